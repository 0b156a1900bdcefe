"""A text-to-image model small enough to reason about: the exact denoiser of a Gaussian whose mean the prompt sets."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from comfyui_safe_region.region.conditioning import Entry
from comfyui_safe_region.training.instant import Averages, TokenStatistics

WIDTH, LATENT = 24, (4, 4, 4)


def word_vector(word: str, width: int) -> Tensor:
    """A fixed random vector for any word; words that start with `zz` share a direction, as synonyms do."""
    generator = Generator().manual_seed(zlib.crc32(word.lower().encode()))
    vector = torch.randn(width, generator=generator)
    if word.lower().startswith("zz"):
        vector[: max(width // WIDTH, 1)] += 6
    return vector


def word_vectors(prompt: str, width: int) -> list[Tensor]:
    """Those of a prompt's words, after a start token, and an end token that has seen everything."""
    vectors = [torch.full((width,), 9.0), *(word_vector(word, width) for word in prompt.replace(",", " ").split())]
    return [*vectors, torch.stack(vectors).mean(0)]


class ToyBackbone:
    """`flow=False`: x = x_0 + sigma * noise. `flow=True`: x = (1 - sigma) x_0 + sigma * noise, sigma from 1 to 0."""

    can_denoise = True
    can_decode = True

    def __init__(self, flow: bool = False, pooled: bool = False, padded: bool = True) -> None:
        self.flow, self.pooled, self.padded = flow, pooled, padded
        generator = Generator().manual_seed(1)
        self.picture = torch.randn(WIDTH, 64, generator=generator) / WIDTH**0.5
        self.picture.requires_grad_(False)
        self.calls = 0

    def signature(self) -> dict[str, Any]:
        return {"name": "Toy", "parts": ["toy"], "blocks": {"cross_attn": WIDTH}}

    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        entries = []
        for prompt in prompts:
            vectors = word_vectors(prompt, WIDTH)
            if self.padded:
                vectors += [vectors[-1]] * (24 - len(vectors))
            tokens = torch.stack(vectors)[None]
            entries.append([tokens, {"pooled_output": tokens[:, 1:].mean(1)} if self.pooled else {}])
        return entries

    def sigmas(self, steps: int) -> Tensor:
        return (
            torch.linspace(1, 0, steps + 1) if self.flow else torch.cat([torch.logspace(1, -1, steps), torch.zeros(1)])
        )

    def start(self, count: int, sigma: Tensor, generator: Generator) -> Tensor:
        return torch.randn(count, *LATENT, generator=generator) * sigma

    def denoise(self, x: Tensor, sigma: Tensor, entries: Sequence[Entry]) -> Tensor:
        self.calls += len(entries)
        source = [e[1]["pooled_output"][0] if self.pooled else e[0][0, 1:].mean(0) for e in entries]
        mean = (torch.stack(source) @ self.picture).reshape(-1, *LATENT)
        level = sigma.view(-1, 1, 1, 1)
        signal = 1 - level if self.flow else torch.ones_like(level)
        # E[x_0 | x] for x_0 ~ N(mean, 1) and x = signal x_0 + level noise
        return mean + signal / (signal**2 + level**2) * (x - signal * mean)

    def fits(self, count: int) -> int:
        return count

    def step_bytes(self, count: int) -> int:
        return 1000 * count

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].detach().sigmoid().repeat_interleave(8, -1).repeat_interleave(8, -2)


def token_statistics(
    source: Tensor, target: Tensor, mean: Tensor, scale: Tensor, constant: Tensor | None
) -> TokenStatistics:
    """Of prompts [N, T, D] that are all at hand: see `Averages`."""
    averages = Averages(mean, scale, constant, still=source is target)
    averages.add(source, target)
    return averages.result()
