"""`quest train classify`: texts with labels -> a classifier: a model's head is replaced by one number for each class,
read at a text's last token. Rows with lists of labels make a multi-label classifier.

Commonly got wrong: macro F1 weighs classes alike, however common they are; an export of a multi-label classifier has to
say so, or its reader takes a softmax over the labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from llm_quest.data.batch import MULTI_LABEL
from llm_quest.data.builtin_qa import builtin_labeled_texts
from llm_quest.data.conversations import split_by_prompt
from llm_quest.data.document import DropReport
from llm_quest.data.loader import repeat_by_weight
from llm_quest.data.row_forms import LABELED_TEXT_FORMS
from llm_quest.data.text_classification import (
    LabeledText,
    collect_label_names,
    encode_labeled_texts,
    problem_type_of,
    read_labeled_texts,
    split_labeled_texts,
)
from llm_quest.errors import UsageError
from llm_quest.eval.classification import ClassifierEvaluator, text_outputs
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.classification import TextClassificationLoss
from llm_quest.recipes.assembly import (
    load_split_rows,
    log_remarks,
    make_sharded_loader,
    micro_batch_rows,
    source_name,
)
from llm_quest.recipes.class_weights import ClassWeights, make_class_weights
from llm_quest.recipes.config_schema import BatchedConfig, NonNegativeInt, PositiveInt
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    FreshTokenizer,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    count_steps,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.row_source import RowsConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.rng_state import derive_seed


class LabeledTextConfig(RowsConfig):
    """Texts with labels."""

    forms = LABELED_TEXT_FORMS
    held_out: float = Field(
        default=0.1, ge=0, lt=0.5, description="the part of the texts that is never trained on; 0: none"
    )
    max_samples: PositiveInt | None = Field(default=None, description="use so many rows; null: all")
    stratify: bool = Field(default=True, description="hold out the same share of each label; false: of all texts")
    label_separator: str | None = Field(
        default=None, min_length=1, description="splits a label of text into several, such as ; (multi-label)"
    )


class ClassifyConfig(BatchedConfig):
    """A model and labeled texts in, a classifier out."""

    recipe: Literal["classify"]
    model: StartModelConfig
    tokenizer: FreshTokenizer = None
    data: LabeledTextConfig = LabeledTextConfig()
    sequence_length: int = Field(default=128, ge=1, description="tokens of a text that are read, at most")
    trainable: Literal["all", "last_block", "head"] = Field(
        default="all", description="what learns: everything, the last block with the last norm and the head, the head"
    )
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = Field(
        default=None,
        description="one label of a text, or any number; null: as the rows have it (a list of labels: any)",
    )
    class_weights: ClassWeights = None
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
    """Model, labeled texts, classification loss."""
    parallel, log = context.parallel, context.log
    config, model, tokenizer = begin_finetuning(config, context, builtin_labeled_texts)
    tokenizer.model_max_length = config.sequence_length
    drop_report = DropReport()
    part = config.data
    learned, held_texts = load_split_rows(
        part, partial(read_labeled_texts, label_separator=part.label_separator), drop_report,
        builtin=builtin_labeled_texts, limit=part.max_samples,
        split=split_labeled_texts if part.stratify else split_by_prompt,
    )  # fmt: skip
    callbacks = apply_config_techniques(config, model, log, scores=True)
    head = attach_score_head(model, [*learned, *held_texts], config.problem_type, derive_seed(config.seed, "init"))
    freeze_except(model, config.trainable)
    names, is_multi_label = head.labels, head.is_multi_label
    train, held_out = (
        encode_labeled_texts(side, names, tokenizer, config.sequence_length, drop_report, is_multi_label)
        for side in (repeat_by_weight(learned), held_texts)
    )
    note_unmeasured(names, train.label_counts, held_out.label_counts, drop_report)
    config = count_steps(config, context, model, len(train))
    loader = make_sharded_loader(config, train, parallel, micro_batch_rows(config, parallel, config.sequence_length))
    log(f"texts: {len(train):,} to train on, {len(held_out):,} held out, {len(names)} labels: {', '.join(names[:8])}")
    log_remarks(drop_report, log)
    weights = make_class_weights(
        config.class_weights, names, train.label_counts, len(train), log, multi_label=is_multi_label
    )
    facts = {
        "source": source_name(part),
        "labels": list(names),
        "train_rows": len(train),
        "held_out_rows": len(held_out),
    }
    facts |= {**drop_report.row_facts(), "tokenizer_sha256": tokenizer.hash, "problem_type": head.problem_type}
    facts["label_counts"] = dict(zip(names, zip(train.label_counts, held_out.label_counts, strict=True), strict=True))
    evaluator = ClassifierEvaluator(text_outputs(held_out), config.eval_steps, names, context.samples_dir)
    return Job(
        config,
        TextClassificationLoss(model, label_smoothing=config.label_smoothing, class_weights=weights),
        loader,
        [evaluator] if held_texts else [],
        {"tokenizer": tokenizer.hash, "data": train.hash, "held_out": held_out.hash},
        facts,
        tokenizer,
        callbacks=callbacks,
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
    )


def attach_score_head(model: Decoder, texts: Sequence[LabeledText], wanted: str | None, seed: int) -> ScoreHead:
    """Return the model's score head, with the names of the classes in the order of its outputs; attach one if there is
    none. wanted: the problem type, where the config names it."""
    labels, head = collect_label_names(texts), find_score_head(model)
    if head is None:
        head = ScoreHead(len(labels), labels, seed=seed, problem_type=problem_type_of(texts, wanted))  # type: ignore[arg-type]
        head(model)
        return head
    if set(labels) - set(head.labels):
        raise UsageError(f"the model tells apart {', '.join(head.labels) or 'nothing'}, the texts {', '.join(labels)}")
    if wanted not in (None, head.problem_type) or problem_type_of(texts) == MULTI_LABEL != head.problem_type:
        raise UsageError(
            f"the model's problem type is {head.problem_type}, that of the texts is {wanted or MULTI_LABEL}: start "
            "from the model that it was trained from"
        )
    return head


def note_unmeasured(
    names: Sequence[str], train: Sequence[int], held_out: Sequence[int], drop_report: DropReport
) -> None:
    """Report the labels that occur only in training, or only in the held-out rows."""
    for counts, others, what in ((held_out, train, "held out, so that it is never measured"),
                                 (train, held_out, "trained on, so that it is never learned")):  # fmt: skip
        absent = [name for name, here, there in zip(names, counts, others, strict=True) if there and not here]
        if absent and any(counts):
            drop_report.note(f"of {len(absent)} labels no text is {what}: {', '.join(absent[:5])}")


def freeze_except(model: Decoder, trainable: str) -> None:
    """Freeze all but the chosen part."""
    parts = {"last_block": [model.blocks[-1], model.norm, model.head], "head": [model.head]}
    if trainable != "all":
        model.requires_grad_(False)
        for part in parts[trainable]:
            part.requires_grad_(True)


RECIPE = Recipe("classify", ClassifyConfig, build_classify)
