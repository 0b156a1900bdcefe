"""What a region does to one prompt, token by token: the very numbers that `steer` decides and moves by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import POOLED, key_of, read_blocks, write_blocks
from .conditioning import (
    Entry,
    apply_to_conditioning,
    original_tensors,
    other_texts,
    text_masks,
    text_tensors,
    with_even_rows,
)
from .region import Part, Region
from .steering import as_tokens, depth, how_far, judged, openness, out_of_scope, steer, unreadable

FARTHEST = 1000.0  # ramps: the depth of what cannot be judged; below 0 that of a prompt without words


@dataclass(frozen=True, eq=False)
class PartInspection:
    """One concept and one prompt. Options of the conditioning that have no wall are not in `depth`."""

    label: str
    gated: bool
    openness: float  # share of the move that is made, before the strength
    depth: dict[str, Tensor]  # option -> [T], in ramps beyond the nearest wall; NaN where no one looks
    wall: dict[str, Tensor]  # option -> [T], which wall that is, counted from 0
    walls: int
    depth_after: dict[str, Tensor]  # the same once all concepts have acted
    shift: dict[str, Tensor]  # option -> [T], what this concept alone moves, as a share of the token's own length
    pooled_share: float | None  # of the squared length of this concept's shift; None where there is no pooled vector
    rebuilt: bool = False  # not as the text encoder writes prompts, so that walls alone cannot tell

    @property
    def deepest(self) -> float:
        """The largest depth of any token: positive outside. NaN without walls, or when every token is padding."""
        return largest(self.depth)

    @property
    def deepest_after(self) -> float:
        return largest(self.depth_after)

    @property
    def inside(self) -> bool:
        """Whether no token lies beyond any wall, and walls can tell. Without walls nothing is inside."""
        return self.gated and not self.deepest > 0 and not self.rebuilt

    @property
    def inside_after(self) -> bool:
        """Whether no token lies beyond any wall after the move."""
        return self.gated and not self.deepest_after > 0


@dataclass(frozen=True, eq=False)
class Inspection:
    """What all concepts of a region together do to one prompt. A pooled vector counts as one token."""

    parts: tuple[PartInspection, ...]
    shift: dict[str, Tensor]  # option -> [T], as a share of the token's own length
    pooled_share: float | None
    moved: bool  # False: to the bit as it was

    @property
    def inside(self) -> bool:
        return all(part.inside for part in self.parts)


def largest(values: Mapping[str, Tensor]) -> float:
    """The largest number that is not NaN; NaN where there is none."""
    found = [tensor[~tensor.isnan()] for tensor in values.values()]
    return max((float(tensor.max()) for tensor in found if tensor.numel()), default=float("nan"))


def _by_position(values: Tensor, block: Tensor) -> Tensor:
    """Values [B, N, k] of a block's tokens as [B, T, L * k]: those of several layers belong to one position."""
    positions, layers = 1 if block.ndim == 2 else block.shape[-2], block.shape[1] if block.ndim == 4 else 1
    split = values.reshape(values.shape[0], layers, positions, values.shape[-1])
    return split.transpose(1, 2).flatten(2)


def _depths(
    blocks: Mapping[str, Tensor], part: Part, masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Depth [B, T] by option in ramps, and the wall it is counted from."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    first = 0
    for block, gate in part.gates.items():
        if block not in blocks:  # text that only some prompts have
            first += len(gate.bias)
            continue
        tokens, walls = as_tokens(blocks[block]), len(gate.bias)
        counts = judged(tokens, part.constant.get(block), masks.get(block))
        ramps = depth(tokens, gate, counts) / gate.ramp
        beyond = _by_position(torch.where(counts[..., None], ramps, -torch.inf), blocks[block])
        found.setdefault(key_of(block), []).append((beyond, first + torch.arange(beyond.shape[-1]) % walls))
        first += walls
    depths, nearest = {}, {}
    for key, pieces in found.items():
        deepest, place = torch.cat([beyond for beyond, _ in pieces], -1).max(-1)
        depths[key] = torch.where(deepest == -torch.inf, torch.nan, deepest).cpu()
        nearest[key] = torch.cat([numbers for _, numbers in pieces])[place.cpu()]
    return depths, nearest


def _squares(tensor: Tensor) -> Tensor:
    """The squared length of each token [B, T]; layers add up."""
    squares = tensor.float().square().sum(-1)
    return squares[:, None] if tensor.ndim == 2 else squares.flatten(1, -2).sum(1) if tensor.ndim > 3 else squares


def _shifts(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[float | None]]:
    """Each token's shift as a share of its length [B, T] by option, and the pooled vector's share for each row."""
    moved = {key: _squares(after[key].float() - tensor.float()).cpu() for key, tensor in before.items()}
    lengths = {key: _squares(tensor).cpu() for key, tensor in before.items()}
    shares = {key: (moved[key] / lengths[key].clamp(min=1e-12)).sqrt() for key in moved}
    rows = len(next(iter(moved.values())))
    total = sum(squares.sum(-1) for squares in moved.values())
    if POOLED not in moved:
        return shares, [None] * rows
    return shares, (moved[POOLED].sum(-1) / total.clamp(min=1e-30)).tolist()


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], row: int) -> bool:
    pairs = [(tensor[row], after[key][row]) for key, tensor in before.items()]
    return all(one is other or torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


def _row(values: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: tensor[row] for key, tensor in values.items()}


@dataclass(frozen=True)
class Judgement:
    """What the gates of a region say of one row of a conditioning, as it was before any region acted on it.

    It counts as outside where it cannot be judged: the region has a part without a gate, or it holds numbers that are
    not finite, and no other is outside.
    """

    depth: float  # from -FARTHEST to FARTHEST: the largest of any gate, in ramps; as steering opens above 0
    concepts: tuple[str, ...]  # that see it outside
    by_wall: bool  # it lies beyond a wall, and was not only changed after its encoder
    judged: bool  # False: not finite, or there is no text at all

    @property
    def opened(self) -> bool:
        return self.depth > 0


def _far(entry: Sequence[Any], region: Region) -> Tensor | None:
    """Of each part and row: ramps beyond walls, beyond scopes, and whether numbers are not finite. [P, B, 3]"""
    tensors = original_tensors(entry)
    blocks = read_blocks(tensors, list(dict.fromkeys(block for part in region.parts
                                            for block in (*part.gates, *part.moves))))  # fmt: skip
    if not blocks:
        return None
    masks, device = text_masks(entry, list(blocks)), next(iter(blocks.values())).device
    found = []
    for part in (part.to(device) for part in region.parts):
        lost = torch.where(unreadable(blocks, part, masks), FARTHEST, 0.0)
        found.append(torch.stack([*how_far(blocks, part, masks), lost], -1).clamp(-FARTHEST, FARTHEST))
    return torch.stack(found)


@torch.no_grad()
def judge(conditioning: Sequence[Sequence[Any]], region: Region) -> list[Judgement]:
    """What a region's gates say of each row of a conditioning; every entry counts for its rows, as ComfyUI repeats
    those that have fewer. At least one row; a GPU is read once. The region fits the conditioning.
    """
    texts = [text for entry in conditioning for text in (entry, *other_texts(entry)) if text_tensors(text)]
    found = [far for text in texts if (far := _far(text, region)) is not None]
    if not found:
        return [Judgement(FARTHEST, tuple(part.label for part in region.parts), False, False)]
    rows = max(far.shape[1] for far in found)
    even = [far[:, torch.arange(rows, device=far.device) % far.shape[1]].to(found[0].device) for far in found]
    return [_judgement(parts, region) for parts in torch.stack(even).amax(0).transpose(0, 1).tolist()]


def _judgement(parts: Sequence[Sequence[float]], region: Region) -> Judgement:
    """Of one row: what `_far` says of each part."""
    depths = [max(walls, scope) for walls, scope, _ in parts]
    lost = max(depths) <= 0 and any(not_finite > 0 for _, _, not_finite in parts)
    depths = [FARTHEST if lost and not_finite > 0 else depth for depth, (_, _, not_finite) in zip(depths, parts)]
    concepts = tuple(part.label for part, depth in zip(region.parts, depths) if depth > 0)
    by_wall = any(walls > 0 and part.gates for part, (walls, _, _) in zip(region.parts, parts))
    return Judgement(max(depths), concepts, by_wall, not lost)


def together(judgements: Sequence[Sequence[Judgement]]) -> list[Judgement]:
    """What several say of the same rows: each is outside where any says so. Of fewer rows, as `judge` repeats them."""
    rows = [[found[row % len(found)] for found in judgements] for row in range(max(map(len, judgements)))]
    return [Judgement(
        max(one.depth for one in row), tuple(dict.fromkeys(label for one in row for label in one.concepts)),
        any(one.by_wall for one in row), all(one.judged for one in row),
    ) for row in rows]  # fmt: skip


@torch.no_grad()
def inspect_entry(
    entry: Sequence[Any], region: Region, strength: float = 1.0, mode: str = "auto"
) -> tuple[list[Inspection], list[Entry]]:
    """What a region does to an entry of a conditioning: one result for each row of its batch, and the steered entry.

    An entry that a region acted on before is looked at as it was before that.

    Raises:
        RegionError: as `apply_to_conditioning` does: the region does not fit, balances an attribute, or has no gate.
    """
    steered = apply_to_conditioning([list(entry)], region, strength, mode)
    before, after = original_tensors(entry), with_even_rows(text_tensors(steered[0]))
    rows = len(next(iter(before.values())))
    always = mode == "always"
    names = list(dict.fromkeys(block for part in region.parts for block in (*part.gates, *part.moves)))
    masks, blocks, outcome = text_masks(entry, names), read_blocks(before, names), read_blocks(after, names)
    found: list[list[PartInspection]] = [[] for _ in range(rows)]
    for part in (part.to(next(iter(before.values())).device) for part in region.parts):
        opened = openness(blocks, part, always, masks).tolist()
        rebuilt = out_of_scope(blocks, part, masks).tolist()
        depths, walls = _depths(blocks, part, masks)
        later, _ = _depths(outcome, part, masks)
        alone = steer(blocks, [part], strength, always, masks)
        written = write_blocks(before, {name: tensor for name, tensor in alone.items() if tensor is not blocks[name]})
        shift, pooled = _shifts(before, before | written)
        for row in range(rows):
            found[row].append(PartInspection(
                part.label, bool(part.gates), opened[row], _row(depths, row), _row(walls, row),
                sum(len(gate.bias) for gate in part.gates.values()), _row(later, row), _row(shift, row), pooled[row],
                rebuilt[row],
            ))  # fmt: skip
    shift, pooled = _shifts(before, after)
    return [
        Inspection(tuple(found[row]), _row(shift, row), pooled[row], not _same(before, after, row))
        for row in range(rows)
    ], steered
