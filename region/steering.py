"""The maths of a safe region, on plain tensors. No host synchronisation, no mutation, any device and dtype.

A prompt is a dict of blocks [B, T, D] (or [B, D] for pooled vectors). See the design, section 3.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .region import Gate, Move, Part, RegionError, Scope

CONSTANT_TOLERANCE = 0.1  # relative distance at which a token counts as one of the constant ones
UNDONE = 1e-3  # ramps: what a prompt may lie deeper than with one part alone before others count as undoing it
WINDOW = 16  # tokens whose mean is compared with what the encoder writes; the bounds in files are for this
EDGE = 0.02  # of a scope's unit: how far beyond it text is clearly outside
ROUNDS = 2  # of steering again what other parts undid


def depth(tokens: Tensor, gate: Gate, counts: Tensor) -> Tensor:
    """How far each token [..., T, D] lies beyond each wall: [..., T, k], positive outside. In the gate's float32.

    `counts` [..., T]: the tokens that a prompt's average is taken over.
    """
    walls = (gate.weight if gate.context is None else torch.cat([gate.weight, gate.context])) / gate.scale
    found = tokens.to(walls.dtype) @ walls.T - walls @ gate.mean
    if gate.context is None:
        return found - gate.bias
    own, context = found.chunk(2, -1)
    number = counts.sum(-1)[..., None, None].clamp(min=1)
    return own + torch.where(counts[..., None], context, 0.0).sum(-2, keepdim=True) / number - gate.bias


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


def _extremes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest feature of tokens [..., T, D], NaN where one is: [..., T] each.

    They tell of padding and of what is not finite in a tenth of the time that asking each feature takes.
    """
    return tokens.amax(-1), tokens.amin(-1)


def _finite(high: Tensor, low: Tensor) -> Tensor:
    """Which tokens hold no NaN and no infinity, by their extremes."""
    return (high < torch.inf) & (low > -torch.inf)


def _countable(tokens: Tensor, constant: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens [..., T, D] are this prompt's own: not padding (all zero, or masked out), not constant; and which
    are finite. [..., T] each"""
    high, low = _extremes(tokens)
    counts = (high != 0) | (low != 0)
    if mask is not None:
        counts = counts & (mask != 0)
    if constant is not None:
        near = torch.cdist(tokens.float(), constant) < CONSTANT_TOLERANCE * constant.norm(dim=-1)
        counts = counts & ~near.any(-1)
    return counts, _finite(high, low)


def judged(tokens: Tensor, constant: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Which tokens [..., T, D] count: no padding (all zero, or masked out), none of the constant ones, and finite.

    Of a token that holds NaN or infinity nothing can be said; the others of its prompt still count. [..., T]
    """
    own, finite = _countable(tokens, constant, mask)
    return own & finite


def _deepest(values: Tensor) -> Tensor:
    """The largest of each row [B, N], -inf where there is none: [B]."""
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:1], -torch.inf)


def _worst_depths(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    worst = {}
    for block, gate in part.gates.items():
        if block not in blocks:  # text that only some prompts have
            continue
        tokens = as_tokens(blocks[block])
        counts = judged(tokens, part.constant.get(block), (masks or {}).get(block))
        # NaN of a finite token: numbers beyond all bounds
        beyond = depth(tokens, gate, counts).amax(-1).nan_to_num(nan=torch.inf)
        worst[block] = _deepest(torch.where(counts, beyond, -torch.inf))
    return worst


def _largest(found: list[Tensor], blocks: Mapping[str, Tensor], otherwise: float) -> Tensor:
    """The largest of several numbers for each prompt, `otherwise` where there are none: [B]."""
    first = next(iter(blocks.values()))
    return torch.stack(found).amax(0) if found else torch.full(first.shape[:1], otherwise, device=first.device)


def worst_depth(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None = None) -> Tensor:
    """The largest depth of any counted token beyond any wall of `part`, per prompt: [B].

    -inf where no token counts, inf where none of the text that the walls stand in is there.
    """
    return _largest(list(_worst_depths(blocks, part, masks).values()), blocks, torch.inf)


def likeness(tokens: Tensor, counts: Tensor, scope: Scope) -> Tensor:
    """How prompts [B, T, D] compare with what the encoder writes, by means over tokens that count [B, T]: over all of
    them, then over each WINDOW that follow one another (what is left joins the last). [B, 1 + n, k]
    """
    u = tokens.to(scope.scale.dtype) / scope.scale
    values = torch.where(counts[..., None], u.square() @ scope.square.T + u @ scope.linear.T, 0.0)
    windows = torch.arange(max(tokens.shape[-2] // WINDOW, 1), device=tokens.device)
    last = counts.sum(-1, keepdim=True) // WINDOW - 1
    place = torch.minimum((counts.cumsum(-1) - 1) // WINDOW, last).clamp(min=0)
    within = (counts[..., None] & (place[..., None] == windows)).to(values.dtype)  # [B, T, n]
    sums, number = within.mT @ values, within.sum(-2)[..., None]
    means = torch.where(number > 0, sums / number.clamp(min=1), sums[:, :1] / number[:, :1].clamp(min=1))
    return torch.cat([values.sum(-2, keepdim=True) / counts.sum(-1)[:, None, None].clamp(min=1), means], -2)


def _beyond_scope(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None) -> Tensor:
    """How far beyond any of the part's scopes each prompt is, -inf where none is there to tell: [B]."""
    found = []
    for block, scope in part.scopes.items():
        if block in blocks:
            tokens = as_tokens(blocks[block])
            counts = judged(tokens, part.constant.get(block), (masks or {}).get(block))
            like = likeness(tokens, counts, scope)
            low, high = (torch.cat([bound[:1], bound[1:].expand(like.shape[1] - 1, -1)])
                         for bound in (scope.low, scope.high))  # fmt: skip
            beyond = torch.maximum(low - like, like - high).nan_to_num(nan=torch.inf).amax((-2, -1))
            found.append(torch.where(counts.any(-1), beyond, -torch.inf))
    return _largest(found, blocks, -torch.inf)


def out_of_scope(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None = None) -> Tensor:
    """Which prompts are not as the text encoder writes them, but scaled, averaged or otherwise changed: [B]."""
    return _beyond_scope(blocks, part, masks) > 0


def _ramps_beyond(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None) -> Tensor:
    """As `worst_depth`, each depth in ramps of its own gate: [B]."""
    worst = _worst_depths(blocks, part, masks)
    return _largest([depths / part.gates[block].ramp for block, depths in worst.items()], blocks, torch.inf)


def how_far(
    blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """What opens a gate, in ramps: how far beyond its walls and beyond its scopes each prompt is, positive outside. [B]

    inf beyond the walls where none of the text that they stand in is there, or the part has no gate; -inf where no
    token counts, or there is no scope.
    """
    return _ramps_beyond(blocks, part, masks), _beyond_scope(blocks, part, masks) / EDGE


def openness(
    blocks: Mapping[str, Tensor], part: Part, always: bool = False, masks: Mapping[str, Tensor] | None = None
) -> Tensor:
    """One gate for the whole prompt: 0 inside, 1 clearly outside, a ramp between. [B]"""
    first = next(iter(blocks.values()))
    if always:
        return torch.ones(len(first), device=first.device)
    return torch.maximum(*how_far(blocks, part, masks)).clamp(0, 1)


def unreadable(blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor] | None = None) -> Tensor:
    """Which prompts hold text, where the part's gates look, whose numbers are NaN or infinite: [B]."""
    first = next(iter(blocks.values()))
    found = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for block in part.gates.keys() & blocks.keys():
        broken, mask = ~_finite(*_extremes(as_tokens(blocks[block]))), (masks or {}).get(block)
        found = found | (broken if mask is None else broken & (mask != 0)).any(-1)
    return found


def check_judgeable(
    blocks: Mapping[str, Tensor], parts: Sequence[Part], masks: Mapping[str, Tensor] | None = None
) -> None:
    """Raises RegionError where a prompt has text of which nothing finite is left to judge.

    Only on the CPU: a GPU would have to wait, and draws nothing from such a prompt but numbers that are none.
    """
    for part in parts:
        lost, seen = [], []
        for block in part.gates or part.moves:
            if block not in blocks or blocks[block].device.type != "cpu":
                continue
            tokens, mask = as_tokens(blocks[block]), (masks or {}).get(block)
            text, finite = _countable(tokens, part.constant.get(block), mask)
            lost.append((text & ~finite).any(-1))
            seen.append((text & finite).any(-1))
        if lost and bool((torch.stack(lost).any(0) & ~torch.stack(seen).any(0)).any()):
            raise RegionError(
                "This prompt cannot be judged: all its numbers are NaN or infinite. Look at what made it (a text "
                "encoder that overflows in half precision, or a node that changes the conditioning)."
            )


def as_tokens(block: Tensor) -> Tensor:
    """A block as [B, T, D]; a pooled vector [B, D] is one token, several layers [B, L, T, D] follow one another."""
    return block.unsqueeze(-2) if block.ndim == 2 else block.flatten(1, -2)


@dataclass(frozen=True)
class _Acting:
    """A part on its device, with its strength (a tensor [B, 1, 1] holds one for each row), and how open its gate is."""

    part: Part
    factor: float | Tensor
    gate: Tensor  # [B]

    def rows(self) -> Tensor:
        """Which prompts it moves: [B]."""
        acts = self.gate > 0
        return acts & (self.factor != 0).flatten() if isinstance(self.factor, Tensor) else acts

    def of(self, rows: Tensor) -> _Acting:
        """The same for some prompts only; `rows` [B]."""
        return replace(self, gate=torch.where(rows, self.gate, 0.0))


def _moved(
    blocks: Mapping[str, Tensor], acting: Sequence[_Acting], masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """`e + sum(strength * open(e) * move(e))`; blocks that nothing moves are returned as they came."""
    total: dict[str, Tensor] = {}
    touched: dict[str, Tensor] = {}
    for one in acting:
        rows = one.rows()
        for block, move in one.part.moves.items():
            if block not in blocks:  # text that only some prompts have
                continue
            tokens = as_tokens(blocks[block])
            counts = judged(tokens, one.part.constant.get(block), (masks or {}).get(block))
            shift = one.factor * one.gate[:, None, None] * displacement(tokens, move)
            moves = (counts & rows[:, None])[..., None]
            shift = torch.where(moves, shift, torch.zeros_like(shift))
            total[block] = total[block] + shift if block in total else shift
            touched[block] = touched[block] | moves if block in touched else moves
    steered = dict(blocks)
    for block, shift in total.items():
        tokens = as_tokens(blocks[block])
        moved = (tokens.float() + shift).to(tokens.dtype)
        steered[block] = torch.where(touched[block], moved, tokens).reshape(blocks[block].shape)
    return steered


def steer(
    blocks: Mapping[str, Tensor],
    parts: Sequence[Part],
    strength: float | Sequence[float | Tensor] = 1.0,
    always: bool | Sequence[bool] = False,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Move each prompt into the safe region: `e + sum(strength * open(e) * move(e))` over the parts.

    Every part sees the original prompt, and the sum runs in the order of the parts' ids, so the order of `parts`
    does not matter. A prompt that is inside every part comes out bit for bit unchanged, NaNs included. What is outside
    of a part because of the others, where that part alone would have brought it in, is steered again (`_not_undone`).

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
    acting = []
    for i in sorted(range(count), key=lambda i: parts[i].id):
        factor = strengths[i]
        if isinstance(factor, (int, float)) and factor == 0:
            continue
        device = next(iter(blocks.values())).device
        part = parts[i].to(device)
        factor = factor.to(device)[:, None, None] if isinstance(factor, Tensor) else factor
        acting.append(_Acting(part, factor, openness(blocks, part, modes[i], masks)))
    steered = _moved(blocks, acting, masks)
    return _not_undone(blocks, steered, acting, masks) if len(acting) > 1 else steered


def _undone(
    alone: Sequence[Tensor], steered: Mapping[str, Tensor], acting: Sequence[_Acting],
    masks: Mapping[str, Tensor] | None,
) -> list[Tensor]:  # fmt: skip
    """Which prompts lie outside of each gated part, and deeper than it alone leaves them: [B] each.

    `alone`: that depth, inf for a prompt that the part alone moves no nearer to its region.
    """
    found = []
    for one, depths in zip(acting, alone):
        beyond = _ramps_beyond(steered, one.part, masks)
        outside = (beyond > 0) | out_of_scope(steered, one.part, masks)
        found.append(one.rows() & outside & (beyond > depths + UNDONE))
    return found


def _not_undone(
    blocks: Mapping[str, Tensor], steered: Mapping[str, Tensor], acting: Sequence[_Acting],
    masks: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The prompts where no part's move is undone by those of others, be it by accident or by a region made for it.

    Such a part acts again on what came out; where that is not enough, those that were undone act alone.
    """
    alone = []
    for one in acting:
        before, after = (_ramps_beyond(found, one.part, masks) for found in (blocks, _moved(blocks, [one], masks)))
        alone.append(torch.where(after < before, after, torch.inf))
    for _ in range(ROUNDS):
        undone = _undone(alone, steered, acting, masks)
        again = [replace(one, gate=openness(steered, one.part, False, masks)).of(rows)
                 for one, rows in zip(acting, undone)]  # fmt: skip
        steered = _moved(steered, again, masks)
    undone = _undone(alone, steered, acting, masks)
    lost = torch.stack(undone).any(0)
    strongest = _moved(blocks, [one.of(rows) for one, rows in zip(acting, undone)], masks)
    return {block: torch.where(lost.view(-1, *[1] * (tensor.ndim - 1)), strongest[block], tensor)
            if tensor is not blocks[block] else tensor for block, tensor in steered.items()}  # fmt: skip
