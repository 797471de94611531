"""What reads files of models, runs, caches and images, each with good ones."""

from __future__ import annotations

import atexit
import base64
import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save as save_bytes

from llm_quest.cli.generation_options import parse_template_kwargs
from llm_quest.cli.jsonl_output import JsonlOutput
from llm_quest.cli.ledger import export_ledger_rows, list_experiments, merge_into_ledger, show_experiment
from llm_quest.cli.models import read_family_config
from llm_quest.data.answer_layout import AnswerLayout
from llm_quest.data.conversations import read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.documents import read_documents
from llm_quest.data.image_datasets import CIFAR10_RECORD_BYTES, read_cifar_files
from llm_quest.data.image_folder import list_table
from llm_quest.data.image_labels import LabelOptions
from llm_quest.data.images import is_image_file, load_image
from llm_quest.data.policy_batch import PolicyRow, row_from_json, row_to_json
from llm_quest.data.template_messages import parse_arguments
from llm_quest.data.template_program import RenderJob, TemplateProgram, TemplateSettings
from llm_quest.data.template_sandbox import render_job
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import open_token_folder, prepare_token_folder
from llm_quest.errors import UsageError
from llm_quest.experiments.ladder_forecast import read_ladder
from llm_quest.experiments.ledger import experiments, read_rows
from llm_quest.experiments.measurements import read_record
from llm_quest.experiments.page import read_losses
from llm_quest.files import damaged_file_errors, load_json
from llm_quest.hub.inspect import content_conditions, inspect_folder
from llm_quest.hub.load_save import load, read_model_config, save, write_model_json
from llm_quest.hub.locate import read_step
from llm_quest.hub.pickled import read_pickled
from llm_quest.machine.probe import REQUIRED
from llm_quest.machine.profile import VERSION, identify_machine, read_profile
from llm_quest.manifest import file_entry
from llm_quest.models.build import build, preset
from llm_quest.papers import load_paper
from llm_quest.papers.card import load_sizes
from llm_quest.recipes.iterative import read_comparisons
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.reference_model import load_log_probs
from llm_quest.recipes.rpt.control import load_rpt_run
from llm_quest.recipes.rpt.positions import load_positions
from llm_quest.rollouts.included_environments import read_tool_calls, tool_argument
from llm_quest.rollouts.judge_reward import JudgeFailure, reply_text
from llm_quest.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from llm_quest.train.run_dir import RunDir, _row_step, lock_owner
from llm_quest.train.state import PendingRow, Progress
from tests.data.test_tokens import PARTS
from tests.experiments.test_ledger import fill
from tests.faults.targets import Target, family_configs, rows_reader
from tests.papers.made_up import make_result
from tests.tokenizer_kinds import tokenizer_of
from tests.train.small import go, objective

STEP = "checkpoints/step-00000003"


@cache
def base_folder(kind: str) -> Path:
    """A whole model folder, run or token folder, whose files stand beside the one that is read."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = build(replace(preset("llama3.2-tiny").config, vocab_size=400, num_hidden_layers=1), seed=0)
    if kind == "shards":
        save(model, folder / "model", tokenizer=tokenizer_of("byte-level"), max_shard_size=60_000)
        return folder / "model"
    if kind == "model":
        save(model, folder / "model", tokenizer=tokenizer_of("byte-level"))
        return folder / "model"
    if kind == "training":
        with RunDir(folder / "run") as run:
            go(3, run, made=objective(dropout=0.0))
        return folder / "run"
    if kind == "run":
        write_model_json(folder, model)
        values = {
            "model": dict(model.state_dict()),
            "optimizer": {},
            "progress": asdict(Progress(step=3, best_step=3, good_step=3)),
        }
        save_checkpoint(folder / "checkpoints", Checkpoint(3, values, {"settings": "{}"}))
        return folder
    if kind == "tokens":
        return prepare_token_folder(PARTS, tokenizer_of("byte-level"), folder).path
    tokenizer = tokenizer_of("byte-level")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(parts["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in parts["merges"]]
    (folder / "merges.txt").write_text("\n".join(merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def in_folder(kind: str, read: Callable[[Path], object], inside: str = "") -> Callable[[Path], object]:
    """Reads a file that stands in a folder of this kind in place of the one of its name. read gets the folder."""

    def place(file: Path) -> object:
        whole = file.parent / "whole"
        shutil.copytree(base_folder(kind), whole, copy_function=os.link)
        target = whole / inside / file.name
        target.unlink(missing_ok=True)
        os.link(file, target)
        return read(whole)

    return place


def resume_training(folder: Path) -> object:
    """Goes on with a run whose state is another one, under a manifest that fits it, for no step."""
    place = folder / STEP
    manifest = json.loads((place / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = file_entry(place / "state.json")
    (place / "MANIFEST.json").unlink()
    (place / "MANIFEST.json").write_text(json.dumps(manifest))
    for name in ("metrics.jsonl", "events.jsonl", "run.lock"):
        (folder / name).unlink(missing_ok=True)  # links to those of the base folder
    with RunDir(folder) as run:
        return go(3, run, made=objective(dropout=0.0))


def states_of_a_training() -> list[Any]:
    """The state of a run that ended, and of one whose last evaluation a signal ended, with a row of metrics."""
    (state,) = json_of("training", f"{STEP}/state.json")()
    (*_, last) = (base_folder("training") / "metrics.jsonl").read_text().splitlines()
    row = dict.fromkeys(PendingRow.COUNTERS, 1) | json.loads(last)
    pending = {"row": {name: value for name, value in row.items() if type(value) in (int, float)}, "is_last": True}
    return [state, state | {"progress": state["progress"] | {"pending": pending | {"is_tracked": False}}}]


def read_noted_steps(folder: Path) -> object:
    return read_step(folder / STEP, "best"), read_step(folder / STEP, "good")


def json_of(kind: str, name: str) -> Callable[[], list[Any]]:
    return lambda: [json.loads((base_folder(kind) / name).read_text())]


def bytes_of(kind: str, name: str) -> Callable[[], list[bytes]]:
    return lambda: [(base_folder(kind) / name).read_bytes()]


def read_slow_tokenizer(folder: Path) -> object:
    return Tokenizer.load(folder).encode("Once upon a time")


def read_template(file: Path) -> object:
    """As the worker process does, which catches every Exception of a template."""
    (file.parent / "tokenizer.json").write_text(tokenizer_of("byte-level").backend_tokenizer.to_str())
    source = Tokenizer.load(file.parent).chat_template or ""
    content_conditions(source)
    try:
        layout = AnswerLayout(TemplateProgram(TemplateSettings(source, {})))
    except Exception:
        return None
    return render_job(layout, RenderJob([{"role": "user", "content": "4?"}], add_generation_prompt=True))


def read_documents_of(file: Path) -> object:
    return list(read_documents(file, DropReport()))


def read_table(file: Path) -> object:
    return rows_reader(read_conversations)(file)


def table_rows() -> list[dict[str, Any]]:
    return [{"prompt": f"say {n}", "completion": "cat, dog\n", "messages": None} for n in range(3)]


def csv_inputs(delimiter: str) -> list[bytes]:
    messages = json.dumps([{"role": "user", "content": "say"}, {"role": "assistant", "content": "cat"}])
    tables = [
        [["prompt", "completion"], ["say", "cat, dog"], ['"quoted"', "two\nlines"]],
        [["messages"], [messages], [messages]],
    ]
    found = []
    for rows in tables:
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter=delimiter).writerows(rows)
        found.append(stream.getvalue().encode())
    return found


def parquet_bytes() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table_rows()), stream)
    return [stream.getvalue()]


def gzip_bytes() -> list[bytes]:
    return [gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in table_rows()), mtime=0)]


def image_bytes() -> list[bytes]:
    found = []
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        found.append(stream.getvalue())
    return found


def read_picture(file: Path) -> object:
    return is_image_file(file), load_image(file).size


def pickle_bytes() -> list[bytes]:
    found = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"a": torch.ones(3, 2), "b": torch.zeros(5)}, stream, _use_new_zipfile_serialization=zipped)
        found.append(stream.getvalue())
    return found


def npy_bytes() -> list[bytes]:
    return bytes_of("tokens", "train.offsets.npy")()


def log_prob_bytes() -> list[bytes]:
    return [save_bytes({"log_probs": np.zeros(3, np.float32)}, {"key": "k"})]


def profile_value() -> list[Any]:
    content = {"machine": identify_machine(), "rates": dict.fromkeys(REQUIRED, 1.5), "busy": False, "measured_at": 1e9}
    return [{"version": VERSION, **content, "compiler": None, "compile_seconds": 3.0}]


def results_value() -> list[Any]:
    paper = load_paper("muon")
    return [{"claim": paper.hash, "sizes": {"0.3M": make_result(paper, "better", [-0.5, -0.4, -0.5, -0.6])}}]


POSITIONS = {"key": {"k": 1}, "train": [[0, 3, 1.5]], "held_out": [[1, 2, 0.5]], "flops": 3.0, "facts": {"a": 1}}
JUDGE_REPLY = {"choices": [{"message": {"role": "assistant", "content": "Score: 7"}}], "usage": {"total_tokens": 3}}
TOOL_CALLS = (b'<tool_call> {"name": "search", "arguments": {"query": "cat"}} </tool_call>', b"<search>cat</search>")
TEMPLATE = (
    b"{% for m in messages %}{% if m.role == 'user' and m.content %}<u>{{ m.content | trim }}{% else %}{% generation %}"
    b"{{ m['content'][:5] }}{% endgeneration %}{% endif %}{% endfor %}{{ eos_token }}",
)


def read_reply(file: Path) -> object:
    try:
        return reply_text(file.read_bytes())
    except JudgeFailure:
        return None


def read_output(file: Path) -> object:
    output = JsonlOutput(file.parent / "out.jsonl", {"model": "m", "tokens": 3})
    if file.name != "out.jsonl":
        (file.parent / "out.jsonl").write_text('{"row": 0}\n')
    else:
        output.settings_file.write_text(json.dumps(output.settings))
    return output.load_existing()


def read_rpt_run(file: Path) -> object:
    shutil.copy(Path(get_recipe.__code__.co_filename).with_name("rpt.yaml"), file.parent / "config.yaml")
    return load_rpt_run(str(file.parent))


def read_results(file: Path) -> object:
    return load_sizes(load_paper("muon"), file)


POLICY_ROW = row_to_json(
    PolicyRow((1, 2), (3, 4, 5), np.ones(3, np.float32), np.ones(3, np.float32), is_policy_token=np.ones(3, np.bool_))
)


def read_policy_row(file: Path) -> object:
    content = load_json(file)
    with damaged_file_errors(file, "start again"):
        return row_from_json(content)


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
IMAGE_LABELS = [{"file_name": "1.png", "label": "cat"}, {"file_name": "2.png", "label": "dog", "width": 3}]


def read_image_labels(file: Path) -> object:
    for name in ("1.png", "2.png", "3.png"):
        (file.parent / name).write_bytes(PNG)
    report = DropReport()
    found = list_table(file, LabelOptions(label_separator="|"), report)
    return found, report.lines()


@cache
def ledger_values() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        ledger = fill(Path(folder) / "ledger.jsonl", "one")
        ledger.append("prediction", "one", {"sentence": "a loss of 3", "loss": 3.0})
        return [[row | {"time": "2026-11-29"} for row in ledger.rows()]]


def read_ledger(file: Path) -> object:
    """Everything that a command does with a ledger."""
    log = [].append
    merge_into_ledger([file], file.parent / "merged.jsonl", log)
    export_ledger_rows(file, "csv", None, log)
    for name in experiments(read_rows(file, log)):
        with contextlib.suppress(UsageError):  # a beginning of several names
            show_experiment(file, name, log).lines()
    return list_experiments(file, log).lines()


LADDER_RESULT = {
    "experiment": "ladder-1", "recipe": "pretrain", "settings": ["max_steps=3"],
    "rungs": [{"multiplying": n, "tokens": 10 * n, "losses": [3.0]} for n in (1000, 2000, 4000, 8000)],
}  # fmt: skip
FILE_TARGETS: tuple[Target, ...] = (
    Target("model.json", in_folder("run", lambda folder: inspect_folder(folder).lines()), json_of("run", "model.json")),
    Target("state.json", in_folder("run", lambda folder: load_checkpoint(folder / STEP), STEP),
           json_of("run", f"{STEP}/state.json")),
    Target("best checkpoint", in_folder("run", read_noted_steps, STEP),
           json_of("run", f"{STEP}/state.json"), file="state.json"),
    Target("model.safetensors.index.json", in_folder("shards", lambda folder: inspect_folder(folder).lines()),
           json_of("shards", "model.safetensors.index.json")),
    Target("model.safetensors", in_folder("model", load), contents=bytes_of("model", "model.safetensors")),
    Target("config.json to read", in_folder("model", read_model_config), json_of("model", "config.json"),
           file="config.json"),
    Target("state of a training", in_folder("training", resume_training, STEP), states_of_a_training,
           file="state.json"),
    Target("row of a rollout", read_policy_row, lambda: [POLICY_ROW], file="row.json"),
    Target("step of a row", lambda file: _row_step(text_of(file)), lambda: [{"step": 3}], file="line.json"),
    Target("arguments of a call", lambda file: parse_arguments(text_of(file)), lambda: [{"query": "cat"}],
           file="arguments.json"),
    Target("config.json to show", read_family_config, family_configs, file="config.json"),
    Target("weights.bin", read_pickled, contents=pickle_bytes),
    Target("log_probs.safetensors", lambda file: load_log_probs(file, "k"), contents=log_prob_bytes),
    Target("vocab.json", in_folder("slow", read_slow_tokenizer), json_of("slow", "vocab.json")),
    Target("merges.txt", in_folder("slow", read_slow_tokenizer), contents=bytes_of("slow", "merges.txt")),
    Target("added_tokens.json", in_folder("slow", read_slow_tokenizer), lambda: [{"<x>": 330, "<y>": 331}]),
    Target("special_tokens_map.json", in_folder("slow", read_slow_tokenizer),
           lambda: [{"eos_token": "<s>", "additional_special_tokens": ["<x>", {"content": "<y>"}]}]),
    Target("chat_template.jinja", read_template, contents=lambda: TEMPLATE),
    Target("chat_template.json", read_template, lambda: [{"chat_template": TEMPLATE[0].decode()}]),
    Target("template arguments", lambda file: parse_template_kwargs(text_of(file)),
           contents=lambda: [b"{enable_thinking: false, n: [1, 2]}"], file="arguments.yaml"),
    Target("manifest.json", in_folder("tokens", lambda folder: open_token_folder(folder, verify="size")),
           json_of("tokens", "manifest.json")),
    Target("train.offsets.npy", in_folder("tokens", lambda folder: open_token_folder(folder, verify="size")),
           contents=npy_bytes),
    Target("rows.csv", read_table, contents=lambda: csv_inputs(",")),
    Target("rows.tsv", read_table, contents=lambda: csv_inputs("\t")),
    Target("rows.json", read_table, lambda: [table_rows()]),
    Target("rows.jsonl.gz", read_table, contents=gzip_bytes),
    Target("rows.parquet", read_table, contents=parquet_bytes),
    Target("text.txt", read_documents_of, contents=lambda: ["Once upon été.\n\nTwo.\n".encode()]),
    Target("picture", read_picture, contents=image_bytes),
    Target("data_batch_1.bin", lambda file: read_cifar_files([file]), contents=lambda: [bytes(CIFAR10_RECORD_BYTES)]),
    Target("profile.json", read_profile, profile_value),
    Target("positions.json", lambda file: load_positions(file.parent, {"k": 1}), lambda: [POSITIONS]),
    Target("comparisons.json", read_comparisons, lambda: [[[[1, 2], [3], [4, 5]], [[1], [2], [3]]]]),
    Target("measurements.json", read_results, results_value),
    Target("summary.json", read_rpt_run, lambda: [{"status": "finished", "metrics": {"teraflops": 2.5}}]),
    Target("out.jsonl.settings.json", read_output, lambda: [{"model": "m", "tokens": 3}]),
    Target("out.jsonl", read_output, lambda: [[{"row": 0, "text": "x"}, {"row": 1, "text": "y"}]], as_lines=True),
    Target("run.lock", lock_owner, lambda: [{"pid": 3, "host": "h", "started": "now"}]),
    Target("judge's reply", read_reply, lambda: [JUDGE_REPLY], file="reply.json"),
    Target("ledger.jsonl", read_ledger, ledger_values, as_lines=True),
    Target("metadata.jsonl", read_image_labels, lambda: [IMAGE_LABELS], as_lines=True),
    Target("metadata.csv", read_image_labels,
           contents=lambda: [b'file_name,label\n1.png,cat\n"2.png","a|b"\n', b"file_name,labels\n1.png,cat\n"]),
    Target("ladder's result.json", read_ladder, lambda: [LADDER_RESULT], file="result.json"),
    Target("record.json", lambda file: read_record(file.parent), lambda: [{"status": "finished", "metrics": {}}]),
    Target("losses of a run", read_losses, lambda: [[{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]],
           as_lines=True, file="metrics.jsonl"),
    Target("calls of functions", lambda file: read_tool_calls(text_of(file)), contents=lambda: TOOL_CALLS,
           file="call.txt"),
    Target("tool calls", lambda file: tool_argument(text_of(file), "search"), contents=lambda: TOOL_CALLS,
           file="call.txt"),
)  # fmt: skip
