"""What comes with Python: questions, answers, and answers that are worse by a rule."""

from __future__ import annotations

from llm_quest.data.builtin_qa import builtin_instructions, builtin_preferences, corrupt_answer

TEXT, OTHER = "Return the value of the option.", "Close the file."


def test_the_better_answer_is_the_manuals_sentence_and_the_worse_one_less_or_more_than_that():
    said = {record.row["prompt"]: record.row["completion"] for record in builtin_instructions()}
    rows = [record.row for record in builtin_preferences()]
    assert len(rows) > 2000
    cut = [row for row in rows if row["chosen"].startswith(row["rejected"])]
    run_on = [row for row in rows if row["rejected"].startswith(f"{row['chosen']} ")]
    assert len(cut) + len(run_on) > 0.97 * len(rows), "the rest have lost a comma with their end"
    assert 0.28 < len(run_on) / len(rows) < 0.38
    assert {row["chosen"] for row in rows} <= set(said.values())
    assert not any(row["rejected"].endswith(".") for row in cut)
    assert not any(row["chosen"] == row["rejected"] for row in rows)


def test_at_least_two_words_stay_and_two_go_and_the_question_alone_decides_how():
    found = {corrupt_answer(f"f{number}()", TEXT, OTHER) for number in range(200)}
    assert found == {"Return the", "Return the value", "Return the value of", f"{TEXT} {OTHER}"}
    assert corrupt_answer("f()", TEXT, OTHER) == corrupt_answer("f()", TEXT, OTHER)
