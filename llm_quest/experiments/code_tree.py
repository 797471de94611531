"""Opens the code that an arm runs: this package, or an edit of it (`--code`), which is a patch, applied to a copy, or a
git worktree without uncommitted changes."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import shutil
import subprocess
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.errors import UsageError

PACKAGE = Path(__file__).parents[1]
EXCLUDED_PARTS = ("cli", "papers", "report", "experiments", "__pycache__")
"""Parts that do not change the result of a run."""


@dataclass(frozen=True)
class CodeTree:
    """A folder that holds `llm_quest`. hash: of the source of what a run computes. revision: where it comes from."""

    root: Path
    hash: str
    revision: str

    @property
    def files(self) -> dict[str, Path]:
        return source_files(self.root / "llm_quest")

    def require_unchanged(self) -> None:
        """UsageError where the files are not those of the hash any more: a process that starts now would run others."""
        if hash_source(self.root) != self.hash:
            raise UsageError(
                f"llm_quest in {self.root} was edited while its runs are measured; take the edit back (git stash), and "
                "the same command goes on; edit in a worktree (git worktree add FOLDER -b BRANCH)"
            )


def source_files(package: Path) -> dict[str, Path]:
    """The files that decide what a run computes, by their path in the package."""
    files = {str(file.relative_to(package)): file for file in package.rglob("*") if file.suffix in (".py", ".yaml")}
    return {name: files[name] for name in sorted(files) if not set(Path(name).parts) & set(EXCLUDED_PARTS)}


def load_code_tree(root: Path, revision: str = "") -> CodeTree:
    """The tree in a folder, with the hash of its source."""
    return CodeTree(root, hash_source(root), revision or describe_revision(root))


def hash_source(root: Path) -> str:
    """The hash of the files that decide what a run computes."""
    digest = hashlib.sha256()
    for name, file in source_files(root / "llm_quest").items():
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def own_code() -> CodeTree:
    """This package, as it was when a process first asked: its modules are imported, and an edit on disk is not run."""
    return load_code_tree(PACKAGE.parent)


def describe_revision(root: Path) -> str:
    """The git commit of a folder, with a plus sign where files have changed since; empty outside of a repository."""
    commit = git(root, "rev-parse", "--short=12", "HEAD")
    if commit.returncode:
        return ""
    return commit.stdout.strip() + ("+" if git(root, "status", "--porcelain", "--", "llm_quest").stdout.strip() else "")


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A git command; its exit code is 127 where there is no git."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, "", "git is not installed")


NAME_READERS = ("locals", "vars", "eval", "exec", "dir")
"""Functions that read the names of local variables."""


def code_content(code: types.CodeType) -> tuple[Any, ...]:
    """The content of compiled code, without line numbers and the names of local variables that are no arguments."""
    arguments = code.co_argcount + code.co_kwonlyargcount + sum(bool(code.co_flags & flag) for flag in (4, 8))
    names = code.co_varnames if set(NAME_READERS) & set(code.co_names) else code.co_varnames[:arguments]
    constants = [
        code_content(constant) if isinstance(constant, types.CodeType) else repr(constant)
        for constant in code.co_consts
    ]
    sizes = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_nlocals, code.co_flags)
    outer = (len(code.co_cellvars), len(code.co_freevars), code.co_exceptiontable)
    return code.co_name, code.co_code, code.co_names, names, *constants, sizes, outer


def source_content(source: str) -> tuple[Any, ...]:
    """The content of a module without its docstrings and comments: other words, layout and names of local variables
    do not make other measurements."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass(lineno=1, col_offset=0)]
    return code_content(compile(tree, "module", "exec", dont_inherit=True, optimize=0))


def differing_files(base: CodeTree, other: CodeTree) -> list[str]:
    """The files of a run whose code differs, by more than words, layout and names of local variables."""
    before, after = base.files, other.files
    changed = [
        name for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name].read_bytes() != after[name].read_bytes()
    ]  # fmt: skip
    return [name for name in changed if not same_code(before.get(name), after.get(name))]


def same_code(one: Path | None, other: Path | None) -> bool:
    """Whether two files compute the same."""
    if one is None or other is None or one.suffix != ".py":
        return False
    try:
        return source_content(one.read_text(encoding="utf-8")) == source_content(other.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return False


def open_edit(given: str, copies: Path) -> CodeTree:
    """The tree of `--code PATCH|WORKTREE`. copies: the folder for copies of this package that patches are applied
    to. UsageError for what is neither, has uncommitted changes, or does not apply."""
    path = Path(given).expanduser()
    if path.is_dir():
        return open_worktree(path.resolve())
    if path.is_file():
        return apply_patch(path.resolve(), copies)
    raise UsageError(f"--code {given}: there is no such file or folder; give a patch (git diff > FILE) or a worktree")


def open_worktree(folder: Path) -> CodeTree:
    """A git worktree of the package."""
    if not (folder / "llm_quest" / "__init__.py").is_file():
        raise UsageError(
            f"--code {folder} holds no llm_quest; give the root of a worktree (git worktree add DIR BRANCH)"
        )
    status = git(folder, "status", "--porcelain", "--", "llm_quest")
    if status.returncode:
        raise UsageError(
            f"--code {folder} is no git worktree ({status.stderr.strip().splitlines()[-1:]}); give a patch"
        )
    if changes := status.stdout.splitlines():
        files = ", ".join(line[3:] for line in changes[:3])
        raise UsageError(
            f"--code {folder} has uncommitted changes ({files}{', ...' if len(changes) > 3 else ''}), so "
            "that code could not be run again\ncommit them there, or give them as a patch: git diff > edit.patch"
        )
    return load_code_tree(folder)


def apply_patch(patch: Path, copies: Path) -> CodeTree:
    """This package with a patch, in a folder of its own that is made once."""
    base = own_code()
    digest = hashlib.sha256(base.hash.encode() + patch.read_bytes()).hexdigest()[:16]
    root = (copies / digest).absolute()
    if not (root / "llm_quest").is_dir():
        stage = root.with_name(f".tmp-{root.name}-{os.getpid()}")
        shutil.rmtree(stage, ignore_errors=True)
        shutil.copytree(PACKAGE, stage / "llm_quest")  # with compiled files, which hold the times of their sources
        try:
            run_patch(patch, stage)
            stage.rename(root)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return load_code_tree(root, f"{base.revision} with {patch.name}")


def is_applied(patch: Path, root: Path, environment: Mapping[str, str]) -> bool:
    """Whether a patch's edit is in a copy of the package already: it can be taken back."""
    command = ["git", "apply", "--whitespace=nowarn", "--reverse", "--check", str(patch)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode == 0


def run_patch(patch: Path, root: Path) -> None:
    """Apply a patch to a copy. UsageError with git's reason."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    command = ["git", "apply", "--whitespace=nowarn", str(patch)]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("--code PATCH needs git, which is not installed") from None
    if done.returncode and is_applied(patch, root, environment):
        raise UsageError(
            f"--code {patch}: its edit is in this package already, so the control would run it too; take it back: "
            f"git apply -R {patch}"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["unknown"])[0]
        raise UsageError(
            f"--code {patch} does not apply to this package: {reason}\nmake it here: git diff > {patch.name}"
        )
