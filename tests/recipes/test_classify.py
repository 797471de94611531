"""A classifier, real and tiny: it learns, freezes what it was told to, resumes, and transformers reads it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_quest.cli.classify import classify_text
from llm_quest.cli.export import export_run
from llm_quest.data.document import DropReport
from llm_quest.data.records import Record, read_records
from llm_quest.data.text_classification import (
    collect_label_names,
    encode_labeled_texts,
    parse_labeled_text,
    read_labeled_texts,
)
from llm_quest.errors import DataError, RowError, UsageError
from llm_quest.eval.classification import (
    classification_metrics,
    confusions,
    expected_calibration_error,
    f1_score,
    multi_label_metrics,
)
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.recipes.class_weights import make_class_weights
from llm_quest.report.page import write_report
from tests.later import Later
from tests.recipes.tuned import WORDS, base, start_run, weights

transformers = Later("transformers")
sklearn_metrics, sklearn_class_weight = Later("sklearn.metrics"), Later("sklearn.utils.class_weight")

RECIPE = """
recipe: classify
data: {held_out: 0.2}
batch_size: 8
sequence_length: 24
max_steps: 20
eval_steps: 10
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with a color in it is a color."""
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["mail", "kind"])
        for word in WORDS:
            for n in range(10):
                writer.writerow([f"say, {word} {n}", "color" if word in WORDS[:3] else "thing"])
        writer.writerow([" ", "thing"])
    return file


@pytest.fixture
def pairs(start: Path, table: Path) -> list[str]:
    return [f"model.load={start}", f"data.source={table}", "data.columns={text: mail, label: kind}"]


@pytest.fixture(scope="module")
def classifier_run(start: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    pairs = [f"model.load={start}", f"data.source={table}", "data.columns={text: mail, label: kind}"]
    outcome = start_run("classify", RECIPE, out, *pairs)
    assert outcome.scores["accuracy"] == 1.0
    assert outcome.scores["macro_f1"] == 1.0
    assert 0.5 < outcome.scores["commonest"] < 0.9
    return out


def test_it_tells_apart_what_it_was_taught(classifier_run: Path):
    found = classify_text(str(classifier_run), "say, green 7")
    assert found.label == "color"
    assert sum(found.probabilities.values()) == pytest.approx(1.0)
    assert classify_text(str(classifier_run), "say, moon 7").label == "thing"
    assert json.loads((classifier_run / "data.json").read_text())["dropped"] == {"empty text": 1}


@pytest.mark.filterwarnings("ignore")
def test_the_export_is_a_classifier_in_transformers(classifier_run: Path, tmp_path: Path):
    export_run(classifier_run, tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("say, blue 3", "a tree"):
        with torch.no_grad():
            p = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0].tolist()
        ours = classify_text(str(tmp_path / "out"), text).probabilities
        assert {model.config.id2label[i]: p[i] for i in range(2)} == pytest.approx(ours, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["run", "export", "adapter", "merged"])
def test_as_many_tokens_are_read_as_in_training(form: str, pairs: list[str], tmp_path: Path):
    """What follows them changes nothing, and is counted; transformers' own truncation goes by the same number."""
    run = folder = tmp_path / "run"
    adapted = ["techniques=[{name: lora, rank: 2}]"] if form in ("adapter", "merged") else []
    start_run("classify", RECIPE, run, *pairs, *adapted, "max_steps=2", "sequence_length=8", "eval_steps=0")
    if form != "run":
        folder = tmp_path / "out"
        export_run(run, folder, adapter=form == "adapter", merged=form == "merged")
    text = "say, green 7, and then a moon"
    found = classify_text(str(folder), text)
    whole = load_tokenizer(run).encode(text)
    assert (found.tokens, found.cut) == (8, len(whole) - 8)
    assert classify_text(str(folder), text + " and a tree").probabilities == found.probabilities
    assert "left out" in found.lines()[-1]
    if form != "run":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text, truncation=True)["input_ids"] == whole[:8]


@pytest.mark.parametrize("what", ["last_block", "head"])
def test_what_is_frozen_does_not_move(what: str, start: Path, pairs: list[str], tmp_path: Path):
    start_run("classify", RECIPE, tmp_path / "run", *pairs, f"trainable={what}", "max_steps=3")
    before, after = load(start), load(tmp_path / "run")
    moved = {name for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=False) if not torch.equal(a, b)}  # fmt: skip # noqa: E501
    assert all(name.startswith(("blocks.1.", "norm.")) for name in moved)
    assert bool(moved) == (what == "last_block")


def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(
    classifier_run: Path, pairs: list[str], tmp_path: Path
):
    out = tmp_path / "again"
    pairs = [*pairs, "save_steps=10"]
    start_run("classify", RECIPE, out, *pairs)
    shutil.rmtree(out / "checkpoints" / "step-00000020")
    start_run("classify", RECIPE, out, *pairs)
    assert weights(out, 20) == weights(classifier_run, 20)


def test_mistakes_are_told(pairs: list[str], classifier_run: Path, start: Path, tmp_path: Path):
    with pytest.raises(
        DataError,
        match=r"rows\.csv:2: has the keys mail, kind; expected those of one form: text, label",
    ):
        start_run("classify", RECIPE, tmp_path / "a", *pairs[:2])
    with pytest.raises(UsageError, match="techniques decide what is trained"):
        start_run("classify", RECIPE, tmp_path / "a", *pairs, "techniques=[lora]", "trainable=head")
    with pytest.raises(UsageError, match="the model tells apart color, thing, the texts say"):
        start_run(
            "classify",
            RECIPE,
            tmp_path / "a",
            f"model.load={classifier_run}",
            pairs[1],
            "data.columns={text: mail, label: mail}",
            "data.stratify=false",
        )
    with pytest.raises(UsageError, match="is not a text classifier"):
        classify_text(str(start), "hello")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (range(12), [str(n) for n in range(12)]),
        (["10", "-1", "2"], ["-1", "2", "10"]),
        (["10", "2", "b"], ["10", "2", "b"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_whole_numbers_are_classes_in_their_own_order(labels, names: list[str]):
    rows = [Record({"text": "a", "label": label}, "f:1") for label in labels]
    assert list(collect_label_names(read_labeled_texts(rows, DropReport()))) == names


def test_rows_are_checked_and_cut_texts_counted(start: Path):
    tokenizer, ledger = load_tokenizer(start), DropReport()
    rows = [Record({"text": "a" * 40, "label": 1}, "f:1"), Record({"text": "b", "label": "0"}, "f:2")]
    texts = read_labeled_texts(rows, ledger)
    assert collect_label_names(texts) == ("0", "1")
    made = encode_labeled_texts(texts, ("0", "1"), tokenizer, 16, ledger)
    assert made.label_ids == [(1,), (0,)]
    assert made.item_length(0) == 16
    assert ledger.notes == ["1 texts lost their end beyond 16 tokens"]
    with pytest.raises(DataError, match="all 1 rows have the label"):
        collect_label_names(texts[:1])
    with pytest.raises(RowError, match="f:3: 'text' is a int, expected text"):
        parse_labeled_text(Record({"text": 3, "label": "x"}, "f:3"))
    with pytest.raises(RowError, match=r"f:3: .label. is 0\.5; expected text or a whole number"):
        parse_labeled_text(Record({"text": "a", "label": 0.5}, "f:3"))
    assert parse_labeled_text(Record({"text": "a", "label": "spam "}, "f")).labels == ("spam",)
    with pytest.raises(DataError, match="f:1: the model has no label '1'; it has a, b"):
        encode_labeled_texts(texts, ("a", "b"), tokenizer, 16, ledger)


def test_measures_by_hand():
    """Four texts of two classes: said 0 0 1 1, true 0 1 1 1."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.05, 0.95]])
    found = classification_metrics(p, np.array([0, 1, 1, 1]))
    assert found["accuracy"] == found["commonest"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["loss"] == pytest.approx(-np.log([0.9, 0.2, 0.7, 0.95]).mean())
    assert f1_score(np.array([True, False]), np.array([False, True])) == 0.0
    # confidence 0.95, 0.9 (right, right), 0.8 (wrong), 0.7 (right), each bin by its share
    assert found["calibration_error"] == pytest.approx(0.5 * abs(1 - 0.925) + 0.25 * 0.8 + 0.25 * 0.3)
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == pytest.approx(0.5)


def test_tables_and_json_lines_are_read_alike(table: Path, tmp_path: Path):
    rows = [record.row for record in read_records(table)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [record.row for record in read_records(tmp_path / "rows.jsonl")] == rows


def test_every_spelling_of_several_labels_is_read():
    def labels(row: dict[str, object], separator: str | None = None) -> tuple[tuple[str, ...], bool]:
        found = parse_labeled_text(Record({"text": "a", **row}, "f:1"), label_separator=separator)
        return found.labels, found.is_list

    assert labels({"labels": ["joy", "love", "joy"]}) == (("joy", "love"), True)
    assert labels({"label": [3, 1]}) == (("3", "1"), True)
    assert labels({"labels": []}) == ((), True)
    assert labels({"labels": '["joy", "love"]'}) == (("joy", "love"), True)
    assert labels({"labels": "joy"}) == (("joy",), False)
    assert labels({"label": "joy; love;"}, ";") == (("joy", "love"), True)
    assert labels({"label": "[joy]"}) == (("[joy]",), False)
    with pytest.raises(RowError, match=r"f:1: .labels. is None; expected text or a whole number, or a list"):
        labels({"labels": ["a", None]})


def test_measures_of_several_labels_equal_scikit_learns():
    chance = np.random.default_rng(0)
    p, y = chance.random((40, 5)), (chance.random((40, 5)) < 0.3).astype(float)
    y[:, 4] = 0  # a label that does not occur
    said = p > 0.5
    found = multi_label_metrics(p, y)
    assert found["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(y, said, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(y[:, :4], said[:, :4], average="macro"))
    assert found["accuracy"] == sklearn_metrics.accuracy_score(y, said)
    logits = torch.from_numpy(np.log(p / (1 - p)))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(y))
    assert found["loss"] == pytest.approx(float(bce))
    cases = sklearn_metrics.multilabel_confusion_matrix(y, said)  # [[tn, fp], [fn, tp]] of each label
    assert confusions(p, y)["counts"] == [[m[1][1], m[0][1], m[1][0], m[0][0]] for m in cases.tolist()]


def test_class_weights_balance_the_classes_as_scikit_learn_does():
    names, counts, log = ("a", "b", "c"), [6, 3, 1], lambda line: None
    labels = np.repeat([0, 1, 2], counts)
    theirs = sklearn_class_weight.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert make_class_weights("balanced", names, counts, 10, log).tolist() == pytest.approx(theirs.tolist())
    found = make_class_weights("balanced", names, [6, 0, 10], 10, log, multi_label=True)
    assert found.tolist() == pytest.approx([4 / 6, 1, 1 / 10])
    assert make_class_weights({"b": 5.0}, names, counts, 10, log).tolist() == [1, 5, 1]
    assert make_class_weights((1.0, 2.0, 3.0), names, counts, 10, log).tolist() == [1, 2, 3]
    with pytest.raises(UsageError, match="there is no class 'bb', did you mean 'b'"):
        make_class_weights({"bb": 5.0}, names, counts, 10, log)
    with pytest.raises(UsageError, match="class_weights has 2 numbers for 3 classes"):
        make_class_weights((1.0, 2.0), names, counts, 10, log)


@pytest.fixture(scope="module")
def multi_label_run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on texts of no, one or two words, each of which is a label."""
    folder = tmp_path_factory.mktemp("several")
    words = WORDS[:3]
    chosen = [[word for k, word in enumerate(words) if n >> k & 1] for n in range(7)] * 12
    rows = [{"text": f"{' '.join(some)} {n}", "labels": some} for n, some in enumerate(chosen)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [f"model.load={start}", f"data.source={folder}/rows.jsonl", "max_steps=60", "class_weights=balanced"]
    outcome = start_run("classify", RECIPE, folder / "run", *pairs, "eval_steps=0", "label_smoothing=0.02")
    assert outcome.scores["micro_f1"] > 0.95
    assert outcome.scores["accuracy"] > 0.9
    return folder / "run"


@pytest.mark.filterwarnings("ignore")
def test_a_multi_label_export_scores_the_same_in_transformers(multi_label_run: Path, tmp_path: Path):
    export_run(multi_label_run, tmp_path / "out")
    pipe = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None, device="cpu")
    assert pipe.model.config.problem_type == "multi_label_classification"
    for text, labels in (("red blue 3", {"red", "blue"}), ("green 1", {"green"}), (" 14", set())):
        ours = classify_text(str(tmp_path / "out"), text)
        assert set(ours.labels) == set(classify_text(str(multi_label_run), text).labels) == labels
        assert {one["label"]: one["score"] for one in pipe([text])[0]} == pytest.approx(ours.probabilities, abs=1e-5)
    assert "labels: none" in classify_text(str(multi_label_run), " 14").lines()[3]


def test_the_report_of_several_labels_has_the_cases_of_each(multi_label_run: Path):
    page = write_report([multi_label_run], out=multi_label_run / "page.html").read_text()
    for told in ("wrongly left out", "nats per label", "macro F1, held out"):
        assert told in page, told
    facts = json.loads((multi_label_run / "data.json").read_text())
    assert facts["problem_type"] == "multi_label_classification"
    assert all(held == round(0.2 * (learned + held)) for learned, held in facts["label_counts"].values())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_keeps_what_its_scores_mean(multi_label_run: Path, start: Path, tmp_path: Path):
    pairs = [f"model.load={start}", f"data.source={multi_label_run.parent}/rows.jsonl", "max_steps=1", "warmup_steps=0"]
    start_run("classify", RECIPE, tmp_path / "run", *pairs, "techniques=[lora]", "eval_steps=0")
    export_run(tmp_path / "run", tmp_path / "out", adapter=True)
    ours, theirs = (classify_text(str(folder), "red 1") for folder in (tmp_path / "run", tmp_path / "out"))
    assert ours.is_multi_label
    assert theirs.is_multi_label
    assert theirs.probabilities == pytest.approx(ours.probabilities, abs=1e-6)


def test_problem_types_that_do_not_fit_are_told(
    multi_label_run: Path, pairs: list[str], classifier_run: Path, tmp_path: Path
):
    rows = f"data.source={multi_label_run.parent}/rows.jsonl"
    with pytest.raises(DataError, match=r"rows.jsonl:\d: has a list of labels, and the problem type is single_label"):
        start_run("classify", RECIPE, tmp_path / "a", pairs[0], rows, "problem_type=single_label_classification")
    with pytest.raises(UsageError, match="the model's problem type is single_label_classification"):
        start_run("classify", RECIPE, tmp_path / "a", f"model.load={classifier_run}", *pairs[1:],
                "problem_type=multi_label_classification")  # fmt: skip


def test_rare_labels_are_held_out_and_learned(pairs: list[str], table: Path, tmp_path: Path):
    with table.open() as file:
        rows = list(csv.reader(file))
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        csv.writer(out).writerows([*rows, *[[f"rare {n}", "rare"] for n in range(5)]])
    pairs = [pairs[0], f"data.source={tmp_path}/rows.csv", pairs[2], "max_steps=1", "warmup_steps=0"]
    start_run("classify", RECIPE, tmp_path / "run", *pairs, "class_weights={rare: 8.0}", "eval_steps=0")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["label_counts"]["rare"] == [4, 1]
