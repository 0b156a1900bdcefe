"""The tokens that walls are found with: a few of each prompt, and of many prompts those that teach most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..region.region import Gate
from ..region.steering import depth
from . import processes

BAG, LARGE, BAGS_BYTES = 6, 24, 2**26  # tokens of a prompt in its bag at least, and where all bags have room at most
BAGS = 16_384  # prompts that have one at most
SLAB = 512  # bags that lie in one piece
ENOUGH = 16  # tokens of each prompt: where walls see so many, the deepest ones are among them


@dataclass(frozen=True)
class Bags:
    """Tokens of prompts, normalised [N, K, D], which of them count [N, K], and the averages of all that do [N, D]."""

    tokens: Tensor  # in half precision, as the averages: many are kept
    counts: Tensor
    averages: Tensor

    def rows(self, rows: slice | Tensor) -> Bags:
        """Some of them."""
        return Bags(self.tokens[rows], self.counts[rows], self.averages[rows])


NONE = Bags(torch.zeros(0, 0, 0), torch.zeros(0, 0), torch.zeros(0, 0))


@dataclass(frozen=True)
class Room:
    """How much is kept."""

    size: int  # tokens of a prompt
    share: float  # of the prompts


def room_for(prompts: int, width: int) -> Room:
    """For so many prompts, if all of their texts together have so many features."""
    kept = min(max(prompts, 1), BAGS)
    return Room(min(max(BAGS_BYTES // (2 * width * kept) - 1, BAG), LARGE), kept / max(prompts, 1))


def bags_of(tokens: Tensor, counts: Tensor, gate: Gate, generator: Generator, size: int = BAG) -> Bags:
    """Of each prompt [N, T, D] the tokens that lie deepest beyond the walls, and a third at random; all where there is
    room.

    Args:
        counts: tokens that count [N, T].
        size: of a bag.
    """
    normalised = ((tokens.float() - gate.mean) / gate.scale).masked_fill(~counts[..., None], 0.0)
    averages = average(normalised, counts)
    if size < tokens.shape[1]:
        drawn = torch.rand(counts.shape, generator=generator).masked_fill(~counts, -1.0)
        order = depth(tokens, gate, counts).amax(-1).masked_fill(~counts, -torch.inf)
        deepest = order.topk(size - size // 3).indices
        others = drawn.scatter(1, deepest, -2.0).topk(size // 3).indices
        chosen = torch.cat([deepest, others], 1)
        normalised = normalised.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        counts = counts.gather(1, chosen)
    return Bags(normalised.half(), counts, averages.half())


def average(tokens: Tensor, counts: Tensor) -> Tensor:
    """Of those of each prompt's tokens [N, T, D] that count: [N, D]."""
    return torch.where(counts[..., None], tokens, 0.0).sum(1) / counts.sum(1, keepdim=True).clamp(min=1)


def hardest(tokens: Tensor, counts: Tensor, gate: Gate, unsafe: bool, share: float) -> Tensor:
    """Which of the prompts [N, T, D] the walls are most wrong about: so large a share of them."""
    depths = depth(tokens, gate, counts).amax(-1).masked_fill(~counts, -torch.inf).amax(-1)
    wrong = (-depths if unsafe else depths).masked_fill(~counts.any(1), -torch.inf)
    return wrong.topk(math.ceil(share * len(wrong))).indices


def all_bags(found: Sequence[Bags]) -> Bags:
    """Bags of several sizes as one."""
    most = max(bags.tokens.shape[1] for bags in found)
    return Bags(torch.cat([F.pad(bags.tokens, (0, 0, 0, most - bags.tokens.shape[1])) for bags in found]),
                torch.cat([F.pad(bags.counts, (0, most - bags.counts.shape[1])) for bags in found]),
                torch.cat([bags.averages for bags in found]))  # fmt: skip


class Collected:
    """Bags by the number of the batch that they are from. Those of a batch that is read again take the place of older
    ones of it."""

    def __init__(self) -> None:
        self._new: list[tuple[int, Bags]] = []
        self._slab, self._taken = NONE, 0
        self._places: dict[int, int] = {}  # where those of a batch end
        self._all: Bags | None = None

    def add(self, number: int, bags: Bags) -> None:
        self._new.append((number, self._placed(bags)))

    def has(self, number: int) -> bool:
        """Whether `all` has had bags of that batch."""
        return number in self._places

    def _placed(self, bags: Bags) -> Bags:
        """The same in a large piece of memory: many small ones would leave holes between that nothing fits into."""
        count, size = bags.counts.shape
        if self._slab.counts.shape[1] != size or self._taken + count > len(self._slab.counts):
            rows = max(count, SLAB)
            self._slab = Bags(*(tensor.new_empty(rows, *tensor.shape[1:])
                                for tensor in (bags.tokens, bags.counts, bags.averages)))  # fmt: skip
            self._taken = 0
        place = slice(self._taken, self._taken + count)
        self._taken += count
        _written(self._slab, place, bags)
        return self._slab.rows(place)

    def all(self) -> Bags:
        """What all processes have collected by now, in the order of the batches."""
        found = processes.in_order(self._new)
        self._new, self._slab = [], NONE
        kept = [] if self._all is None else [self._all]
        end = sum(len(bags.counts) for bags in kept)
        for number, bags in found:
            if number in self._places:
                rows = slice(self._places[number] - len(bags.counts), self._places[number])
                _written(kept[0], rows, bags)
            else:
                kept.append(bags)
                end = self._places[number] = end + len(bags.counts)
        if len(kept) > 1:
            kept = [all_bags(kept)]
        (self._all,) = kept
        return self._all


def _written(into: Bags, rows: slice, bags: Bags) -> None:
    size = bags.counts.shape[1]
    into.tokens[rows, :size] = bags.tokens
    into.counts[rows] = False
    into.counts[rows, :size] = bags.counts
    into.averages[rows] = bags.averages
