"""The embedded demo model as a backbone, without ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from ..demo.model import DemoModel, alphas_cumprod, load_demo, tokenize, weighted_tokens
from ..demo.networks import LATENT_CHANNELS
from ..demo.text import unknown_words
from ..region.conditioning import CROSS_ATTENTION, Entry
from ..region.words import Token, decoder, tokens_of
from .kept import Needs, needs_of

LATENT_SIZE = 16


class DemoBackbone:
    """Noise levels as k-diffusion counts them: x = x_0 + sigma * noise."""

    can_denoise = can_decode = True
    unknown_words = staticmethod(unknown_words)

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
        """As ComfyUI does: chunks of 77 tokens follow one another, and a weight scales a token's distance to that of
        the empty prompt.
        """
        if not prompts:
            return []
        read = [weighted_tokens(self.model, prompt) for prompt in prompts]
        ids, weights = (torch.cat(rows) for rows in zip(*read))
        encoder = self.model.text_encoder
        states = torch.cat([encoder(input_ids=rows).last_hidden_state for rows in ids.split(64)])
        if not torch.all(weights == 1):
            empty = encoder(input_ids=weighted_tokens(self.model, "")[0]).last_hidden_state
            scaled = empty + (states - empty) * weights[..., None]
            states = torch.where(weights[..., None] == 1, states, scaled)
        chunks = states.split([len(rows) for rows, _ in read])
        return [[chunk.reshape(1, -1, chunk.shape[-1]), {}] for chunk in chunks]

    def words(self, prompt: str) -> list[Token]:
        """What stands at each place of an encoded prompt."""
        tokenizer = self.model.tokenizer
        pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
        read = decoder(pieces.values())
        ids = weighted_tokens(self.model, prompt)[0].flatten().tolist()
        special = [number in (tokenizer.bos_token_id, tokenizer.eos_token_id) for number in ids]
        return tokens_of(ids, special, [], lambda number: read(pieces[number]), prompt)

    def sigmas(self, steps: int) -> Tensor:
        timesteps = torch.linspace(len(self.levels) - 1, 0, steps).round().long()
        return torch.cat([self.levels[timesteps], torch.zeros(1)])

    def start(self, count: int, sigma: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        return noise * (1 + sigma**2).sqrt()

    def denoise(self, x: Tensor, sigma: Tensor, entries: Sequence[Entry]) -> Tensor:
        # prompts of different lengths are repeated to a common one, as ComfyUI does: attention reads the same
        length = math.lcm(*(entry[0].shape[1] for entry in entries))
        context = torch.cat([entry[0].repeat(1, length // entry[0].shape[1], 1) for entry in entries])
        timesteps = (sigma.log()[:, None] - self.levels.log()).abs().argmin(-1)
        level = sigma.view(-1, 1, 1, 1)
        v = self.model.unet(x / (level**2 + 1).sqrt(), timesteps, context)
        return x / (level**2 + 1) - v * level / (level**2 + 1).sqrt()

    @cached_property
    def _needs(self) -> Needs:
        return needs_of(self, self.model.unet)

    def fits(self, count: int) -> int:
        return count

    def step_bytes(self, count: int) -> int:
        return self._needs.step(count, saving=False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.model.autoencoder.decode(chunk) for chunk in latents.split(32)]).clamp(0, 1)
