"""The instant move: closed-form regression from unsafe tokens to those of the safe counterpart. No diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..region.region import Move
from ..region.steering import judged
from . import processes

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
EXACT = 1_024  # features: sums of wider encoders are in single precision, since in double they take twice the memory
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

    def to(self, dtype: torch.dtype) -> TokenStatistics:
        """The same in another precision."""
        return TokenStatistics(**{name: value.to(dtype) for name, value in vars(self).items()})


class Averages:
    """Collects TokenStatistics from batches of prompts."""

    def __init__(
        self, mean: Tensor, scale: Tensor, constant: Tensor | None, share: float = 1.0, seed: int = 0,
        still: bool = False,
    ) -> None:  # fmt: skip
        """Args:
            mean, scale: [D], the gate's normalisation.
            constant: tokens [n, D] that are left out.
            still: all tokens should stay where they are.
            share: of the tokens; the others are left out by chance.
        """  # fmt: skip
        self.mean, self.scale, self.constant, self.share, self.seed = mean, scale, constant, share, seed
        width = len(mean)
        like = {"dtype": torch.float64 if width <= EXACT else torch.float32}
        self._number = torch.zeros((), dtype=torch.float64)
        shapes = ((width,), (width,), (width, width), () if still else (width, width), ())
        self._sums, self._still = [torch.zeros(shape, **like) for shape in shapes], still

    def add(self, source: Tensor, target: Tensor, number: int = 0) -> None:
        """Tokens of `source` [N, T, D] that should become those at the same places of `target`.

        Args:
            target: token states of the safe counterparts.
            number: of the batch; it tells which tokens are left out.
        """
        before, after = source.float(), target.float()
        counts = judged(before, self.constant)
        if not self._still:
            counts = counts & judged(after, self.constant)
        if self.share < 1:
            drawn = torch.rand(counts.shape, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
            counts = counts & (drawn < self.share)
        dtype = self._sums[0].dtype
        x = ((before[counts] - self.mean) / self.scale).to(dtype)
        self._number += len(x)
        self._sums[0] += x.sum(0)
        self._sums[2].addmm_(x.T, x)
        if self._still:
            return
        y = ((after[counts] - before[counts]) / self.scale).to(dtype)
        for total, some in zip((self._sums[1], self._sums[4]), (y.sum(0), y.square().sum())):
            total += some
        self._sums[3].addmm_(x.T, y)

    def result(self) -> TokenStatistics:
        """Of all batches, of all processes; asked for once, since the sums become the averages."""
        count = processes.summed(self._number).clamp(min=1)
        x, y, xx, xy, yy = (processes.summed(total).div_(count.to(total.dtype)) for total in self._sums)
        return TokenStatistics(self.mean, self.scale, x, y, xx, xy, yy)


def moments_bytes(width: int, targets: int) -> int:
    """What the averages of a block take while a move for each target is learned and chosen."""
    return 2 * (2 * targets + 1) * width**2 * (8 if width <= EXACT else 4)


def solving_bytes(width: int) -> int:
    """What `instant_move` takes beside the averages."""
    return 6 * width**2 * 8


def leading(product: Callable[[Tensor], Tensor], width: int, count: int) -> Tensor:
    """The eigenvectors [D, count] with the largest eigenvalues of a symmetric matrix, largest first, each with its
    largest number positive.

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
    found = (basis @ vectors[:, -count:]).flip(-1)
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return found * largest.sign()  # so that rounding turns none the other way


def instant_move(learn: TokenStatistics, held_out: TokenStatistics, rank: int) -> Move:
    """Reduced-rank ridge regression (Izenman, 1975) of the displacement on the normalised token.

    Args:
        held_out: moments of other prompts; they choose the ridge penalty.
        rank: of the linear map; the mean displacement comes on top.
    """
    covariance = learn.xx.double() - torch.outer(learn.x.double(), learn.x.double())
    wanted = learn.xy.double() - torch.outer(learn.x.double(), learn.y.double())
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for penalty in PENALTIES:
        shifted = covariance.clone()
        shifted.diagonal().add_(penalty * covariance.diagonal().mean())
        factor = torch.linalg.cholesky(shifted, out=shifted)

        def fitted(vectors: Tensor, factor: Tensor = factor) -> Tensor:
            """The ridge regression, which takes x to y, on the right of vectors of the output."""
            return torch.cholesky_solve(wanted @ vectors, factor)

        def carried(vectors: Tensor, factor: Tensor = factor, fitted: Callable[[Tensor], Tensor] = fitted) -> Tensor:
            return wanted.T @ torch.cholesky_solve(covariance @ fitted(vectors), factor)

        # the r directions of the output that carry most of the fitted displacement
        up = leading(carried, len(covariance), rank)  # [D, r]
        down = fitted(up).T  # [r, D]
        offset = learn.y.double() - up @ (down @ learn.x.double())
        error = float(held_out.error(*(tensor.to(held_out.x) for tensor in (down, up, offset))))
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
                mean=learn.mean.float(), scale=learn.scale.float())  # fmt: skip
