"""What a backbone's encoder makes of prompts, as tensors that training computes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.blocks import block_names, key_of, read_blocks
from ..region.conditioning import CROSS_ATTENTION, Entry, text_masks, text_tensors
from . import processes
from .gate import constant_tokens

ENCODE_BATCH = 64


def stacked(entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Entries' text by option, [N, T, D] or [N, L, T, D].

    What is padding, masked, or text that only other prompts have, is zero and counts for nothing.
    """
    found: dict[str, list[Tensor | None]] = {}
    for i, entry in enumerate(entries):
        tensors = text_tensors(entry)
        masks = text_masks(entry, tensors)
        for key, tensor in tensors.items():
            tokens = (tensor.unsqueeze(-2) if tensor.ndim == 2 else tensor)[0]
            if key in masks:
                tokens = tokens * (masks[key] != 0).to(tokens).unsqueeze(-1)[0]
            found.setdefault(key, [None] * len(entries))[i] = tokens
    return {key: _padded(states) for key, states in found.items()}


def text_bytes(backbone: Backbone, prompt: str) -> int:
    """What one prompt's text states take."""
    return sum(tensor.nbytes for tensor in text_tensors(backbone.encode([prompt])[0]).values())


def batches(count: int) -> int:
    """In how many batches so many prompts are encoded."""
    return -(-count // ENCODE_BATCH)


def encode_all(backbone: Backbone, prompts: Sequence[str], tell: Callable[[int, int], None]) -> dict[str, Tensor]:
    """Text states of many prompts, as `stacked` has them. `tell` is called with batches that were done since the last
    call, and with the prompts that are done by now.

    Where several processes encode, the batches of all are told as if they went on side by side.
    """
    entries: list[Entry | None] = [None] * len(prompts)
    mine = range(processes.index(), len(prompts), processes.count())
    for begin in range(0, len(mine), ENCODE_BATCH):
        rows = mine[begin : begin + ENCODE_BATCH]
        for row, entry in zip(rows, backbone.encode([prompts[row] for row in rows])):
            entries[row] = entry
        before, done = (min(rows * processes.count(), len(prompts)) for rows in (begin, begin + ENCODE_BATCH))
        tell(batches(done) - batches(before), done)
    for row, entry in processes.gathered([(row, entries[row]) for row in mine]):
        entries[row] = entry
    return stacked(entries)


def _padded(states: Sequence[Tensor | None]) -> Tensor:
    """States [T, D] or [L, T, D] of different lengths beside one another; None is none at all."""
    some = next(state for state in states if state is not None)
    rows = [some[..., :0, :] if state is None else state for state in states]
    padded = torch.nn.utils.rnn.pad_sequence([row.movedim(-2, 0) for row in rows], batch_first=True)
    return padded.movedim(1, -2)


def few(states: Tensor, most: int = 128) -> Tensor:
    """Some of the prompts of states [N, T, D], from all over them."""
    return states[:: -(-len(states) // most)]


def blocks_of(*encoded: dict[str, Tensor]) -> list[str]:
    """The blocks that all of these have and that a region is to move: not those that are the same in every prompt."""
    shared = [name for name in block_names(encoded[0]) if all(key_of(name) in found for found in encoded)]
    return [name for name in shared
            if not all(torch.equal(states, states[:1].expand_as(states)) for states in (cut(e, name) for e in encoded))]


def cut(encoded: dict[str, Tensor], block: str) -> Tensor:
    """One block of stacked text: [N, T, D]."""
    return read_blocks(encoded, [block])[block]


def known_tokens(harmless: dict[str, Tensor], others: dict[str, Tensor], blocks: Sequence[str]) -> dict[str, Tensor]:
    """The constant tokens of each block that has some."""
    found = {block: constant_tokens(cut(harmless, block), cut(others, block)) for block in dict.fromkeys(blocks)}
    return {block: tokens for block, tokens in found.items() if tokens is not None}


def gated_key(encoded: dict[str, Tensor]) -> str:
    """The text that the gate looks at, all of it, whatever blocks it is divided into for the move."""
    return CROSS_ATTENTION if CROSS_ATTENTION in encoded else next(iter(encoded))


def beside(first: Tensor, second: Tensor) -> Tensor:
    """States [N, T, D] and [M, T, D] as [N + M, T, D], the shorter ones padded."""
    return torch.nn.utils.rnn.pad_sequence([*first, *second], batch_first=True)


def same_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    length = min(first.shape[1], second.shape[1])
    return first[:, :length], second[:, :length]
