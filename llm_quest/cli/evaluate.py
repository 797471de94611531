"""`quest eval MODEL`: bits per byte on a text, accuracy on problems, lm-eval tasks, or accuracy on held-out images."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.cli.chat import load_text_model
from llm_quest.contracts import LogFn
from llm_quest.data.corpus import load_corpus
from llm_quest.data.documents import Document
from llm_quest.data.image_text import ImageTextCollator
from llm_quest.data.split import split_corpus
from llm_quest.errors import MissingError, UsageError
from llm_quest.eval.images import ImageAccuracyEvaluator, ImageQuestionEvaluator
from llm_quest.eval.perplexity import PerplexityReport, evaluate_documents
from llm_quest.eval.problems import ProblemAccuracy, ProblemEvalOptions, evaluate_task, load_eval_problems
from llm_quest.formatting import align_columns
from llm_quest.hub.load_save import load, load_preprocess, load_tokenizer
from llm_quest.recipes.config import load_run_config, parse_config
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.vit import VitConfig, load_images
from llm_quest.recipes.vlm import VlmConfig, load_image_text
from llm_quest.train.parallel import resolve_device


def evaluate_text(
    name_or_path: str, source: str, *, max_tokens: int | None, device: str, dtype: str, log: LogFn
) -> PerplexityReport:
    """Bits per byte on a source; without one, on the text that a run held out, with baselines fitted to its training
    text."""
    train, documents, name = load_eval_documents(name_or_path, source)
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    return evaluate_documents(model, tokenizer, documents, train=train, source=name, max_tokens=max_tokens, log=log)


def evaluate_problem_task(
    name_or_path: str, options: ProblemEvalOptions, *, device: str, dtype: str, log: LogFn
) -> ProblemAccuracy:
    """Greedy accuracy, mean@k and pass@k on a task."""
    problems = load_eval_problems(options)  # a mistake in its name is reported before the model is loaded
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    samples = f" and {options.num_samples} samples" if options.num_samples else ""
    log(f"{options.task}: {len(problems):,} problems, greedy{samples}")
    return evaluate_task(model, tokenizer, problems, options)


def evaluate_with_lm_eval(
    name_or_path: str, tasks: Sequence[str], *, limit: int | None, device: str, dtype: str, log: LogFn
) -> Any:
    """The tasks of EleutherAI's harness. MissingError without its package."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingError("lm_eval is not installed: pip install 'llm-quest[harness]'")
    from llm_quest.eval.lm_eval_harness import run_lm_eval

    return run_lm_eval(*load_text_model(name_or_path, device, dtype, log), tasks, limit=limit)


def load_eval_documents(name_or_path: str, source: str) -> tuple[Sequence[Document], Sequence[Document], str]:
    """(training documents, held-out documents, a name for them)."""
    if source:
        corpus = load_corpus(source)
        return (), corpus.documents, corpus.name
    run = Path(name_or_path).resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"{name_or_path} is not a run with held-out text of its own; name a text: --data FILE, or --data "
            "builtin:topics"
        )
    data = parse_config(PretrainConfig, load_run_config(run)).data
    if (Path(data.source) / "manifest.json").is_file():
        raise UsageError(f"{name_or_path} was trained on prepared token files, not on text; name a text: --data FILE")
    corpus = load_corpus(data.source, column=data.text_column, separator=data.separator)
    parts = split_corpus(corpus, held_out=data.held_out)
    return parts.train, parts.val, f"the text that {name_or_path} held out of {data.source}"


@dataclass(frozen=True)
class ImageScores:
    """Scores on held-out images: accuracy, or the share of right answers by kind of question."""

    source: str
    scores: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        return align_columns(
            [("held out", self.source), *((name, f"{value:.4f}") for name, value in self.scores.items())]
        )


def evaluate_images(name_or_path: str, *, device: str, log: LogFn) -> ImageScores | None:
    """Evaluate a run of `quest train vit` or `vlm` on its held-out images; None for anything else."""
    run = Path(name_or_path).resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    settings = load_run_config(run) if (run / "config.yaml").is_file() else None
    if settings is None or settings.tree.get("recipe") not in ("vit", "vlm"):
        return None
    model: Any = load(name_or_path, device=resolve_device(device), dtype="float32")
    log(f"{name_or_path}: {model.spec.family}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if settings.tree["recipe"] == "vit":
        part = parse_config(VitConfig, settings).data
        preprocess = load_preprocess(name_or_path)
        images = load_images(part, preprocess).held_out
        return ImageScores(
            f"{len(images):,} images of {part.source}", ImageAccuracyEvaluator(images, preprocess, 0).evaluate(model, 0)
        )
    config, preprocess, numbers = parse_config(VlmConfig, settings), load_preprocess(name_or_path), model.config
    writer = ImageTextCollator(
        load_tokenizer(name_or_path), numbers.image_token_id, numbers.image_seq_length, config.sequence_length
    )
    asking = ImageQuestionEvaluator(load_image_text(config, preprocess), writer, preprocess, config.eval_images, 0)
    return ImageScores(f"{asking.num_images:,} images of {config.data.source}", asking.evaluate(model, 0))
