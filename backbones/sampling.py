"""Sampling with any backbone: plain Euler steps and classifier-free guidance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

from ..region.conditioning import Entry
from .protocol import Backbone

# (backbone, noisy latents [B, ...], sigmas [B], entries one each, empty prompt, guidance) -> denoised latents
Guide = Callable[[Backbone, Tensor, Tensor, Sequence[Entry], Entry | None, float], Tensor]


def guided(
    backbone: Backbone, x: Tensor, sigma: Tensor, entries: Sequence[Entry], empty: Entry | None, guidance: float
) -> Tensor:
    """Denoised latents with classifier-free guidance (Ho & Salimans, 2022); at guidance 1 one evaluation only."""
    if guidance == 1 or empty is None:
        return backbone.denoise(x, sigma, entries)
    same = all(entry[0].shape == empty[0].shape for entry in entries)
    if same:
        both = backbone.denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), [*entries, *[empty] * len(entries)])
        positive, negative = both.chunk(2)
    else:
        positive = backbone.denoise(x, sigma, entries)
        negative = backbone.denoise(x, sigma, [empty] * len(entries))
    return negative + guidance * (positive - negative)


@torch.no_grad()
def trajectory(
    backbone: Backbone,
    entries: Sequence[Entry],
    empty: Entry | None,
    guidance: float,
    steps: int,
    generator: Generator,
    visit: Callable[[int], None] = lambda step: None,
    guide: Guide = guided,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Euler sampling. Yields, before each step, noisy latents [B, ...], their sigma [] and the denoised latents.

    `guide` stands in for classifier-free guidance; one that remembers earlier steps is made anew for each run.
    """
    sigmas = backbone.sigmas(steps)
    x = backbone.start(len(entries), sigmas[0], generator).to(sigmas.device)
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        visit(step)
        denoised = guide(backbone, x, sigma.expand(len(x)), entries, empty, guidance)
        yield x, sigma, denoised
        x = x + (x - denoised) / sigma * (following - sigma)


def sample(
    backbone: Backbone,
    entries: Sequence[Entry],
    empty: Entry | None,
    guidance: float = 4.0,
    steps: int = 20,
    seed: int = 0,
    guide: Guide = guided,
) -> Tensor:
    """Latents [B, ...] drawn from one seed: picture i depends on i, its prompt and the seed only."""
    walk = trajectory(backbone, entries, empty, guidance, steps, Generator().manual_seed(seed), guide=guide)
    ((_, _, denoised),) = deque(walk, maxlen=1)
    return denoised
