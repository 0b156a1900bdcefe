"""Applying regions to a conditioning as ComfyUI passes it around: a list of `[tensor, options]` entries."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .blocks import (
    BESIDE,
    CROSS_ATTENTION,
    DIRECT,
    LLAMA,
    MASK_OPTIONS,
    MT5,
    POSE,
    SOMETIMES,
    TEXT_KEYS,
    block_names,
    block_width,
    described,
    families,
    key_of,
    read_blocks,
    whole_widths,
    write_blocks,
)
from .known import check_known, keep_mask
from .region import Part, Region, RegionError, combined_from, plain
from .steering import check_judgeable, steer

Entry = list[Any]  # [cross-attention tensor, options]

ACTED = "safe_region_ids"  # the option that tells other nodes which parts acted on an entry
MAX_STRENGTH = 4.0


@dataclass(frozen=True)
class _Origin:
    """What an entry was before it was steered, by what, and what came of it."""

    tensors: dict[str, Tensor]
    applied: tuple[tuple[Part, float | Tensor, bool], ...] = ()  # with the strength, of each row where it is a tensor
    outcome: Mapping[str, Tensor] = field(default_factory=dict)  # copies: text may be edited in place later
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # that it was judged with


# From a steered tensor to what it was. A second node in a chain starts from there, so that the order of nodes does
# not matter and no part acts twice. Text that another node rebuilt (concat, average) is not in here: it counts as new,
# whatever its options say, since unsteered text may have been mixed in.
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _origin(tensors: Mapping[str, Tensor]) -> _Origin:
    """What the text was before any part acted; the text itself where none did, or another node edited it since."""
    found = next((origin for tensor in tensors.values() if (origin := _origins.get(tensor))), None)
    if (
        found
        and tensors.keys() <= found.outcome.keys()
        and all(_origins.get(t) is found or found.tensors[name] is t for name, t in tensors.items())
        and all(_same_bits(tensor, found.outcome[name]) for name, tensor in tensors.items())
    ):
        return replace(found, tensors={name: found.tensors[name] for name in tensors})
    return _Origin(dict(tensors))


def with_even_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with as many rows each, as ComfyUI repeats one row beside several. Raises RegionError."""
    rows = {len(tensor) for tensor in tensors.values()} - {1} or {1}
    if len(rows) > 1:
        raise RegionError(
            f"This conditioning holds the texts of {min(rows)} images beside those of {max(rows)}: use one that comes "
            "straight from its text encoder."
        )
    return {name: repeated(tensor, *rows) for name, tensor in tensors.items()}


def original_tensors(entry: Sequence[Any]) -> dict[str, Tensor]:
    """The entry's text, as `text_tensors` has it, before any region acted on it, and of as many rows in each."""
    return with_even_rows(_origin(text_tensors(entry)).tensors)


def acted_before(entry: Sequence[Any], parts: Iterable[Part]) -> list[tuple[float | Tensor, bool]]:
    """How those of the parts that steered the entry did so: strength (of each row where it is a tensor), always."""
    ids = {part.id for part in parts}
    return [(strength, mode) for part, strength, mode in _origin(text_tensors(entry)).applied if part.id in ids]


def text_tensors(entry: Sequence[Any]) -> dict[str, Tensor]:
    """The parts of an entry that carry text, by the option they are in."""
    found = {key: entry[1].get(key) for key in TEXT_KEYS}  # ComfyUI, too, takes the option where the entry has none
    found |= {CROSS_ATTENTION: entry[0]} if entry[0] is not None else {}
    return {key: tensor for key, tensor in found.items() if isinstance(tensor, Tensor)}


def text_blocks(entry: Sequence[Any], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The entry's text by block; `names` are those wanted, None the blocks that a region for this model has."""
    tensors = text_tensors(entry)
    return read_blocks(tensors, block_names(tensors) if names is None else names)


def text_masks(entry: Sequence[Any], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Which tokens attention masks leave, bool [B or 1, T], by block name, where there is a mask for its tokens."""
    masks, tensors = {}, text_tensors(entry)
    for block in block_names(tensors) if names is None else names:
        mask, text = entry[1].get(MASK_OPTIONS.get(key_of(block))), tensors.get(key_of(block))
        if mask is not None and text is not None:
            keeps = keep_mask(mask, len(text), text.shape[-2])
            masks |= {} if keeps is None else {block: keeps.to(text.device)}
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


def _of_other_families(learned: Mapping[str, int], met: Mapping[str, int]) -> bool:
    """Whether both are of families that we know, and of none together: one has a text that the other does not."""
    known, others = families(learned), families(met)
    fits = (family in known or {key: w for key, w in met.items() if key not in family.unread} == learned
            for family in others)  # fmt: skip
    return bool(known and others) and not any(fits)


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
    check_known([entry], allow_unknown=True)
    tensors = text_tensors(entry)
    widths = {key: tensor.shape[-1] for key, tensor in tensors.items()}
    for part in region.parts:
        wanted = _needed(part)
        met = {block: block_width(block, tensors) for block in wanted}
        if (
            any(met[block] != width for block, width in wanted.items() if met[block] or block not in SOMETIMES)
            or not widths.keys() & {LLAMA, MT5, DIRECT} <= set(map(key_of, wanted))
            or _of_other_families(whole_widths(wanted), widths)
        ):
            name = _learned_on(region)
            layers = {key: tensor.shape[1] for key, tensor in tensors.items() if tensor.ndim == 4}
            learned = Counter(key_of(block) for block in wanted if "__layer" in block)
            raise RegionError(
                f'The region "{region.name}" was learned on {name or "another text encoder"} '
                f"({described(wanted, learned, name)}), but this conditioning has {described(widths, layers)}. "
                "Use a region that was trained with this model's text encoder."
            )


def _check_learned(region: Region, entry: Sequence[Any]) -> None:
    """Raises RegionError for text that only some prompts have, and of which a part of the region learned nothing."""
    for key in SOMETIMES:
        if key in text_tensors(entry) and not all(key in map(key_of, part.moves) for part in region.parts):
            raise RegionError(
                f'This prompt has words in quotes, which this model reads with a text encoder of their own ("{key}"), '
                f'and the region "{region.name}" learned nothing about such text: take the quotes away, or train it '
                'with some pairs that have words in quotes. With unknown_text on "allow" they pass unguarded.'
            )


def repeated(tensor: Tensor, count: int | None) -> Tensor:
    """The tensor with its one row `count` times; the tensor itself where it has that many, or `count` is None."""
    return tensor if count in (None, len(tensor)) else tensor.repeat(count, *[1] * (tensor.ndim - 1))


def _stronger(one: float | Tensor, other: float | Tensor) -> float | Tensor:
    """The larger strength, row by row; `one` itself where no row of `other` is larger."""
    if isinstance(one, Tensor):
        larger = torch.maximum(one, other.to(one.device)) if isinstance(other, Tensor) else one.clamp(min=other)
        return one if torch.equal(one, larger) else larger
    if isinstance(other, Tensor):
        return other.clamp(min=one)
    return one if one >= other else other


def _same_masks(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two sets of masks [B or 1, T] leave the same tokens."""
    return some.keys() == others.keys() and all(
        len({1, len(mask), len(others[name])}) <= 2 and bool((mask == others[name]).all())
        for name, mask in some.items()
    )


def steer_once(
    entry: Entry, parts: Sequence[Part], strengths: Sequence[float | Tensor], always: bool = False,
    count: int | None = None,
) -> Entry:  # fmt: skip
    """The entry steered by these parts together with those that acted on it before, all from the original text.

    Of a part that comes again the strongest counts: the largest strength, row by row, and `always` if it was ever so.

    Args:
        strengths: of each part, at least 0; a tensor [B] holds one for each row.
        count: B, when the entry is to become so many rows.
    """
    found = text_tensors(entry)
    origin = _origin(found)
    before = {part.id: (part, strength, mode) for part, strength, mode in origin.applied}
    asked = dict(before)
    for part, strength in zip(parts, strengths):
        _, old, mode = asked.get(part.id, (part, 0.0, False))
        asked[part.id] = (part, _stronger(old, strength), mode or always)
    names = list(dict.fromkeys(block for part, _, _ in asked.values() for block in (*part.gates, *part.moves)))
    masks = text_masks(entry, names)
    if (
        asked.keys() == before.keys()
        and all(new[1] is old[1] and new[2] == old[2] for new, old in zip(asked.values(), before.values()))
        and _same_masks(masks, origin.masks)
    ):
        return entry
    applied = tuple(asked.values())
    tensors = {name: repeated(tensor, count) for name, tensor in origin.tensors.items()}
    even = with_even_rows(tensors)
    blocks = read_blocks(even, names)
    check_judgeable(blocks, [part for part, _, _ in applied], masks)
    steered = steer(blocks, *zip(*applied), masks)
    written = write_blocks(even, {name: t for name, t in steered.items() if t is not blocks[name]})
    result = tensors | written
    outcome = _Origin(tensors, applied, {name: tensor.clone() for name, tensor in result.items()}, masks)
    for tensor in written.values():
        _origins[tensor] = outcome
    changed = {name: tensor for name, tensor in result.items() if tensor is not found[name]}
    return _with_tensors(entry, changed, **{ACTED: sorted(asked)})


def _range(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say in which share of sampling an entry is drawn."""
    return {key: options[key] for key in ("start_percent", "end_percent") if key in options}


def _with_range(entry: Entry, start: float, end: float) -> Entry:
    return [entry[0], {**entry[1], "start_percent": start, "end_percent": end}]


def _beside(entry: Entry) -> list[tuple[Mapping[str, str], Entry]]:
    """The texts that the entry has beside its own, each as an entry, with the names of its options."""
    found = []
    for group in BESIDE:
        texts = {key: entry[1][option] for option, key in group.items() if isinstance(entry[1].get(option), Tensor)}
        found += [(group, [texts.pop(CROSS_ATTENTION, None), texts])] if texts else []
    return found


def other_texts(entry: Entry) -> list[Entry]:
    """Texts that the entry has beside its own, for a ControlNet alone or with a pose, as entries of their own."""
    return [text for _, text in _beside(entry)]


def check_numbers(strength: float, start: float = 0.0, end: float = 1.0) -> None:
    """Raises RegionError for a strength or a range that makes no sense: a linked number may be any."""
    if not isinstance(strength, Real) or not 0 <= strength <= MAX_STRENGTH:
        raise RegionError(
            f"The strength must be a number from 0 to {MAX_STRENGTH:g}, not {plain(str(strength), 40)}: 1 is what was "
            "learned, 0 changes nothing."
        )
    if not isinstance(start, Real) or not isinstance(end, Real) or not 0 <= start < end <= 1:
        raise RegionError(
            f"start ({plain(str(start), 40)}) and end ({plain(str(end), 40)}) must lie between 0 and 1, start before "
            "end: 0 and 1 act from the first step to the last."
        )


def within_range(
    conditioning: Sequence[Entry], start: float, end: float, act: Callable[[Entry], Entry]
) -> list[Entry]:
    """The entries as `act` makes them from `start` to `end` of sampling, and as they were outside of it."""
    result = []
    for entry in conditioning:
        first, last = entry[1].get("start_percent", 0.0), entry[1].get("end_percent", 1.0)
        if not isinstance(first, Real) or not isinstance(last, Real):
            raise RegionError("A prompt's own range of sampling is no number: take out the node that sets it.")
        inner = (max(first, start), min(last, end))
        # an entry of a single point is drawn at a step that falls on it
        if inner[0] > inner[1] or (inner[0] == inner[1] and first < last):
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
    return "attribute" in metadata or any(map(balances, combined_from(metadata)))


def refuse_groups(region: Region) -> None:
    """Raises RegionError for a region that holds the groups of an attribute."""
    if balances(region.metadata):
        raise RegionError(
            f'The region "{region.name}" holds the groups of an attribute, and acting all at once they would undo one '
            'another: connect it to the node "Balance Safe Region (Bias)" instead.'
        )


def apply_to_conditioning(
    conditioning: Sequence[Entry], region: Region, strength: float = 1.0, mode: str = "auto",
    start: float = 0.0, end: float = 1.0, unknown_text: bool = False,
) -> list[Entry]:
    """Steer every entry of a ComfyUI conditioning; the input is never changed.

    Args:
        conditioning: entries `[tensor [B, T, D], options]`.
        strength: 1 is what was learned, 0 is the identity.
        mode: `auto` and `gated` use the region's gates, `always` ignores them. `gated` needs a region that has gates.
        start, end: the share of sampling (0 to 1) in which the region acts. An entry's own range is split, as
            ComfyUI splits schedules; outside of `start` to `end` the original text holds.
        unknown_text: let pass what may be text and has a name that we do not know, unsteered; see `check_known`.

    Raises:
        RegionError: the region does not fit this conditioning, which may hold text that no region steers, or the mode
            or the numbers make no sense.
    """
    if mode not in ("auto", "gated", "always"):
        raise RegionError(f'There is no mode "{mode}": use auto, gated or always.')
    check_numbers(strength, start, end)
    refuse_groups(region)
    if mode == "gated" and not all(part.gates for part in region.parts):
        raise RegionError(f'The region "{region.name}" has no gate: it acts on every prompt. Use mode auto or always.')
    check_known(conditioning, unknown_text)
    for entry in conditioning:
        check_fit(region, entry)
        if not unknown_text:
            _check_learned(region, entry)
        for other in other_texts(entry):
            check_fit(region, other)
    if strength == 0:
        return list(conditioning)

    def steered(entry: Entry) -> Entry:
        return steer_once(entry, region.parts, [strength] * len(region.parts), mode == "always")

    def act(entry: Entry) -> Entry:
        text, options = steered(entry)
        for group, other in _beside(entry):
            changed = text_tensors(steered(other))
            options = options | {option: changed[key] for option, key in group.items() if key in changed}
        return [text, options]

    with torch.no_grad():
        return within_range(conditioning, start, end, act)


def steer_poses(conditioning: Sequence[Entry], region: Region, *how: Any) -> list[Entry]:
    """Steer the text with a pose, and nothing else, in entries that are not drawn themselves; `how` and errors are
    those of `apply_to_conditioning`."""
    result: list[Entry] = []
    for entry in conditioning:
        pose = entry[1].get(POSE)
        if not isinstance(pose, Tensor):
            result.append(entry)
            continue
        for text, options in apply_to_conditioning([[pose, _range(entry[1])]], region, *how):
            result.append([entry[0], {**entry[1], POSE: text, **_range(options)}])
    return result
