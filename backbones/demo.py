"""The embedded demo model as a backbone, without ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ..demo.model import DemoModel, alphas_cumprod, load_demo, tokenize
from ..demo.networks import LATENT_CHANNELS
from ..region.conditioning import CROSS_ATTENTION, Entry

LATENT_SIZE = 16


class DemoBackbone:
    """Noise levels as k-diffusion counts them: x = x_0 + sigma * noise."""

    can_denoise = can_decode = True

    def __init__(self, model: DemoModel | None = None) -> None:
        self.model = model or load_demo()
        alphas = alphas_cumprod()
        self.levels = ((1 - alphas) / alphas).sqrt()  # sigma of each timestep, rising

    @property
    def text_encoder(self) -> torch.nn.Module:
        """The transformers text encoder, for the LoRA initialisation."""
        return self.model.text_encoder

    def signature(self) -> dict[str, Any]:
        return {
            "name": "Safe Region demo CLIP",
            "parts": [type(self.model.text_encoder).__name__],
            "blocks": {CROSS_ATTENTION: self.model.text_encoder.config.hidden_size},
        }

    def states_with(self, encoder: torch.nn.Module) -> Callable[[Sequence[str]], Tensor]:
        """A function from prompts to text states [B, 77, D], differentiable in the weights of `encoder`."""
        return lambda prompts: encoder(input_ids=tokenize(self.model, prompts)).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        states_of = self.states_with(self.model.text_encoder)
        states = [states_of(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
        return [[state[None], {}] for state in torch.cat(states)] if states else []

    def sigmas(self, steps: int) -> Tensor:
        timesteps = torch.linspace(len(self.levels) - 1, 0, steps).round().long()
        return torch.cat([self.levels[timesteps], torch.zeros(1)])

    def start(self, count: int, sigma: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        return noise * (1 + sigma**2).sqrt()

    def denoise(self, x: Tensor, sigma: Tensor, entries: Sequence[Entry]) -> Tensor:
        context = torch.cat([entry[0] for entry in entries])
        timesteps = (sigma.log()[:, None] - self.levels.log()).abs().argmin(-1)
        level = sigma.view(-1, 1, 1, 1)
        v = self.model.unet(x / (level**2 + 1).sqrt(), timesteps, context)
        return x / (level**2 + 1) - v * level / (level**2 + 1).sqrt()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.model.autoencoder.decode(chunk) for chunk in latents.split(32)]).clamp(0, 1)
