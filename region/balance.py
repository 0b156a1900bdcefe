"""Balancing an attribute: which image of a batch gets which group, and the groups' moves on a conditioning.

An *attribute region* is a region whose parts are the groups of one attribute (`man` and `woman`, say): they share a
gate, which opens on prompts about people, and each has its own move. One more part, `stated`, has a gate that opens on
prompts which state the attribute; where it opens, no group acts. (Its move is nothing. Two gates are needed since what
leaves a gender open lies between what states one and what states the other: no set of walls has that outside.)
The metadata names the `attribute` and its target `shares`.
"""
from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .blocks import MASK_OPTIONS, read_blocks
from .conditioning import (
    Entry,
    check_fit,
    check_numbers,
    original_tensors,
    repeated,
    steer_once,
    text_masks,
    text_tensors,
    within_range,
)
from .region import Part, Region, RegionError
from .steering import openness

GROUPS = "safe_region_groups"  # the option that says which group each image has: {attribute: [group of image 0, ...]}
STATED = "stated"  # the label of the part that tells which prompts state the attribute
MAX_SHARE = 1e9
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)
_SHARE = re.compile(r"\s*([^\s:=,;]+)\s*[:= ]\s*([^\s:=,;%]+)\s*%?\s*")


@dataclass(frozen=True)
class Attribute:
    """What an attribute region says about itself: the attribute's name, and a part and a target share by group."""

    name: str
    groups: dict[str, Part]
    shares: dict[str, float]
    stated: Part | None = None  # its gate opens on prompts that state the attribute

    def left_open(self, tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
        """1 for each prompt that does not state the attribute, else 0: [B]. `tensors` are its text, unsteered."""
        if self.stated is None:
            return torch.ones(())
        blocks = read_blocks(tensors, self.stated.gates)
        stated = self.stated.to(next(iter(blocks.values())).device)
        return (openness(blocks, stated, masks=text_masks(entry, self.stated.gates)) == 0).float()


def attribute_of(region: Region) -> Attribute:
    """The groups of an attribute region, in alphabetical order. RegionError when it is none or its shares are wrong."""
    name = region.metadata.get("attribute")
    if name is None:
        raise RegionError(
            f'The region "{region.name}" is a safe region and has no groups to balance: connect it to the node '
            '"Apply Safe Region", or load one that was learned with "Train Balance Region".'
        )
    if not isinstance(name, str) or not name.strip():
        raise RegionError(f'The region "{region.name}" does not name its attribute in a word.')
    parts = {part.label: part for part in sorted(region.parts, key=lambda part: part.label)}
    stated = parts.pop(STATED, None)
    shares = region.metadata.get("shares", dict.fromkeys(parts, 1.0))
    return Attribute(name, parts, checked_shares(shares, list(parts), f'The region "{region.name}"'), stated)


def checked_shares(shares: Any, groups: Sequence[str], where: str) -> dict[str, float]:
    """The share of each group, in the order of `groups`; they need not add up to 1. `where` is what errors begin with.

    Raises RegionError unless there is one finite number of at least 0 for each group, and not all are 0.
    """
    named = ", ".join(groups)
    if not isinstance(shares, Mapping) or set(shares) != set(groups):
        raise RegionError(f"{where} must give a share to each of its groups, and to no others: {named}.")
    values = [shares[group] for group in groups]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numbers or not all(0 <= value <= MAX_SHARE for value in values) or sum(values) <= 0:
        raise RegionError(f"{where} must give shares that are numbers of 0 or more, not all of them 0, to: {named}.")
    return dict(zip(groups, map(float, values)))


def parse_shares(text: str, groups: Sequence[str]) -> dict[str, float] | None:
    """Shares as people write them, `man: 50, woman: 50`; None for an empty text. Raises RegionError."""
    shares: dict[str, float] = {}
    for piece in filter(None, map(str.strip, re.split(r"[,;\n]", text))):
        found = _SHARE.fullmatch(piece)
        try:
            if found is None or found[1] in shares:
                raise ValueError
            shares[found[1]] = float(found[2])
        except ValueError:
            example = ", ".join(f"{group}: {100 / len(groups):.3g}" for group in groups)
            raise RegionError(f'The shares "{piece[:60]}" cannot be read; write, for instance: {example}.') from None
    return checked_shares(shares, groups, "The shares") if shares else None


def _phase(seed: int, dimension: int) -> Fraction:
    """Point `seed` of the Richtmyer sequence {seed * sqrt(prime)}, exact to 64 bits: of low discrepancy in all
    dimensions together, so consecutive seeds make totals even, and random seeds are not biased.
    """
    root = math.isqrt(_PRIMES[dimension % len(_PRIMES)] << 128)  # sqrt(prime) in units of 2^-64
    return Fraction(seed * root % 2**64, 2**64)


def _spread(count: int) -> list[int]:
    """0 ... count - 1 in the order of their bit reversals (van der Corput, 1935), whose inverse spreads runs evenly."""
    return sorted(range(count), key=lambda k: int(f"{k:b}"[::-1], 2) / 2 ** k.bit_length())


def assign(shares: Sequence[float], count: int, seed: int, within: Sequence[Sequence[Hashable]] = ()) -> Tensor:
    """Which group each image of a batch gets: [count] indices on the CPU, the same on every device.

    Systematic sampling (Madow & Madow, 1944): `count` evenly spaced points with one phase, cut at the cumulated
    shares. A group's count differs from share * count by less than 1, whatever the seed, and its expectation over
    seeds is exact. The phase is a low-discrepancy sequence in the seed, so that over runs with consecutive seeds, of
    one image each for instance, the totals keep close to the shares too. Which images get which points is a seeded
    shuffle.

    Args:
        shares: of the groups, at least 0; they need not add up to 1.
        within: the groups [count] that the images already have of other attributes. Within each combination of
            these the new groups are spread as evenly as the numbers allow.
    """
    parts = [Fraction(share) for share in shares]
    bounds = [count * bound / sum(parts) for bound in accumulate(parts)]
    phase = _phase(seed, len(within))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**64)).tolist()
    combinations = list(zip(*within)) or [()] * count
    known = {combination: i for i, combination in enumerate(dict.fromkeys(combinations))}
    order.sort(key=lambda image: known[combinations[image]])
    groups = torch.empty(count, dtype=torch.long)
    for point, place in enumerate(_spread(count)):
        groups[order[place]] = bisect_right(bounds, point + phase)
    return groups


def known_groups(conditioning: Sequence[Entry], count: int) -> dict[str, list[str]]:
    """The groups that the images have been given already, by attribute."""
    found: dict[str, list[str]] = {}
    for entry in conditioning:
        groups = entry[1].get(GROUPS)
        found |= groups if isinstance(groups, dict) else {}
    return {name: labels for name, labels in found.items() if isinstance(labels, list) and len(labels) == count}


def balance_conditioning(
    conditioning: Sequence[Entry], region: Region, batch_size: int, seed: int,
    shares: Mapping[str, float] | None = None, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
    groups: Sequence[str] | None = None,
) -> list[Entry]:  # fmt: skip
    """Give each image of a batch a group of the region's attribute, where its prompt leaves the attribute open.

    Every entry's text gets `batch_size` rows. Rows of a prompt that the gate leaves alone keep their bits; no host
    synchronisation tells them apart. With regions before or after it in a chain this acts on the same original text,
    in any order; the same attribute is drawn once only.

    Args:
        conditioning: entries `[tensor [1 or batch_size, T, D], options]`; never changed.
        seed: says who gets what, see `assign`.
        shares: target shares by group; None takes the region's own.
        strength: 1 is what was learned, 0 is the identity.
        start, end: the share of sampling (0 to 1) in which the groups act, as in `apply_to_conditioning`.
        groups: the group of each image, instead of drawing them.

    Raises:
        RegionError: the region balances nothing or does not fit, or the numbers make no sense.
    """
    attribute = attribute_of(region)
    check_numbers(strength, start, end)
    if batch_size < 1:
        raise RegionError(f"batch_size must be at least 1, not {batch_size}.")
    for entry in conditioning:
        check_fit(region, entry)
        rows = {len(tensor) for tensor in text_tensors(entry).values()} - {1, batch_size}
        if rows:
            raise RegionError(
                f"This conditioning holds the texts of {rows.pop()} images, but batch_size is {batch_size}: both must "
                "be the same, or the conditioning must come straight from its text encoder."
            )
    if strength == 0:
        return list(conditioning)
    known = known_groups(conditioning, batch_size)
    drawn = groups or known.pop(attribute.name, None)
    if drawn is None or not set(drawn) <= attribute.groups.keys():
        wanted = attribute.shares if shares is None else checked_shares(shares, list(attribute.groups), "The shares")
        names = list(wanted)
        drawn = [names[i] for i in assign(list(wanted.values()), batch_size, seed, list(known.values())).tolist()]
    rows = [strength * torch.tensor([float(group == name) for group in drawn]) for name in attribute.groups]
    parts = list(attribute.groups.values())

    def act(entry: Entry) -> Entry:
        left_open = attribute.left_open(original_tensors(entry), entry)
        strengths = [row.to(left_open.device, non_blocking=True) * left_open for row in rows]
        text, options = steer_once(entry, parts, strengths, count=batch_size)
        options = {**options, GROUPS: {**known, attribute.name: list(drawn)}}
        for name in MASK_OPTIONS.values():
            if isinstance(options.get(name), Tensor) and options[name].ndim > 1 and len(options[name]) == 1:
                options[name] = repeated(options[name], batch_size)
        return [text, options]

    with torch.no_grad():
        return within_range(conditioning, start, end, act)
