"""`quest train classify`: texts with labels -> a classifier: a model's head is replaced by one number for each class,
read at a text's last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from llm_quest.data.builtin_qa import builtin_labeled_texts
from llm_quest.data.document import DropReport
from llm_quest.data.loader import length_grouped_indices, repeat_by_weight
from llm_quest.data.row_forms import LABELED_TEXT_FORMS
from llm_quest.data.text_classification import (
    TextClassificationDataset,
    collect_label_names,
    encode_labeled_texts,
    read_labeled_texts,
)
from llm_quest.errors import UsageError
from llm_quest.files import atomic_write_json
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.classification import TextClassificationLoss, last_token_outputs
from llm_quest.recipes.assembly import (
    count_epochs,
    load_split_rows,
    log_remarks,
    make_sharded_loader,
    micro_batch_rows,
    source_name,
)
from llm_quest.recipes.config_schema import BatchedConfig, NonNegativeInt, PositiveInt
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    FreshTokenizer,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.row_source import RowsConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.state import derive_seed

CALIBRATION_BINS = 10


class LabelledTextConfig(RowsConfig):
    """Texts with labels."""

    forms = LABELED_TEXT_FORMS
    held_out: float = Field(
        default=0.1, ge=0, lt=0.5, description="the part of the texts that is never trained on; 0: none"
    )
    max_samples: PositiveInt | None = Field(default=None, description="use so many rows; null: all")


class ClassifyConfig(BatchedConfig):
    """A model and labelled texts in, a classifier out."""

    recipe: Literal["classify"]
    model: StartModelConfig
    tokenizer: FreshTokenizer = None
    data: LabelledTextConfig = LabelledTextConfig()
    sequence_length: int = Field(default=128, ge=1, description="tokens of a text that are read, at most")
    trainable: Literal["all", "last_block", "head"] = Field(
        default="all", description="what learns: everything, the last block with the last norm and the head, the head"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @model_validator(mode="after")
    def check_trainable(self) -> ClassifyConfig:
        if self.techniques and self.trainable != "all":
            raise ValueError(
                f"techniques decide what is trained, so trainable={self.trainable} has no effect; leave one out"
            )
        return self


def build_classify(config: ClassifyConfig, context: Context) -> Job:
    """Model, labelled texts, classification loss."""
    parallel, log = context.parallel, context.log
    config, model, tokenizer = begin_finetuning(config, context, builtin_labeled_texts)
    tokenizer.model_max_length = config.sequence_length
    drop_report = DropReport()
    part = config.data
    learned, held_texts = load_split_rows(
        part, read_labeled_texts, drop_report, builtin=builtin_labeled_texts, limit=part.max_samples
    )
    callbacks = apply_config_techniques(config, model, log)
    names = attach_score_head(model, collect_label_names([*learned, *held_texts]), derive_seed(config.seed, "init"))
    freeze_except(model, config.trainable)
    train, held = (
        encode_labeled_texts(side, names, tokenizer, config.sequence_length, drop_report)
        for side in (repeat_by_weight(learned), held_texts)
    )
    config = count_epochs(config, context.settings, len(train), log)
    loader = make_sharded_loader(config, train, parallel, micro_batch_rows(config, parallel, config.sequence_length))
    log(f"texts: {len(train):,} to train on, {len(held):,} held out, {len(names)} labels: {', '.join(names[:8])}")
    log_remarks(drop_report, log)
    facts = {"source": source_name(part), "labels": list(names), "train_rows": len(train), "held_out_rows": len(held)}
    facts |= {**drop_report.row_facts(), "tokenizer_sha256": tokenizer.hash}
    facts["label_counts"] = {name: (count_label(train, i), count_label(held, i)) for i, name in enumerate(names)}
    return Job(
        config,
        TextClassificationLoss(model, label_smoothing=config.label_smoothing),
        loader,
        [ClassifierEvaluator(held, config.eval_steps, labels=names, samples_dir=context.samples_dir)]
        if held_texts
        else [],
        {"tokenizer": tokenizer.hash, "data": train.hash},
        facts,
        tokenizer,
        callbacks=callbacks,
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
    )


def attach_score_head(model: Decoder, labels: tuple[str, ...], seed: int) -> tuple[str, ...]:
    """The names of the classes, in the order of the head's outputs; a head is put on where there is none."""
    head = find_score_head(model)
    if head is None:
        ScoreHead(len(labels), labels, seed=seed)(model)
        return labels
    if set(labels) - set(head.labels):
        raise UsageError(f"the model tells apart {', '.join(head.labels) or 'nothing'}, the texts {', '.join(labels)}")
    return head.labels


def freeze_except(model: Decoder, trainable: str) -> None:
    """Freeze all but the chosen part."""
    parts = {"last_block": [model.blocks[-1], model.norm, model.head], "head": [model.head]}
    if trainable != "all":
        model.requires_grad_(False)
        for part in parts[trainable]:
            part.requires_grad_(True)


class ClassifierEvaluator:
    """Held-out texts: loss, accuracy, macro F1, calibration error; and what always saying the commonest would reach.
    How often each label was said for each is kept beside samples_dir, in confusion.json."""

    name = "eval"

    def __init__(
        self,
        held_out: TextClassificationDataset,
        every: int,
        batch_size: int = 32,
        *,
        labels: Sequence[str] = (),
        samples_dir: Path | None = None,
    ):
        self.held, self.interval, self.at_once = held_out, every, batch_size
        self.labels, self.samples_dir = labels, samples_dir

    @torch.no_grad()
    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        device = next(model.parameters()).device
        found, labels = [], []
        for numbers in length_grouped_indices(self.held, self.at_once):
            batch = self.held.collate(numbers).to(device)
            out = last_token_outputs(model, batch.input_ids, batch.position_ids)
            found.append(out.double().softmax(dim=1).cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
        probabilities, wanted = np.concatenate(found), np.concatenate(labels)
        if self.samples_dir is not None:
            matrix = confusion_matrix(probabilities.argmax(axis=1), wanted, probabilities.shape[1])
            content = {"step": step, "labels": list(self.labels), "matrix": matrix.tolist()}
            atomic_write_json(self.samples_dir.parent / "confusion.json", content)
        return classification_metrics(probabilities, wanted)


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes): how often class j was said for class i."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def count_label(texts: TextClassificationDataset, label: int) -> int:
    """How many texts have this label."""
    return sum(one == label for one in texts.label_ids)


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """From probabilities (N, classes) and class numbers (N,)."""
    said, classes = probabilities.argmax(axis=1), probabilities.shape[1]
    right = said == labels
    return {
        "loss": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean()),
        "accuracy": float(right.mean()),
        "macro_f1": float(np.mean([f1_score(said == c, labels == c) for c in range(classes) if (labels == c).any()])),
        "calibration_error": expected_calibration_error(probabilities.max(axis=1), right),
        "commonest": float(np.bincount(labels).max() / len(labels)),
    }


def f1_score(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of one class; 0 where it was never rightly said."""
    both = float((predicted & labels).sum())
    return 2 * both / float(predicted.sum() + labels.sum()) if both else 0.0


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): |accuracy - confidence| by bins of equal width,
    weighed by how many fall in each."""
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps: Sequence[float] = [
        abs(float(correct[where == b].mean() - confidence[where == b].mean())) * float((where == b).mean())
        for b in np.unique(where)
    ]
    return float(sum(gaps))


RECIPE = Recipe("classify", ClassifyConfig, build_classify)
