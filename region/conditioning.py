"""Applying regions to a conditioning as ComfyUI passes it around: a list of `[tensor, options]` entries."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .region import Part, Region, RegionError
from .steering import steer

Entry = list[Any]  # [cross-attention tensor, options]

CROSS_ATTENTION = "cross_attn"
# Options of an entry that carry text (which family has which: shared/comfyui.md, section 6).
TEXT_OPTIONS = ("pooled_output", "conditioning_llama3", "conditioning_byt5small", "conditioning_mt5xl")
MASK_OPTIONS = {CROSS_ATTENTION: "attention_mask", "conditioning_mt5xl": "attention_mask_mt5xl"}
ACTED = "safe_region_ids"  # the option that tells other nodes which parts acted on an entry


@dataclass(frozen=True)
class _Origin:
    """What an entry was before it was steered, and by what."""

    blocks: dict[str, Tensor]
    applied: tuple[tuple[Part, float | Tensor, bool], ...]  # with the strength, of each row where it is a tensor


# From a steered tensor to what it was. A second node in a chain starts from there, so that the order of nodes does
# not matter and no part acts twice. Text that another node rebuilt (concat, average) is not in here: it counts as new,
# whatever its options say, since unsteered text may have been mixed in.
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _origin(blocks: dict[str, Tensor]) -> _Origin:
    """What the text was before any part acted; the text itself where none did."""
    found = next((origin for tensor in blocks.values() if (origin := _origins.get(tensor))), None)
    if found and all(_origins.get(t) is found or found.blocks.get(name) is t for name, t in blocks.items()):
        return found
    return _Origin(blocks, ())


def original_blocks(entry: Sequence[Any]) -> dict[str, Tensor]:
    """The entry's text, by block name, as it was before any region acted on it."""
    return _origin(text_blocks(entry)).blocks


def text_blocks(entry: Sequence[Any]) -> dict[str, Tensor]:
    """The parts of an entry that carry text, by block name."""
    tensor, options = entry[0], entry[1]
    blocks = {CROSS_ATTENTION: tensor} if isinstance(tensor, Tensor) else {}
    for name in TEXT_OPTIONS:
        if isinstance(options.get(name), Tensor):
            blocks[name] = options[name]
    return blocks


def text_masks(entry: Sequence[Any]) -> dict[str, Tensor]:
    """Attention masks [B, T] by block name, where they fit the block's tokens."""
    masks = {}
    for block, option in MASK_OPTIONS.items():
        mask, tokens = entry[1].get(option), text_blocks(entry).get(block)
        if isinstance(mask, Tensor) and tokens is not None and mask.shape[-1] == tokens.shape[-2]:
            masks[block] = mask.reshape(-1, mask.shape[-1]).to(tokens.device)
    return masks


def with_blocks(entry: Sequence[Any], blocks: Mapping[str, Tensor], **options: Any) -> Entry:
    """A copy of the entry with other text; every other option stays as it was."""
    changed = {name: tensor for name, tensor in blocks.items() if name != CROSS_ATTENTION}
    return [blocks.get(CROSS_ATTENTION, entry[0]), {**entry[1], **changed, **options}]


def _describe(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {width}" for name, width in widths.items()) or "no text"


def check_fit(region: Region, blocks: Mapping[str, Tensor]) -> None:
    """Raises RegionError, naming both sides, unless every block the region moves is there at the right width."""
    met = {name: tensor.shape[-1] for name, tensor in blocks.items()}
    for part in region.parts:
        wanted = part.widths() | {block: gate.mean.shape[-1] for block, gate in part.gates.items()}
        if any(met.get(block) != width for block, width in wanted.items()):
            encoder = region.metadata.get("encoder")
            family = encoder.get("name") if isinstance(encoder, dict) else None
            learned = f"{family or 'another text encoder'} ({_describe(wanted)})"
            raise RegionError(
                f'The region "{region.name}" was learned on {learned}, but this conditioning has {_describe(met)}. '
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
    origin = _origin(text_blocks(entry))
    acted = {part.id for part, _, _ in origin.applied}
    fresh = [(part, strength, always) for part, strength in zip(parts, strengths) if part.id not in acted]
    if not fresh:
        return entry
    blocks = {name: repeated(tensor, count) for name, tensor in origin.blocks.items()}
    applied = (*origin.applied, *fresh)
    steered = steer(
        blocks, [p for p, _, _ in applied], [s for _, s, _ in applied], [a for _, _, a in applied], text_masks(entry)
    )
    changed = {name: tensor for name, tensor in steered.items() if tensor is not origin.blocks[name]}
    outcome = _Origin(blocks, applied)
    for name, tensor in changed.items():
        if tensor is not blocks[name]:  # else the outcome, which holds it, would keep its own key alive
            _origins[tensor] = outcome
    return with_blocks(entry, changed, **{ACTED: sorted(part.id for part, _, _ in applied)})


def _with_range(entry: Entry, start: float, end: float) -> Entry:
    return [entry[0], {**entry[1], "start_percent": start, "end_percent": end}]


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
    if balances(region.metadata):
        raise RegionError(
            f'The region "{region.name}" holds the groups of an attribute, and acting all at once they would undo one '
            'another: connect it to the node "Balance Safe Region" instead.'
        )
    if mode == "gated" and not all(part.gates for part in region.parts):
        raise RegionError(f'The region "{region.name}" has no gate: it acts on every prompt. Use mode auto or always.')
    for entry in conditioning:
        check_fit(region, text_blocks(entry))
    if strength == 0:
        return list(conditioning)

    def act(entry: Entry) -> Entry:
        return steer_once(entry, region.parts, [strength] * len(region.parts), mode == "always")

    with torch.no_grad():
        return within_range(conditioning, start, end, act)
