"""The data types: a region is a tuple of parts, each a concept with a gate and a move."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class RegionError(ValueError):
    """A region that cannot be read or does not fit; its text is one sentence for the user."""


def plain(value: object, limit: int = 200) -> str:
    """A text or number from a file as one line without control characters; anything else is empty."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return ""
    line = "".join(c if c.isprintable() else " " for c in str(value)[: limit * 4])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class _Tensors:
    """Shared by the frozen tensor records below."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def to(self, device: torch.device | str) -> Any:
        """The same record on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, eq=False)
class Gate(_Tensors):
    """k walls of the region, in normalised coordinates: `depth(e) = weight u + context u_mean - bias`.

    u = (e - mean) / scale of a token, u_mean its average over the prompt's tokens. Depth is how far a token lies beyond
    a wall, in the company of the others; a prompt is inside when no token is beyond any.
    """

    weight: Tensor  # [k, D]
    bias: Tensor  # [k]
    mean: Tensor  # [D]
    scale: Tensor  # [D], positive
    ramp: Tensor  # [], depth at which the gate is fully open
    context: Tensor | None = None  # [k, D]; older regions judge each token by itself


@dataclass(frozen=True, eq=False)
class Move(_Tensors):
    """Where a prompt outside goes: `up down (e - mean) / scale + offset + profile direction`.

    The first two terms are a low-rank affine map in the form of LoRA factors. The last is the paper's rank-1
    shift: `direction` times a `profile` over token positions (which starts anew with each chunk of 77 tokens).
    """

    down: Tensor | None = None  # [r, D]
    up: Tensor | None = None  # [D, r]
    mean: Tensor | None = None  # [D]
    scale: Tensor | None = None  # [D], positive
    offset: Tensor | None = None  # [D]
    profile: Tensor | None = None  # [P]
    direction: Tensor | None = None  # [D]


@dataclass(frozen=True, eq=False)
class Scope(_Tensors):
    """How a text encoder writes prompts, so that text which was scaled or mixed afterwards is known from it.

    Each of k forms `square u^2 + linear u`, u = e / scale, lies between its `low` and `high`: first its mean over all
    tokens of a prompt, then over each few that follow one another, so that no other text makes up for a mixture. The
    unit is the form's own: what is 0.02 beyond is clearly beyond.
    """

    square: Tensor  # [k, D]
    linear: Tensor  # [k, D]
    scale: Tensor  # [D], positive
    low: Tensor  # [2, k]
    high: Tensor  # [2, k]


@dataclass(frozen=True, eq=False)
class Part:
    """One concept: per block of the conditioning a gate, a move, and tokens that never change.

    `constant` holds tokens that every prompt shares (start token, chat template): they are neither judged nor moved.
    Without any gate the part acts on every prompt, as in the paper. Where it has gates, text that is beyond one of its
    `scopes` opens them too: nothing was learned about such text.
    """

    label: str
    moves: dict[str, Move]
    gates: dict[str, Gate] = field(default_factory=dict)
    constant: dict[str, Tensor] = field(default_factory=dict)  # block -> [n, D]
    scopes: dict[str, Scope] = field(default_factory=dict)

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors as `block.gate.weight`, `block.move.down`, `block.scope.low`, `block.constant`."""
        named = {f"{block}.constant": tensor for block, tensor in self.constant.items()}
        for kind, records in (("gate", self.gates), ("move", self.moves), ("scope", self.scopes)):
            for block, record in records.items():
                named |= {f"{block}.{kind}.{name}": tensor for name, tensor in record.tensors().items()}
        return dict(sorted(named.items()))

    @cached_property
    def id(self) -> str:
        """A hash of the numbers: two parts with the same id do the same."""
        digest = hashlib.sha256()
        for name, tensor in self.named_tensors().items():
            digest.update(f"{name} {list(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _devices(self) -> dict[torch.device, Part]:
        return {}

    def to(self, device: torch.device) -> Part:
        """This part on a device; kept, so that later calls copy nothing."""
        if device not in self._devices:
            self._devices[device] = Part(
                self.label,
                {block: move.to(device) for block, move in self.moves.items()},
                {block: gate.to(device) for block, gate in self.gates.items()},
                {block: tensor.to(device) for block, tensor in self.constant.items()},
                {block: scope.to(device) for block, scope in self.scopes.items()},
            )
        return self._devices[device]

    def widths(self) -> dict[str, int]:
        """Width of each block that this part moves."""
        return {
            block: (move.direction if move.offset is None else move.offset).shape[-1]
            for block, move in self.moves.items()
        }


@dataclass(frozen=True, eq=False)
class Region:
    """A safe region: the intersection of its parts, and `metadata` that says where it comes from.

    Metadata is text for people: name, concept, description, encoder, base model, recipe, calibration, results,
    licence, author, created. Nothing in it is trusted.
    """

    parts: tuple[Part, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def only(self, labels: Iterable[str]) -> Region:
        """The region with just the named concepts. Raises RegionError for a label it does not have."""
        wanted = set(labels)
        missing = wanted - {part.label for part in self.parts}
        if missing:
            have = ", ".join(part.label for part in self.parts)
            raise RegionError(f"This region has no concept named {', '.join(sorted(missing))}; it has: {have}.")
        return replace(self, parts=tuple(part for part in self.parts if part.label in wanted))

    @property
    def name(self) -> str:
        """What it is called, in one line of at most 200 characters."""
        given = plain(self.metadata.get("name")) or plain(self.metadata.get("concept"))
        return given or plain("+".join(part.label for part in self.parts))


def combined_from(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the regions that one was combined from say of themselves; none for a region that was learned as it is."""
    others = metadata.get("combined")
    return [one for one in others if isinstance(one, Mapping)] if isinstance(others, list) else []


def combine(*regions: Region) -> Region:
    """The intersection: a prompt must be inside all. Parts that occur twice count once; order does not matter."""
    parts: dict[str, Part] = {}
    for region in regions:
        for part in region.parts:
            parts.setdefault(part.id, part)
    chosen: dict[str, Part] = {}
    for part in sorted(parts.values(), key=lambda p: (p.label, p.id)):
        label, count = part.label, 1
        while label in chosen:
            count += 1
            label = f"{part.label[:56]}-{count}"
        chosen[label] = part if label == part.label else replace(part, label=label)
    if len(regions) == 1:
        return replace(regions[0], parts=tuple(chosen.values()))
    metadata: dict[str, Any] = {"name": " + ".join(r.name for r in regions), "combined": [r.metadata for r in regions]}
    for key in ("encoder", "base_model", "family"):
        values = [r.metadata[key] for r in regions if key in r.metadata]
        if values and all(value == values[0] for value in values):
            metadata[key] = values[0]
    return Region(tuple(chosen.values()), metadata)
