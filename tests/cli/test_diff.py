"""`quest diff` from GPT-2 to Llama."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from llm_quest.cli.diff import definition_source, diff_families, diff_lines, family_layers, first_sentence
from llm_quest.errors import UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.family import Family


@pytest.fixture(scope="module")
def differences():
    return diff_families("gpt2", "llama")


def test_it_begins_with_what_the_page_says_is_new(differences):
    text = "\n".join(differences.lines()[:14])
    assert "What is new after GPT-2" in text
    assert "RMSNorm instead of LayerNorm" in text
    assert "Commonly got wrong" in text


def test_layers_leave_come_and_stay(differences):
    assert {"TokenPositionEmbedding", "LayerNorm", "MLP", "NoRotary"} <= set(differences.removed)
    assert {"TokenEmbedding", "RMSNorm", "GatedMLP", "RotaryEmbedding"} <= set(differences.added)
    assert "GroupedQueryAttention" in differences.shared
    assert differences.added["RMSNorm"].startswith("y = x / sqrt(mean(x^2) + eps) * weight")


def test_the_sizes_nearest_to_each_other_are_compared(differences):
    assert (differences.a, differences.b) == ("gpt2-medium", "smollm2-360m")
    rows = {name: (a, b) for name, a, b in differences.numbers}
    assert rows["parameters"] == ("354,823,168", "361,821,120")
    assert rows["cache bytes per token (bfloat16)"] == ("98,304", "40,960")
    assert rows["num_key_value_heads"] == ("-", "5")


def test_the_code_is_set_line_against_line(differences):
    block = differences.code["block"]
    assert ("removed", "        rotary=NoRotary(),") in block
    assert ("added", "        rotary=config.rotary,") in block
    assert ("same", "        num_attention_heads=config.num_attention_heads,") in block
    assert list(differences.code) == ["Config", "block", "assemble"]


def test_color_changes_nothing_but_color(differences):
    plain, colored = differences.lines(), differences.lines(color=True)
    stripped = [line.replace("\033[0m", "") for line in colored]
    for code in ("\033[1m", "\033[2m", "\033[31m", "\033[32m"):
        stripped = [line.replace(code, "") for line in stripped]
    assert stripped == plain
    assert any(line.startswith("\033[32m+ ") for line in colored)


def test_old_and_new_code_can_be_read_back(differences):
    code = differences.code["assemble"]
    assert next(text for style, text in code if style != "added").startswith("def assemble")
    assert 'ModelSpec("gpt2", config)' in "\n".join(text for style, text in code if style != "added")
    assert 'ModelSpec("gpt2", config)' not in "\n".join(text for style, text in code if style != "removed")


def test_a_family_that_builds_on_another_has_the_layers_that_it_takes_over():
    """OLMo 2 takes Llama's attention and SwiGLU, StarCoder2 its attention by way of Mistral, and no SwiGLU."""
    found = diff_families("llama", "olmo2")
    assert set(found.added) == {"AcrossHeads"}
    assert set(found.removed) == {"Llama3Scaling"}
    assert {"GroupedQueryAttention", "GatedMLP", "RMSNorm"} <= set(found.shared)
    found = diff_families("llama", "starcoder2")
    assert set(found.added) == {"MLP", "gelu_tanh", "LayerNorm"}
    assert set(found.removed) == {"GatedMLP", "RMSNorm", "Llama3Scaling"}


def test_two_presets_of_one_family_differ_in_numbers_alone():
    found = diff_families("llama3.2-1b", "llama3.1-8b")
    assert found.code == {}
    assert found.docstring == ()
    assert ("rotary", "base 500,000, Llama3Scaling x32", "base 500,000, Llama3Scaling x8") in found.numbers


def test_a_preset_stands_for_itself_and_a_family_for_its_nearest_size():
    assert diff_families("gpt2-tiny", "llama3.2-tiny").a == "gpt2-tiny"
    assert diff_families("gpt2", "gpt2-tiny").a == "gpt2"


def test_every_pair_of_neighboring_families_can_be_compared():
    """Layers and code of all, and the numbers, whose counting takes longest, of some: every preset's are printed by
    another test."""
    for a, b in pairwise(FAMILIES):
        assert family_layers(a).keys() != family_layers(b).keys() or block_source(a) != block_source(b)
    tiny = [next(one.name for one in page.presets if one.name.endswith("-tiny")) for page in FAMILIES]
    for a, b in list(pairwise(tiny))[::4]:
        json.dumps(diff_families(a, b).as_json())


def block_source(family: Family) -> list[str]:
    return [line for name in ("Config", "block", "assemble") for line in definition_source(family, name)]


def test_a_thing_is_not_compared_with_itself():
    with pytest.raises(UsageError, match="name two families or presets"):
        diff_families("llama", "llama")


def test_what_is_gone_stands_before_what_is_new():
    assert list(diff_lines(["a", "b"], ["a", "c"])) == [("same", "a"), ("removed", "b"), ("added", "c")]


def test_a_first_sentence_ends_at_its_full_stop():
    def thing():
        """y = a.b, eq. 3 (Ba et al. 2016). Then more."""

    assert first_sentence(thing) == "y = a.b, eq. 3 (Ba et al. 2016)"


def test_from_gpt2_to_vit_and_from_vit_to_a_model_that_talks_about_images():
    seeing = diff_families("gpt2", "vit")
    assert "ImageEmbedding" in seeing.added
    assert "A word is a square of the image" in "\n".join(seeing.docstring)
    rows = {name: (a, b) for name, a, b in diff_families("vit", "vision_language").numbers}
    assert rows["tokens of an image"] == ("197", "576")
    assert rows["cache bytes per token (bfloat16)"] == ("0", "524,288")
