"""Bounds on names and sizes, so that the package stays as readable as it is: each was reached once, and growing past it
is a decision, made here.

The names are counted by three rules: functions whose name begins with a past participle say what happened instead of
what they do; names that are defined in three or more files need their file to be understood; terms of the field that
occur in no identifier cannot be found by who knows them."""

from __future__ import annotations

import ast
import collections
import functools
import inspect
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.sources import nodes_of, package_files, parse_file

PACKAGE, TESTS = Path(__file__).parents[1] / "llm_quest", Path(__file__).parent


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


MAX_PARTICIPLE_SHARE = 0.02
MAX_SHARED_NAMES = 6
MAX_NAMES_TWICE = 13  # goal: 0, but for commands of the command line and functions of `api.py`
MAX_ABSENT_TERMS = 14
MAX_FILES = 494  # goal of the first design: 260
MAX_LINES = 80_208  # goal of the first design: 35,000
MEDIAN_LENGTH, P90_LENGTH, MAX_LENGTH = 7, 18, 60
"""Lines of a function from `def` to its last one, its docstring included."""
MAX_ATTENTION_ARGUMENTS = 10
FIRST_FAMILIES = words("gpt2 llama gemma mixtral qwen3 deepseek_v3 qwen3_next mimo vit clip llava")
MAX_FIRST_FAMILY_LINES, MAX_LLAMA_LINES, MAX_FAMILY_LINES = 2050, 115, 125
"""The eleven families that share little with each other, together; the one that is read first; and each of the others,
which are one of the eleven (or of each other) with a difference."""

IRREGULAR = words("""
told kept made known found seen drawn shown begun said taken given written taught laid lying held spent cut left lost
become understood dealt thought spelled heard met sung struck woven built chosen
""")
"""Past participles that do not end in -ed."""
NOT_PARTICIPLES = words("embed feed speed seed need speculated shared packed chunked masked fused compiled")
"""Nouns and verbs that end in -ed, and adjectives of the field."""
CONTRACTS = words("""
forward step call state_dict load_state_dict batches block assemble initialize weight_map read publish main Config
make_arm verdict
""")
"""Names that several files define on purpose: a contract asks them to."""
TERMS = words("""
attention_mask position_ids input_ids labels kv_cache past_key_values num_key_value_heads num_attention_heads head_dim
hidden_size intermediate_size vocab_size max_position_embeddings num_hidden_layers rope_theta rms_norm_eps norm_eps
num_experts top_k router aux_loss collate dataloader dataset pad padding pack state_dict load_state_dict
gradient_accumulation micro_batch batch_size learning_rate lr warmup_steps scheduler trainer train_step evaluate eval
callback hook logger metrics checkpoint resume set_seed mixed_precision prefill decode_one_token sampler
logits_processor stopping_criteria rejection_sampler draft_model speculative max_new_tokens reward_fn reward_model
advantages reference_model log_probs kl_coef clip_range epsilon importance_ratio importance_sampling rollout completions
num_generations policy group_size lora_a lora_b rank alpha target_modules merge adapter optimizer_state grad_norm
weight_decay loss_scale data_parallel tensor_parallel process_group world_size local_rank perplexity accuracy pass_at_k
confidence_interval baseline tokenizer chat_template special_tokens stop_strings logprobs temperature top_p min_p
""")


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {file: parse_file(file) for file in package_files(PACKAGE)}


def functions(folder: Path = PACKAGE) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods, with the file and the line of each."""
    for file in package_files(folder):
        for node in nodes_of(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(folder)}:{node.lineno}: {node.name}", node


def begins_with_participle(name: str) -> bool:
    first = name.strip("_").split("_")[0]
    return first not in NOT_PARTICIPLES and (first in IRREGULAR or bool(re.fullmatch(r"[a-z]+ed", first)))


def identifiers(file: Path) -> Iterator[str]:
    """What a file defines, stores or takes as an argument."""
    for node in nodes_of(file):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                yield name


def test_participles_are_recognized():
    assert all(map(begins_with_participle, ("told", "kept_rows", "_padded")))
    assert not any(map(begins_with_participle, ("embed", "seed_of", "packed_rows", "tell", "red_rows_left"[4:])))


def test_hardly_a_functions_name_begins_with_a_participle():
    named = [(place, node.name) for place, node in functions() if not node.name.startswith("__")]
    found = [place for place, name in named if begins_with_participle(name)]
    assert len(found) / len(named) < MAX_PARTICIPLE_SHARE, found


def test_no_fixture_or_helper_of_the_tests_begins_with_a_participle():
    assert [place for place, node in functions(TESTS) if begins_with_participle(node.name)] == []


ELLIPSIS = re.compile(
    r"(Of|Those|All of them)\b|As (?!`)|These \w+[.,]|For (the screen|people)|The (same|inverse)[,.;:]"
)
"""First words that say nothing of what a thing is."""


def own_names(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The fields of a class, or the arguments of a function."""
    fields = {
        one.target.id for one in ast.walk(node) if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    return fields | {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}


def test_a_docstring_says_first_what_a_thing_is():
    """Not what one of its fields means, and not "The same" or "Of them"."""
    elliptic = []
    for file in trees():
        for node in nodes_of(file) if "flat" not in file.parts else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                text = ast.get_docstring(node) or ""
                field = re.match(r"(\w+)(, \w+)*( \([^)]*\))?:(?!:)", text)
                if ELLIPSIS.match(text) or (field and field[1] in own_names(node)):
                    elliptic.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {text[:60]}")
    assert not elliptic


def members(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """The names that a module or a class defines, its classes' members and their attributes included."""
    for line in node.body:
        match line:
            case ast.ClassDef(name=name):
                yield from (name, *members(line))
            case ast.FunctionDef(name=name):
                yield name
            case _:
                yield from (one.id for one in ast.walk(line) if isinstance(one, ast.Name))
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store):
            yield one.attr


@functools.cache
def definitions() -> dict[str, set[str]]:
    """Package, module or class -> what it defines. A class with bases has names of theirs, and is left out."""
    found = collections.defaultdict(set)
    for file, tree in trees().items():
        found[file.parent.name if file.stem == "__init__" else file.stem].update(members(tree))
        found[file.parent.name].add(file.stem)
        found[file.parent.parent.name].add(file.parent.name)
        for node in nodes_of(file):
            if isinstance(node, ast.ClassDef) and not node.bases:
                found[node.name].update(members(node))
    return found


OTHER_NAMES = ("gguf.quants", "tokenizer.ggml.pre", "experts.base_layer.lora_A", "experts.gate", "rewards.1.load")
"""Names of other packages, of files, and of addresses in a model or a config."""
FILE_ENDINGS = words("json jsonl yaml safetensors model bin gguf")


def is_missing(reference: str) -> bool:
    """Whether a name like `file.py`, `module.name` or `Class.method` is not in the package's file, module or class."""
    if reference.endswith(".py"):
        return not any(str(file).endswith(f"/{reference}") for file in (*trees(), *PACKAGE.parent.glob(reference)))
    first, name, *_ = reference.split(".")
    return first in definitions() and name not in (*FILE_ENDINGS, *definitions()[first])


def test_what_a_docstring_refers_to_exists():
    lost = []
    for file in trees():
        for node in nodes_of(file):
            if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
                named = re.findall(r"`(\w[\w/]*\.\w[\w.]*)(?:\([^`]*\))?`", node.value.value)
                found = [one for one in named if one not in OTHER_NAMES and is_missing(one)]
                lost += [f"{file.relative_to(PACKAGE)}:{node.lineno}: {one}" for one in found]
    assert lost == []


def test_few_names_are_defined_in_two_files_and_fewer_in_three():
    files = collections.defaultdict(set)
    for file, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].add(file)
    shared = {name: len(found) for name, found in files.items() if len(found) >= 2 and name not in CONTRACTS}
    assert len(shared) <= MAX_NAMES_TWICE, shared
    assert sum(count >= 3 for count in shared.values()) <= MAX_SHARED_NAMES, shared


def test_the_fields_terms_occur_in_names():
    spelled = {name.lower().replace("_", "") for file in trees() for name in identifiers(file)}
    spelled |= {file.stem.replace("_", "") for file in trees()}
    absent = [term for term in TERMS if not any(term.replace("_", "") in word for word in spelled)]
    assert len(absent) <= MAX_ABSENT_TERMS, absent


def test_functions_stay_short():
    lengths = {place: (node.end_lineno or node.lineno) - node.lineno + 1 for place, node in functions()}
    ordered = sorted(lengths.values())
    assert statistics.median(ordered) <= MEDIAN_LENGTH
    assert ordered[len(ordered) * 9 // 10] <= P90_LENGTH
    assert {place: length for place, length in lengths.items() if length > MAX_LENGTH} == {}


def test_the_package_stays_small():
    assert len(trees()) <= MAX_FILES
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in trees()) <= MAX_LINES


def test_a_family_is_a_page_and_one_with_a_difference_is_short():
    from llm_quest.models import FAMILIES, VISION_FAMILIES

    files = {Path(inspect.getfile(family.assemble)) for family in (*FAMILIES, *VISION_FAMILIES)}
    lines = {file.stem: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert sum(lines[name] for name in FIRST_FAMILIES) <= MAX_FIRST_FAMILY_LINES
    assert lines["llama"] <= MAX_LLAMA_LINES
    assert {
        name: count for name, count in lines.items() if name not in FIRST_FAMILIES and count > MAX_FAMILY_LINES
    } == {}


def test_attention_has_few_constructor_arguments():
    tree = trees()[PACKAGE / "layers" / "attention.py"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            made = [one.args for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            assert all(len(args.args) + len(args.kwonlyargs) - 1 <= MAX_ATTENTION_ARGUMENTS for args in made), node.name


def is_set(node: ast.expr) -> bool:
    """Whether an expression is a set: its order is another one in every process."""
    if isinstance(node, ast.BinOp):
        return is_set(node.left) or is_set(node.right)
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")
    return called or isinstance(node, ast.Set | ast.SetComp)


def test_no_test_takes_its_cases_from_a_set():
    """The workers of pytest-xdist have to collect the same tests in the same order."""
    assert is_set(ast.parse("set(A) - {1}", mode="eval").body)
    found = []
    for file in package_files(TESTS):
        for node in nodes_of(file):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize"):
                found += [f"{file.name}:{node.lineno}" for given in node.args[1:2] if is_set(given)]
    assert found == []
