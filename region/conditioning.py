"""Applying regions to a conditioning as ComfyUI passes it around: a list of `[tensor, options]` entries."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .blocks import (
    CONTROLNET,
    CROSS_ATTENTION,
    MASK_OPTIONS,
    SOMETIMES,
    TEXT_KEYS,
    WORD_IDS,
    block_names,
    block_width,
    described,
    key_of,
    read_blocks,
    write_blocks,
)
from .region import Part, Region, RegionError
from .steering import steer

Entry = list[Any]  # [cross-attention tensor, options]

ACTED = "safe_region_ids"  # the option that tells other nodes which parts acted on an entry


@dataclass(frozen=True)
class _Origin:
    """What an entry was before it was steered, and by what."""

    tensors: dict[str, Tensor]
    applied: tuple[tuple[Part, float | Tensor, bool], ...]  # with the strength, of each row where it is a tensor


# From a steered tensor to what it was. A second node in a chain starts from there, so that the order of nodes does
# not matter and no part acts twice. Text that another node rebuilt (concat, average) is not in here: it counts as new,
# whatever its options say, since unsteered text may have been mixed in.
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _origin(tensors: dict[str, Tensor]) -> _Origin:
    """What the text was before any part acted; the text itself where none did."""
    found = next((origin for tensor in tensors.values() if (origin := _origins.get(tensor))), None)
    if found and all(_origins.get(t) is found or found.tensors.get(name) is t for name, t in tensors.items()):
        return found
    return _Origin(tensors, ())


def original_tensors(entry: Sequence[Any]) -> dict[str, Tensor]:
    """The entry's text, as `text_tensors` has it, as it was before any region acted on it."""
    return _origin(text_tensors(entry)).tensors


def text_tensors(entry: Sequence[Any]) -> dict[str, Tensor]:
    """The parts of an entry that carry text, by the option they are in."""
    found = {CROSS_ATTENTION: entry[0]} | {key: entry[1].get(key) for key in TEXT_KEYS if key != CROSS_ATTENTION}
    return {key: tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}


def text_blocks(entry: Sequence[Any], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The entry's text by block; `names` are those wanted, None the blocks that a region for this model has."""
    tensors = text_tensors(entry)
    return read_blocks(tensors, block_names(tensors) if names is None else names)


def text_masks(entry: Sequence[Any], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Attention masks [B, T] by block name, where they fit the block's tokens."""
    masks, tensors = {}, text_tensors(entry)
    for block in block_names(tensors) if names is None else names:
        mask, tokens = entry[1].get(MASK_OPTIONS.get(key_of(block))), tensors.get(key_of(block))
        if isinstance(mask, Tensor) and tokens is not None and mask.shape[-1] == tokens.shape[-2]:
            masks[block] = mask.reshape(-1, mask.shape[-1]).to(tokens.device)
    return masks


def _with_tensors(entry: Sequence[Any], tensors: Mapping[str, Tensor], **options: Any) -> Entry:
    """A copy of the entry with other text in some of `text_tensors`."""
    others = {key: tensor for key, tensor in tensors.items() if key != CROSS_ATTENTION}
    return [tensors.get(CROSS_ATTENTION, entry[0]), {**entry[1], **others, **options}]


def with_blocks(entry: Sequence[Any], blocks: Mapping[str, Tensor]) -> Entry:
    """A copy of the entry with other text in some blocks; every other option stays as it was."""
    return _with_tensors(entry, write_blocks(text_tensors(entry), blocks))


def _needed(part: Part) -> dict[str, int]:
    """Width of each block that a part judges or moves."""
    return part.widths() | {block: gate.mean.shape[-1] for block, gate in part.gates.items()}


def _learned_on(region: Region) -> str:
    encoder = region.metadata.get("encoder")
    return str(encoder.get("name")) if isinstance(encoder, dict) else ""


def check_together(regions: Sequence[Region]) -> None:
    """Raises RegionError, naming two of them, unless one conditioning can fit all; and for the groups of an attribute.

    Encoders of one width look alike here too: `check_fit` has the last word.
    """
    seen: dict[str, tuple[int, Region]] = {}
    for region in regions:
        refuse_groups(region)
        for block, width in (item for part in region.parts for item in _needed(part).items()):
            other_width, other = seen.setdefault(block, (width, region))
            if other_width != width:
                named = [f'"{r.name}" was learned on {_learned_on(r) or "a text encoder"} ({block} {w})'
                         for r, w in ((other, other_width), (region, width))]  # fmt: skip
                raise RegionError(
                    f"These regions do not go together: {' and '.join(named)}. Combine regions that were trained with "
                    "one text encoder."
                )


def check_fit(region: Region, entry: Sequence[Any]) -> None:
    """Raises RegionError, naming both sides, unless every block the region moves is there at the right width."""
    if WORD_IDS in entry[1]:
        raise RegionError(
            "This model (Anima) reads the prompt's words again inside the diffusion model, where a region of the text "
            "embedding cannot reach them: use another model."
        )
    tensors = text_tensors(entry)
    for part in region.parts:
        wanted = _needed(part)
        met = {block: block_width(block, tensors) for block in wanted}
        if any(met[block] != width for block, width in wanted.items() if met[block] or block not in SOMETIMES):
            name = _learned_on(region)
            widths = {key: tensor.shape[-1] for key, tensor in tensors.items()}
            layers = {key: tensor.shape[1] for key, tensor in tensors.items() if tensor.ndim == 4}
            learned = Counter(key_of(block) for block in wanted if "__layer" in block)
            raise RegionError(
                f'The region "{region.name}" was learned on {name or "another text encoder"} '
                f"({described(wanted, learned, name)}), but this conditioning has {described(widths, layers)}. "
                "Use a region that was trained with this model's text encoder."
            )


def repeated(tensor: Tensor, count: int | None) -> Tensor:
    """The tensor with its one row `count` times; the tensor itself where it has that many, or `count` is None."""
    return tensor if count in (None, len(tensor)) else tensor.repeat(count, *[1] * (tensor.ndim - 1))


def steer_once(
    entry: Entry, parts: Sequence[Part], strengths: Sequence[float | Tensor], always: bool = False,
    count: int | None = None,
) -> Entry:  # fmt: skip
    """The entry steered by those parts that did not act on it before, together with those that did.

    Args:
        strengths: of each part; a tensor [B] holds one for each row.
        count: B, when the entry is to become so many rows.
    """
    origin = _origin(text_tensors(entry))
    acted = {part.id for part, _, _ in origin.applied}
    fresh = [(part, strength, always) for part, strength in zip(parts, strengths) if part.id not in acted]
    if not fresh:
        return entry
    tensors = {name: repeated(tensor, count) for name, tensor in origin.tensors.items()}
    applied = (*origin.applied, *fresh)
    names = list(dict.fromkeys(block for part, _, _ in applied for block in (*part.gates, *part.moves)))
    blocks = read_blocks(tensors, names)
    steered = steer(
        blocks, [p for p, _, _ in applied], [s for _, s, _ in applied], [a for _, _, a in applied],
        text_masks(entry, names),
    )  # fmt: skip
    written = write_blocks(tensors, {name: t for name, t in steered.items() if t is not blocks[name]})
    outcome = _Origin(tensors, applied)
    for tensor in written.values():
        _origins[tensor] = outcome
    changed = {name: t for name, t in (tensors | written).items() if t is not origin.tensors[name]}
    return _with_tensors(entry, changed, **{ACTED: sorted(part.id for part, _, _ in applied)})


def _with_range(entry: Entry, start: float, end: float) -> Entry:
    return [entry[0], {**entry[1], "start_percent": start, "end_percent": end}]


def _for_controlnet(entry: Entry) -> list[Entry]:
    """Other text that the entry has for a ControlNet alone, as an entry of its own; empty where it has none."""
    found = {key: entry[1][option] for option, key in CONTROLNET.items() if isinstance(entry[1].get(option), Tensor)}
    return [[found.pop(CROSS_ATTENTION, None), found]] if found else []


def check_numbers(strength: float, start: float, end: float) -> None:
    """Raises RegionError for a strength or a range that makes no sense."""
    if not math.isfinite(strength):
        raise RegionError(f"The strength must be a number, not {strength}.")
    if not 0 <= start <= end <= 1:
        raise RegionError(f"start ({start}) and end ({end}) must lie between 0 and 1, start before end.")


def within_range(
    conditioning: Sequence[Entry], start: float, end: float, act: Callable[[Entry], Entry]
) -> list[Entry]:
    """The entries as `act` makes them from `start` to `end` of sampling, and as they were outside of it."""
    result = []
    for entry in conditioning:
        first, last = entry[1].get("start_percent", 0.0), entry[1].get("end_percent", 1.0)
        inner = (max(first, start), min(last, end))
        if inner[0] >= inner[1]:
            result.append(entry)
            continue
        acted = act(list(entry))
        if inner == (first, last):
            result.append(acted)
            continue
        if first < inner[0]:
            result.append(_with_range(entry, first, inner[0]))
        result.append(_with_range(acted, *inner))
        if inner[1] < last:
            result.append(_with_range(entry, inner[1], last))
    return result


def balances(metadata: Mapping[str, Any]) -> bool:
    """Whether a region with this metadata, or one that it was combined from, holds the groups of an attribute."""
    others = metadata.get("combined")
    combined = [one for one in others if isinstance(one, Mapping)] if isinstance(others, list) else []
    return "attribute" in metadata or any(map(balances, combined))


def refuse_groups(region: Region) -> None:
    """Raises RegionError for a region that holds the groups of an attribute."""
    if balances(region.metadata):
        raise RegionError(
            f'The region "{region.name}" holds the groups of an attribute, and acting all at once they would undo one '
            'another: connect it to the node "Balance Safe Region (Bias)" instead.'
        )


def apply_to_conditioning(
    conditioning: Sequence[Entry], region: Region, strength: float = 1.0, mode: str = "auto",
    start: float = 0.0, end: float = 1.0,
) -> list[Entry]:
    """Steer every entry of a ComfyUI conditioning; the input is never changed.

    Args:
        conditioning: entries `[tensor [B, T, D], options]`.
        strength: 1 is what was learned, 0 is the identity.
        mode: `auto` and `gated` use the region's gates, `always` ignores them. `gated` needs a region that has gates.
        start, end: the share of sampling (0 to 1) in which the region acts. An entry's own range is split, as
            ComfyUI splits schedules; outside of `start` to `end` the original text holds.

    Raises:
        RegionError: the region does not fit this conditioning, or the mode or range makes no sense.
    """
    if mode not in ("auto", "gated", "always"):
        raise RegionError(f'There is no mode "{mode}": use auto, gated or always.')
    check_numbers(strength, start, end)
    refuse_groups(region)
    if mode == "gated" and not all(part.gates for part in region.parts):
        raise RegionError(f'The region "{region.name}" has no gate: it acts on every prompt. Use mode auto or always.')
    for entry in conditioning:
        check_fit(region, entry)
        for other in _for_controlnet(entry):
            check_fit(region, other)
    if strength == 0:
        return list(conditioning)

    def steered(entry: Entry) -> Entry:
        return steer_once(entry, region.parts, [strength] * len(region.parts), mode == "always")

    def act(entry: Entry) -> Entry:
        text, options = steered(entry)
        for other in map(steered, _for_controlnet(entry)):
            changed = text_tensors(other)
            options = options | {option: changed[key] for option, key in CONTROLNET.items() if key in changed}
        return [text, options]

    with torch.no_grad():
        return within_range(conditioning, start, end, act)
