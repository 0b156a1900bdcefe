"""Prompts as a stream: encoded in batches whenever they are needed, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.conditioning import Entry
from . import processes
from .text_states import stacked

BATCH = 64  # prompts


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


def batches(count: int) -> int:
    """In how many batches so many prompts are read."""
    return -(-count // BATCH)


def _together(number: int, length: int) -> tuple[int, int]:
    """Batches and prompts that all processes are done with when this one is done with a batch."""
    first = number - processes.index()
    prompts = min((first + processes.count()) * BATCH, length) - first * BATCH
    return batches(prompts), prompts


def read(
    backbone: Backbone, *sides: Sequence[str], tell: Callable[[int, int], None] = lambda batches, prompts: None
) -> Iterator[Batch]:
    """The prompts of lists of the same length, in batches. Several processes read every so many batches each.

    `tell` is called with how many batches and prompts were done since the last call, as if those of all processes went
    on side by side.
    """
    length = len(sides[0])
    for number in range(processes.index(), batches(length), processes.count()):
        rows, entries = range(number * BATCH, min((number + 1) * BATCH, length)), []
        for prompts in sides:
            entries += backbone.encode([prompts[row] for row in rows])
            tell(*_together(number, length))
        states = stacked(entries)
        yield Batch(number, rows, tuple({key: tensor[i * len(rows) : (i + 1) * len(rows)]
                                         for key, tensor in states.items()} for i in range(len(sides))))  # fmt: skip


def read_whole(
    backbone: Backbone, prompts: Sequence[str], tell: Callable[[int, int], None] = lambda batches, prompts: None
) -> dict[str, Tensor]:
    """A few prompts, stacked; see `read`. Each process has all of them."""
    found: list[tuple[int, list[Entry]]] = []
    for number in range(processes.index(), batches(len(prompts)), processes.count()):
        found.append((number, backbone.encode(prompts[number * BATCH : (number + 1) * BATCH])))
        tell(*_together(number, len(prompts)))
    return stacked([entry for _, entries in sorted(processes.gathered(found), key=lambda one: one[0])
                    for entry in entries])  # fmt: skip


def in_order(found: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """What all processes found, by the numbers of batches, in their order."""
    return [tensor for _, tensor in sorted(processes.gathered(found), key=lambda one: one[0])]
