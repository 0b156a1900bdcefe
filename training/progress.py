"""What those who watch a training run are told: where it is, what it measures, how long it will still take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .recipe import Recipe

# What a loss is, for people
WALLS = "error of the walls"
UNSAFE_LEFT = "share of unsafe picture left"
GROUP_LEFT = "share of the way left"

BINS = 48
MOST_POINTS = 300  # of a curve that is shown
MEMORY = 60.0  # seconds after which what a pace was counts a third: a busy moment is no new pace
EXPECTED = 20.0  # seconds for which a stage's pace is what the stages before it make expect
CALM = 30.0  # seconds in which the end that is shown makes up two thirds of its way to a new estimate


@dataclass(frozen=True)
class Separation:
    """How far two kinds of prompts are beyond the walls, which are at depth 0."""

    names: tuple[str, str]  # those that should be inside, those that should be outside
    low: float  # where the first bin begins
    high: float  # where the last one ends
    counts: tuple[list[int], list[int]]  # BINS each
    outside: tuple[float, float]  # share of each kind beyond a wall

    def words(self) -> str:
        """For people."""
        return "outside of the walls: " + ", ".join(
            f"{share:.1%} of {name} prompts" for name, share in zip(self.names, self.outside)
        )


def separation(inside: Tensor, outside: Tensor, names: tuple[str, str] = ("harmless", "unsafe")) -> Separation | None:
    """Of the depths [N] and [M] of prompts that should be inside and outside; None when there are none."""
    finite = [depths[torch.isfinite(depths)].float().cpu() for depths in (inside, outside)]
    both = torch.cat(finite)
    if not len(both):
        return None
    low, high = min(float(both.min()), -0.1), max(float(both.max()), 0.1)
    counts = [torch.histc(depths, BINS, low, high).int().tolist() for depths in finite]
    shares = [float((depths > 0).float().mean()) if len(depths) else 0.0 for depths in finite]
    return Separation(names, low, high, (counts[0], counts[1]), (shares[0], shares[1]))


@dataclass(frozen=True)
class Progress:
    """Where training is; `step` of `total` counts over the whole run."""

    stage: str
    step: int
    total: int
    loss: float | None = None
    preview: Image.Image | None = None  # some pictures without the region, and below them with what is learned by now
    message: str = ""
    measure: str = ""  # what the loss is, for people
    separation: Separation | None = None  # where the walls have just been moved
    seconds_left: float | None = None  # None: it cannot be told yet


def measure(recipe: Recipe, gap: str) -> str:
    """What the losses of a whole run are: `gap`, or what its preset has in place of it."""
    if recipe.preset == "paper":
        return "error"
    return gap if recipe.steps else "share of prompts left inside, before and after"


def duration(seconds: float) -> str:
    """A time as a person would estimate it: a few seconds, about 45 s, about 1 h 20 min."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 55:
        return f"about {5 * round(seconds / 5)} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes if minutes < 10 else 5 * round(minutes / 5), 60)
    return " ".join(["about", *([f"{hours} h"] if hours else []), *([f"{minutes} min"] if minutes else [])])


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """At most that many means of neighbouring values, from the first to the last."""
    size = -(-len(values) // most)
    groups = (values[begin : begin + size] for begin in range(0, len(values), size or 1))
    return [sum(group) / len(group) for group in groups]


def smoothed(values: Sequence[float], place: int) -> float:
    """The mean over the fortieth of the values that ends at this one: what is said of a loss."""
    last = values[max(0, place - max(1, len(values) // 40)) : place + 1]
    return sum(last) / len(last)


def smooth(values: Sequence[float]) -> list[float]:
    """All of them smoothed: what a chart draws."""
    return [smoothed(values, place) for place in range(len(values))]


class TimeLeft:
    """How long a run will still take, by the pace of what it has done.

    A stage that is under way goes on at its own recent pace. One that has not begun takes as long as its share of the
    diffusion model's work says, at the pace of the stages that asked the model before it. Where that is not known yet,
    nobody can tell; only stages of a single step, which take a moment, are taken to cost nothing then.

    `seconds` is the estimate as it stands; `shown` moves towards it slowly, so that it does not jump.
    """

    def __init__(
        self, planned: Mapping[str, int], costs: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
            planned: steps of each stage.
            costs: how much of the diffusion model's work each of the stages is that ask it, in any unit.
        """  # fmt: skip
        self.planned, self.costs, self.clock = dict(planned), costs, clock
        self.done = dict.fromkeys(planned, 0)
        self._last = clock()
        self._recent: dict[str, tuple[float, float]] = {}  # seconds and steps of a stage, the older the less they count
        self._asked = [0.0, 0.0]  # seconds, and the work done in them
        self._end, self._seen, self._estimates = 0.0, self._last, 0  # when the run will end, as it is shown

    def advance(self, stage: str, steps: int) -> None:
        """So many steps of a stage were done since the last call."""
        now = self.clock()
        passed, self._last = now - self._last, now
        seconds, count = self._recent.get(stage, (0.0, 0.0))
        fading = math.exp(-passed / MEMORY) if steps and count else 1.0
        self._recent[stage] = (fading * seconds + passed, fading * count + steps)
        self.done[stage] += steps
        if stage in self.costs and self.planned[stage]:
            self._asked[0] += passed
            self._asked[1] += self.costs[stage] * steps / self.planned[stage]

    def _of(self, stage: str) -> float | None:
        """Seconds that the rest of a stage will take."""
        planned, rest = self.planned[stage], self.planned[stage] - self.done[stage]
        seconds, count = self._recent.get(stage, (0.0, 0.0))
        if not rest:
            return 0.0
        if stage in self.costs and self._asked[1]:
            pace = self._asked[0] / self._asked[1] * self.costs[stage] / planned
            return (seconds + EXPECTED) / (count + EXPECTED / pace) * rest if pace else 0.0
        if count:
            return seconds / count * rest
        return 0.0 if planned == 1 and stage not in self.costs else None

    def seconds(self) -> float | None:
        """The estimate as it stands; None: nobody can tell yet."""
        rests = [self._of(stage) for stage in self.planned]
        known = [rest for rest in rests if rest is not None]
        return sum(known) if len(known) == len(rests) else None

    def shown(self) -> float | None:
        """As `seconds`, for people: the first estimates count alike, later ones only as they last."""
        rest = self.seconds()
        if not rest:
            return rest
        passed, self._seen = self._last - self._seen, self._last
        self._estimates += 1
        trusted = max(1 / self._estimates, 1 - math.exp(-passed / CALM))
        self._end += trusted * (self._last + rest - self._end)
        return self._end - self._last if self._end > self._last else rest


class Ledger:
    """Counts the steps that a run has done, of those planned for each stage, and tells whoever watches."""

    def __init__(
        self, planned: Mapping[str, int], costs: Mapping[str, float], visit: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """See TimeLeft. Whatever `visit` raises goes on to the caller of `report`."""
        self.time, self.visit = TimeLeft(planned, costs, clock), visit
        self.seconds: dict[str, float] = {}  # what each stage has taken
        self._clock, self._last = clock, clock()

    def report(self, stage: str, steps: int = 1, **seen: Any) -> None:
        """So many steps of a stage are done. `seen`: more fields of Progress."""
        now = self._clock()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        self.time.advance(stage, steps)
        done, total = sum(self.time.done.values()), sum(self.time.planned.values())
        self.visit(Progress(stage, done, total, seconds_left=self.time.shown(), **seen))

    def reach(self, stage: str, done: int, **seen: Any) -> None:
        """As `report`, with all steps of the stage that are done by now."""
        self.report(stage, done - self.time.done[stage], **seen)

    def close(self, *stages: str) -> None:
        """These stages are over, with fewer steps than planned perhaps."""
        self.time.planned |= {stage: self.time.done[stage] for stage in stages}


class View:
    """What a run has shown so far: enough for a display to begin at any time."""

    def __init__(self) -> None:
        self.losses: list[float] = []  # of one measure
        self.measure = ""
        self.separation: Separation | None = None
        self.progress = Progress("start", 0, 0)

    def see(self, progress: Progress) -> None:
        self.progress = progress
        if progress.measure and progress.measure != self.measure:
            self.measure, self.losses = progress.measure, []
        if progress.loss is not None:
            self.losses.append(progress.loss)
        self.separation = progress.separation or self.separation

    @property
    def loss(self) -> float:
        """The last one, smoothed as in a chart."""
        return smoothed(self.losses, len(self.losses) - 1) if self.losses else math.nan

    def line(self) -> str:
        """Where the run is, in a line."""
        progress = self.progress
        left = f"{duration(progress.seconds_left)} left" if progress.seconds_left else ""
        return ", ".join(filter(None, (progress.stage, progress.message, left)))

    def words(self) -> str:
        """What a chart of it shows, for those who cannot see it."""
        loss = f"{self.measure}: {self.loss:.3g} after {len(self.losses)}" if self.losses else ""
        return "; ".join(filter(None, (loss, self.separation.words() if self.separation else "")))

    def numbers(self) -> dict[str, Any]:
        """What a chart needs, as plain JSON; small however long the run is."""
        progress = self.progress
        return {
            "stage": progress.stage, "step": progress.step, "total": progress.total, "line": self.line(),
            "words": self.words(), "measure": self.measure, "count": len(self.losses),
            "seconds_left": progress.seconds_left,
            "losses": [float(f"{loss:.4g}") if math.isfinite(loss) else None for loss in thinned(self.losses)],
            "separation": asdict(self.separation) if self.separation else None,
        }  # fmt: skip
