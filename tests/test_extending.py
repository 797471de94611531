"""`book/extending.md` is followed to the letter. Its commands of pytest, and the experiment of its paper, run with
`python -m tests.extending`."""

from __future__ import annotations

import re

import pytest

from tests import extending
from tests.extending import Instruction, RecipeError, apply_edit, apply_instruction, copy_package, read_instructions


def test_the_page_has_a_recipe_for_each_way_to_extend():
    found = [one.section for one in read_instructions() if one.kind == "console"]
    assert found == ["A family", "A technique", "A preference loss", "A reward", "A task", "A recipe", "A paper"]
    fences = extending.PAGE.read_text(encoding="utf-8").count("\n```")
    assert fences == 2 * len(read_instructions()), "a block that nobody follows"


def test_files_and_edits_of_the_page_can_be_made_and_its_commands_run(tmp_path):
    copy_package(tmp_path)
    for one in read_instructions():
        apply_instruction(one, tmp_path)
    ended = extending.run_in_copy(tmp_path, quick=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(re.findall(r"^ok: quest", ended.stdout, re.M)) == 14


@pytest.mark.parametrize(("text", "said"), [("a\nc\n", "0 times"), ("a\nb\na\nb\n", "2 times"), (" a\nb", "0 times")])
def test_an_edit_whose_lines_are_not_there_once_is_refused(text, said):
    with pytest.raises(RecipeError, match=said):
        apply_edit(text, Instruction("diff", "file.py", " a\n+new\n b\n", ""))
    assert apply_edit("a\nb\nc\n", Instruction("diff", "file.py", " a\n+new\n b\n", "")) == "a\nnew\nb\nc\n"
