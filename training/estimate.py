"""How long a run will take on this machine, told from a few prompts and one step of each kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .gate import TOLD_EVERY, fit_gate
from .plan import BACKWARD, costs, plan
from .run import TrainingRun
from .text_states import ENCODE_BATCH, gated_key, sources_of, stacked
from .trainer import Trainer

GATE_TRIED = 10  # steps


def _seconds(run: Callable[[], Any]) -> float:
    """The shorter of two goes: the first one may have to warm up."""
    spent = []
    for _ in range(2):
        began = time.monotonic()
        run()
        spent.append(time.monotonic() - began)
    return min(spent)


def run_seconds(trainer: TrainingRun) -> float:
    """About how many seconds `trainer.run()` will take. Encodes a batch of prompts and learns nothing."""
    backbone, recipe = trainer.backbone, trainer.recipe
    prompts = (trainer.shown_prompts() * ENCODE_BATCH)[:ENCODE_BATCH]
    total = plan(trainer).encodings * _seconds(lambda: backbone.encode(prompts)) / len(prompts)
    entries = backbone.encode(prompts)
    if steps := TOLD_EVERY * trainer.count_steps().get("gate", 0):
        states = stacked(entries)
        texts = [one.of(states) for one in sources_of(states)] if isinstance(trainer, Trainer) else []
        for tokens in texts or [states[gated_key(states)]]:
            generator = torch.Generator().manual_seed(0)
            tried = _seconds(lambda: fit_gate(tokens, tokens, tokens, None, generator, steps=GATE_TRIED))  # noqa: B023
            total += steps * tried / GATE_TRIED
    if work := sum(costs(trainer).values()):
        count = backbone.fits(recipe.batch_size)
        sigma = backbone.sigmas(recipe.sampling_steps)[0]
        noise = backbone.start(count, sigma, torch.Generator().manual_seed(0))
        some = [[entry[0].clone().requires_grad_(True), entry[1]] for entry in entries[:count]]

        def step() -> None:
            backbone.denoise(noise, sigma.expand(count), some).square().mean().backward()

        with torch.enable_grad():
            total += work * _seconds(step) / count / (1 + BACKWARD)
    return total
