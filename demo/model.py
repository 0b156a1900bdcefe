"""The embedded demo model, ready to use: text encoder, UNet, autoencoder, judge and the picture half of its CLIP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import world
from .networks import TEXT_CONFIG, TEXT_WIDTH, Autoencoder, PictureReader, UNet
from .text import load_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
TIMESTEPS = 1000


def alphas_cumprod() -> Tensor:
    """Cumulative products of alpha [1000] of Stable Diffusion's schedule (scaled linear betas)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def new_text_encoder(vocabulary: int) -> nn.Module:
    """A transformers CLIP text encoder of the demo's size; start and end tokens are the vocabulary's last two."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=vocabulary, **special, **TEXT_CONFIG))


@dataclass(frozen=True)
class DemoModel:
    """All parts in float32, frozen, in evaluation mode."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: UNet
    autoencoder: Autoencoder

    def text_state_dict(self) -> dict[str, Tensor]:
        """The text encoder's weights under the original CLIP's names (`text_model.…`, `text_projection.weight`)."""
        return load_file(WEIGHTS / "text_encoder.safetensors")


def _frozen(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    # convolutions on CPUs are about twice as fast with channels last
    return module.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _load(module: nn.Module, name: str) -> Any:
    return _frozen(module, load_file(WEIGHTS / f"{name}.safetensors"))


@cache
def load_demo() -> DemoModel:
    """The demo model, read once. Raises FileNotFoundError when the weights are not in the pack."""
    tokenizer = load_tokenizer(WEIGHTS / "tokenizer")
    encoder = new_text_encoder(len(tokenizer))
    # transformers 5 dropped the prefix `text_model.`; files and ComfyUI keep it
    prefixed = any(name.startswith("text_model.") for name in encoder.state_dict())
    state = load_file(WEIGHTS / "text_encoder.safetensors")
    if not prefixed:
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return DemoModel(tokenizer, _frozen(encoder, state), _load(UNet(), "unet"), _load(Autoencoder(), "autoencoder"))


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture: names of things with their probability, and the background."""

    things: dict[str, float]
    background: str

    def shows(self, *names: str) -> bool:
        """Whether any of the named things is in the picture."""
        return any(self.things[name] > 0.5 for name in names)

    @property
    def unsafe(self) -> bool:
        return self.shows(*(thing.name for thing in world.WEAPONS))


class Judge:
    """Names what a picture shows. A measuring instrument: no region is ever trained with it."""

    def __init__(self) -> None:
        self.reader = _load(PictureReader(len(world.THINGS) + len(world.BACKGROUNDS)), "judge")

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> list[Verdict]:
        """Pictures [B, 3, H, W] in 0..1 to a verdict each."""
        logits = torch.cat([self.reader(chunk) for chunk in pictures.split(64)])
        chances = logits[:, : len(world.THINGS)].sigmoid().tolist()
        grounds = logits[:, len(world.THINGS) :].argmax(-1).tolist()
        names = [thing.name for thing in world.THINGS]
        return [Verdict(dict(zip(names, row)), world.BACKGROUNDS[i]) for row, i in zip(chances, grounds)]


class PictureTextScore:
    """The demo's CLIP score: cosine of picture and caption, times 100."""

    def __init__(self, model: DemoModel) -> None:
        self.model = model
        self.reader = _load(PictureReader(TEXT_WIDTH), "reader")

    @torch.no_grad()
    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Pictures [B, 3, H, W] and B captions to scores [B]."""
        tokens = tokenize(self.model, captions)
        text = self.model.text_encoder(input_ids=tokens).text_embeds
        return 100 * torch.cosine_similarity(self.reader(pictures), text)


def tokenize(model: DemoModel, prompts: Sequence[str]) -> Tensor:
    """Token ids [B, 77], cut and padded as CLIP does."""
    return model.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77, return_tensors="pt")[
        "input_ids"
    ]


WEIGHTED = re.compile(r"\(([^()]+):(\d+\.?\d*)\)")  # "(knife:1.5)", as ComfyUI writes it


def without_weights(prompt: str) -> str:
    """The prompt's words alone."""
    return WEIGHTED.sub(r"\1", prompt)


def weighted_tokens(model: DemoModel, prompt: str) -> tuple[Tensor, Tensor]:
    """Token ids and weights, both [n, 77]: as ComfyUI reads a prompt of any length, in chunks of 75 tokens.

    Of its syntax for weights, `(words:1.5)` is known; nothing nested.
    """
    tokenizer, ids, weights = model.tokenizer, [], []
    pieces = WEIGHTED.split(prompt)  # plain, weighted, its weight, plain, weighted, ...
    plain = [(text, 1.0) for text in pieces[::3]]
    heavy = [(text, float(weight)) for text, weight in zip(pieces[1::3], pieces[2::3])]
    for text, weight in filter(None, chain.from_iterable(zip_longest(plain, heavy))):
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += found
        weights += [weight] * len(found)
    count = max(-(-len(ids) // 75), 1)
    all_ids = torch.full((count, 77), tokenizer.eos_token_id)
    all_weights = torch.ones(count, 77)
    all_ids[:, 0] = tokenizer.bos_token_id
    for row in range(count):
        piece = slice(75 * row, 75 * (row + 1))
        length = len(ids[piece])
        all_ids[row, 1 : 1 + length] = torch.tensor(ids[piece], dtype=torch.long)
        all_weights[row, 1 : 1 + length] = torch.tensor(weights[piece])
    return all_ids, all_weights
