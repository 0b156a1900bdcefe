"""The few things that training asks of a text-to-image model.

Everything is said in *denoised* latents (x_0 predictions), so epsilon, v and flow models look the same: guidance
mixes are affine, and one Euler step towards the next noise level is `x + (x - denoised) / sigma * (next - sigma)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Generator, Tensor

from ..region.conditioning import Entry


class Backbone(Protocol):
    """A model to learn a region on. `can_denoise` and `can_decode` say what it was given besides a text encoder."""

    can_denoise: bool
    can_decode: bool

    def signature(self) -> dict[str, Any]:
        """The text encoder: `{"name": class name, "parts": [...], "blocks": {block: width}}`."""

    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        """Each prompt as one conditioning entry `[tensor [1, T, D], options]`, without gradients."""

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels [steps + 1], falling, the last one 0."""

    def start(self, count: int, sigma: Tensor, generator: Generator) -> Tensor:
        """Pure noise at level `sigma`, as sampling begins: latents [count, ...]. `generator` is a CPU generator."""

    def denoise(self, x: Tensor, sigma: Tensor, entries: Sequence[Entry]) -> Tensor:
        """x_0 predicted from noisy latents x [B, ...] at noise levels [B], one entry each.

        Differentiable in the entries' tensors when gradients are enabled; no weight ever requires a gradient.
        """

    def fits(self, count: int) -> int:
        """How many of `count` predictions with gradients fit into memory at once: 1 at least."""

    def step_bytes(self, count: int) -> int:
        """What `count` predictions with gradients take beside the weights, roughly; 0 where that is not known."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1, on the CPU."""
