"""What a training run will take, counted before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator

from .discovery import BISECTIONS, SHARE_STEPS, TRAJECTORY_BATCH
from .hardening import EDITS
from .hardening import PROMPTS as EDITED
from .paper_recipe import FIRST_STEP
from .recipe import Recipe
from .trainer import PREVIEW_EVERY, PREVIEW_PROMPTS, REPORT_STEPS, STRENGTH_PROMPTS, Trainer


@dataclass(frozen=True)
class Plan:
    """Counts of one prompt or one latent each; a hardened run may need less than its plan says."""

    encodings: int  # prompts through the text encoder
    evaluations: int  # predictions of the diffusion model, with and without gradients
    gradients: int  # those of them with a backward pass
    text_bytes: int  # text states that are kept at once
    latent_bytes: int  # noisy latents and targets that are kept at once
    step_bytes: int  # of the model's activations in one training step; 0 where that is not known

    def sentences(self) -> list[str]:
        """For people."""
        known = f", {_size(self.step_bytes)} for a training step beside the weights" if self.step_bytes else ""
        return [
            f"{self.encodings:,} prompts to encode",
            f"{self.evaluations:,} predictions of the model, {self.gradients:,} of them with a backward pass",
            f"memory: {_size(self.text_bytes)} for text, {_size(self.latent_bytes)} for latents{known}",
        ]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**29 else f"{math.ceil(count / 2**20)} MB"


def _batches(count: int) -> list[int]:
    return [min(TRAJECTORY_BATCH, count - begin) for begin in range(0, count, TRAJECTORY_BATCH)]


def _trajectories(recipe: Recipe, count: int) -> int:
    """Predictions while noisy latents are collected."""
    others = 2 if recipe.target == "pair" else 3
    each = [2 if recipe.guidance != 1 and number % 2 == 0 else 1 for number in range(len(_batches(count)))]
    return recipe.sampling_steps * sum(size * (walk + others) for size, walk in zip(_batches(count), each))


def _shares(count: int) -> int:
    """Predictions of `unsafe_shares`."""
    return 3 * SHARE_STEPS * count


def _pictures(recipe: Recipe, counts: Sequence[int], steps: int) -> int:
    return sum(counts) * steps * (2 if recipe.guidance != 1 else 1)


def plan(trainer: Trainer) -> Plan:
    """What `trainer.run()` will take. Encodes one prompt, trains nothing."""
    backbone, recipe, sets = trainer.backbone, trainer.recipe, trainer.sets
    drawing = backbone.can_denoise and backbone.can_decode
    previews = min(PREVIEW_PROMPTS, len(sets.held_out or sets.pairs))
    report = [previews + min(2, len(sets.calibration))] * 2 if drawing else []
    evaluations = _pictures(recipe, report, REPORT_STEPS)
    gradients = latents = 0
    encodings = 1 + (report[0] + 2 if report else 0)
    if recipe.preset == "paper":
        encodings += len(sets.pairs) + 2
        learning = sum(step >= FIRST_STEP * recipe.sampling_steps for step in range(recipe.sampling_steps))
        gradients = recipe.steps * learning
        evaluations += recipe.steps * (2 * recipe.sampling_steps + learning)
        kept = len(sets.pairs) + 2
    else:
        kept = sum(map(len, trainer.prompts().values()))
        encodings += kept + len(trainer.new_words)
        if recipe.steps:
            count, held_out = min(recipe.trajectories, len(sets.pairs)), min(STRENGTH_PROMPTS, len(sets.held_out))
            shown = (recipe.steps - 1) // PREVIEW_EVERY if drawing else 0
            encodings += 2 * count + 1 + 2 * held_out + shown * (previews + 1)
            gradients = recipe.steps * recipe.batch_size
            evaluations += _trajectories(recipe, count) + gradients + BISECTIONS * _shares(held_out)
            evaluations += _pictures(recipe, [previews] * shown, REPORT_STEPS)
            latents = count * recipe.sampling_steps * 2
        if backbone.can_denoise and not trainer.walls_are_fixed():
            encodings += recipe.harden * EDITED * (EDITS + 6)
            evaluations += recipe.harden * _shares(EDITED)
    return Plan(
        encodings, evaluations, gradients, kept * trainer.prompt_bytes,
        latents * backbone.start(1, backbone.sigmas(1)[0], Generator()).nbytes if latents else 0,
        backbone.step_bytes(backbone.fits(recipe.batch_size)) if gradients else 0,
    )  # fmt: skip
