"""Prompts as a stream: encoded in batches whenever they are needed, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.conditioning import Entry
from . import processes
from .text_states import stacked

BATCH, LEAST = 32, 4  # prompts
BATCH_BYTES = 2**25  # of their text, about: of large encoders fewer are read at once


@dataclass(frozen=True)
class Batch:
    """Neighbouring prompts of a list, or of several lists beside one another, as the encoder writes them."""

    number: int  # the same in every run with the same lists, however many processes there are
    rows: range  # places in the lists
    sides: tuple[dict[str, Tensor], ...]  # stacked text of each list

    @property
    def states(self) -> dict[str, Tensor]:
        """Of the only list."""
        (states,) = self.sides
        return states


def batch_size(prompt_bytes: int) -> int:
    """How many prompts are read at once, if the text states of each take so much."""
    return min(BATCH, max(BATCH_BYTES // max(prompt_bytes, 1), LEAST))


def batches(count: int, size: int = BATCH) -> int:
    """In how many batches so many prompts are read."""
    return -(-count // size)


def _together(number: int, length: int, size: int) -> tuple[int, int]:
    """Batches and prompts that all processes are done with when this one is done with a batch."""
    first = number - processes.index()
    prompts = min((first + processes.count()) * size, length) - first * size
    return batches(prompts, size), prompts


def read(
    backbone: Backbone, *sides: Sequence[str], size: int = BATCH,
    tell: Callable[[int, int], None] = lambda batches, prompts: None,
) -> Iterator[Batch]:  # fmt: skip
    """The prompts of lists of the same length, in batches of this size, of which several processes read every so many.

    `tell` is called with how many batches and prompts were done since the last call, as if those of all processes went
    on side by side.
    """
    length = len(sides[0])
    for number in range(processes.index(), batches(length, size), processes.count()):
        rows, entries = range(number * size, min((number + 1) * size, length)), []
        for prompts in sides:
            entries += backbone.encode([prompts[row] for row in rows])
            tell(*_together(number, length, size))
        states = stacked(entries)
        yield Batch(number, rows, tuple({key: tensor[i * len(rows) : (i + 1) * len(rows)]
                                         for key, tensor in states.items()} for i in range(len(sides))))  # fmt: skip


def read_whole(
    backbone: Backbone, prompts: Sequence[str], size: int = BATCH,
    tell: Callable[[int, int], None] = lambda batches, prompts: None,
) -> dict[str, Tensor]:  # fmt: skip
    """A few prompts, stacked; see `read`. Each process has all of them."""
    found: list[tuple[int, list[Entry]]] = []
    for number in range(processes.index(), batches(len(prompts), size), processes.count()):
        found.append((number, backbone.encode(prompts[number * size : (number + 1) * size])))
        tell(*_together(number, len(prompts), size))
    return stacked([entry for _, entries in processes.in_order(found) for entry in entries])
