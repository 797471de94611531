"""Every public class and function of the package is used: a command, a recipe, a paper or `llm_quest.__all__` leads to
it. What only tests use is not a feature; it is wired, removed, or named in EXCEPTIONS with the reason.

The search follows names through the source text (`ast`), without types: a definition is reached when a reached
definition mentions its name, be it as a name, an attribute or a string (tables of lazily imported names are strings).
It errs on the side of reaching, so what it names is certain."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import llm_quest
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.train.arguments import TrainingArguments
from tests.sources import nodes_of, package_files, parse_file

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_quest"
CLAIMS = "".join(file.read_text(encoding="utf-8") for file in (PACKAGE / "papers/claims").glob("*.yaml"))
ROOTS = ("main", *llm_quest.__all__, "FAMILIES", *re.findall(r"\$generated:(\w+)", CLAIMS))
"""The command `quest` (and through it the recipes), the exported names, the families' table and the rows that claims of
papers name by file and function."""
EXCEPTIONS = {
    "Objective": "a protocol of contracts.py: it documents what an objective promises",
    "relu_squared": "an activation for models of one's own (Nemotron); no family here has it",
    "LatentMoE": "a layer for models of one's own (Nemotron 3); no family here has it",
    "unmerge_adapter": "Python API, as PEFT has it: the command line merges into a new folder",
    "AttentionPolicyBatch": "the batch of AttentionDivergenceLoss",
    "AttentionDivergenceLoss": "the paper's loss alone; attention_coef of the policy gradient adds the same term",
    "attention_divergence_loss": "part of AttentionDivergenceLoss",
    "generalized_jsd": "the definition that the chunked divergence is tested against",
    "SafeReward": "wraps a reward function of one's own in Python",
}
"""Public name -> why nothing of ours uses it."""

AT_IMPORT = "<import>"


def names_bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a file defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


@functools.cache
def names_mentioned(node: ast.AST) -> frozenset[str]:
    return frozenset(mentions(node))


def mentions(node: ast.AST) -> Iterator[str]:
    for one in ast.walk(node):
        match one:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name
            case ast.Constant(value=str(text)):
                yield from re.findall(r"\w+", text) if " import " in text else [text]


@functools.cache
def definitions() -> dict[str, list[tuple[Path, ast.stmt]]]:
    """Name -> where it is defined at the top of a file."""
    found: dict[str, list[tuple[Path, ast.stmt]]] = collections.defaultdict(list)
    for file in package_files(PACKAGE):
        for node in top_level(parse_file(file).body):
            for name in names_bound(node):
                found[name].append((file, node))
            if isinstance(node, ast.ImportFrom):  # `import f as g`: who says g means f
                for alias in node.names:
                    if alias.asname and alias.asname != alias.name:
                        found[alias.asname].append((file, ast.Expr(ast.Name(alias.name))))
            if isinstance(node, ast.Expr | ast.For):  # runs when the file is imported
                found[AT_IMPORT].append((file, node))
    return found


def top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Also inside `if` and `try` at the top of a file."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from top_level([*node.body, *node.orelse])
        else:
            yield node


def reach(roots: Iterable[str]) -> set[str]:
    """All names that the definitions of the roots mention, and theirs, and so on."""
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for _, node in definitions().get(name, ()):
            waiting += names_mentioned(node)
    return seen


def functions_with_decorator() -> set[str]:
    """Functions with a decorator are called by what decorates them: the commands of `quest`, validators."""
    nodes = [(name, node) for name, found in definitions().items() for _, node in found]
    return {name for name, node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list}


def public_names() -> dict[str, str]:
    """Public functions and classes, with their file."""
    return {
        name: str(file.relative_to(PACKAGE))
        for name, found in definitions().items()
        for file, node in found
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not name.startswith("_") and "flat" not in file.parts
    }


def test_every_public_class_and_function_is_used():
    reached = reach([*ROOTS, AT_IMPORT, *functions_with_decorator()])
    known = reached | set(EXCEPTIONS)
    lost = {f"{file}: {name}" for name, file in public_names().items() if name not in known}
    assert not lost, "only tests use these: wire them, remove them or name them in EXCEPTIONS"


def test_every_exception_is_a_name_that_nothing_uses():
    assert set(EXCEPTIONS) <= set(public_names()) - reach([*ROOTS, AT_IMPORT, *functions_with_decorator()])


def test_what_nothing_mentions_is_not_reached():
    assert "test_what_nothing_mentions_is_not_reached" not in reach(ROOTS)
    assert reach(["CorrectnessReward"]) < reach(ROOTS)


CALLED_BY_OTHERS = {
    "ignore_aliases": "PyYAML calls it",
    "loglikelihood": "lm-eval calls it",
    "loglikelihood_rolling": "lm-eval calls it",
    "generate_until": "lm-eval calls it",
    "next_symbol_probs": "the definition that the fast sum is tested against",
}
"""Public methods that nothing of ours calls, and why."""
UNSET_ARGUMENTS: dict[str, str] = {}
"""Fields of TrainingArguments that no recipe sets, and who makes them keys or removes them."""


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in nodes_of(file):
            if isinstance(node, ast.ClassDef) and "flat" not in file.parts:
                yield str(file.relative_to(PACKAGE)), node


def test_every_public_method_is_called():
    mentioned = {name for nodes in definitions().values() for _, node in nodes for name in names_mentioned(node)}
    known = mentioned | set(CALLED_BY_OTHERS)
    lost = {
        f"{file}: {owner.name}.{node.name}"
        for file, owner in classes()
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if node.name not in known and "validator" not in "".join(map(ast.unparse, node.decorator_list))
    }
    assert not lost, "only tests call these: wire them, remove them or name them in CALLED_BY_OTHERS"


def test_every_training_argument_is_set_by_a_recipe():
    """By a key of its name, which `train_settings` passes on, or by an argument."""
    fields = {one.name for one in dataclasses.fields(TrainingArguments)} - RunConfig.model_fields.keys()
    nodes = [node for file in package_files(PACKAGE / "recipes") for node in nodes_of(file)]
    given = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    given |= {getattr(key, "value", None) for node in nodes if isinstance(node, ast.Dict) for key in node.keys}
    assert fields - given == set(UNSET_ARGUMENTS)


SET_ON_OTHERS = {
    "dont_write_bytecode": "sys",
    "jaxtyped": "jaxtyping",
    "__signature__": "inspect",
    "subprocess": "a module of the package that imports it",
    "id2label": "transformers",
    **dict.fromkeys(("loss_weights", "neftune_noise_alpha"), "TRL"),
    "should_exit": "uvicorn",
    "close_connection": "http.server",
    **dict.fromkeys(("pre_tokenizer", "normalizer", "post_processor"), "tokenizers"),
    **dict.fromkeys(("n_threads", "n_parallel", "n_batch", "n_ctx", "verbosity", "lora_adapters"), "llama.cpp"),
    **dict.fromkeys(("profile_guard_manager", "get_funcname", "is_co_filename_from_nn_modules"), "torch._dynamo"),
    **dict.fromkeys(("flash_attn_type", "cache_type_k", "cache_type_v"), "llama.cpp"),
}
"""Attribute that a test sets on an object of somebody else's."""


def attributes(nodes: Iterable[ast.AST], context: type[ast.expr_context]) -> set[str]:
    """Names of attributes that are read (ast.Load) or set (ast.Store)."""
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, context)}


def test_tests_set_attributes_that_somebody_reads():
    """One of an old name would be set and read by nobody, and the test could not fail."""
    nodes = [node for file in package_files(PACKAGE) for node in nodes_of(file)]
    names = attributes(nodes, ast.Load) | {name for node in nodes for name in variables(node)}
    for file in (ROOT / "tests").rglob("*.py"):
        here = nodes_of(file)
        lost = attributes(here, ast.Store) - names - attributes(here, ast.Load) - SET_ON_OTHERS.keys()
        assert not lost, f"{file.name} sets what nobody reads"


def variables(node: ast.AST) -> list[str]:
    """A constant or function of a module that may be replaced, or a field of a class, which may be read by its name."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    target = node.target if isinstance(node, ast.AnnAssign) else node
    constant = isinstance(target, ast.Name) and (target is not node or target.id.isupper())
    return [target.id] if isinstance(target, ast.Name) and constant else []
