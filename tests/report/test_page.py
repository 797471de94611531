"""What the page says, and what it may never do."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm_quest.errors import DataError, UsageError
from llm_quest.report.page import parse_settings, write_report
from llm_quest.report.record import OLD_METRICS, read_run
from tests.report.folders import row, write_finished_run, write_json, write_rows


class Reader(HTMLParser):
    """The visible text, the tags, and every attribute of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.attributes, self.inside = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside.append(tag)

    def handle_endtag(self, tag):
        self.text += " " if tag in ("td", "th", "p", "div", "b") else ""
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text += data


def read(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report_page(tmp_path_factory) -> Path:
    """The page of a finished run."""
    return write_report([write_finished_run(tmp_path_factory.mktemp("runs") / "run")])


def test_a_finished_run_is_told_in_a_sentence_with_its_numbers(report_page):
    seen = read(report_page).text
    assert (
        "A llama-style model of 12,345 parameters was trained for 60 steps on 30,720 tokens of builtin:topics" in seen
    )
    assert (
        "A byte of held-out text costs it 2.125 bits; the best baseline (Kneser-Ney 5-gram, bytes) needs 2.250." in seen
    )
    assert "finished" in seen
    assert "no compiler: install g++" in seen


def test_the_plan_stands_beside_what_was_measured(report_page):
    seen = " ".join(read(report_page).text.split())
    assert "tokens per second 2,000 1,031 0.515" in seen
    assert "a step 0.256 s 0.497 s 1.94" in seen
    assert "memory: weights 49.4 kB" in seen


def test_samples_stand_in_the_order_of_their_steps(report_page):
    seen = read(report_page).text
    places = [seen.index(f"answer of step {step}") for step in (20, 40, 60)]
    assert places == sorted(places)


def test_the_page_fetches_nothing_and_runs_nothing(report_page):
    seen = read(report_page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(seen.tags)
    policy = next(value for name, value in seen.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    addresses = [value for name, value in seen.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"@import|url\((?!#)", report_page.read_text(encoding="utf-8"))


def test_whatever_a_run_holds_is_shown_as_text(tmp_path):
    folder = write_finished_run(tmp_path / "run", config="note: </pre><script>alert(1)</script>\n")
    hostile = [{"prompt": "<img src=x onerror=alert(1)>", "text": "a\u202eb\x1b[31mc"}]
    write_json(folder / "samples" / "step-00000070.json", {"step": 70, "samples": hostile})
    write_rows(folder / "events.jsonl", [{"time": "", "event": "<b>", "message": '"><svg onload=alert(1)>'}])
    write_json(folder / "data.json", {"corpus": {"name": "<script>", "ledger": {"notes": ["<script>x</script>"]}}})
    seen = read(write_report([folder]))
    assert not {"script", "img"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<img src=x onerror=alert(1)>" in seen.text
    assert "ab[31mc" in seen.text


def test_secrets_in_the_environment_are_not_shown(tmp_path):
    folder = write_finished_run(tmp_path / "run")
    write_json(folder / "env.json", {"variables": {"HF_TOKEN": "hf_abc", "MY_API_KEY": "k123", "threads": 2}})
    text = write_report([folder]).read_text(encoding="utf-8")
    assert "hf_abc" not in text
    assert "k123" not in text
    assert "variables.threads" in text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    seen = read(write_report([tmp_path])).text
    assert "not begun" in seen
    assert "nothing to draw" in seen


def test_a_run_in_progress_with_a_torn_last_line_has_a_page(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [row(1), row(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    seen = read(write_report([tmp_path])).text
    assert "trained for 2 steps" in seen
    assert "not finished" in seen


def test_steps_that_were_not_finite_are_marked_and_counted(tmp_path):
    bad = {"loss": None, "grad_norm": None, "nonfinite": ["loss", "grad_norm"], "skipped_steps": 1}
    write_rows(tmp_path / "metrics.jsonl", [row(step) for step in range(1, 30)] + [row(30, **bad), row(31, skipped=1)])
    page = write_report([tmp_path])
    assert "skipped updates" in read(page).text
    assert "not finite</text>" in page.read_text(encoding="utf-8")


def test_several_runs_are_compared_on_one_page(tmp_path):
    first = write_finished_run(tmp_path / "a" / "run")
    second = write_finished_run(tmp_path / "b" / "run", config="seed: 0\noptimizer:\n  lr: 0.002\n")
    page = write_report([first, second], out=tmp_path / "both.html")
    seen = " ".join(read(page).text.split())
    assert page == tmp_path / "both.html"
    assert "2 runs compared" in seen
    assert "optimizer.lr 0.001 0.002" in seen
    assert "seed 0 0" not in seen
    assert "run (1)" in seen


def test_the_settings_of_a_config_are_read_with_their_paths():
    config = "seed: 3\noptimizer:\n  name: muon\n  betas:\n  - 0.9\n  - 0.95\nbatch:\n  rows: 8\n"
    expected = {"seed": "3", "optimizer.name": "muon", "optimizer.betas": "- 0.9 - 0.95", "batch.rows": "8"}
    assert dict(parse_settings(config)) == expected


def test_the_same_run_gives_the_same_page(report_page):
    assert (
        write_report([report_page.parent], out=report_page.parent / "again.html").read_bytes()
        == report_page.read_bytes()
    )


def test_a_page_of_ten_thousand_steps_stays_small(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [row(step) for step in range(1, 10_001)])
    assert write_report([tmp_path]).stat().st_size < 400_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl:2 is not JSON"),
        ("plan.json", "[1, 2]", "holds a list; expected a JSON object"),
        ("env.json", "{", "env.json is not JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, said):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(said)):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="is no run folder"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="no run folder was given"):
        write_report([])


def test_an_earlier_page_survives_a_failed_one(tmp_path):
    folder = write_finished_run(tmp_path / "run")
    (folder / "report.html").write_text("an earlier page")
    (folder / "plan.json").write_text("{")
    with pytest.raises(DataError):
        write_report([folder])
    assert (folder / "report.html").read_text() == "an earlier page"
    assert [file.name for file in folder.iterdir() if file.name.startswith(".report")] == []


def test_the_metrics_of_the_first_version_are_shown_under_todays_names(tmp_path):
    folder = write_finished_run(tmp_path / "run")
    new = (folder / "metrics.jsonl").read_text()
    record = read_run(folder)
    old = new
    for before, now in OLD_METRICS.items():
        old = old.replace(f'"{now}"', f'"{before}"')
    assert old != new
    (folder / "metrics.jsonl").write_text(old)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "guard stop", "step": 60}\n')
    again = read_run(folder)
    assert again.rows == record.rows
    assert again.events[-1]["event"] == "stopped_by_guard"
    assert set(again.rows[0]) >= {"learning_rate", "train_seconds", "skipped_steps"}


def run_of(folder: Path, recipe: str, rows: list[dict], **files: dict) -> Path:
    """A run folder of a recipe with these rows."""
    write_rows(folder / "metrics.jsonl", rows)
    (folder / "config.yaml").write_text(f"recipe: {recipe}\nseed: 0\n")
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def words(page: Path) -> str:
    """The visible text, in one line."""
    return " ".join(Reader(page.read_text(encoding="utf-8").replace("</span>", "</span> ")).text.split())


def headings(page: Path) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page.read_text(encoding="utf-8"))


POLICY = {
    "reward": 0.5, "rewards/format": 0.9, "completions/mean_length": 12.0, "entropy": 0.75, "kl": 0.02,
    "frac_reward_zero_std": 0.25, "completions/clipped_ratio": 0.125, "ratio/max": 1.5, "ratio/min": 0.5,
}  # fmt: skip
PREFERENCE = {
    "rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/margin": 0.75, "rewards/accuracy": 0.875,
    "logps/chosen": -30.0, "logps/rejected": -33.0,
}  # fmt: skip


def test_a_policy_is_shown_by_what_it_is_watched_by_and_was_before(tmp_path):
    rows = [row(step, **POLICY) for step in range(1, 21)]
    rows[-1] |= {"eval/accuracy": 0.75, "eval/reward": 2.5, "eval/length": 9.0}
    folder = run_of(tmp_path / "run", "grpo", rows)
    (folder / "samples").mkdir()
    answers = [{"prompt": "2+2=", "text": "4", "reward": 2.25}, {"prompt": "2+3=", "text": "4", "reward": None}]
    write_json(folder / "samples/step-00000020.json", {"step": 20, "samples": answers})
    write_rows(folder / "events.jsonl", [{"event": "evaluated", "step": 0, "eval/accuracy": 0.25}])
    page = write_report([folder])
    seen = words(page)
    for told in (
        "reward 0.500", "length of completions 12.0 tokens", "entropy 0.750 nats", "KL to the reference 0.0200 nats",
        "groups without spread 25.0%", "cut off 12.5%", "held-out accuracy 0.750", "0.250 before",
    ):  # fmt: skip
        assert told in seen, told
    assert "training loss" not in seen
    assert headings(page)[:2] == ["Reward", "Policy loss"]
    wanted = {"Accuracy", "Length of completions", "Entropy", "KL to the reference", "Shares of samples"}
    assert wanted <= set(headings(page))
    record = read_run(folder)
    assert record.series("eval/accuracy") == ([0, 20], [0.25, 0.75])
    assert set(record.scores) == {"accuracy", "reward"}, "a reward may be any number"
    assert "after 20 steps, reward 2.25" in seen
    assert seen.count(", reward ") == 1


def test_preferences_are_shown_by_margin_accuracy_and_both_answers(tmp_path):
    page = write_report([run_of(tmp_path / "run", "dpo", [row(step, **PREFERENCE) for step in range(1, 21)])])
    seen = words(page)
    for told in ("training margin 0.750", "training accuracy 87.5%", "reward of chosen 0.500", "nats per pair"):
        assert told in seen, told
    assert {"Rewards of pairs", "Accuracy", "Log-probability of answers"} <= set(headings(page))


def test_a_classifier_is_shown_with_its_labels_and_its_confusions(tmp_path):
    data = {
        "train_rows": 90, "held_out_rows": 10, "dropped": {"no label": 3}, "notes": ["two texts were alike"],
        "label_counts": {"joy": [60, 6], "anger": [30, 4]}, "unused_keys": {"scores": 90},
        "skipped": {"rows": 2, "kinds": {"not JSON": 2}, "first": ["a.jsonl:3: is not JSON"]},
    }  # fmt: skip
    confusion = {"labels": ["joy", "anger"], "matrix": [[5, 1], [0, 4]]}
    rows = [row(step, accuracy=0.5) for step in range(1, 21)]
    seen = " ".join(
        read(write_report([run_of(tmp_path, "classify", rows, data=data, confusion=confusion)])).text.split()
    )
    for told in (
        "trained on 90 rows", "held out 10 rows", "not used: no label 3 rows",
        "cannot be used: not JSON 2 rows", "key that nothing reads: scores 90 rows", "two texts were alike",
        "joy 60 6 anger 30 4", "joy 5 1 anger 0 4", "nats per text",
    ):  # fmt: skip
        assert told in seen, told


def test_the_training_loss_is_the_main_loss_of_every_run_and_other_terms_have_names(tmp_path):
    plain = run_of(tmp_path / "plain", "pretrain", [row(1, loss=3.0), row(2, loss=2.0)])
    more = {"lookahead_1": 4.0, "load_balancing": 1.25}
    ahead = run_of(tmp_path / "ahead", "pretrain", [row(s, loss=5.0, next_token=2.5, **more) for s in (1, 2)])
    both = words(write_report([plain, ahead], out=tmp_path / "both.html"))
    assert "training loss 2.000 2.500" in both
    alone = words(write_report([ahead]))
    for told in ("training loss 2.500", "optimized sum 5.000", "term: 1 tokens further 4.0000", "term: load balancing"):
        assert told in alone, told
    assert "optimized sum" not in read(write_report([plain])).text


def test_several_policies_are_compared_by_one_line_of_each_family(tmp_path):
    runs = [run_of(tmp_path / name, "grpo", [row(s, **POLICY) for s in (1, 2, 3)]) for name in ("a", "b")]
    page = write_report(runs, out=tmp_path / "both.html")
    assert "Shares of samples: groups without spread" in headings(page)
    assert "Importance ratio: largest" in headings(page)
