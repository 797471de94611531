"""YAML from strangers: what is read, and what is refused before it costs anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.errors import DataError, UsageError
from llm_quest.recipes.yaml_io import MAX_BYTES, apply_overrides, dump_yaml, flatten_tree, read_yaml, read_yaml_file

LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
TREE = st.dictionaries(
    st.text("abcdefgh_", min_size=1, max_size=8),
    st.recursive(
        LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1), inner, max_size=3)
    ),
    max_size=5,
)


@given(TREE)
def test_what_is_written_is_read_again(tree: dict) -> None:
    assert read_yaml(dump_yaml(tree), "it").tree == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E4", 5e4),
        (".5", 0.5),
        ("1_000", 1000),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("[a, 2]", ["a", 2]),
        ("'1'", "1"),
    ],
)
def test_words_are_read_by_the_rules_of_yaml_1_2(text: str, value: object) -> None:
    found = read_yaml(f"key: {text}", "it").tree["key"]
    assert found == value
    assert type(found) is type(value)


BOMB = "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 'lol'}]" for i in range(10))
MANY = "a: &a [" + "1, " * 400 + "]\n" + "\n".join(f"b{i}: *a" for i in range(30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        (MANY, "10,000 values"),
        ("a: &a [*a]", "10,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "32 deep"),
        ("a: !!python/object/apply:os.system [echo hacked]", "constructor"),
        ("a: !!python/name:os.system", "constructor"),
        ("a: 1\nb: 2\na: 3", "written twice, first in line 1"),
        ("a: {b: 1, b: 2}", "a.b: written twice"),
        ("a: 1\n---\nb: 2", "several documents"),
        ("- 1\n- 2", "`key: value` lines"),
        ("just words", "`key: value` lines"),
        ("a: [1", "it:1: not YAML"),
        ("a: \t- b", "not YAML"),
        ("a: \x00", "not YAML"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("x" * (MAX_BYTES + 1), "more than 1,048,576 bytes"),
    ],
)
def test_an_attack_or_a_slip_is_one_mistake_with_its_place(text: str, said: str) -> None:
    settings = read_yaml(text, "it")
    assert settings.tree == {}
    assert any(said in str(mistake) for mistake in settings.problems), settings.problems
    assert all(len(str(mistake)) < 300 and "\n" not in str(mistake) for mistake in settings.problems)


def test_every_key_twice_is_told_not_only_the_first() -> None:
    assert len(read_yaml("a: 1\nb: 1\na: 2\nb: 2", "it").problems) == 2


def test_a_pair_replaces_what_the_file_says_and_is_named_in_messages() -> None:
    settings = apply_overrides(
        read_yaml("samples:\n  temperature: 1\n  name: adamw", "my.yaml"),
        ["samples.temperature=1e-4", "samples.prompts=[a, b]", "note=a: b"],
    )
    assert settings.tree == {
        "samples": {"temperature": 1e-4, "name": "adamw", "prompts": ["a", "b"]},
        "note": "a: b",
    }
    assert settings.location(("samples", "name")) == "my.yaml:3"
    assert settings.location(("samples", "temperature")) == "argument 'samples.temperature=1e-4'"
    assert settings.location(("samples", "prompts", "0")) == "argument 'samples.prompts=[a, b]'"


@pytest.mark.parametrize("pair", ["steps", "=3", "a..b=1", ".a=1"])
def test_a_pair_without_a_key_or_a_value_is_a_mistake(pair: str) -> None:
    assert "write key=value" in str(apply_overrides(read_yaml("", "it"), [pair]).problems[0])


def test_a_file_that_cannot_be_settings_is_told_by_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: Zoë".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.yaml is not UTF-8 \(byte 8\)"):
        read_yaml_file(latin)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="at most 1,048,576"):
        read_yaml_file(large)
    with pytest.raises(UsageError, match="no regular file"):
        read_yaml_file(Path("/dev/zero"))


def test_flat_names_every_leaf_by_its_dotted_key() -> None:
    assert dict(flatten_tree({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
