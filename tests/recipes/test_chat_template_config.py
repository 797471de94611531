"""The chat template of a recipe: a date that it writes is the run's, and its arguments reach every row."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from llm_quest.data.chat import CHATML_TEMPLATE
from llm_quest.data.problems import Problem
from llm_quest.errors import QuestError, UsageError
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.recipes import chat_template_config
from llm_quest.recipes.chat_template_config import ChatTemplateConfig
from llm_quest.recipes.policy_prompts import ProblemSet, make_prompt_encoder
from tests.recipes.tuned import WORDS, base, start_run, weights, write_rows

COMMON = """
batch_size: 4
sequence_length: 48
max_steps: 2
save_steps: 1
save_total_limit: 9
"""
RECIPES = {
    "sft": "recipe: sft\nsamples: {every_steps: 0}\n",
    "dpo": "recipe: dpo\n",
    "reward": "recipe: reward\n",
    "kto": "recipe: kto\n",
}
DATED = CHATML_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }}")
ASKING = CHATML_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{% if thinking is defined %}red dog{% endif %}")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "model")


def rows_of(name: str, folder: Path) -> Path:
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": "tree" * 2, "completion": word} for word in WORDS]
    keys = ("prompt", "completion") if name == "sft" else ("prompt", "chosen", "rejected")
    return write_rows(folder / "rows.jsonl", [{key: row[key] for key in keys} for row in rows])


def set_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Day(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2026, 3, day)

    monkeypatch.setattr(chat_template_config.datetime, "date", Day)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_the_next_day_where_its_template_writes_the_date(name, start, tmp_path, monkeypatch):
    (tmp_path / "dated.jinja").write_text(DATED)
    pairs = [
        f"model.load={start}", f"data.source={rows_of(name, tmp_path)}",
        f"data.chat_template_path={tmp_path / 'dated.jinja'}", "data.held_out=0.2",
    ]  # fmt: skip
    out = tmp_path / "run"
    set_day(monkeypatch, 1)
    lines: list[str] = []
    start_run(name, RECIPES[name] + COMMON, out, *pairs, log=lines.append)
    assert any("2026-03-01 in the whole run" in line for line in lines)
    whole = weights(out, 2)
    shutil.rmtree(out / "checkpoints" / "step-00000002")
    set_day(monkeypatch, 2)
    start_run(name, RECIPES[name] + COMMON, out, *pairs)
    assert weights(out, 2) == whole
    other = tmp_path / "other"
    start_run(name, RECIPES[name] + COMMON, other, *pairs)
    assert "chat_template_date: '2026-03-02'" in (other / "config.yaml").read_text()
    assert weights(other, 2) != whole


@pytest.mark.parametrize("name", RECIPES)
def test_arguments_of_the_template_are_in_every_row(name, start, tmp_path):
    (tmp_path / "asking.jinja").write_text(ASKING)
    pairs = [
        f"model.load={start}", f"data.source={rows_of(name, tmp_path)}", "data.held_out=0.2",
        f"data.chat_template_path={tmp_path / 'asking.jinja'}",
    ]  # fmt: skip
    start_run(name, RECIPES[name] + COMMON, tmp_path / "plain", *pairs)
    start_run(name, RECIPES[name] + COMMON, tmp_path / "asked", *pairs, "data.chat_template_kwargs={thinking: true}")
    assert weights(tmp_path / "plain", 2) != weights(tmp_path / "asked", 2)
    with pytest.raises(UsageError, match="reads no no_such"):
        start_run(name, RECIPES[name] + COMMON, tmp_path / "none", *pairs, "data.chat_template_kwargs={no_such: 1}")


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("data.chat_template_kwargs={messages: []}", "'messages' is given to every chat template"),
        ("data.chat_template_date=2026-02-31", "day is out of range"),
        ("data.chat_template_date=tomorrow", "chat_template_date"),
    ],
)
def test_what_no_template_can_be_given_is_refused_with_its_key(pair, said, start, tmp_path):
    with pytest.raises(QuestError, match=said):
        start_run("sft", RECIPES["sft"] + COMMON, tmp_path / "run", f"model.load={start}", pair)


def test_a_policys_prompts_have_the_arguments_of_the_template(start):
    """Of a task's prompts and of rows alike; without a chat template they are refused."""
    tokenizer = load_tokenizer(str(start))
    tokenizer.chat_template = ASKING
    problems = ProblemSet(lambda index: Problem("say red", "red", "exact", ""), [], "one")
    given = ChatTemplateConfig(chat_template_kwargs={"thinking": True})

    def prompt(template: ChatTemplateConfig, use: bool | None) -> str:
        encode = make_prompt_encoder(tokenizer, problems, template, apply_chat_template=use, system_prompt=None)
        return tokenizer.decode(encode(problems.train_problem(0)))

    assert "red dog" not in prompt(ChatTemplateConfig(), True)
    assert "red dog" in prompt(given, True)
    assert "red dog" in prompt(given, None)
    with pytest.raises(UsageError, match="have no effect with apply_chat_template=false"):
        prompt(given, False)
    with pytest.raises(QuestError, match=r"for rows give data\.chat_template_kwargs"):
        start_run(
            "grpo", "recipe: grpo\n", Path("never"), f"model.load={start}", "model.preset=null", "warmup=null",
            "data={source: rows.jsonl}", "chat_template_kwargs={thinking: true}",
        )  # fmt: skip
