"""Going on from a region: what it can be, and a move that learns new pairs and keeps what the old one did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..region.conditioning import CROSS_ATTENTION, balances, check_fit
from ..region.region import Move, Region, RegionError
from .instant import TokenStatistics, instant_move, leading

SEEN = 0.98  # of all unsafe prompts: where old walls open on so many, no new ones are needed
FURTHER = 6.0  # measured: as good as the old pairs themselves; with 3 the old concept is half forgotten


def check_existing(region: Region, preset: str, signature: dict[str, Any], entry: Sequence[Any]) -> None:
    """Raises RegionError unless a run with this preset can go on from the region.

    Args:
        signature: of the backbone's text encoder.
        entry: any prompt, as it encodes it.
    """
    named = f'Training cannot go on from the region "{region.name}": '
    if balances(region.metadata):
        raise RegionError(f"{named}it balances an attribute; choose a safe region.")
    if len(region.parts) != 1:
        raise RegionError(f"{named}training can go on from a region with one concept, and it has several.")
    encoder, (part,) = region.metadata.get("encoder"), region.parts
    # what was imported names no parts, and no text encoder
    if isinstance(encoder, dict) and encoder.get("parts") and encoder.get("name") != signature["name"]:
        raise RegionError(
            f"{named}it was learned on the text encoder {encoder.get('name')}, and this model has {signature['name']}; "
            "choose a region of this text encoder."
        )
    check_fit(region, entry)
    shifts = [move.direction is not None for move in part.moves.values()]
    if preset == "paper" and not (part.moves.keys() == {CROSS_ATTENTION} and all(shifts) and not part.gates):
        raise RegionError(f"{named}it was not learned with the preset paper; choose another preset.")
    if preset != "paper" and (any(shifts) or not part.gates):
        raise RegionError(f"{named}it has no gate, as the preset paper makes regions; choose that preset.")


def _map_of(move: Move, statistics: TokenStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """`down`, `up` and `offset` in units of the scale."""
    scale = statistics.scale.double()
    width = len(scale)
    down = torch.zeros(0, width, dtype=torch.float64) if move.down is None else move.down.double()
    up = torch.zeros(width, 0, dtype=torch.float64) if move.up is None else move.up.double() / scale[:, None]
    offset = torch.zeros(width, dtype=torch.float64) if move.offset is None else move.offset.double() / scale
    return down, up, offset


def seen_by_old(old: Move, still: TokenStatistics) -> TokenStatistics:
    """Tokens as the old pairs may have had them, which nobody knows any more: harmless ones, but FURTHER times as
    widely spread in all that the old move looks at. They should go where it takes them.

    The move was fitted to do nothing to harmless tokens, so what it looks at tells unsafe ones from them.
    """
    still = still.to(torch.float64)
    down, up, offset = _map_of(old, still)
    covariance = still.xx - torch.outer(still.x, still.x)
    looks = down @ covariance  # [r, D]
    spread = looks.T @ torch.linalg.pinv(looks @ down.T, hermitian=True) @ looks if len(down) else 0.0
    kept = replace(still, xx=still.xx + (FURTHER**2 - 1) * spread, y=torch.zeros_like(still.y),
                   xy=torch.zeros_like(still.xx), yy=torch.zeros_like(still.yy))  # fmt: skip
    return kept.plus(down, up, offset)


def extended_move(old: Move, learn: TokenStatistics, held_out: TokenStatistics, rank: int) -> Move:
    """The old move with a low-rank map added, fitted to what the old one leaves of the wanted displacements.

    Args:
        learn, held_out: in the old move's normalisation; `held_out` chooses the ridge penalty.
        rank: of what is added; the sum has at most twice as much, or the old move's own rank.
    """
    learn, held_out = learn.to(torch.float64), held_out.to(torch.float64)
    down, up, offset = _map_of(old, learn)
    added = instant_move(*(some.plus(down, -up, -offset) for some in (learn, held_out)), rank)
    more_down, more_up, more_offset = _map_of(added, learn)
    down, up, offset = torch.cat([down, more_down]), torch.cat([up, more_up], 1), offset + more_offset
    most = max(2 * rank, len(old.down) if old.down is not None else 0)
    if len(down) > most:
        covariance = learn.xx - torch.outer(learn.x, learn.x)
        whole = up @ down
        basis = leading(lambda vectors: whole @ (covariance @ (whole.T @ vectors)), len(whole), most)
        # what is cut off is replaced by its mean
        offset = offset + (whole - basis @ (basis.T @ whole)) @ learn.x
        down, up = basis.T @ whole, basis
    scale = learn.scale.double()
    return Move(down=down.float(), up=(up * scale[:, None]).float(), offset=(offset * scale).float(),
                mean=learn.mean.float(), scale=learn.scale.float())  # fmt: skip
