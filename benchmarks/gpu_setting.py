"""What the stages of `benchmarks.gpu` share: the device, the deadline, a result, a clock that waits for the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Result:
    """One row: a verdict in words, or a number with its unit and its share of what the machine can do. ok: False is a
    failure."""

    name: str
    words: str = ""
    value: float | None = None
    unit: str = ""
    share: float | None = None
    ok: bool | None = None

    def text(self) -> str:
        number = "" if self.value is None else f"{self.value:,.4g} {self.unit}"
        share = "" if self.share is None else f"{self.share:.0%} of the peak"
        return ", ".join(part for part in (number, share, self.words) if part)


@dataclass
class Setting:
    """device: where everything runs. tiny: shapes for a test. families: of which presets the laws are
    judged. peaks: what was measured of the device, by name."""

    device: torch.device
    tiny: bool = False
    families: Sequence[str] = ()
    deadline: float = float("inf")
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """Of torch.compile."""
        return "eager" if self.tiny else "inductor"

    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], *, repeats: int = 5, warm_up: int = 2) -> float:
        """The median of some runs, each waited for."""
        times = []
        for number in range(warm_up + repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            if number >= warm_up:
                times.append(time.perf_counter() - start)
        return statistics.median(times)
