"""The walls of all texts that reach the model: fitted one by one, calibrated together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from ..region.blocks import key_of
from ..region.region import Gate, Part
from .bags import ENOUGH, Collected, Room, bags_of, hardest
from .gate import (
    REVIEW,
    RISK,
    SCOUTS,
    SPARE,
    STEPS,
    WallFit,
    first_walls,
    joined,
    judged_all,
    prompt_depths,
    quantiles,
    raised_together,
    ramp_for,
    touched_share,
    towards,
    upper_bound,
    widened,
)
from .text_states import Source, cut, same_length

APART = 25  # every so many harmless prompts tell which walls are best and how their depths compare, and teach nothing
CONTEXTS = (0.0, 0.2)  # walls are fitted with each, see `WallFit`: prompts' averages tell much where many teach them
DEEPEST, WELL = 0.05, 0.9  # of harmless prompts: those near which walls will stand; deeper unsafe ones are enough
LONG = 3.0  # times the budget is what long harmless prompts have: they hold as many chances for an unlucky word
CHANCE, SEPARATES = 0.05, 0.15  # where so many harmless prompts lie deeper, so many unsafe ones are next to none

Encoded = Mapping[str, dict[str, Tensor]]  # by the name of a prompt set: stacked text


@dataclass(frozen=True)
class Walls:
    """The walls of one source, as a gate of the whole block."""

    source: Source
    gate: Gate

    def depths(self, encoded: dict[str, Tensor], constant: Mapping[str, Tensor]) -> Tensor:
        """Of stacked prompts: [N], -inf for those that have no such text."""
        block = self.source.block
        if key_of(block) not in encoded:
            return torch.full((len(next(iter(encoded.values()))),), -torch.inf)
        return prompt_depths(cut(encoded, block), self.gate, constant.get(block))


def known_walls(part: Part) -> list[Walls]:
    """Those of a region that training goes on from."""
    return [Walls(Source(block), gate) for block, gate in part.gates.items()]


def depths_of(walls: Sequence[Walls], states: dict[str, Tensor], constant: Mapping[str, Tensor]) -> Tensor:
    """How deep stacked prompts lie beyond each of the walls: [S, N]."""
    count = len(next(iter(states.values())))
    return torch.stack([one.depths(states, constant) for one in walls]) if walls else torch.zeros(0, count)


def gate_depths(states: dict[str, Tensor], gates: Mapping[str, Gate], constant: Mapping[str, Tensor]) -> Tensor:
    """The largest depth of each stacked prompt beyond the walls of any gate whose text is there: [N]."""
    return depths_of([Walls(Source(block), gate) for block, gate in gates.items()], states, constant).amax(0)


class SourceFit:
    """The walls of one source while they are sought: in bags of tokens that are collected batch by batch."""

    def __init__(
        self, source: Source, sample: Encoded, constant: Mapping[str, Tensor], generator: Generator, room: Room,
        steps: int = STEPS, contexts: Sequence[float] = CONTEXTS[:1],
    ) -> None:  # fmt: skip
        """Args:
            sample: some prompts of the sets `unsafe`, `safe` and `harmless`, from which the walls start.
            contexts: for each there are walls to choose from.
        """  # fmt: skip
        unsafe, safe, harmless = (source.of(sample[name]) for name in ("unsafe", "safe", "harmless"))
        known = constant.get(source.block)
        self.source, self._constant = source, known if known is None else known[:, source.begin : source.end]
        self._room, self._width = room, cut(sample["unsafe"], source.block).shape[-1]
        start = first_walls(unsafe, safe, harmless, self._constant, generator)
        self.start = start
        self._fits = [WallFit(start, generator, steps, context) if i == 0 else
                      WallFit(start, Generator().manual_seed(generator.initial_seed() + i), steps, context)
                      for i, context in enumerate(contexts[: unsafe.shape[1]])]  # fmt: skip
        self._bags = {"unsafe": Collected(), "harmless": Collected()}
        self._scouts = start
        # where all tokens are kept nobody chooses; where few are, they are collected again by walls that know more
        if ENOUGH <= room.size < unsafe.shape[1]:
            scouts = WallFit(start, generator, SCOUTS)
            scouts.run(*(bags_of(tokens, self._counts(kind, tokens), start, generator, tokens.shape[1])
                         for kind, tokens in zip(self._bags, (unsafe, harmless))), SCOUTS)  # fmt: skip
            self._scouts = scouts.gate

    def _counts(self, kind: str, tokens: Tensor) -> Tensor:
        # constant tokens count here as harmless, in case one goes unrecognised later
        return judged_all(tokens, self._constant if kind == "unsafe" else None)

    def collect(self, kind: str, states: dict[str, Tensor], number: int) -> None:
        """From stacked prompts, `unsafe` or `harmless` ones; `number`: of the batch, which chance hangs on."""
        if key_of(self.source.block) not in states:
            return
        tokens = self.source.of(states)
        if not len(tokens):
            return
        bags, counts, generator = self._bags[kind], self._counts(kind, tokens), Generator().manual_seed(number)
        gate, share = self._fits[-1].gate if self.done else self._scouts, self._room.share
        rows = torch.arange(len(tokens))
        if share < 1 and bags.has(number):  # half of those that were kept at first stay
            rows = hardest(tokens, counts, gate, kind == "unsafe", share / 2)
        elif share < 1 and not self.done:
            rows = torch.randperm(len(tokens), generator=generator)[: math.ceil(share * len(tokens))]
        bags.add(number, bags_of(tokens[rows], counts[rows], gate, generator, self._room.size))

    def run(self, until: int, visit: Callable[[int, float, Walls], None]) -> None:
        """Learn from all that was collected by now, by all processes, until so many steps are done."""
        bags = [collected.all() for collected in self._bags.values()]
        while self.done < until:
            end = min(self.done - self.done % REVIEW + REVIEW, until)
            for fit in self._fits[:-1]:
                fit.run(*bags, end)
            self._fits[-1].run(*bags, end, lambda step, loss, gate: visit(step, loss, self._whole(gate)))

    def again(self, unsafe: dict[str, Tensor], safe: dict[str, Tensor]) -> None:
        """All steps once more. Half of the walls begin anew, along the mean difference of these stacked pairs."""
        first, pairs = self.start, [self.source.of(states) for states in (unsafe, safe)]
        for i, fit in enumerate(self._fits):
            new = towards(*pairs, self._constant, first.mean, first.scale, len(first.weight) // 2, fit.generator)
            start = replace(first, weight=torch.cat([first.weight[len(new) :], new]))
            self._fits[i] = WallFit(start, fit.generator, fit.steps, fit.context)

    def _whole(self, gate: Gate) -> Walls:
        return Walls(self.source, gate if self.source.end is None else widened(gate, self.source.begin, self._width))

    @property
    def done(self) -> int:
        """Steps."""
        return self._fits[-1].done

    @property
    def walls(self) -> list[Walls]:
        """As they stand: those to choose from, or the chosen ones."""
        return [self._whole(fit.gate) for fit in self._fits]

    def choose(self, chosen: Sequence[int]) -> None:
        """Go on with these walls only."""
        self._fits = [self._fits[i] for i in chosen]


def alike(source: Source, states: Encoded) -> bool:
    """Whether the text encoder reads both sides of every pair alike."""
    return torch.equal(*same_length(*(source.of(states[name]) for name in ("unsafe", "safe"))))


def best_of(like: Tensor, held: Tensor) -> int:
    """Which walls tell unsafe prompts [S, M] from harmless ones [S, N], by depth: the first, which are the simplest,
    where they do so well enough or there is nothing to compare; else the last that are no worse than these.

    Counted is the mean share of unsafe prompts that lie deeper than one of the deepest harmless ones.
    """
    if not like.shape[1] or not held.shape[1]:
        return 0
    deepest = like.topk(math.ceil(DEEPEST * like.shape[1])).values
    first, *others = (held[:, None] > deepest[..., None]).float().mean((1, 2)).tolist()
    return max((i for i, share in enumerate(others, 1) if first < WELL and share > first - CHANCE), default=0)


def separating(like: Tensor, held: Tensor) -> list[int]:
    """Which walls tell unsafe prompts [S, M] from harmless ones [S, N] at all, by depth; the best where none does.

    The others are left out: they would open on a share of harmless prompts, and on hardly more unsafe ones. Walls stay
    until that is certain.
    """
    most = []
    for deep, depths in zip(quantiles(like, 1 - CHANCE), held):
        there = depths[depths.isfinite()]
        most.append(upper_bound(int((there > deep).sum()), len(there)))
    return [i for i, share in enumerate(most) if share >= SEPARATES] or [max(range(len(most)), key=most.__getitem__)]


def calibrated(
    walls: Sequence[Walls], known: Sequence[Walls], depths: Mapping[str, Tensor], budget: float
) -> tuple[dict[str, Gate], dict[str, Any], dict[str, Tensor]]:
    """Gates by block whose walls together are opened by no more harmless prompts than the budget allows.

    Two kinds of harmless prompts have a budget each: those of `calibration`, and `long` ones. (A wall that stands
    further out for long prompts is no way: how long a prompt is cannot be told from its tokens, since CLIP and T5 fill
    up to a fixed number of them.)

    Args:
        known: walls that stay where they are, beside the others; harmless prompts beyond them are counted, too.
        depths: [S, N] of the sets `like` (harmless prompts that taught none of the walls, and are in no other set),
            `calibration`, `long`, `unsafe` and `held_unsafe`, beyond each of the walls and the known ones.

    Returns the gates, what the region's card says, and by set the largest depth of each prompt beyond these gates [N].
    """
    count = len(walls)
    new, old = ({name: some[part] for name, some in depths.items()} for part in (slice(count), slice(count, None)))
    sources = {one.source.name: 0.0 for one in (*walls, *known)}
    raised, bounds = torch.zeros(0), [0.0, 0.0]
    if len(walls) > 1:
        chosen = separating(new["like"], new["held_unsafe"])
        walls, new = [walls[i] for i in chosen], {name: some[chosen] for name, some in new.items()}
    if walls:
        like = new["calibration"] if len(walls) == 1 else new["like"]
        raised, bounds = raised_together([(new["calibration"], budget), (new["long"], LONG * budget)],
                                         new["held_unsafe"], like, SPARE)  # fmt: skip
    together = [*(replace(one, gate=replace(one.gate, bias=one.gate.bias + by)) for one, by in zip(walls, raised)),
                *known]  # fmt: skip
    left = {name: torch.cat([new[name] - raised[:, None] if walls else new[name], old[name]]) for name in new}
    worst = {name: found.amax(0) for name, found in left.items()}
    if known:  # they may open on some that the new ones do not
        bounds = [upper_bound(int((worst[name] > 0).sum()), len(worst[name])) for name in ("calibration", "long")]
    for one, found in zip(together, left["held_unsafe"]):
        sources[one.source.name] = max(sources[one.source.name], touched_share(found))
    gates = {}
    for block in dict.fromkeys(one.source.block for one in together):
        fresh, kept = ([i for i, one in enumerate(together) if one.source.block == block and (i < len(walls)) == is_new]
                       for is_new in (True, False))  # fmt: skip
        ramps = [ramp_for(left["unsafe"][fresh].amax(0))] if fresh else []
        ramps += [together[i].gate.ramp for i in kept]
        gates[block] = replace(joined([together[i].gate for i in (*fresh, *kept)]), ramp=torch.stack(ramps).amin())
    card = {
        "harmless_prompts": len(worst["calibration"]),
        "budget": budget,
        "confidence": 1 - RISK,
        "bound": bounds[0],
        "bound_long": bounds[1],
        "unsafe_touched": touched_share(worst["unsafe"]),
        "held_out_unsafe": len(worst["held_unsafe"]),
        "held_out_unsafe_touched": touched_share(worst["held_unsafe"]),
        "sources": sources,
    }
    return gates, card, worst
