"""Laws about the source text, read with `ast`: which package may import which, no circular imports, and what the
package refuses: other people's implementations, unsafe loading, device names inside layers."""

from __future__ import annotations

import ast
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path

import pytest

from tests.sources import nodes_of, package_files, parse_file

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_quest"
LEVELS = (
    (
        "contracts",
        "scope",
        "errors",
        "files",
        "atomic_dirs",
        "cache_dirs",
        "formatting",
        "progress",
        "child_process",
        "manifest",
        "tensor_files",
        "layers",
    ),
    ("models", "data", "machine"),
    ("techniques", "generation", "hub"),
    ("train", "rollouts", "objectives", "eval", "cost"),
    ("recipes", "papers", "report", "serve", "experiments"),
    ("cli",),
    ("api",),
    ("__main__",),
)
"""A package imports from the levels above its own line here (docs/architecture.md); the packages of one line do not
import one another, but for those of the first line and for what ONE_WAY names."""
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
ONE_WAY = {
    ("hub", "techniques"): "files of adapters and of techniques are read into techniques",
    ("eval", "objectives"): "perplexity is the loss of an objective",
    ("eval", "rollouts"): "pass@k samples and verifies as a rollout does",
    ("experiments", "recipes"): "an arm is a recipe with settings",
    ("experiments", "report"): "the page of an experiment draws with the plots of a run's report",
    ("train", "layers"): "a step of Muon is one of the operators in C++",
    ("papers", "experiments"): "measurements of papers and of experiments are kept by the code that made them",
}
"""Imports inside a level, each with its reason; the other way round is refused."""
TRAIN_MAY_IMPORT = ("contracts", "errors", "files", "atomic_dirs", "progress", "manifest", "tensor_files", "machine")
FILES = package_files(PACKAGE)


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def names_of_import(node: ast.AST) -> Iterator[str]:
    """The dotted names that an import statement asks for: `from a import b` is `a.b` where that is a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative imports hide which package they reach"
        module = node.module or ""
        names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (name if name in MODULES or module == "llm_quest" else module for name in names)


@functools.cache
def imports(file: Path) -> set[str]:
    return {name for node in nodes_of(file) for name in names_of_import(node)}


def packages_imported(file: Path) -> set[str]:
    """The packages of ours that this file imports from, its own included."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("llm_quest.")} & set(LEVEL)


def imports_refused(package: str, imported: Set[str]) -> list[str]:
    if package == "__init__":
        return []
    refused = []
    for other in sorted(imported - {package}):
        upward, sideways = LEVEL[other] > LEVEL[package], LEVEL[other] == LEVEL[package] != 0
        beyond_train = package == "train" and other not in TRAIN_MAY_IMPORT
        if (upward or sideways or beyond_train) and (package, other) not in ONE_WAY:
            refused.append(f"{package} imports {other}")
    return refused


def test_every_package_has_a_level():
    packages = {package_of(file) for file in FILES} - {"__init__"}
    assert packages == set(LEVEL), "add it to LEVELS, or remove it there"


def files_with(find: Callable[[Path], object]) -> dict[str, object]:
    """File -> what was found in it, of the files in which something was."""
    found = {str(file.relative_to(PACKAGE)): find(file) for file in FILES}
    return {name: what for name, what in found.items() if what}


def test_imports_go_down_only():
    assert files_with(lambda file: imports_refused(package_of(file), packages_imported(file))) == {}


@pytest.mark.parametrize(
    ("package", "other"),
    [
        ("layers", "models"),
        ("models", "data"),
        ("hub", "generation"),
        ("techniques", "hub"),
        ("train", "scope"),
        ("models", "train"),
        ("objectives", "eval"),
        ("recipes", "cli"),
        ("report", "recipes"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_named(package: str, other: str):
    assert imports_refused(package, {other, package, "contracts", "errors"}) == [f"{package} imports {other}"]


def test_every_stated_exception_is_still_needed():
    used = {(package_of(file), other) for file in FILES for other in packages_imported(file)}
    assert set(ONE_WAY) <= used


def circles(graph: Mapping[str, Set[str]]) -> list[set[str]]:
    """The strongly connected parts of a graph that have more than one node (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            part = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(part)

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [{"b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_files_import_each_other_in_a_circle():
    """Imports under TYPE_CHECKING and inside functions count: who reads one file has to read the other."""
    graph = {name: imports(file) & set(MODULES) - {name} for name, file in MODULES.items()}
    assert circles(graph) == []


def test_the_first_level_needs_torch_shapes_processes_and_hashes_only():
    allowed = {"torch", "jaxtyping", "psutil", "xxhash", "llm_quest", *sys.stdlib_module_names}
    for file in FILES:
        if package_of(file) in LEVELS[0]:
            assert {name.split(".")[0] for name in imports(file)} <= allowed, file


FOREIGN = {"transformers", "trl", "peft", "litgpt", "torchtune", "x_transformers", "tests", "benchmarks"}


def foreign_imports(file: Path) -> set[str]:
    """Other people's implementations that a file imports; `quest verify` may import transformers inside a function."""
    found = {name.split(".")[0] for name in imports(file)} & FOREIGN
    if file == PACKAGE / "hub" / "verify.py":
        at_the_top = {name.split(".")[0] for node in parse_file(file).body for name in names_of_import(node)}
        found = found - {"transformers"} | at_the_top & FOREIGN
    return found


def test_other_peoples_implementations_are_not_imported():
    """They are oracles of the tests."""
    assert files_with(foreign_imports) == {}


@functools.cache
def calls_in(file: Path) -> tuple[tuple[str, ast.Call], ...]:
    """The dotted name of everything called in this file, and the call."""
    return tuple((ast.unparse(node.func), node) for node in nodes_of(file) if isinstance(node, ast.Call))


def test_pickles_are_opened_in_one_place_and_for_weights_only():
    loads = {
        (file, call)
        for file in FILES
        for name, call in calls_in(file)
        if name in ("torch.load", "pickle.load", "pickle.loads")
    }
    assert len({file for file, _ in loads}) <= 1
    for _, call in loads:
        assert ast.unparse(call.func) == "torch.load"
        assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
    picklers = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert {file for file in FILES if imports(file) & picklers} <= {file for file, _ in loads}, (
        "where its errors are caught"
    )


FORBIDDEN = {"eval", "exec", "hasattr", "os.system", "os.popen"}


def test_nothing_is_evaluated_executed_or_asked_whether_it_has_an_attribute():
    def find(file: Path) -> list[str]:
        return [f"line {call.lineno}: {name}" for name, call in calls_in(file) if name in FORBIDDEN]

    assert files_with(find) == {}


def test_no_process_is_started_through_a_shell():
    def find(file: Path) -> list[str]:
        words = [(call.lineno, word) for _, call in calls_in(file) for word in call.keywords if word.arg == "shell"]
        return [f"line {line}" for line, word in words if ast.unparse(word.value) == "True"]

    assert files_with(find) == {}


def test_operators_are_defined_without_custom_op():
    """Its first call imports torch._dynamo, over a second of processor time before a model's first token."""
    assert not [file.name for file in FILES for name, _ in calls_in(file) if name.endswith("custom_op")]


def test_library_files_have_no_main_block():
    def find(file: Path) -> list[str]:
        compared = [node for node in nodes_of(file) if isinstance(node, ast.Compare)]
        lines = [f"line {node.lineno}" for node in compared if ast.unparse(node.left) == "__name__"]
        return [] if file.name == "__main__.py" or "flat" in file.parts else lines

    assert files_with(find) == {}


def docstrings(module: ast.Module) -> set[int]:
    """The constants that are documentation."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(module) if isinstance(node, owners)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


@pytest.mark.parametrize(
    "file", [f for f in FILES if package_of(f) in ("layers", "models", "scope")], ids=lambda f: f.name
)
def test_layers_and_models_name_no_accelerator(file: Path):
    prose = docstrings(parse_file(file))
    strings = [
        node.value
        for node in nodes_of(file)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    assert not [text for text in strings if any(device in text for device in ("cuda", "mps", "xpu"))]
    attributes = {node.attr for node in nodes_of(file) if isinstance(node, ast.Attribute)}
    assert not attributes & {"cuda", "mps", "xpu"}


FAMILIES = ("gpt", "llama", "mixtral", "mistral", "gemma", "qwen", "deepseek", "kimi", "mimo")
FAMILIES += ("neox", "pythia", "olmo", "granite", "cohere", "glm", "exaone", "helium", "starcoder", "stablelm")


@pytest.mark.parametrize("file", sorted((PACKAGE / "layers").glob("*.py")), ids=lambda file: file.name)
def test_no_familys_name_decides_anything_in_a_layer(file: Path):
    """Docstrings may say who uses a thing, and a published rule may have its inventor's name (`Llama3Scaling`, a
    frequency scaling); an argument, an attribute or a string may not."""
    prose = docstrings(parse_file(file))
    for node in nodes_of(file):
        match node:
            case ast.arg(arg=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                words = name
            case ast.Constant(value=str(text)) if id(node) not in prose:
                words = text
            case _:
                continue
        assert not any(family in words.lower() for family in FAMILIES), f"line {node.lineno}: {words}"


def test_every_folder_with_code_is_a_package():
    """A folder without `__init__.py` is missing from a built wheel."""
    folders = {file.parent for file in FILES}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_a_wheel_would_hold_every_package():
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=["llm_quest*"]))
    assert found == {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}


@pytest.mark.parametrize("module", ["llm_quest", "llm_quest.cli.main"])
def test_importing_the_package_or_the_command_imports_no_torch(module: str):
    heavy = ("torch", "transformers", "matplotlib", "pydantic", "tokenizers", "numpy")
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_the_package_exports_what_it_lists():
    import llm_quest

    for name in llm_quest.__all__:
        assert getattr(llm_quest, name) is not None
    with pytest.raises(AttributeError, match="llm_quest has no 'trainer'; it offers"):
        _ = llm_quest.trainer


def code_text(node: ast.stmt) -> str:
    """The code of a function or of a constant, without its name and docstring, where it is longer than a line."""
    if isinstance(node, ast.FunctionDef):
        body = node.body[1:] if isinstance(node.body[0], ast.Expr) else node.body
        text = "\n".join(ast.unparse(one) for one in body)
    else:
        text = ast.unparse(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value else ""
    return text if len(text) > 70 else ""


def local_names(module: ast.Module) -> set[str]:
    """Names that a file defines: they mean something else in another file."""
    named = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [node.targets for node in module.body if isinstance(node, ast.Assign)]
    return named | {target.id for targets in assigned for target in targets if isinstance(target, ast.Name)}


def test_no_function_and_no_table_is_written_twice():
    """Two copies drift apart. The flat recipes repeat the package on purpose."""
    seen: dict[str, str] = {}
    for file in FILES:
        for node in [] if "flat" in file.parts else parse_file(file).body:
            used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
            if (text := code_text(node)) and not used & local_names(parse_file(file)):
                here = f"{file.relative_to(PACKAGE)}:{node.lineno}"
                assert text not in seen, f"{here} repeats {seen[text]}"
                seen[text] = here


def test_the_cores_a_process_may_use_are_counted_in_one_place():
    files = {file for file in FILES for name, _ in calls_in(file) if name == "os.sched_getaffinity"}
    assert {file.name for file in files} == {"hardware.py"}


def literal_tables() -> Iterator[tuple[str, set[frozenset[str]]]]:
    """Tables at the top of a file, with their entries: the pairs of a dict, whichever side is the key, and the texts of
    a list. Numbers are left out (the sizes of tiny models), and `old_keys.py`, whose table is of what was before."""
    for file in FILES:
        for node in parse_file(file).body if file.name != "old_keys.py" else ():
            for table in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
                entries: set[frozenset[str]] = set()
                if isinstance(table, ast.Dict):
                    pairs = [(k, v) for k, v in zip(table.keys, table.values, strict=True) if k and not is_number(v)]
                    entries = {frozenset(ast.unparse(side).split(".")[-1] for side in pair) for pair in pairs}
                elif isinstance(table, ast.Tuple | ast.List | ast.Set):
                    texts = [one.value for one in table.elts if isinstance(one, ast.Constant)]
                    entries = {frozenset([text]) for text in texts if isinstance(text, str)}
                yield str(file.relative_to(PACKAGE)), {one for one in entries if not one & SAMPLING_NAMES}


def is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float, bool)


SAMPLING_NAMES = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
"""Every format that is read or written has some of these."""


def test_no_table_repeats_another():
    """Three entries that are seven tenths of the smaller table are too many: derive one of them from the other."""
    tables = [(file, entries) for file, entries in literal_tables() if len(entries) >= 3]
    alike = {
        (one, other, *map(str, a & b))
        for (one, a), (other, b) in itertools.combinations(tables, 2)
        if one != other and len(a & b) >= max(3, 0.7 * min(len(a), len(b)))
    }
    assert not alike
