"""The model card: README.md of a published folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from llm_quest.hub.config import classifier_config
from llm_quest.models.build import count_parameters
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import Family
from llm_quest.techniques.model_spec import all_exportable
from llm_quest.techniques.score_head import find_score_head

if TYPE_CHECKING:
    from llm_quest.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Readme:
    """The content of a model card that only the maker of the model knows. datasets: names of the hub. data, training,
    results: name -> value, a table each; limits: sentences."""

    title: str = ""
    summary: str = ""
    license: str | None = None
    base_model: str | None = None
    language: str | None = None
    datasets: Sequence[str] = ()
    data: Mapping[str, float | str] = field(default_factory=dict)
    training: Mapping[str, float | str] = field(default_factory=dict)
    results: Mapping[str, float | str] = field(default_factory=dict)
    limits: Sequence[str] = ()

    def render(self, model: Decoder, family: Family, tokenizer: Tokenizer | None = None) -> str:
        """Render the card as Markdown with a YAML head, as the hub reads it. tokenizer: the folder's, if it has one."""
        published = family.publish(model.config)
        classifier = classifier_config(published, model.spec.techniques)
        exportable = bool(classifier) or all_exportable(model.spec.techniques)
        task = "text-classification" if find_score_head(model) else family.pipeline_tag
        published |= classifier
        (architecture,), model_type = published.pop("architectures"), published.pop("model_type")
        head = self.head() | {"library_name": "transformers" if exportable else "llm-quest", "pipeline_tag": task}
        size = f"{count_parameters(model):,} parameters"
        summary = f"A {architecture} of {size}, trained and exported with LLM Quest. {describe_outputs(model)}".rstrip()
        return join_parts(
            yaml_head(head | {"tags": ["llm-quest", model_type]}),
            f"# {self.title or f'{family.name}-style, {size}'}",
            self.summary or summary,
            "## Use\n\n" + (usage(task, model, tokenizer) if exportable else quest_usage(model)),
            *self.tables(),
            markdown_table("Shape", published),
            *self.terms(),
        )

    def render_adapter(self, model: Decoder, base: str) -> str:
        """Render the card of an adapter of this base, in PEFT's form."""
        size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        names = ", ".join(type(technique).__name__ for technique in model.spec.techniques)
        return join_parts(
            yaml_head(self.head() | {"library_name": "peft", "tags": ["llm-quest", "adapter"]}),
            f"# {self.title or f'An adapter of {base}'}",
            f"An adapter ({names}, {size:,} parameters) of {base}, trained and exported with LLM Quest.",
            "## Use\n\n" + adapter_usage(base),
            *self.tables(),
            *self.terms(),
        )

    def head(self) -> dict[str, Any]:
        """The fields of the YAML head about the model's origin."""
        known = {"license": self.license, "base_model": self.base_model, "language": self.language}
        metadata: dict[str, Any] = {name: value for name, value in known.items() if value}
        return metadata | ({"datasets": list(self.datasets)} if self.datasets else {})

    def tables(self) -> list[str]:
        return [
            markdown_table("Data", self.data),
            markdown_table("Training", self.training),
            markdown_table("Results", self.results, note="Measured on held-out data."),
        ]

    def terms(self) -> list[str]:
        """License and limits."""
        return [
            "## License\n\n" + (self.license or "Not stated: ask who made these weights before you use them."),
            "## Known limits\n\n" + "\n".join(f"- {limit}" for limit in self.limits or ("Not evaluated for any use.",)),
        ]


def yaml_head(values: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---"


def join_parts(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def adapter_usage(base: str) -> str:
    """Code that loads an adapter in PEFT, vLLM and this package."""
    peft = f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{PLACE}")'
    return "\n\n".join(
        (code_block("python", peft), code_block("", f"vllm serve {base} --enable-lora --lora-modules name={PLACE}"),
         code_block("", f"quest serve {base} --adapter name={PLACE}"))
    )  # fmt: skip


def describe_outputs(model: Decoder) -> str:
    """A sentence about the outputs of a score head; empty for a model without one."""
    head = find_score_head(model)
    if head is None:
        return ""
    if head.outputs == 1:
        return (
            "It is a reward model: it gives a conversation one number, read at the end of its last answer, and writes "
            "no text."
        )
    number = "; a text may have several or none (multi-label)" if head.is_multi_label else ""
    return f"It classifies texts and writes none; classes: {', '.join(head.labels) or head.outputs}{number}."


def usage(task: str, model: Decoder, tokenizer: Tokenizer | None) -> str:
    """Code that loads the model in transformers and this package, and in vLLM and llama.cpp if they can run it."""
    from llm_quest.hub.gguf_export import can_be_gguf

    auto = AUTO_CLASSES[task]
    parts = [code_block("python", f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{PLACE}")')]
    if task == "text-generation":
        parts.append(code_block("", f"vllm serve {PLACE}\nquest serve {PLACE}"))
        if tokenizer is not None and can_be_gguf(model, tokenizer):
            parts.append(code_block("", f"quest export {PLACE} {GGUF_FILE}\nllama-server -m {GGUF_FILE}"))
    parts.append(code_block("python", f'import llm_quest as quest\n\nmodel = quest.load("{PLACE}")'))
    return "\n\n".join(parts)


def quest_usage(model: Decoder) -> str:
    """Code that loads the model in this package, with the reason why others cannot."""
    names = ", ".join(type(technique).__name__ for technique in model.spec.techniques)
    why = f"# made with {names}: the published tensors alone are not this model"
    return code_block("python", f'import llm_quest as quest\n\nmodel = quest.load("{PLACE}")  {why}')


def code_block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"


PLACE = "path/to/this/folder"
"""Placeholder for the folder; `quest push` replaces it by the repository's name."""
GGUF_FILE = "model.gguf"
AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "image-text-to-text": "AutoModelForImageTextToText",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "feature-extraction": "AutoModel",
}


def markdown_table(title: str, values: Mapping[str, Any], note: str = "") -> str:
    """A table; empty without values."""
    cells = [(table_cell(name), table_cell(value)) for name, value in values.items() if not isinstance(value, Mapping)]
    if not cells:
        return ""
    head = [f"## {title}\n", *([f"{note}\n"] if note else []), "| | |", "| --- | --- |"]
    return "\n".join([*head, *(f"| {name} | {value} |" for name, value in cells)])


def table_cell(value: Any) -> str:
    """Escape a value as one cell of a table."""
    return " ".join(str(value).split()).replace("|", r"\|").replace("<", "&lt;")
