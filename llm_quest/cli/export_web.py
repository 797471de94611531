"""`quest export RUN FOLDER --web`: writes a folder whose page runs the model in a browser."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.atomic_dirs import atomic_dir
from llm_quest.cli.export_gguf import GGUFExportReport, export_gguf, model_name
from llm_quest.errors import UsageError
from llm_quest.files import write_text
from llm_quest.hub.gguf import GGUFFile, read_gguf
from llm_quest.hub.gguf_layouts import SAMPLING, size_of
from llm_quest.hub.model_card import Readme, join_parts
from llm_quest.hub.wllama import FILES, load_wllama
from llm_quest.report import render_template
from llm_quest.report.run_card import run_readme

PAGE = Path(__file__).parents[1] / "report" / "web_page"
PAGE_FILES = {"index.html": ".html", "page.js": ".js", "style.css": ".css"}
"""Names in the folder -> endings of our files."""
MODEL = "model.gguf"
WEB_FILES = {*PAGE_FILES, *FILES, MODEL, "README.md"}
MAX_MODEL_BYTES = 2**31 - 1
"""A browser reads no larger file into WebAssembly."""
MAX_CONTEXT = 4096


@dataclass(frozen=True)
class WebExportReport:
    """The folder that an export wrote. notes: what llama.cpp computes otherwise."""

    run: str
    folder: str
    architecture: str
    parameters: int
    dtype: str
    files: dict[str, int]
    notes: tuple[str, ...]
    advice: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        head = f"{self.folder}: a page for {self.parameters:,} parameters in {self.dtype}, from {self.run}"
        files = [f"  {size:>14,} bytes  {name}" for name, size in self.files.items()]
        return [head, *files, *(f"note: {note}" for note in self.notes), self.advice]


def export_web(
    run: Path,
    folder: Path,
    *,
    wllama: Path | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    merged: bool = False,
    license: str | None = None,
) -> WebExportReport:
    """Write a page with the model as a GGUF file and wllama, which runs it. The folder appears whole or not at all.

    wllama: a package of npm or its folder; None: the cache, otherwise npm. The rest as in `export_gguf`."""
    if (run / "adapter_config.json").is_file() and not merged:
        raise UsageError(f"{run} is an adapter, and a page shows a whole model: add --merge")
    with atomic_dir(folder, overwrite=overwrite, replaceable=WEB_FILES.__contains__, required_bytes=2**24) as stage:
        for name, content in load_wllama(wllama).items():
            (stage / name).write_bytes(content)
        merge = "a page shows the whole model: add --merge"
        report = export_gguf(run, stage / MODEL, quantize=quantize, dtype=dtype, merged=merged, remedy=merge)
        if report.bytes > MAX_MODEL_BYTES:
            raise UsageError(f"the model has {report.bytes:,} bytes, and a browser reads 2 GB: add --quantize q4_0")
        write_web_page(stage, read_gguf(stage / MODEL), report, run_readme(run, license), model_name(run))
    return make_web_report(run, folder, report)


def write_web_page(stage: Path, file: GGUFFile, report: GGUFExportReport, readme: Readme, name: str) -> None:
    """The page's own files, and its card as README.md."""
    title = readme.title or name
    facts = model_facts(file, report)
    groups = {"Model": facts, "Data": readme.data, "Training": readme.training, "Results": readme.results}
    terms = {"License": readme.license or "not stated: ask who made these weights before you use them"}
    html = render_web_page(title, {**groups, "Terms": terms}, page_settings(file))
    for target, ending in PAGE_FILES.items():
        own = PAGE.with_name(PAGE.name + ending)
        write_text(stage / target, html if ending == ".html" else own.read_text(encoding="utf-8"))
    use = (
        "Serve this folder over HTTP and open it in a browser; nothing leaves the browser:\n\n    python -m http.server"
    )
    shape = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    write_text(
        stage / "README.md",
        join_parts(f"# {title}", f"## Use\n\n{use}", f"## Model\n\n{shape}", *readme.tables(), *readme.terms()),
    )


def model_facts(file: GGUFFile, report: GGUFExportReport) -> dict[str, str]:
    """The rows of the card about the model itself."""
    context = size_of(file, "context_length")
    return {
        "architecture": report.architecture,
        "parameters": f"{count_file_parameters(file):,}",
        "file": f"{report.bytes / 1e6:,.1f} MB in {report.dtype}",
        "context": f"{context:,} tokens" if context else "unknown",
    }


def count_file_parameters(file: GGUFFile) -> int:
    """The number of parameters in a file: of all tensors but the tables of rotations, which follow from the config."""
    return sum(math.prod(tensor.shape) for name, tensor in file.tensors.items() if not name.startswith("rope_"))


def page_settings(file: GGUFFile) -> dict[str, Any]:
    """The settings of the page's script: the context, whether there is a chat template, the sampling that is
    advised."""
    advised = {ours: file.get(f"general.sampling.{theirs}") for ours, theirs in SAMPLING.items()}
    return {
        "context": min(size_of(file, "context_length") or MAX_CONTEXT, MAX_CONTEXT),
        "chat": bool(file.get("tokenizer.chat_template")),
        "sampling": {name: value for name, value in advised.items() if value is not None},
    }


def render_web_page(title: str, card: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    return render_template(PAGE.with_name(PAGE.name + ".html"), title=title, card=card, settings=settings)


def make_web_report(run: Path, folder: Path, report: GGUFExportReport) -> WebExportReport:
    files = {file.name: file.stat().st_size for file in sorted(folder.expanduser().iterdir())}
    parameters = count_file_parameters(read_gguf(folder.expanduser() / MODEL))
    advice = f"serve it: python -m http.server -d {shlex.quote(str(folder))} --bind 127.0.0.1 8000; open localhost:8000"
    return WebExportReport(
        str(run), str(folder), report.architecture, parameters, report.dtype, files, report.notes, advice
    )
