"""The maths of a safe region, on plain tensors. No host synchronisation, no mutation, any device and dtype.

A prompt is a dict of blocks [B, T, D] (or [B, D] for pooled vectors). See the design, section 3.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .region import Gate, Move, Part

CONSTANT_TOLERANCE = 0.1  # relative distance at which a token counts as one of the constant ones


def depth(tokens: Tensor, gate: Gate) -> Tensor:
    """How far each token [..., D] lies beyond each wall: [..., k], positive outside. In the gate's float32."""
    weight = gate.weight / gate.scale
    return tokens.to(weight.dtype) @ weight.T - (gate.bias + weight @ gate.mean)


def displacement(tokens: Tensor, move: Move) -> Tensor:
    """The move of each token [..., T, D] at strength 1: [..., T, D] in float32."""
    total = torch.zeros_like(tokens, dtype=torch.float32)
    if move.down is not None:
        normalised = (tokens.to(move.down.dtype) - move.mean) / move.scale
        total = total + (normalised @ move.down.T) @ move.up.T
    if move.offset is not None:
        total = total + move.offset
    if move.direction is not None:
        positions = torch.arange(tokens.shape[-2], device=tokens.device) % len(move.profile)
        total = total + move.profile[positions, None] * move.direction
    return total


def judged(tokens: Tensor, constant: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Which tokens [..., T, D] count: not padding (all zero, or masked out) and none of the constant ones. [..., T]"""
    counts = (tokens != 0).any(-1)
    if mask is not None:
        counts = counts & (mask != 0)
    if constant is not None:
        near = torch.cdist(tokens.float(), constant) < CONSTANT_TOLERANCE * constant.norm(dim=-1)
        counts = counts & ~near.any(-1)
    return counts


def _worst_depths(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    worst = {}
    for block, gate in part.gates.items():
        tokens = as_tokens(blocks[block])
        counts = judged(tokens, part.constant.get(block), (masks or {}).get(block))
        beyond = depth(tokens, gate).amax(-1)
        worst[block] = torch.where(counts, beyond, torch.full_like(beyond, -torch.inf)).amax(-1)
    return worst


def worst_depth(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None = None) -> Tensor:
    """The largest depth of any counted token beyond any wall of `part`, per prompt: [B]."""
    return torch.stack(list(_worst_depths(blocks, part, masks).values())).amax(0)


def openness(
    blocks: Mapping[str, Tensor], part: Part, always: bool = False, masks: Mapping[str, Tensor] | None = None
) -> Tensor:
    """One gate for the whole prompt: 0 inside, 1 clearly outside, a ramp between. [B]"""
    first = next(iter(blocks.values()))
    if always or not part.gates:
        return torch.ones(len(first), device=first.device)
    worst = _worst_depths(blocks, part, masks)
    return torch.stack([worst[block] / gate.ramp for block, gate in part.gates.items()]).amax(0).clamp(0, 1)


def as_tokens(block: Tensor) -> Tensor:
    """A block as [B, T, D]; a pooled vector [B, D] is one token, several layers [B, L, T, D] follow one another."""
    return block.unsqueeze(-2) if block.ndim == 2 else block.flatten(1, -2)


def steer(
    blocks: Mapping[str, Tensor],
    parts: Sequence[Part],
    strength: float | Sequence[float | Tensor] = 1.0,
    always: bool | Sequence[bool] = False,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Move each prompt into the safe region: `e + sum(strength * open(e) * move(e))` over the parts.

    Every part sees the original prompt, and the sum runs in the order of the parts' ids, so the order of `parts`
    does not matter. A prompt that is inside every part comes out bit for bit unchanged, NaNs included.

    Args:
        blocks: block name -> [B, T, D] or [B, D], any float dtype; never changed in place.
        parts: the parts of one or more regions; blocks that a part does not move are returned as they came.
        strength: one for all parts or one each; 0 leaves everything unchanged. A tensor [B] gives each prompt its own
            (blocks of one prompt are repeated for it).
        always: ignore the gates, for all parts or each.
        masks: block name -> [B, T], 0 where a token is padding.
    """
    count = len(parts)
    strengths = [strength] * count if isinstance(strength, (int, float)) else list(strength)
    modes = [always] * count if isinstance(always, bool) else list(always)
    order = sorted(range(count), key=lambda i: parts[i].id)
    total: dict[str, Tensor] = {}
    touched: dict[str, Tensor] = {}
    for i in order:
        factor = strengths[i]
        if isinstance(factor, (int, float)) and factor == 0:
            continue
        device = next(iter(blocks.values())).device
        part = parts[i].to(device)
        gate = openness(blocks, part, modes[i], masks)
        acts = gate > 0  # a NaN gate compares false: such a prompt keeps its bits
        if isinstance(factor, Tensor):
            factor = factor.to(device)[:, None, None]
            acts = acts & (factor != 0).flatten()
        for block, move in part.moves.items():
            if block not in blocks:  # text that only some prompts have
                continue
            tokens = as_tokens(blocks[block])
            counts = judged(tokens, part.constant.get(block), (masks or {}).get(block))
            shift = factor * gate[:, None, None] * displacement(tokens, move)
            moves = (counts & acts[:, None])[..., None]
            shift = torch.where(moves, shift, torch.zeros_like(shift))
            total[block] = total[block] + shift if block in total else shift
            touched[block] = touched[block] | moves if block in touched else moves
    steered = dict(blocks)
    for block, shift in total.items():
        tokens = as_tokens(blocks[block])
        moved = (tokens.float() + shift).to(tokens.dtype)
        steered[block] = torch.where(touched[block], moved, tokens).reshape(-1, *blocks[block].shape[1:])
    return steered
