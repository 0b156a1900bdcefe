"""How long a run will take on this machine, told from a few prompts and one step of each kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .bags import bags_of
from .gate import TOLD_EVERY, WallFit, first_walls, judged_all
from .learner import Learner
from .plan import plan
from .processes import count as processes
from .stages import BACKWARD, costs, planned_steps
from .stream import BATCH
from .text_states import stacked

GATE_TRIED = 10  # steps


def _seconds(run: Callable[[], Any]) -> float:
    """The shorter of two goes: the first one may have to warm up."""
    spent = []
    for _ in range(2):
        began = time.monotonic()
        run()
        spent.append(time.monotonic() - began)
    return min(spent)


def run_seconds(learner: Learner) -> float:
    """About how many seconds `learner.run()` will take. Encodes a batch of prompts and learns nothing."""
    backbone, recipe = learner.backbone, learner.recipe
    prompts = (learner.shown_prompts() * BATCH)[:BATCH]
    total = plan(learner).encodings * _seconds(lambda: backbone.encode(prompts)) / len(prompts)
    entries = backbone.encode(prompts)
    if steps := TOLD_EVERY * planned_steps(learner.stages).get("gate", 0):
        for tokens in learner.walled_texts(stacked(entries)):
            generator = torch.Generator().manual_seed(0)
            start = first_walls(tokens, tokens, tokens, None, generator)
            bags = bags_of(tokens, judged_all(tokens, None), start, generator)
            for context in learner.contexts:
                tried = _seconds(lambda: WallFit(start, generator, context=context).run(bags, bags, GATE_TRIED))  # noqa: B023
                total += steps * tried / GATE_TRIED
    if work := sum(costs(learner.stages, processes()).values()):
        count = backbone.fits(recipe.batch_size)
        sigma = backbone.sigmas(recipe.sampling_steps)[0]
        noise = backbone.start(count, sigma, torch.Generator().manual_seed(0))
        some = [[entry[0].clone().requires_grad_(True), entry[1]] for entry in entries[:count]]

        def step() -> None:
            backbone.denoise(noise, sigma.expand(count), some).square().mean().backward()

        with torch.enable_grad():
            total += work * _seconds(step) / count / (1 + BACKWARD)
    return total
