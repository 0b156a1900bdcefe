"""What a backbone's encoder makes of prompts, as tensors that training computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..region.blocks import block_names, families, key_of, read_blocks
from ..region.conditioning import CROSS_ATTENTION, Entry, text_masks, text_tensors
from .gate import constant_tokens

# Of a text encoder's layers [L, T, D], so many have walls, evenly spread, the last one among them: each layer holds the
# whole text, and no node of ComfyUI writes one and not the others.
GATED_LAYERS = 4
FEWEST_TAUGHT = 8  # prompts with a text: fewer teach nothing about it
# Blocks that hold the features of two encoders beside one another, which may be given different texts: CLIP L, then G
SIDE_BY_SIDE = {
    "SDXL": {"cross_attn": 768},
    "SD3": {"cross_attn__narrow2048": 768, "pooled_output": 768},
    "HiDream": {"pooled_output": 768},
}


@dataclass(frozen=True)
class Source:
    """A text that reaches the model and has walls of its own: a block, or the features of it that one encoder wrote."""

    block: str
    begin: int = 0
    end: int | None = None  # None: the whole block

    @property
    def name(self) -> str:
        """For a region's card."""
        return self.block if self.end is None else f"{self.block}[{self.begin}:{self.end}]"

    def of(self, encoded: dict[str, Tensor]) -> Tensor:
        """Its states of stacked text: [N, T, D]."""
        states = cut(encoded, self.block)[..., self.begin : self.end]
        if "__narrow" in self.block or "__beyond" in self.block:  # nothing stands at the places of the other tokens
            states = states[:, (states != 0).any(-1).any(0)]
        return states


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


def text_bytes(entry: Entry) -> int:
    """What one prompt's text states take."""
    return sum(tensor.nbytes for tensor in text_tensors(entry).values())


def _padded(states: Sequence[Tensor | None]) -> Tensor:
    """States [T, D] or [L, T, D] of different lengths beside one another; None is none at all."""
    some = next(state for state in states if state is not None)
    rows = [some[..., :0, :] if state is None else state for state in states]
    padded = torch.nn.utils.rnn.pad_sequence([row.movedim(-2, 0) for row in rows], batch_first=True)
    return padded.movedim(1, -2)


def _varies(sets: Sequence[Tensor]) -> bool:
    """Whether the states [N, T, D] of some set are not the same in every prompt."""
    return not all(torch.equal(states, states[:1].expand_as(states)) for states in sets)


def blocks_of(*encoded: dict[str, Tensor]) -> list[str]:
    """The blocks that all of these have and that a region is to move: not those that are the same in every prompt."""
    shared = [name for name in block_names(encoded[0]) if all(key_of(name) in found for found in encoded)]
    return [name for name in shared if _varies([cut(found, name) for found in encoded])]


def possible_sources(*encoded: dict[str, Tensor]) -> list[Source]:
    """The texts that all of these have and that reach the model, the entry's own first."""
    pieces: dict[str, list[str]] = {}
    for name in block_names(encoded[0]):
        pieces.setdefault(key_of(name), []).append(name)
    known = families({key: tensor.shape[-1] for key, tensor in encoded[0].items()})
    two_encoders = SIDE_BY_SIDE.get(known[0].name, {}) if known else {}
    found = []
    for key, names in pieces.items():
        if not all(key in states for states in encoded):
            continue
        if encoded[0][key].ndim == 4:
            count = min(GATED_LAYERS, len(names))
            names = [names[(i + 1) * len(names) // count - 1] for i in range(count)]
        elif "__features" in names[0] or "__every" in names[0]:  # one encoder's layers
            names = [key]
        for name in names:
            at = two_encoders.get(name)
            width = cut(encoded[0], name).shape[-1]
            found += [Source(name)] if at is None else [Source(name, 0, at), Source(name, at, width)]
    return found


def sources_of(*encoded: dict[str, Tensor]) -> list[Source]:
    """Those of `possible_sources` that walls can be found in: not those that are the same in every prompt, or that too
    few prompts have."""

    def teaches(source: Source) -> bool:
        sets = [cut(states, source.block)[..., source.begin : source.end] for states in encoded]
        enough = all(int((some != 0).flatten(1).any(1).sum()) >= min(FEWEST_TAUGHT, len(some)) for some in sets)
        return enough and _varies(sets)

    return [source for source in possible_sources(*encoded) if teaches(source)]


def cut(encoded: dict[str, Tensor], block: str) -> Tensor:
    """One block of stacked text: [N, T, D]."""
    return read_blocks(encoded, [block])[block]


def known_tokens(harmless: dict[str, Tensor], others: dict[str, Tensor], blocks: Sequence[str]) -> dict[str, Tensor]:
    """The constant tokens of each block that has some."""
    found = {block: constant_tokens(cut(harmless, block), cut(others, block)) for block in dict.fromkeys(blocks)}
    return {block: tokens for block, tokens in found.items() if tokens is not None}


def gated_key(encoded: dict[str, Tensor]) -> str:
    """The text that tells what a prompt is about: all of it, whatever blocks it is divided into for the move."""
    return CROSS_ATTENTION if CROSS_ATTENTION in encoded else next(iter(encoded))


def same_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    length = min(first.shape[1], second.shape[1])
    return first[:, :length], second[:, :length]
