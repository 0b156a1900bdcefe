"""The instant move: closed-form regression from unsafe tokens to those of the safe counterpart. No diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..region.region import Move
from ..region.steering import judged

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def token_pairs(unsafe: Tensor, safe: Tensor, constant: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [n, D] of unsafe prompts and, at the same positions, of their counterparts."""
    unsafe, safe = unsafe.float(), safe.float()
    counts = judged(unsafe, constant) & judged(safe, constant)
    return unsafe[counts], safe[counts]


def instant_move(
    unsafe: Tensor,
    safe: Tensor,
    held_unsafe: Tensor,
    held_safe: Tensor,
    mean: Tensor,
    scale: Tensor,
    constant: Tensor | None,
    rank: int,
) -> Move:
    """Reduced-rank ridge regression (Izenman, 1975) of the displacement on the normalised token.

    Args:
        unsafe, safe: token states [N, T, D] of the pairs; held_unsafe, held_safe choose the ridge penalty.
        mean, scale: [D], the gate's normalisation.
        rank: of the linear map; the mean displacement comes on top.
    """
    source, target = token_pairs(unsafe, safe, constant)
    held_source, held_target = token_pairs(held_unsafe, held_safe, constant)
    x, y = (source - mean) / scale, target - source
    held_x, held_y = (held_source - mean) / scale, held_target - held_source
    centre_x, centre_y = x.mean(0), y.mean(0)
    x, y = x - centre_x, y - centre_y
    gram, cross = x.T @ x, x.T @ y
    values, vectors = torch.linalg.eigh(gram.double())
    projected = vectors.T @ cross.double()
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        solution = (vectors @ (projected / (values + penalty * values.mean())[:, None])).float()
        error = float((held_y - centre_y - (held_x - centre_x) @ solution).square().mean())
        if best is None or error < best[0]:
            best = (error, solution)
    assert best is not None  # noqa: S101 - there is always a penalty
    solution = best[1]
    # the r directions of the output that carry most of the fitted displacement
    fitted = solution.T @ gram @ solution
    _, directions = torch.linalg.eigh(fitted.double())
    up = directions[:, -rank:].flip(-1).float()  # [D, r]
    down = (solution @ up).T  # [r, D]
    balance = (down.norm(dim=1) / up.norm(dim=0)).clamp(min=1e-8).sqrt()
    up, down = up * balance, down / balance[:, None]
    return Move(down=down, up=up, mean=mean, scale=scale, offset=centre_y - up @ (down @ centre_x))


def difference_move(
    unsafe: Tensor, safe: Tensor, mean: Tensor, scale: Tensor, constant: Tensor | None, rank: int
) -> Move:
    """The mean displacement for every token, and a linear map that starts at zero."""
    source, target = token_pairs(unsafe, safe, constant)
    return zero_move(mean, scale, rank, (target - source).mean(0))


def zero_move(mean: Tensor, scale: Tensor, rank: int, offset: Tensor | None = None, seed: int = 0) -> Move:
    """The LoRA initialisation: `up` is zero, `down` is random, so nothing changes yet."""
    width = len(mean)
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=generator) / width**0.5
    return Move(
        down=down, up=torch.zeros(width, rank), mean=mean, scale=scale,
        offset=torch.zeros(width) if offset is None else offset,
    )  # fmt: skip
