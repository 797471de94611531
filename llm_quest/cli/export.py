"""`quest export RUN FOLDER`: writes a run's latest checkpoint as a Hugging Face folder, as one GGUF file, or as a page
for a browser. `quest consolidate RUN`: joins the shards of checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_quest.cli.export_gguf import GGUFExportReport, export_gguf
from llm_quest.cli.export_web import WebExportReport, export_web
from llm_quest.data.chat import end_template_at_answer
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.load_save import load, parse_dtype, save
from llm_quest.hub.load_tokenizer import load_preprocess, load_tokenizer
from llm_quest.hub.locate import is_checkpoint, resolve_checkpoint, run_of_checkpoint
from llm_quest.hub.save_adapter import save_adapter
from llm_quest.layers.low_rank import adapter_layers
from llm_quest.models.decoder import GenerationConfig
from llm_quest.models.dual_encoder import CLIPModel
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.recipes.yaml_io import read_yaml_file
from llm_quest.report.run_card import run_readme
from llm_quest.techniques.adapter_merge import merge_adapter, require_adapters
from llm_quest.techniques.model_spec import all_exportable
from llm_quest.techniques.score_head import find_score_head, read_length
from llm_quest.techniques.token_rows import append_embedding_rows
from llm_quest.techniques.value_head import remove_value_head

NEW_PAD_TOKEN = "<|pad|>"


@dataclass(frozen=True)
class ExportReport:
    """The files that an export wrote."""

    run: str
    folder: str
    parameters: int
    dtype: str
    files: dict[str, int]
    advice: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        result = [f"{self.folder}: {self.parameters:,} parameters in {self.dtype}, from {self.run}"]
        result += [f"  {size:>14,} bytes  {name}" for name, size in self.files.items()]
        return [*result, self.advice]


@dataclass(frozen=True)
class ConsolidateReport:
    """The checkpoints of a run that were in shards and are whole now."""

    checkpoints: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        return [f"{folder}: whole" for folder in self.checkpoints] or ["no checkpoint was in shards"]


def consolidate_run(folder: Path) -> ConsolidateReport:
    """Join the shards of a run's checkpoints, or of one checkpoint."""
    from llm_quest.train.checkpoint import list_checkpoints
    from llm_quest.train.sharded_checkpoint import consolidate_checkpoint

    checkpoints = [folder] if is_checkpoint(folder) and folder.is_dir() else list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise DataError(f"{folder} has no checkpoint; give a run folder, or one of its checkpoints")
    return ConsolidateReport([str(checkpoint) for checkpoint in checkpoints if consolidate_checkpoint(checkpoint)])


def export_run(
    run: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    merged: bool = False,
    adapter: bool = False,
    license: str | None = None,
    quantize: str | None = None,
    web: bool = False,
    wllama: Path | None = None,
) -> ExportReport | GGUFExportReport | WebExportReport:
    """Write a run's model and tokenizer in the Hugging Face layout, with a card (README.md) that says how it was made,
    or where the name ends in .gguf as one file for llama.cpp. A model with an adapter is written merged, or as the
    adapter alone. dtype None: float32; in a GGUF file the dtype of the weights. license: of the weights, for the card.
    quantize: of a GGUF file, q8_0 or q4_0. web: a folder whose page runs the model in a browser; wllama: see
    `export_web`."""
    run = resolve_checkpoint(run)
    if merged and adapter:
        raise UsageError("--merge writes the whole model and --adapter the adapter alone: give one of them")
    if wllama is not None and not web:
        raise UsageError(f"--wllama {wllama} is for a page: add --web")
    if web:
        if adapter or folder.suffix == ".gguf":
            raise UsageError("--web writes a folder with the whole model: give a folder's name, and no --adapter")
        kind: dict[str, Any] = {"quantize": quantize, "dtype": dtype, "overwrite": overwrite, "merged": merged}
        return export_web(run, folder, wllama=wllama, license=license, **kind)
    if folder.suffix == ".gguf":
        return export_gguf(
            run, folder, quantize=quantize, dtype=dtype, overwrite=overwrite, merged=merged, adapter=adapter
        )
    if quantize is not None:
        raise UsageError(f"--quantize {quantize} writes a GGUF file: give a name that ends in .gguf, not {folder}")
    dtype = dtype or "float32"
    if run.suffix == ".gguf":
        model = load(run, dtype=dtype)
        save_with_inputs(model, run, folder, overwrite, license)
        return make_export_report(run, folder, model, dtype, advise_next_step(model, folder))
    if not (run / "model.json").is_file() and not (run / "config.json").is_file() and not is_checkpoint(run):
        raise DataError(f"{run} is no run folder (it has no model.json); give a folder that quest train wrote")
    if merged or adapter:
        return export_adapter(run, folder, dtype, overwrite, merged, license)
    model = remove_value_head(load(run, dtype=dtype, vision=True))
    if adapter_layers(model):
        raise UsageError(
            f"the model of {run} has an adapter: --merge writes the whole model for transformers, "
            "--adapter the adapter alone for PEFT"
        )
    save_with_inputs(model, run, folder, overwrite, license)
    return make_export_report(run, folder, model, dtype, advise_next_step(model, folder))


def save_with_inputs(model: Any, run: Path, folder: Path, overwrite: bool, license: str | None) -> None:
    """Save the model with what prepares its inputs: the tokenizer of a model that reads text, the image processor of
    one that reads images, both of one that reads both."""
    reads_text = not isinstance(model, ImageEncoder)
    reads_images = isinstance(model, ImageEncoder | VisionLanguageModel | CLIPModel)
    tokenizer = load_tokenizer(run) if reads_text else None
    if tokenizer is not None and find_score_head(model) is not None:
        tokenizer = prepare_score_export(model, tokenizer)
    save(
        model,
        folder,
        tokenizer=tokenizer,
        preprocess=load_preprocess(run) if reads_images else None,
        readme=run_readme(run, license),
        overwrite=overwrite,
    )


def prepare_score_export(model: Any, tokenizer: Tokenizer) -> Tokenizer:
    """What transformers' ...ForSequenceClassification needs to read the same numbers: a padding token, by which it
    finds a row's last token in a batch, and for a reward model a chat template that ends where it was trained.

    Commonly got wrong: the end of text as padding; the last token that is no padding is then the one before the end."""
    head = find_score_head(model)
    if head is not None and head.outputs == 1:
        tokenizer.chat_template = end_template_at_answer(tokenizer)
    ends = set(tokenizer.special_token_names["eos_token"] or ())
    named = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    pad = next((name for name in named if name is not None and name not in ends), None)
    if pad is None:
        tokenizer = tokenizer.with_added_tokens([NEW_PAD_TOKEN], special=True)
        pad = NEW_PAD_TOKEN
        append_embedding_rows(model, tokenizer.vocab_size)
    tokenizer = tokenizer.with_pad_token(pad)
    generation = model.generation_config or GenerationConfig()
    model.generation_config = replace(generation, pad_token_id=tokenizer.pad_token_id)
    return tokenizer


def export_adapter(
    run: Path, folder: Path, dtype: str, overwrite: bool, merged: bool, license: str | None
) -> ExportReport:
    """Export a model with an adapter. Weights are merged in float32, whatever dtype is written."""
    model = remove_value_head(load(run, dtype="float32", vision=True))
    require_adapters(model)
    kind = parse_dtype(dtype)
    if merged:
        merge_adapter(model)
        save_with_inputs(model.to(kind), run, folder, overwrite, license)
        return make_export_report(run, folder, model, dtype, advise_next_step(model, folder))
    base = base_model_path(run)
    readme = run_readme(run, license)
    card = readme.render_adapter(model, readme.base_model or Path(base or "a model that exists only in its run").name)
    save_adapter(model.to(kind), folder, base=base, overwrite=overwrite, card=card)
    if (head := find_score_head(model)) is not None and head.outputs > 1:
        tokenizer = load_tokenizer(run)  # its length is the classifier's own, not the base's
        tokenizer.save(folder, model_max_length=read_length(model, tokenizer.model_max_length))
    return make_export_report(
        run, folder, model, dtype, f"an adapter of {base or 'a model that exists only in this run'}"
    )


def advise_next_step(model: Any, folder: Path) -> str:
    """The next command for the folder."""
    if (head := find_score_head(model)) is not None:
        return f"use it here: quest {'score' if head.outputs == 1 else 'classify'} {folder}"
    if all_exportable(model.spec.techniques):
        return f"check it against transformers: quest verify {folder}"
    return f"it uses techniques that transformers does not support; use it here: quest generate {folder}"


def base_model_path(run: Path) -> str | None:
    """The model that a run was initialized from, if any."""
    config = run_of_checkpoint(run) / "config.yaml"
    model = read_yaml_file(config).tree.get("model") if config.is_file() else None
    where = model.get("load") if isinstance(model, dict) else None
    folder = None if where is None else resolve_checkpoint(where)
    return str(folder.resolve()) if folder is not None and folder.is_dir() else where


def make_export_report(run: Path, folder: Path, model: Any, dtype: str, advice: str) -> ExportReport:
    """A report of the files in the folder."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    adapter = (folder / "adapter_config.json").exists()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad or not adapter)
    return ExportReport(str(run), str(folder), parameters, dtype, files, advice)
