"""`quest export RUN model.gguf`: writes one file for llama.cpp, or an adapter for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_quest.data.chat import find_template_fault
from llm_quest.errors import UsageError
from llm_quest.hub.gguf_adapter import save_gguf_adapter
from llm_quest.hub.gguf_export import GGUFReport, save_gguf
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.locate import run_of_checkpoint
from llm_quest.layers.low_rank import adapter_layers
from llm_quest.techniques.adapter_merge import merge_adapter, require_adapters
from llm_quest.techniques.score_head import find_score_head
from llm_quest.techniques.value_head import remove_value_head


@dataclass(frozen=True)
class GGUFExportReport:
    """The file that an export wrote."""

    run: str
    file: str
    bytes: int
    architecture: str
    dtype: str
    tensors: int
    notes: tuple[str, ...]
    advice: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        head = f"{self.file}: {self.bytes:,} bytes, {self.tensors} tensors in {self.dtype}, from {self.run}"
        return [
            head,
            f"llama.cpp's architecture: {self.architecture}",
            *(f"note: {note}" for note in self.notes),
            self.advice,
        ]


def export_gguf(
    run: Path,
    file: Path,
    *,
    quantize: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    merged: bool = False,
    adapter: bool = False,
    remedy: str = "--merge writes the whole model, --adapter the adapter alone",
) -> GGUFExportReport:
    """Write a run's, a folder's or another file's model; of an adapter's folder, or with `adapter`, the adapter.
    remedy: what to do about a model with an adapter."""
    model = remove_value_head(load(run, dtype="float32" if merged else None))
    if find_score_head(model) is not None:
        raise UsageError(f"{run} gives scores and no text: a GGUF file of it would need llama.cpp's own kinds of heads")
    if adapter or ((run / "adapter_config.json").is_file() and not merged):
        require_adapters(model)
        if quantize is not None:
            raise UsageError("an adapter is not quantized: leave out --quantize")
        report = save_gguf_adapter(model, file, dtype=dtype, overwrite=overwrite)
        return make_report(run, file, report, f"use it with the base's file: llama-server -m base.gguf --lora {file}")
    if adapter_layers(model) and not merged:
        raise UsageError(f"the model of {run} has an adapter: {remedy}")
    if merged:
        merge_adapter(model)
    tokenizer = load_tokenizer(run)
    report = save_gguf(
        model, tokenizer, file, quantize=quantize, dtype=dtype, name=model_name(run), overwrite=overwrite
    )
    if fault := find_template_fault(tokenizer):
        report = replace(report, notes=(*report.notes, f"{fault}; programs that chat with this file fail too"))
    return make_report(run, file, report, f"run it: llama-server -m {file}; or here: quest generate {file}")


def model_name(run: Path) -> str:
    """The name of the run or folder, which llama.cpp's programs show."""
    home = run_of_checkpoint(run).resolve()
    return home.stem if home.is_file() else home.name


def make_report(run: Path, file: Path, report: GGUFReport, advice: str) -> GGUFExportReport:
    size = file.expanduser().stat().st_size
    return GGUFExportReport(
        str(run), str(file), size, report.architecture, report.dtype, report.tensors, report.notes, advice
    )
