"""Loads the files of wllama (llama.cpp in WebAssembly), which runs a GGUF file in a page: from a package of npm,
checked by their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from llm_quest.cache_dirs import cache_dir, tolerate_cache_errors
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.files import atomic_file

VERSION = "3.13.0"
NPM_FIELDS = ("code", "syscall", "errno", "path", "dest")
"""First words of lines of npm's errors that are no sentences."""
PACKAGE = f"@wllama/wllama@{VERSION}"
MAX_MEMBER_BYTES = 64_000_000
NPM_SECONDS = 300.0
ONCE = f"npm pack {PACKAGE}"
REMEDY = f"get it once where npm and a network are: {ONCE}; then give --wllama wllama-wllama-{VERSION}.tgz"


@dataclass(frozen=True)
class PackageFile:
    """A file of the package: its path there, and the SHA-256 of its bytes."""

    path: str
    sha256: str


FILES = {
    "index.min.js": PackageFile("esm/index.min.js", "e7f3745ee508c111c22d178d23c52cc74016dd8cec39e4600d87e28d287d7981"),
    "wllama.wasm": PackageFile(
        "esm/wasm/wllama.wasm", "79ac5be917b71d50571a4f584436a9f6baf6b6e57719d094ed8bd950e9a65780"
    ),
    "wllama-LICENCE": PackageFile("LICENCE", "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720"),
}
"""Names in a page's folder -> files of the package."""


def load_wllama(given: Path | None = None) -> dict[str, bytes]:
    """Load the files by their names in a page's folder. given: the package as a .tgz, or as a folder; None: from the
    cache, otherwise through npm, whose package is kept in the cache.

    Raises DataError where a file is not that of version 3.13.0; MissingError where npm or its registry is not there."""
    if given is not None:
        return read_package_folder(given) if given.is_dir() else read_package(given)
    cache = cache_dir(f"wllama-{VERSION}")
    with contextlib.suppress(OSError, DataError):  # nothing there yet, or damaged: it is fetched again
        return check_files({name: (cache / name).read_bytes() for name in FILES}, cache)
    files = download_package()
    with tolerate_cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_file(cache / name) as stage:
                stage.write_bytes(content)
    return files


def read_package_folder(folder: Path) -> dict[str, bytes]:
    """The files of an unpacked package."""
    root = folder / "package" if (folder / "package").is_dir() else folder
    if missing := [file.path for file in FILES.values() if not (root / file.path).is_file()]:
        raise DataError(f"{root} is no unpacked package of wllama: {missing[0]} is missing; {REMEDY}")
    return check_files({name: (root / file.path).read_bytes() for name, file in FILES.items()}, root)


def read_package(file: Path) -> dict[str, bytes]:
    """The files of a package as npm packs it. A package with a member that leads out of its folder is refused."""
    if not file.is_file():
        raise UsageError(f"--wllama {file}: no such file or folder; {REMEDY}")
    names = {f"package/{one.path}": name for name, one in FILES.items()}
    contents = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                tarfile.data_filter(member, tempfile.gettempdir())
                if member.name in names and member.isreg() and member.size <= MAX_MEMBER_BYTES:
                    content = archive.extractfile(member)
                    contents[names[member.name]] = content.read() if content else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{file} is no package of npm: {error}; {REMEDY}") from None
    if missing := [name for name in FILES if name not in contents]:
        raise DataError(f"{file} is no package of wllama: {FILES[missing[0]].path} is missing; {REMEDY}")
    return check_files(contents, file)


def check_files(files: dict[str, bytes], source: Path) -> dict[str, bytes]:
    """The files, or DataError where one has another hash."""
    for name, content in files.items():
        if (digest := hashlib.sha256(content).hexdigest()) != FILES[name].sha256:
            raise DataError(
                f"{source}: {FILES[name].path} is not that of wllama {VERSION}: its SHA-256 begins with {digest[:12]}, "
                f"not with {FILES[name].sha256[:12]}; {REMEDY}"
            )
    return files


def download_package() -> dict[str, bytes]:
    """The files of the package that npm gets; nothing of the package is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise MissingError(f"a page needs wllama {VERSION}, and npm, which gets it, is not installed; {REMEDY}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MissingError(f"{ONCE} failed ({type(error).__name__}); {REMEDY}") from None
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packages) != 1:
            raise MissingError(f"{ONCE} failed: {find_npm_reason(done.stderr)}; {REMEDY}")
        return read_package(packages[0])


def find_npm_reason(stderr: str) -> str:
    """The sentence of npm's error, among its codes and its advice; its last line where it is in another form."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no reason given"]
    error_lines = [line.removeprefix("npm error ") for line in lines if line.startswith("npm error ")]
    sentences = [line for line in error_lines if line.split()[0] not in NPM_FIELDS]
    return (sentences or error_lines or lines[-1:])[0][:200]
