"""Edits of the package that change nothing that matters, made by chance.

words        a comment in a function                                        said, not run
name         another name for a local variable                              said, not run
order        two neighboring statements that need nothing of each other    runs, and every pair is identical
draws        other random numbers of the same distribution                  runs, and the pairs differ by chance"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jade", "knoll", "larch")
WEIGHTS, ROWS, VALUES = "recipes/model_config.py", "recipes/assembly.py", "layers/initialize.py"
INIT = (WEIGHTS, 'derive_seed(seed, "init")', 'derive_seed(seed, "{word}")')
ORDER = (ROWS, 'seed=derive_seed(config.seed, "order")', 'seed=derive_seed(config.seed, "{word}")')
DRAWN = "std=out_std if writes else std, generator=generator)"
WRITES = "            writes = path.rsplit("
DRAWS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "first values": (INIT,),
    "order of data": (ORDER,),
    "both": (INIT, ORDER),
    "modules": ((VALUES, 'f"{seed}/{path}".encode()', 'f"{seed}/{word}/{path}".encode()'),),
    "signs": ((VALUES, DRAWN, f"{DRAWN}.data.mul_(1 - 2 * (len(path) % 2))"),),
    "spare numbers": ((VALUES, WRITES, f"            torch.rand({{number}}, generator=generator)\n{WRITES}"),),
    "documents": (("data/packing.py", "num_documents, seed, epoch, 0)", "num_documents, seed, epoch, {number})"),),
    "rows": (("data/packing.py", "rows_per_epoch, seed, epoch, 1)", "rows_per_epoch, seed, epoch, {number})"),),
    "rows backwards": (("data/packing.py", "order.rows[place]", "order.rows[-1 - place]"),),
}
"""Name -> (file, text, its replacement); {word} and {number} are drawn."""
EXCLUDED = ("cli", "papers", "report", "experiments", "eval", "split.py")
"""Parts that are not of a run, and those that score all arms, which no arm may edit."""


@dataclass(frozen=True)
class Edit:
    """What was done, and the text of the files after it."""

    kind: str
    name: str
    files: dict[str, str]


def edits(kind: str, package: Path, seed: int) -> Iterator[Edit]:
    """Endlessly many edits of a kind."""
    rng = random.Random(f"{kind} {seed}")
    sources = [
        file for file in sorted(package.rglob("*.py")) if not set(file.relative_to(package).parts) & set(EXCLUDED)
    ]
    while True:
        if (found := KINDS[kind](package, sources, rng)) is not None:
            yield found


def write_patch(edit: Edit, package: Path, file: Path) -> Path:
    """The edit as `git diff` would show it."""
    text = ""
    for name, after in edit.files.items():
        before = (package / name).read_text(encoding="utf-8")
        paths = f"a/llm_quest/{name}", f"b/llm_quest/{name}"
        text += "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), *paths))
    file.write_text(text, encoding="utf-8")
    return file


def change_draws(package: Path, sources: list[Path], rng: random.Random) -> Edit:
    name, files = rng.choice(list(DRAWS)), dict[str, str]()
    drawn = {"word": f"{rng.choice(WORDS)} {rng.randrange(10**6)}", "number": str(rng.randrange(2, 10**6))}
    if name == "spare numbers":
        drawn["number"] = str(rng.randrange(1, 64))
    for file, old, new in DRAWS[name]:
        before = files.get(file) or (package / file).read_text(encoding="utf-8")
        assert before.count(old) == 1, f"{file}: {old}"
        for key, value in drawn.items():
            new = new.replace("{" + key + "}", value)
        files[file] = before.replace(old, new)
    return Edit("draws", f"{name} ({drawn['word']}, {drawn['number']})", files)


def add_words(package: Path, sources: list[Path], rng: random.Random) -> Edit | None:
    file, function, text = draw_function(sources, rng)
    if function is None:
        return None
    lines = text.splitlines(True)
    first = function.body[-1]
    lines.insert(first.lineno - 1, " " * first.col_offset + f"# {rng.choice(WORDS)} {rng.randrange(10**6)}\n")
    return finish("words", package, file, text, "".join(lines), function.name)


def rename_local(package: Path, sources: list[Path], rng: random.Random) -> Edit | None:
    """A variable that is assigned in a function and known nowhere else."""
    file, function, text = draw_function(sources, rng)
    if function is None or any(isinstance(one, NESTED) for one in ast.walk(function) if one is not function):
        return None
    names = [one for one in ast.walk(function) if isinstance(one, ast.Name)]
    arguments = {one.arg for one in ast.walk(function) if isinstance(one, ast.arg)}
    stored = sorted({one.id for one in names if isinstance(one.ctx, ast.Store)} - arguments)
    if not stored:
        return None
    old, new = rng.choice(stored), f"{rng.choice(WORDS)}_{rng.randrange(100)}"
    rows = [line.encode() for line in text.splitlines(True)]
    for one in sorted((one for one in names if one.id == old), key=lambda one: (-one.lineno, -one.col_offset)):
        row, end = rows[one.lineno - 1], one.col_offset + len(old.encode())
        if row[one.col_offset : end] != old.encode():
            return None  # inside of a formatted string, whose places Python 3.11 does not know
        rows[one.lineno - 1] = row[: one.col_offset] + new.encode() + row[end:]
    return finish("name", package, file, text, b"".join(rows).decode(), f"{function.name}: {old} -> {new}")


def swap_statements(package: Path, sources: list[Path], rng: random.Random) -> Edit | None:
    """Two neighboring assignments to names; neither reads what the other writes, and at most one calls anything."""
    file, function, text = draw_function(sources, rng)
    if function is None:
        return None
    pairs = [pair for pair in zip(function.body, function.body[1:], strict=False) if are_independent(*pair)]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    lines = text.splitlines(True)
    first, second = lines[one.lineno - 1 : one.end_lineno], lines[other.lineno - 1 : other.end_lineno]
    between = lines[one.end_lineno : other.lineno - 1]
    lines[one.lineno - 1 : other.end_lineno] = [*second, *between, *first]
    return finish("order", package, file, text, "".join(lines), f"{function.name}, line {one.lineno}")


NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.Global, ast.Nonlocal, ast.Match, ast.Try)


def draw_function(
    sources: list[Path], rng: random.Random
) -> tuple[Path, ast.FunctionDef | None, str]:  # fmt: skip
    file = rng.choice(sources)
    text = file.read_text(encoding="utf-8")
    functions = [one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.FunctionDef) and len(one.body) > 1]
    return file, rng.choice(functions) if functions else None, text


def are_independent(one: ast.stmt, other: ast.stmt) -> bool:
    if not (isinstance(one, ast.Assign) and isinstance(other, ast.Assign)) or one.end_lineno == other.lineno:
        return False
    reads, writes, calls = [], [], 0
    for statement in (one, other):
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        targets = [node for target in statement.targets for node in ast.walk(target)]
        if any(not isinstance(node, ast.Name | ast.Tuple | ast.expr_context) for node in targets):
            return False
        writes.append({node.id for node in names if isinstance(node.ctx, ast.Store)})
        reads.append({node.id for node in names if isinstance(node.ctx, ast.Load)})
        calls += any(isinstance(node, ast.Call | ast.Await | ast.Yield | ast.NamedExpr) for node in ast.walk(statement))
    return calls < 2 and not (writes[0] & (reads[1] | writes[1]) or writes[1] & reads[0])


def finish(kind: str, package: Path, file: Path, before: str, after: str, name: str) -> Edit | None:
    path = str(file.relative_to(package))
    compile(after, path, "exec")
    return Edit(kind, f"{path}: {name}", {path: after}) if after != before else None


KINDS: dict[str, Callable[[Path, list[Path], random.Random], Edit | None]] = {
    "words": add_words, "name": rename_local, "order": swap_statements, "draws": change_draws,
}  # fmt: skip
