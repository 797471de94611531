"""MANIFEST.json of a checkpoint: its step, what it depends on, and the size and hash of each of its files. Every
reader of a checkpoint, for training as for generation, asks here whether it is whole.

The hash is XXH3 (128 bits), which runs at the speed of memory: it finds damage, and is no signature. Manifests of
earlier versions hold sha256, and are verified by that."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from llm_quest.errors import DataError
from llm_quest.files import file_sha256, load_json

MANIFEST_FILE = "MANIFEST.json"
MAX_MANIFEST_BYTES = 64_000_000
MAX_HASHING_THREADS = 4
GROUP = "a group of keys"
BLOCK = 2**20
"""Bytes read at a time: they stay in the processor's cache while they are hashed."""


def file_xxh3(file: Path) -> str:
    """XXH3 (128 bits) of a file's bytes, in hexadecimal."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


HASHES = {"xxh3_128": file_xxh3, "sha256": file_sha256}
"""By their name in a manifest. The first one is written."""


def file_entry(file: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    name, compute = next(iter(HASHES.items()))
    return {"size": file.stat().st_size, name: compute(file)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. DataError, with the field, for one that is missing, damaged or of another form."""
    file = folder / MANIFEST_FILE
    content = load_json(file, object, limit=MAX_MANIFEST_BYTES)
    wrong = _find_wrong_field(content)
    if wrong:
        raise DataError(f"{file}: {wrong}")
    return content  # type: ignore[no-any-return]


def _find_wrong_field(content: Any) -> str:
    """Which field of a manifest has another type than we write; empty if none."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, expected an object"
    for name, kind in (("format", int), ("step", int), ("identity", dict), ("files", dict)):
        if not isinstance(content.get(name), kind):
            return f"{name} is {str(content.get(name))[:40]!r}, expected {'a number' if kind is int else 'an object'}"
    for name, entry in content["files"].items():
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            return f"files: {name!r} leads out of the checkpoint"
        if not (isinstance(entry, Mapping) and isinstance(entry.get("size"), int) and HASHES.keys() & entry.keys()):
            return f"files: {name} has no size and hash ({' or '.join(HASHES)})"
    return ""


def find_fault(folder: Path, verify: str = "full", only: Collection[str] = ()) -> str:
    """What is wrong with a checkpoint; empty if nothing. verify: full (hashes), size, or none (the list alone). only:
    names of the files that will be read; without it all are checked."""
    try:
        files = read_manifest(folder)["files"]
        missing = [name for name in only if name not in files]
        if missing:
            return f"its manifest does not list {missing[0]}"
        names = list(only or files)
        with ThreadPoolExecutor(min(len(names) or 1, MAX_HASHING_THREADS)) as pool:  # hashing frees the interpreter
            faults = list(pool.map(lambda name: _find_file_fault(folder / name, files[name], verify), names))
        return next(filter(None, faults), "")
    except (OSError, DataError) as error:
        return f"its manifest cannot be read or lists a file that is missing ({error})"


def _find_file_fault(file: Path, entry: Mapping[str, Any], verify: str) -> str:
    seen = file.stat()
    if verify != "none" and seen.st_size != entry["size"]:
        return f"{file.name} has {seen.st_size} bytes, its manifest says {entry['size']}"
    for name in [name for name in HASHES if name in entry and verify == "full"]:
        if _hash_at(name, file, seen.st_size, seen.st_mtime_ns, seen.st_ino) != entry[name]:
            return f"{file.name} does not have the {name} of its manifest"
    return ""


@lru_cache(maxsize=64)
def _hash_at(name: str, file: Path, size: int, mtime_ns: int, inode: int) -> str:
    """The hash of a file in this state: model, tokenizer and image settings of one run are located one by one."""
    return HASHES[name](file)


def _parse_settings(text: str) -> dict[str, Any] | None:
    """The object of an identity's value; None where it is none."""
    try:
        settings = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def describe_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """What differs between the identities of a checkpoint and of the run that would resume it: name -> how it is
    called in a message. A name that the checkpoint does not know is of a newer version. Of a value that is a JSON
    object each key that differs is named (`differing_keys`)."""
    changes = {name: f"{name} (there is none now)" for name in sorted(saved.keys() - now.keys())}
    for name in sorted(now):
        if saved.get(name, now[name]) == now[name]:
            continue
        before = _parse_settings(saved[name]) if now[name].startswith("{") else None
        if before is None:
            changes[name] = name
            continue
        after = json.loads(now[name])
        keys = differing_keys(before, after)
        if keys:
            listing = "; ".join(f"{key}: {before.get(key, GROUP)!r} -> {after.get(key, GROUP)!r}" for key in keys[:6])
            changes[name] = f"{name} ({listing})"
    return changes


def differing_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ. A key that one side alone has is of another version, unless it is part of a
    group that the other side says is null or empty."""
    both = [key for key in before if after.get(key, before[key]) != before[key]]
    groups: set[str] = set()
    for mine, other in ((before, after), (after, before)):
        for key in mine.keys() - other.keys():
            above = [key[:at] for at, sign in enumerate(key) if sign == "."]
            groups |= {group for group in above if group in other and not other[group]}
    return both + [group for group in sorted(groups) if group not in both]
