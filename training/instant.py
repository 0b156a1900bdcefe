"""The instant move: closed-form regression from unsafe tokens to those of the safe counterpart. No diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..region.region import Move
from ..region.steering import judged

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
CHUNK = 256  # prompts
ITERATIONS, SPARE = 200, 8  # of subspace iteration at most, and vectors beside those that are asked for
CLOSE = 1e-7  # of the largest eigenvalues' sum: by how much it still grew in the last iteration
STILL = 4.0  # harmless tokens together count so many times as much as the unsafe ones


@dataclass(frozen=True)
class TokenStatistics:
    """Averages over normalised tokens x [D] and their wanted displacements y [D], in units of `scale`.

    They are all that a linear regression needs, and with them the error of any affine map is known without looking
    at a token again.
    """

    mean: Tensor  # [D], the gate's normalisation
    scale: Tensor  # [D]
    x: Tensor  # [D]
    y: Tensor  # [D]
    xx: Tensor  # [D, D]
    xy: Tensor  # [D, D]
    yy: Tensor  # []

    def _of_map(self, down: Tensor, up: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The mean square of what the map adds, and its agreement with the wanted displacements."""
        mapped = down @ self.xx @ down.T  # [r, r]
        square = ((up.T @ up) * mapped).sum() + offset.square().sum() + 2 * offset @ (up @ (down @ self.x))
        return square, ((down @ self.xy) * up.T).sum() + offset @ self.y

    def error(self, down: Tensor, up: Tensor, offset: Tensor) -> Tensor:
        """What the map `up down x + offset` leaves of the wanted displacements: 1 for no map, 0 for a perfect one.

        `up` [D, r] and `offset` [D] are in units of `scale`.
        """
        square, agreement = self._of_map(down, up, offset)
        return (square - 2 * agreement + self.yy) / self.yy

    def plus(self, down: Tensor, up: Tensor, offset: Tensor) -> TokenStatistics:
        """The same tokens with that map added to the wanted displacements."""
        square, agreement = self._of_map(down, up, offset)
        return replace(self, y=self.y + up @ (down @ self.x) + offset, yy=self.yy + 2 * agreement + square,
                       xy=self.xy + (up @ (down @ self.xx)).T + torch.outer(self.x, offset))  # fmt: skip

    def beside(self, still: TokenStatistics, weight: float = STILL) -> TokenStatistics:
        """These with those of tokens that should stay where they are, which count `weight` times as much together."""
        mixed = {name: (value + weight * getattr(still, name)) / (1 + weight)
                 for name, value in vars(self).items() if name not in ("mean", "scale")}  # fmt: skip
        return replace(self, **mixed)

    def float(self) -> TokenStatistics:
        """The same in float32."""
        return TokenStatistics(**{name: value.float() for name, value in vars(self).items()})


def token_statistics(
    source: Tensor, target: Tensor, mean: Tensor, scale: Tensor, constant: Tensor | None
) -> TokenStatistics:
    """Statistics of the tokens of `source` [N, T, D] that should become those at the same places of `target`.

    Args:
        target: token states of the safe counterparts; `source` itself for harmless prompts, which should stay.
        mean, scale: [D], the gate's normalisation.
        constant: tokens [n, D] that are left out.
    """
    count, sums = 0, [torch.zeros((), dtype=torch.float64)] * 5
    for begin in range(0, len(source), CHUNK):
        before, after = source[begin : begin + CHUNK].float(), target[begin : begin + CHUNK].float()
        counts = judged(before, constant) & judged(after, constant)
        x = ((before[counts] - mean) / scale).double()
        y = ((after[counts] - before[counts]) / scale).double()
        count += len(x)
        sums = [a + b for a, b in zip(sums, (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum()))]
    return TokenStatistics(mean, scale, *(total / max(count, 1) for total in sums))


def leading(product: Callable[[Tensor], Tensor], width: int, count: int) -> Tensor:
    """The eigenvectors [D, count] with the largest eigenvalues of a symmetric matrix, largest first.

    Subspace iteration (Bauer, 1957) with a few vectors more: the matrix itself need not be known.

    Args:
        product: of the positive matrix [D, D] and some vectors [D, n], in float64.
        width: D.
    """
    start = torch.randn(width, min(count + SPARE, width), dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    basis, before = torch.linalg.qr(start).Q, -1.0
    for _ in range(ITERATIONS):
        image = product(basis)
        values, vectors = torch.linalg.eigh(basis.T @ image)
        total = float(values[-count:].sum())
        if total - before <= CLOSE * total:
            break
        basis, before = torch.linalg.qr(image).Q, total
    return (basis @ vectors[:, -count:]).flip(-1)


def instant_move(learn: TokenStatistics, held_out: TokenStatistics, rank: int) -> Move:
    """Reduced-rank ridge regression (Izenman, 1975) of the displacement on the normalised token.

    Args:
        held_out: moments of other prompts; they choose the ridge penalty.
        rank: of the linear map; the mean displacement comes on top.
    """
    covariance = learn.xx - torch.outer(learn.x, learn.x)
    wanted = learn.xy - torch.outer(learn.x, learn.y)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for penalty in PENALTIES:
        ridge = penalty * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
        factor = torch.linalg.cholesky(covariance + ridge)

        def fitted(vectors: Tensor, factor: Tensor = factor) -> Tensor:
            """The ridge regression, which takes x to y, on the right of vectors of the output."""
            return torch.cholesky_solve(wanted @ vectors, factor)

        def carried(vectors: Tensor, factor: Tensor = factor, fitted: Callable[[Tensor], Tensor] = fitted) -> Tensor:
            return wanted.T @ torch.cholesky_solve(covariance @ fitted(vectors), factor)

        # the r directions of the output that carry most of the fitted displacement
        up = leading(carried, len(covariance), rank)  # [D, r]
        down = fitted(up).T  # [r, D]
        offset = learn.y - up @ (down @ learn.x)
        error = float(held_out.error(down, up, offset))
        if best is None or error < best[0]:
            best = (error, down, up, offset)
    assert best is not None  # noqa: S101 - there is always a penalty
    _, down, up, offset = best
    balance = (down.norm(dim=1) / up.norm(dim=0)).clamp(min=1e-8).sqrt()
    return _move(down / balance[:, None], up * balance, offset, learn)


def difference_move(learn: TokenStatistics, rank: int, seed: int = 0) -> Move:
    """The mean displacement for every token, and a linear map that starts at zero."""
    return _move(*_flat_map(len(learn.mean), rank, seed), learn.y, learn)


def zero_move(learn: TokenStatistics, rank: int, seed: int = 0) -> Move:
    """The LoRA initialisation: `up` is zero, `down` is random, so nothing changes yet."""
    return _move(*_flat_map(len(learn.mean), rank, seed), torch.zeros_like(learn.y), learn)


def _flat_map(width: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    down = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return down, torch.zeros(width, rank)


def _move(down: Tensor, up: Tensor, offset: Tensor, learn: TokenStatistics) -> Move:
    """A move from a map in units of the scale."""
    scale = learn.scale.double()
    return Move(down=down.float(), up=(up * scale[:, None]).float(), offset=(offset * scale).float(),
                mean=learn.mean, scale=learn.scale)  # fmt: skip
