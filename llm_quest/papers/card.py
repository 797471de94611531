"""The card of a claim: NAME.json, NAME.md and NAME.svg, from what was measured at each size; and the verdicts that the
package ships."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.experiments.arms import CONTROL
from llm_quest.experiments.sequential import sequential_interval
from llm_quest.experiments.verdict_lines import describe_deciding_interval, describe_evidence, describe_verdict
from llm_quest.files import atomic_write_json, atomic_write_text, damaged_file_errors, load_json
from llm_quest.papers.paper import Paper, judge
from llm_quest.papers.reproduce import SizeResult, comparison_claim, reproduce_command

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
VERDICTS = Path(__file__).with_name("verdicts.json")
"""Name -> what the card in docs/papers says, which a wheel does not contain."""


@dataclass(frozen=True)
class PaperCard:
    """What was measured of a claim. sizes: name -> `SizeResult`."""

    paper: Paper
    sizes: Mapping[str, SizeResult]
    file: Path

    @property
    def deciding(self) -> SizeResult:
        """The largest size that is decided, otherwise the largest one."""
        largest_first = list(self.sizes.values())[::-1]
        return next(
            (one for one in largest_first if size_verdict(self.paper, one) in ("confirmed", "refuted")),
            largest_first[0],
        )

    @property
    def verdict(self) -> str:
        return size_verdict(self.paper, self.deciding)

    @property
    def trend(self) -> str:
        return describe_trend(self.paper, self.sizes)

    def as_json(self) -> dict[str, Any]:
        return {
            "paper": self.paper.name, "claim": self.paper.hash, "verdict": self.verdict, "trend": self.trend,
            "metric": self.paper.metric, "scale": self.paper.scale, "delta": self.paper.delta, "cap": self.paper.cap,
            "sizes": dict(self.sizes),
        }  # fmt: skip

    def summary(self) -> dict[str, str]:
        """What the package ships of it."""
        last, trend = self.deciding, self.trend.partition(" ")[0]
        sizes = ", ".join(self.sizes) + (f" ({trend})" if trend else "")
        return {
            "verdict": self.verdict, "sizes": sizes, "date": last["date"], "machine": last["machine"],
            "effect": describe_deciding_effect(claim_verdict(self.paper, last)),
        }  # fmt: skip

    def lines(self) -> list[str]:
        result = [f"{self.paper.title} (arXiv:{self.paper.arxiv})", self.paper.claim, ""]
        for size, size_result in self.sizes.items():
            result += [f"{size}: {size_verdict(self.paper, size_result)}"]
            result += [
                f"  {line}" for verdict in size_result["verdicts"] for line in describe_found(self.paper, verdict)
            ]
        return [*result, *([self.trend] if self.trend else []), f"verdict: {self.verdict}", f"card: {self.file}"]


def claim_verdict(paper: Paper, result: SizeResult) -> Mapping[str, Any]:
    """The verdict of the claim's arm."""
    verdict: Mapping[str, Any] = next(one for one in result["verdicts"] if one["arm"] == next(iter(paper.arms)))
    return verdict


def size_verdict(paper: Paper, result: SizeResult) -> str:
    """Undecided where every pair is identical: what the claim is about did nothing in these runs."""
    verdict = claim_verdict(paper, result)
    if verdict["differences"] and not any(verdict["differences"]):
        return "undecided"
    return judge(paper.expect, verdict["outcome"])


def describe_found(paper: Paper, verdict: Mapping[str, Any]) -> list[str]:
    return describe_verdict(with_terms(paper, verdict))


def with_terms(paper: Paper, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A card's verdict with what is the claim's: metric and delta."""
    claim = comparison_claim(paper)
    return {**verdict, "metric": claim.measure, "delta": claim.delta, "divergence_bound": None}


def describe_effect(verdict: Mapping[str, Any]) -> str:
    interval = verdict["interval_95"]
    return f"{interval[0]:+.3g} to {interval[1]:+.3g}" if interval else "not bounded"


def describe_deciding_effect(verdict: Mapping[str, Any]) -> str:
    """The 90 % interval where it decided and is kept (cards since December 2026); otherwise the 95 % one."""
    interval = verdict.get("interval_90")
    if verdict.get("decided_by") == "interval_90" and interval:
        return f"{interval[0]:+.3g} to {interval[1]:+.3g}, 90 %"
    return describe_effect(verdict)


def describe_trend(paper: Paper, sizes: Mapping[str, SizeResult]) -> str:
    """How the effect of the claim's arm changes from the smallest size to the largest; empty for one size.

    c = (m_2 - m_1) sign(m) +- sqrt(h_1^2 + h_2^2), with m_i -+ h_i the 90 % sequential interval of a size, and m the
    mean that is farther from 0:

        grows     c > 0          fades     c < 0          turns     the two intervals lie on different sides of 0
        holds     -delta < c < delta                      unclear   otherwise"""
    means, halves = [], []
    for verdict in (claim_verdict(paper, result) for result in sizes.values()):
        low, high = sequential_interval(verdict["differences"], paper.cap, 0.1)
        means.append((low + high) / 2)
        halves.append((high - low) / 2)
    if len(means) < 2 or not all(map(math.isfinite, halves)):
        return ""
    change, half = means[-1] - means[0], math.hypot(halves[0], halves[-1])
    farther = max(means[0], means[-1], key=abs)
    if all(abs(means[i]) > halves[i] for i in (0, -1)) and means[0] * means[-1] < 0:
        word = "turns"
    elif abs(change) > half:
        word = "grows" if change * farther > 0 else "fades"
    else:
        word = "holds" if abs(change) + half < comparison_claim(paper).delta else "unclear"
    first, last = next(iter(sizes)), list(sizes)[-1]
    return f"{word} from {first} to {last}: arm - control moves by {change - half:+.3g} to {change + half:+.3g} (90 %)"


def write_card(paper: Paper, sizes: Mapping[str, SizeResult], out: Path) -> PaperCard:
    """Write the files of a card; a size that is there from an earlier run and of the same claim is kept."""
    file = out / f"{paper.name}.json"
    kept = {**load_sizes(paper, file), **sizes}
    card = PaperCard(paper, {s: kept[s] for s in paper.all_sizes if s in kept}, out / f"{paper.name}.md")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(file, card.as_json())
    atomic_write_text(file.with_suffix(".svg"), draw_differences(card))
    atomic_write_text(card.file, "\n\n".join(card_parts(card)) + "\n")
    return card


def load_card(paper: Paper, out: Path) -> PaperCard | None:
    """The card in a folder, if it is of this claim."""
    sizes = load_sizes(paper, out / f"{paper.name}.json")
    return PaperCard(paper, sizes, out / f"{paper.name}.md") if sizes else None


def load_sizes(paper: Paper, file: Path) -> dict[str, SizeResult]:
    if not file.is_file():
        return {}
    remedy = "remove it, and the claim is measured again"
    content = load_json(file, remedy=remedy)
    with damaged_file_errors(file, remedy):
        if content["claim"] != paper.hash or not content["sizes"]:
            return {}
        sizes = dict(content["sizes"])
        card = PaperCard(paper, sizes, file)
        parts = [*card_parts(card), card.summary()]
        assert all(parts), "nothing of a card is empty"
    return sizes


def card_parts(card: PaperCard) -> Iterator[str]:
    """The paragraphs of the card."""
    paper = card.paper
    yield f"# {paper.title}\n\n[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
    yield f"**Claim.** {paper.claim}"
    words = {"not worse": "not worse by delta", "no difference": "not different by more than delta"}
    delta = f"{'log ' if paper.scale == 'log' else ''}{paper.delta:g}"
    yield (
        f"**Experiment.** {paper.bench_spec.about} Arms: {', '.join(arm_words(paper))}. "
        f"{comparison_claim(paper).measure}, delta {delta}, at most {paper.cap} pairs of runs with shared seeds. "
        f"Confirmed if the first arm is {words.get(paper.expect, paper.expect)}. "
        f"Predicted before the first run: {paper.prediction:.0%}."
    )
    yield f"## Verdict: {card.verdict}\n\n{verdict_words(card)}"
    yield f"![paired differences against the pair]({paper.name}.svg)"
    yield "\n".join(table_rows(card))
    yield "\n".join(f"- {line}" for line in details(card))
    if paper.replication:
        yield f"**Elsewhere.** {paper.replication[0].upper() + paper.replication[1:]}."
    if paper.notes:
        yield paper.notes


def arm_words(paper: Paper) -> Iterator[str]:
    for name, pairs in {CONTROL: paper.settings, **paper.arms}.items():
        size = paper.all_sizes[0]
        given = " ".join(paper.fill_in(pairs, size)).replace(
            paper.fill_in(["$generated"], size)[0], "generated_text.py"
        )
        words = [*([f"`{given}`"] if given else []), *([paper.metrics[name]] if name in paper.metrics else [])]
        yield f"{name} ({', '.join(words)})" if words else name


def verdict_words(card: PaperCard) -> str:
    parts = []
    for size, result in card.sizes.items():
        verdict = claim_verdict(card.paper, result)
        outcome, *rest = describe_found(card.paper, verdict)
        lines = rest[: 1 + len(describe_deciding_interval(with_terms(card.paper, verdict)))]
        parts.append("; ".join([f"At {size} {outcome}", *map(str.strip, lines)]))
    return ". ".join([*parts, *([card.trend] if card.trend else [])]) + "."


def table_rows(card: PaperCard) -> Iterator[str]:
    yield "| size | arm | parameters | steps | rate (of those tried) | mean | arm - control, 95 % | pairs | E of K |"
    yield f"|{' --- |' * 9}"
    for size, result in card.sizes.items():
        verdicts = {one["arm"]: one for one in result["verdicts"]}
        for name, arm in result["arms"].items():
            values = [value for value in arm["values"] if value is not None]
            tried = f" ({', '.join(sorted(arm['rates'], key=float))})" if arm["rates"] else ""
            mean = f"{average(card.paper, values):.4f}" if values else "diverged"
            verdict = verdicts.get(name)
            last = ("", "", "")
            if verdict:
                evidence = describe_evidence(verdict) if verdict["evidence"] else ""
                last = (describe_effect(verdict), str(verdict["pairs"]), evidence)
            cells = (size, name, f"{arm['parameters']:,}", f"{arm['steps']:,}", f"{arm['learning_rate']:g}{tried}")
            yield f"| {' | '.join((*cells, mean, *last))} |"


def average(paper: Paper, values: Sequence[float]) -> float:
    """The mean of the metric: of logarithms the geometric one."""
    return statistics.geometric_mean(values) if paper.scale == "log" else statistics.fmean(values)


def details(card: PaperCard) -> Iterator[str]:
    """Cost, date, machine, noise and remarks of each size."""
    for size, result in card.sizes.items():
        sd = claim_verdict(card.paper, result)["standard_deviation"]
        noise = f"differences of pairs vary by {sd:.3g}" if sd is not None else ""
        gain = claim_verdict(card.paper, result)["pairing_gain"]
        pairing = f", pairing gain {gain:.2g}" if gain is not None else ""
        run_sd = result["noise"].get("run_sd")
        yield f"{size}: {noise}{pairing}" + (f"; equal runs of different seeds by {run_sd:.3g}" if run_sd else "")
        seeds = claim_verdict(card.paper, result)["seeds"]
        yield (
            f"{size}: measured on {result['date']} by `{reproduce_command(card.paper, size, *seeds[:1])}`: "
            f"{result['runs']} runs, {result['cpu_seconds']:,} s of CPU, {result['machine']}, torch {result['torch']}, "
            f"code {result['code']}"
        )
        yield from (f"{size}: {line}" for verdict in result["verdicts"] for line in secondary_lines(verdict))
        yield from (f"{size}: {note}" for note in result["notes"])


def secondary_lines(verdict: Mapping[str, Any]) -> Iterator[str]:
    """Differences in the metrics that decide nothing, where there are any."""
    for metric, difference in verdict["secondary"].items():
        if difference["mean"]:
            mean, interval = f"{difference['mean']:+.3g}", describe_effect(difference)
            yield f"{verdict['arm']}, {metric}, arm - control: mean {mean}, 95 % {interval}"


def draw_differences(card: PaperCard) -> str:
    """The paired differences of each size and arm, with the band of delta."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    paper, claim = card.paper, comparison_claim(card.paper)
    with mpl.rc_context({"svg.hashsalt": paper.name, "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.2), layout="tight")
        axes = figure.add_subplot()
        axes.axhspan(-claim.delta, claim.delta, color="#eeeeee")
        axes.axhline(0.0, color="#888888", linewidth=0.8)
        series = [(f"{one['arm']}, {size}", one) for size, result in card.sizes.items() for one in result["verdicts"]]
        for number, (label, verdict) in enumerate(series):
            d = verdict["differences"]
            color = COLORS[number % len(COLORS)]
            axes.plot(range(1, len(d) + 1), d, "o-", color=color, markersize=4, linewidth=0.8, label=label)
        axes.set_xlabel("pair")
        axes.set_ylabel(f"{claim.measure}, arm - control")
        axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def shipped_verdicts() -> dict[str, dict[str, str]]:
    """What the package's own cards say, by name."""
    verdicts: dict[str, dict[str, str]] = json.loads(VERDICTS.read_text(encoding="utf-8"))
    return verdicts
