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
from llm_quest.experiments.verdict_lines import describe_verdict
from llm_quest.files import atomic_write_json, atomic_write_text, damaged_file_errors, load_json
from llm_quest.papers.paper import Paper, judge
from llm_quest.papers.reproduce import SizeResult, reproduce_command

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
VERDICTS = Path(__file__).with_name("verdicts.json")
"""Name -> what the card in docs/papers says, which a wheel does not contain."""
Z90 = 1.645


@dataclass(frozen=True)
class PaperCard:
    """What was measured of a claim. sizes: name -> `SizeResult`."""

    paper: Paper
    sizes: Mapping[str, SizeResult]
    file: Path

    @property
    def verdict(self) -> str:
        """At the largest size that is decided, otherwise at the largest one."""
        found = [size_verdict(self.paper, result) for result in self.sizes.values()]
        return next((one for one in reversed(found) if one in ("confirmed", "refuted")), found[-1])

    @property
    def trend(self) -> str:
        return describe_trend(
            {s: claim_verdict(self.paper, r)["differences"] for s, r in self.sizes.items()}, self.sizes
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "paper": self.paper.name, "claim": self.paper.hash, "verdict": self.verdict, "trend": self.trend,
            "metric": self.paper.metric, "delta": self.paper.delta, "cap": self.paper.cap, "sizes": dict(self.sizes),
        }  # fmt: skip

    def summary(self) -> dict[str, str]:
        """What the package ships of it."""
        last = list(self.sizes.values())[-1]
        return {
            "verdict": self.verdict, "sizes": ", ".join(self.sizes), "date": last["date"], "machine": last["machine"],
            "effect": describe_effect(claim_verdict(self.paper, last)),
        }  # fmt: skip

    def lines(self) -> list[str]:
        result = [f"{self.paper.title} (arXiv:{self.paper.arxiv})", self.paper.claim, ""]
        for size, found in self.sizes.items():
            result += [f"{size}: {size_verdict(self.paper, found)}"]
            result += [f"  {line}" for verdict in found["verdicts"] for line in describe_found(self.paper, verdict)]
        return [*result, *([self.trend] if self.trend else []), f"verdict: {self.verdict}", f"card: {self.file}"]


def claim_verdict(paper: Paper, result: SizeResult) -> Mapping[str, Any]:
    """The verdict of the claim's arm."""
    found: Mapping[str, Any] = next(one for one in result["verdicts"] if one["arm"] == next(iter(paper.arms)))
    return found


def size_verdict(paper: Paper, result: SizeResult) -> str:
    """Undecided where every pair is identical: what the claim is about did nothing in these runs."""
    found = claim_verdict(paper, result)
    if found["differences"] and not any(found["differences"]):
        return "undecided"
    return judge(paper.expect, found["outcome"], found["size"])


def describe_found(paper: Paper, verdict: Mapping[str, Any]) -> list[str]:
    settings = {"metric": paper.metric, "delta": paper.delta, "divergence_bound": None}
    return describe_verdict({**verdict, **settings})


def describe_effect(verdict: Mapping[str, Any]) -> str:
    interval = verdict["interval_95"]
    return f"{interval[0]:+.3g} to {interval[1]:+.3g}" if interval else "not bounded"


def describe_trend(differences: Mapping[str, Sequence[float]], sizes: Mapping[str, SizeResult]) -> str:
    """Whether the effect grows, holds or fades: the slope of the differences against the logarithm of the parameters,
    with its 90 % interval. Empty for one size."""
    points = [
        (math.log2(sizes[size]["arms"][CONTROL]["parameters"]), d) for size, own in differences.items() for d in own
    ]
    means = [statistics.fmean(own) for own in differences.values() if own]
    if len(means) < 2 or len(points) < 4:
        return ""
    x0, y0 = (statistics.fmean(column) for column in zip(*points, strict=True))
    spread = math.fsum((x - x0) ** 2 for x, _ in points)
    slope = math.fsum((x - x0) * (y - y0) for x, y in points) / spread
    freedom = len(points) - 2
    residual = math.fsum((y - y0 - slope * (x - x0)) ** 2 for x, y in points) / freedom
    half = (Z90 + 1.52 / freedom + 1.42 / freedom**2) * math.sqrt(residual / spread)
    away = slope * math.copysign(1.0, means[0])
    word = "holds"
    if away - half > 0:
        word = "grows"
    elif away + half < 0 and abs(means[-1]) < abs(means[0]) / 2:
        word = "fades"
    between = f"90 % between {slope - half:+.3g} and {slope + half:+.3g}"
    return f"{word} with size: {slope:+.3g} per doubling of the parameters, {between}"


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
    found = load_sizes(paper, out / f"{paper.name}.json")
    return PaperCard(paper, found, out / f"{paper.name}.md") if found else None


def load_sizes(paper: Paper, file: Path) -> dict[str, SizeResult]:
    if not file.is_file():
        return {}
    remedy = "remove it, and the claim is measured again"
    content = load_json(file, remedy=remedy)
    with damaged_file_errors(file, remedy):
        if content["claim"] != paper.hash or not content["sizes"]:
            return {}
        found = dict(content["sizes"])
        card = PaperCard(paper, found, file)
        parts = [*card_parts(card), card.summary()]
        assert all(parts), "nothing of a card is empty"
    return found


def card_parts(card: PaperCard) -> Iterator[str]:
    """The paragraphs of the card."""
    paper = card.paper
    yield f"# {paper.title}\n\n[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
    yield f"**Claim.** {paper.claim}"
    expected = paper.expect.replace("difference", "different by more than delta")
    yield (
        f"**Experiment.** {paper.on.about} Arms: {', '.join(arm_words(paper))}. {paper.metric}, delta "
        f"{paper.delta:g}, at most {paper.cap} pairs of runs with shared seeds. Confirmed if the first arm is "
        f"{expected}. Predicted before the first run: {paper.prediction:.0%}."
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
        found = describe_found(card.paper, claim_verdict(card.paper, result))
        parts.append(f"At {size} {found[0]}; {found[1].strip() if len(found) > 1 else ''}")
    return ". ".join([*parts, *([card.trend] if card.trend else [])]) + "."


def table_rows(card: PaperCard) -> Iterator[str]:
    yield "| size | arm | parameters | steps | rate (of those tried) | mean | arm - control, 95 % | pairs | E of K |"
    yield f"|{' --- |' * 9}"
    for size, result in card.sizes.items():
        verdicts = {one["arm"]: one for one in result["verdicts"]}
        for name, arm in result["arms"].items():
            values = [value for value in arm["values"] if value is not None]
            tried = f" ({', '.join(sorted(arm['rates'], key=float))})" if arm["rates"] else ""
            mean = f"{statistics.fmean(values):.4f}" if values else "diverged"
            found = verdicts.get(name)
            last = ("", "", "")
            if found:
                evidence = f"{found['evidence'][-1]:.3g} of {found['threshold']:.3g}" if found["evidence"] else ""
                last = (describe_effect(found), str(found["pairs"]), evidence)
            cells = (size, name, f"{arm['parameters']:,}", f"{arm['steps']:,}", f"{arm['learning_rate']:g}{tried}")
            yield f"| {' | '.join((*cells, mean, *last))} |"


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
    for metric, found in verdict["secondary"].items():
        if found["mean"]:
            yield f"{verdict['arm']}, {metric}, arm - control: mean {found['mean']:+.3g}, 95 % {describe_effect(found)}"


def draw_differences(card: PaperCard) -> str:
    """The paired differences of each size and arm, with the band of delta."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    paper = card.paper
    with mpl.rc_context({"svg.hashsalt": paper.name, "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.2), layout="tight")
        axes = figure.add_subplot()
        axes.axhspan(-paper.delta, paper.delta, color="#eeeeee")
        axes.axhline(0.0, color="#888888", linewidth=0.8)
        series = [(f"{one['arm']}, {size}", one) for size, result in card.sizes.items() for one in result["verdicts"]]
        for number, (label, verdict) in enumerate(series):
            d = verdict["differences"]
            color = COLORS[number % len(COLORS)]
            axes.plot(range(1, len(d) + 1), d, "o-", color=color, markersize=4, linewidth=0.8, label=label)
        axes.set_xlabel("pair")
        axes.set_ylabel(f"{paper.metric}, arm - control")
        axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def shipped_verdicts() -> dict[str, dict[str, str]]:
    """What the package's own cards say, by name."""
    found: dict[str, dict[str, str]] = json.loads(VERDICTS.read_text(encoding="utf-8"))
    return found
