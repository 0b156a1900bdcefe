"""The walls of all texts that reach the model: fitted one by one, calibrated together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..region.blocks import key_of
from ..region.region import Gate, Part
from .gate import (
    RISK,
    SPARE,
    fit_gate,
    joined,
    prompt_depths,
    quantiles,
    raised_together,
    ramp_for,
    touched_share,
    upper_bound,
    widened,
)
from .text_states import Source, cut, same_length

APART = 25  # every so many harmless prompts tell how the depths of several texts compare, and teach nothing
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


def gate_depths(encoded: dict[str, Tensor], gates: Mapping[str, Gate], constant: Mapping[str, Tensor]) -> Tensor:
    """The largest depth of each stacked prompt beyond the walls of any gate whose text is there: [N]."""
    return torch.stack([Walls(Source(block), gate).depths(encoded, constant) for block, gate in gates.items()]).amax(0)


def kept_apart(states: Encoded) -> Tensor:
    """Which harmless prompts no walls learn from: [N]."""
    count = len(next(iter(states["harmless"].values())))
    return torch.arange(count) % APART == APART - 1


def fit_walls(
    source: Source,
    states: Encoded,
    constant: Mapping[str, Tensor],
    generator: torch.Generator,
    visit: Callable[[int, float, Walls], None],
    apart: Tensor | None,
) -> Walls:
    """Walls in the text of one source, from the sets `unsafe`, `safe` and `harmless`.

    `apart`: harmless prompts to leave out.
    """
    unsafe, safe, harmless = (source.of(states[name]) for name in ("unsafe", "safe", "harmless"))
    known, width = constant.get(source.block), cut(states["unsafe"], source.block).shape[-1]
    known = known if known is None else known[:, source.begin : source.end]

    def whole(gate: Gate) -> Walls:
        return Walls(source, gate if source.end is None else widened(gate, source.begin, width))

    gate = fit_gate(unsafe, safe, harmless, known, generator, lambda step, loss, now: visit(step, loss, whole(now)),
                    apart=apart)  # fmt: skip
    return whole(gate)


def alike(source: Source, states: Encoded) -> bool:
    """Whether the text encoder reads both sides of every pair alike."""
    return torch.equal(*same_length(*(source.of(states[name]) for name in ("unsafe", "safe"))))


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
    walls: Sequence[Walls], known: Sequence[Walls], states: Encoded, constant: Mapping[str, Tensor], budget: float
) -> tuple[dict[str, Gate], dict[str, Any], tuple[Tensor, Tensor]]:
    """Gates by block whose walls together are opened by no more harmless prompts than the budget allows.

    Two kinds of harmless prompts have a budget each: those of `calibration`, and `long` ones. (A wall that stands
    further out for long prompts is no way: how long a prompt is cannot be told from its tokens, since CLIP and T5 fill
    up to a fixed number of them.)

    Args:
        known: walls that stay where they are, beside the others; harmless prompts beyond them are counted, too.
        states: the sets `harmless`, `calibration`, `long`, `unsafe` and `held_unsafe`.

    Returns the gates, what the region's card says, and depths of harmless and of held-out unsafe prompts.
    """

    def depths(name: str, of: Sequence[Walls]) -> Tensor:
        return torch.stack([one.depths(states[name], constant) for one in of])

    sources = {one.source.name: 0.0 for one in (*walls, *known)}
    raised, bounds = torch.zeros(0), [0.0, 0.0]
    if len(walls) > 1:
        rows = kept_apart(states)
        some = {key: tensor[rows] for key, tensor in states["harmless"].items()}
        like = torch.stack([one.depths(some, constant) for one in walls])
        chosen = separating(like, depths("held_unsafe", walls))
        walls, like = [walls[i] for i in chosen], like[chosen]
    if walls:
        plain, long, held = (depths(name, walls) for name in ("calibration", "long", "held_unsafe"))
        if len(walls) == 1:
            like = plain
        raised, bounds = raised_together([(plain, budget), (long, LONG * budget)], held, like, SPARE)
    together = [*(replace(one, gate=replace(one.gate, bias=one.gate.bias + by)) for one, by in zip(walls, raised)),
                *known]  # fmt: skip
    left = {name: depths(name, together) for name in ("calibration", "long", "unsafe", "held_unsafe")}
    worst = {name: found.amax(0) for name, found in left.items()}
    if known:  # they may open on some that the new ones do not
        bounds = [upper_bound(int((worst[name] > 0).sum()), len(worst[name])) for name in ("calibration", "long")]
    for one, found in zip(together, left["held_unsafe"]):
        sources[one.source.name] = max(sources[one.source.name], touched_share(found))
    gates = {}
    for block in dict.fromkeys(one.source.block for one in together):
        new, old = ([i for i, one in enumerate(together) if one.source.block == block and (i < len(walls)) == fresh]
                    for fresh in (True, False))  # fmt: skip
        ramps = [ramp_for(left["unsafe"][new].amax(0))] if new else []
        ramps += [together[i].gate.ramp for i in old]
        gates[block] = replace(joined([together[i].gate for i in (*new, *old)]), ramp=torch.stack(ramps).amin())
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
    return gates, card, (torch.cat([worst["calibration"], worst["long"]]), worst["held_unsafe"])
