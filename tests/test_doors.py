"""The one rule that cannot be seen by reading a single file: doors open downstairs only. Read over `ast`.

And what the house refuses: other people's libraries inside the package, unsafe loading, device names inside layers."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "llm_quest"
FLOORS = (
    ("contracts", "scope", "errors", "disk", "tensor_files", "layers"),
    ("models", "data"),
    ("techniques", "generation", "hub"),
    ("objectives", "rollouts"),
    ("train",),
    ("recipes", "papers", "report", "cli"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ONE_FLOOR_EXCEPTIONS = {
    ("rollouts", "generation"),
    ("hub", "techniques"),
    ("cli", "recipes"),
    ("cli", "report"),
    ("cli", "papers"),
}
FILES = sorted(HOUSE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def room_of(file: Path) -> str:
    return file.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names, as absolute as they are written."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative imports hide which door they open"
        module = node.module or ""
        yield from (f"{module}.{alias.name}" for alias in node.names) if module == "llm_quest" else [module]


def imports(file: Path) -> set[str]:
    return {name for node in ast.walk(tree(file)) for name in imported(node)}


def doors(file: Path) -> set[str]:
    """The rooms of the house that this file opens a door to."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("llm_quest.")}


def wrong_doors(room: str, opened: set[str]) -> list[str]:
    if room == "__init__":
        return []
    wrong = []
    for other in sorted(opened - {room}):
        if other not in FLOOR:
            continue
        upstairs, beside = FLOOR[other] > FLOOR[room], FLOOR[other] == FLOOR[room] != 0
        stranger = room == "train" and other not in ("contracts", "errors", "disk", "tensor_files")
        if (upstairs or beside or stranger) and (room, other) not in ONE_FLOOR_EXCEPTIONS:
            wrong.append(f"{room} opens the door to {other}")
    return wrong


def test_every_room_stands_on_a_floor():
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms <= set(FLOOR), f"which floor do these belong to: {rooms - set(FLOOR)}?"


@every_file
def test_doors_open_downstairs_only(file: Path):
    assert wrong_doors(room_of(file), doors(file)) == []


@pytest.mark.parametrize(
    ("room", "opened"),
    [
        ("layers", "models"),
        ("models", "data"),
        ("hub", "generation"),
        ("train", "scope"),
        ("models", "train"),
        ("report", "cli"),
    ],
)
def test_a_door_opened_the_wrong_way_is_named(room: str, opened: str):
    assert wrong_doors(room, {opened, room, "contracts", "errors"}) == [f"{room} opens the door to {opened}"]


def test_the_ground_floor_needs_torch_and_shapes_only():
    allowed = {"torch", "jaxtyping", "llm_quest", *sys.stdlib_module_names}
    for file in FILES:
        if room_of(file) in FLOORS[0]:
            assert {name.split(".")[0] for name in imports(file)} <= allowed, file


@every_file
def test_other_peoples_implementations_are_not_imported(file: Path):
    """They are oracles of the tests. One stated exception: `quest verify` asks transformers, inside a function."""
    strangers = {"transformers", "trl", "peft", "litgpt", "torchtune", "x_transformers", "tests", "benchmarks"}
    found = {name.split(".")[0] for name in imports(file)} & strangers
    if file == HOUSE / "hub" / "inspect.py":
        at_the_top = {name.split(".")[0] for node in tree(file).body for name in imported(node)}
        found = found - {"transformers"} | at_the_top & strangers
    assert not found


def called(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """The dotted name of everything called in this file, and the call."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_pickles_are_opened_in_one_place_and_for_weights_only():
    loads = {
        (file, call)
        for file in FILES
        for name, call in called(file)
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


@every_file
def test_nothing_is_evaluated_executed_or_asked_whether_it_has_an_attribute(file: Path):
    forbidden = {"eval", "exec", "hasattr", "os.system", "os.popen"}
    assert not [f"line {call.lineno}: {name}" for name, call in called(file) if name in forbidden]


@every_file
def test_no_process_is_started_through_a_shell(file: Path):
    for name, call in called(file):
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert words.get("shell") != "True", f"line {call.lineno}: {name}"


@every_file
def test_there_are_no_demonstrations_at_the_bottom(file: Path):
    if file.name == "__main__.py" or "flat" in file.parts:
        return
    asked = [ast.unparse(node.left) for node in ast.walk(tree(file)) if isinstance(node, ast.Compare)]
    assert "__name__" not in asked


def docstrings(module: ast.Module) -> set[int]:
    """The constants that are documentation."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(module) if isinstance(node, owners)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


@pytest.mark.parametrize(
    "file", [f for f in FILES if room_of(f) in ("layers", "models", "scope")], ids=lambda f: f.name
)
def test_layers_and_models_name_no_accelerator(file: Path):
    prose = docstrings(tree(file))
    strings = [
        node.value
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    assert not [text for text in strings if any(device in text for device in ("cuda", "mps", "xpu"))]
    attributes = {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
    assert not attributes & {"cuda", "mps", "xpu"}


FAMILIES = ("gpt", "llama", "mixtral", "mistral", "gemma", "qwen", "deepseek", "kimi", "mimo")


@pytest.mark.parametrize("file", sorted((HOUSE / "layers").glob("*.py")), ids=lambda file: file.name)
def test_no_familys_name_decides_anything_on_the_ground_floor(file: Path):
    """Docstrings may say who uses a thing, and a published rule may bear its inventor's name (`Llama3`, a frequency
    scaling); an argument, an attribute or a string may not."""
    prose = docstrings(tree(file))
    for node in ast.walk(tree(file)):
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
def test_importing_the_front_door_and_the_street_door_costs_no_torch(module: str):
    heavy = ("torch", "transformers", "matplotlib", "pydantic", "tokenizers", "numpy")
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_the_front_door_offers_what_it_promises():
    import llm_quest

    for name in llm_quest.__all__:
        assert getattr(llm_quest, name) is not None
    with pytest.raises(AttributeError, match="llm_quest has no 'trainer'; it offers"):
        _ = llm_quest.trainer


def spelled_out(node: ast.stmt) -> str:
    """What a function does or a constant is, without its name and its words, where it is more than a line's worth."""
    if isinstance(node, ast.FunctionDef):
        body = node.body[1:] if isinstance(node.body[0], ast.Expr) else node.body
        text = "\n".join(ast.unparse(one) for one in body)
    else:
        text = ast.unparse(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value else ""
    return text if len(text) > 70 else ""


def local_names(module: ast.Module) -> set[str]:
    """What a file defines: the same words mean something else in another file."""
    named = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [node.targets for node in module.body if isinstance(node, ast.Assign)]
    return named | {target.id for targets in assigned for target in targets if isinstance(target, ast.Name)}


def test_the_same_function_and_the_same_table_never_stand_twice():
    """What is decided in two places is one day decided in two ways. The flat recipes repeat the package on purpose."""
    seen: dict[str, str] = {}
    for file in FILES:
        for node in [] if "flat" in file.parts else tree(file).body:
            used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
            if (text := spelled_out(node)) and not used & local_names(tree(file)):
                here = f"{file.relative_to(HOUSE)}:{node.lineno}"
                assert text not in seen, f"{here} repeats {seen[text]}"
                seen[text] = here


def test_the_cores_a_process_may_use_are_counted_in_one_place():
    asked = {file for file in FILES for name, _ in called(file) if name == "os.sched_getaffinity"}
    assert {file.name for file in asked} == {"hardware.py"}
