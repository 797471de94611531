"""Whatever reads a file of a user or a stranger is reached by a fuzz target, or explained here.

The functions are found in the syntax tree, by the calls that take bytes apart (READS); whether a target reaches one is
seen while the targets read their good inputs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import llm_quest
from tests.faults.all_targets import ALL_TARGETS
from tests.faults.mutations import to_hostile_json

PACKAGE = Path(llm_quest.__file__).parent
READS = {
    "json.loads", "json.load", "json.JSONDecoder", "yaml.load", "yaml.safe_load", "yaml.compose", "yaml.parse",
    "csv.reader", "csv.DictReader", "gzip.open", "zipfile.ZipFile", "torch.load", "np.load", "np.memmap",
    "np.fromfile", "np.frombuffer", "torch.frombuffer", "Image.open", "pyarrow.parquet.ParquetFile", "safe_open",
    "load_file", "tokenizers.Tokenizer.from_file", "models.BPE.from_file", "load_json", "read_json", "pickle.load",
    "struct.unpack", "tomllib.load", "ast.literal_eval", "ET.parse",
}  # fmt: skip
EXPLAINED = {
    "data/template_sandbox.py:run_worker": "what its parent, this package, writes to its stdin",
    "data/template_sandbox.py:parse_rendering": "what our own worker process writes",
    "eval/baselines.py:byte_sequences": "the bytes of texts in memory",
    "hub/gguf_rope.py:read_own_scaling": "a value of read_gguf, every error of which is caught",
    "hub/gguf_rope.py:read_vector": "a tensor whose place read_gguf has checked, and its size here",
    "hub/gguf_tokenizer.py:tokenizer_keys": "the JSON of a tokenizer in memory, which is being exported",
    "hub/load_tokenizer.py:read_json_if_there": "read_json, which config.json goes through",
    "hub/whole_parameters.py:read_score_head": "read_json, and fields that config.json's target reads",
    "papers/card.py:shipped_verdicts": "a file of this package",
    "papers/paper.py:read_benches": "files of this package",
    "papers/paper.py:read_papers": "files of this package",
    "recipes/model_config.py:check_saved": "what this function has just written as JSON",
    "recipes/reference_model.py:load_state_dict": "a file whose sha256 is in the checkpoint",
    "recipes/rpt/evaluation.py:report_table": "load_json of an object, into which a key is put",
    "experiments/experiment.py:same_but_seeds": "what this function has just written as JSON",
    "experiments/measurements.py:describe_step": "whole lines that our own worker process logs",
    "experiments/worker.py:read_requests": "what its parent, this package, writes to its stdin",
    "experiments/worker_pool.py:read_answer": "what our own worker process writes",
    "eval/lm_eval_harness.py:render_contexts": "what this file wrote into lm-eval's requests",
    "report/run_card.py:run_readme": "config.yaml of a run, bounded by read_run, every error of which is caught",
    "report/run_card.py:folder_readme": "the head of a card, every error of which is caught",
    "serve/grammar.py:token_mask": "a bit mask of llguidance, in memory",
    "serve/protocol.py:parse_request_json": "the POST targets reach it, in the server's thread",
    "train/failures.py:first_failure": "what another process of the same run wrote",
    "train/failures.py:report_failure": "what another process of the same run wrote",
}
"""What no target reaches: file:function (or a whole file) -> why it needs none."""


def call_name(call: ast.Call) -> str:
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def readers_in(file: Path) -> Iterator[str]:
    """file:function of every function that calls one of READS."""
    name = file.relative_to(PACKAGE).as_posix()

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and call_name(child) in READS:
                yield f"{name}:{function}"
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            yield from visit(child, inside)

    yield from visit(ast.parse(file.read_bytes()), "<module>")


def functions_reached(folder: Path) -> set[str]:
    """file:function of everything in the package that runs while the targets read good input."""
    seen: set[tuple[str, str]] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen.add((frame.f_code.co_filename, frame.f_code.co_name))

    for number, target in enumerate(ALL_TARGETS):
        rows = [value if target.as_lines else [value] for value in target.values()]
        contents = [b"\n".join(map(to_hostile_json, lines)) for lines in rows] or target.contents()
        for other, content in enumerate(contents[:12] if target.name == "x.gguf" else contents[:3]):
            file = folder / f"{number}-{other}" / (target.file or target.name)
            file.parent.mkdir()
            file.write_bytes(content)
            sys.setprofile(profile)
            try:
                target.read(file)
            finally:
                sys.setprofile(None)
    inside = ((Path(file), name) for file, name in seen if file.startswith(str(PACKAGE)))
    return {f"{file.relative_to(PACKAGE).as_posix()}:{name}" for file, name in inside}


def test_every_function_that_takes_bytes_apart_is_fuzzed_or_explained(tmp_path: Path):
    readers = {place for file in PACKAGE.rglob("*.py") for place in readers_in(file)}
    assert len(readers) > 40
    unreached = readers - functions_reached(tmp_path)
    unexplained = {place for place in unreached if not {place, place.partition(":")[0]} & set(EXPLAINED)}
    assert not sorted(unexplained), f"write a target (tests/faults/), or explain: {sorted(unexplained)}"
    needless = {name for name in EXPLAINED if not any(name in (one, one.partition(":")[0]) for one in unreached)}
    assert not needless, f"explained here, and fuzzed or gone: {sorted(needless)}"
