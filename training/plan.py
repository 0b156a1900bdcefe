"""What a training run will take, counted before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator

from . import processes
from .discovery import BISECTIONS, SHARE_STEPS, TRAJECTORY_BATCH
from .hardening import EDITS
from .hardening import PROMPTS as EDITED
from .paper_recipe import FIRST_STEP
from .recipe import REPORT_STEPS, STRENGTH_PROMPTS, Recipe

if TYPE_CHECKING:
    from .attributes import AttributeTrainer
    from .run import TrainingRun
    from .trainer import Trainer

BACKWARD = 2  # what a backward pass costs, in predictions


@dataclass(frozen=True)
class Plan:
    """Counts of one prompt or one latent each; a hardened run may need less than its plan says."""

    encodings: int  # prompts through the text encoder
    evaluations: int  # predictions of the diffusion model, with and without gradients
    gradients: int  # those of them with a backward pass
    text_bytes: int  # text states that are kept at once
    latent_bytes: int  # noisy latents and targets that are kept at once
    step_bytes: int  # of the model's activations in one training step; 0 where that is not known
    kept: int  # of the encodings: prompts that are learned from and calibrated with

    def sentences(self) -> list[str]:
        """For people."""
        known = f", {_size(self.step_bytes)} for a training step beside the weights" if self.step_bytes else ""
        return [
            f"{self.encodings:,} prompts to encode: {self.kept:,} to learn from and to calibrate with, "
            f"{self.encodings - self.kept:,} for trajectories and pictures",
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


def _pictures(recipe: Recipe, count: int) -> int:
    """Predictions for that many pictures."""
    return count * REPORT_STEPS * (2 if recipe.guidance != 1 else 1)


@dataclass(frozen=True)
class Work:
    """What a kind of trainer has to do."""

    encodings: int  # of prompts that are not kept
    kept: int  # prompts whose text states are kept
    predictions: dict[str, int]  # by stage; those with a backward pass are among them
    gradients: int  # in the stage `discover`
    latents: int  # kept at once


def _paper(recipe: Recipe) -> tuple[int, int]:
    """Predictions, and those of them with a backward pass, of the paper's recipe."""
    learning = sum(step >= FIRST_STEP * recipe.sampling_steps for step in range(recipe.sampling_steps))
    return recipe.steps * (2 * recipe.sampling_steps + learning), recipe.steps * learning


def region_work(trainer: Trainer) -> Work:
    """Of a region's trainer."""
    backbone, recipe, sets = trainer.backbone, trainer.recipe, trainer.sets
    previews, shown = (len(prompts) if trainer.draws() else 0
                       for prompts in (trainer.preview_prompts(), trainer.shown_prompts()))  # fmt: skip
    encodings = 2 * (shown + 1) if shown else 0
    predictions = {"report": 2 * _pictures(recipe, shown)}
    if recipe.preset == "paper":
        predictions["discover"], gradients = _paper(recipe)
        return Work(encodings, len(sets.pairs) + 2, predictions, gradients, 0)
    latents = gradients = 0
    if recipe.steps:
        count, held_out = min(recipe.trajectories, len(sets.pairs)), min(STRENGTH_PROMPTS, len(sets.held_out))
        often = recipe.previews() if previews else 0
        encodings += 2 * count + 1 + 2 * held_out + often * (previews + 1)
        gradients = recipe.steps * recipe.batch_size
        predictions |= {
            "trajectories": _trajectories(recipe, count), "discover": gradients,
            "preview": _pictures(recipe, often * previews),
            "strength": (1 if trainer.existing else BISECTIONS + 1) * _shares(held_out),
        }  # fmt: skip
        latents = count * recipe.sampling_steps * 2
    if backbone.can_denoise:
        encodings += recipe.harden * EDITED * (EDITS + 6)
        predictions["harden"] = recipe.harden * _shares(EDITED)
    kept = sum(map(len, trainer.prompts().values()))
    return Work(encodings + sum(map(len, trainer.tried())), kept, predictions, gradients, latents)


def attribute_work(trainer: AttributeTrainer) -> Work:
    """Of an attribute's trainer."""
    recipe, groups, rows = trainer.recipe, len(trainer.pairs.groups), trainer.learn.rows
    previews, shown = (len(prompts) if trainer.draws() else 0
                       for prompts in (trainer.preview_prompts(), trainer.shown_prompts()))  # fmt: skip
    drawn = shown + (groups - 1) * previews  # with the region: what must stay the same in the first group only
    encodings = shown + 1 + drawn + groups if shown else 0
    predictions = {"report": _pictures(recipe, shown + drawn)}
    if recipe.preset == "paper":
        predictions["discover"], gradients = (groups * number for number in _paper(recipe))
        return Work(encodings, 1 + groups + min(max(recipe.steps, 1), len(rows)), predictions, gradients, 0)
    latents = gradients = 0
    if recipe.steps:
        count, often = min(recipe.trajectories, len(rows)), groups * recipe.previews() if previews else 0
        encodings += (1 + groups) * count + 1 + often * (previews + 1)
        gradients = groups * recipe.steps * recipe.batch_size
        predictions |= {
            "trajectories": groups * _trajectories(recipe, count), "discover": gradients,
            "preview": _pictures(recipe, often * previews),
        }  # fmt: skip
        latents = count * recipe.sampling_steps * 2
    encodings += sum(map(len, trainer.tried()))
    return Work(encodings, sum(map(len, trainer.prompts())), predictions, gradients, latents)


def costs(trainer: TrainingRun) -> dict[str, float]:
    """What each stage that asks the diffusion model costs this process, in predictions without a backward pass."""
    work = trainer.work()
    found = work.predictions | {"discover": work.predictions.get("discover", 0) + BACKWARD * work.gradients}
    alone = ("preview", "report")  # one process draws all pictures
    return {stage: count / (1 if stage in alone else processes.count()) for stage, count in found.items() if count}


def plan(trainer: TrainingRun) -> Plan:
    """What `trainer.run()` will take. Encodes a prompt or two and asks the model once, so that a model and a text
    encoder that do not belong together are found before anything is learned; trains nothing."""
    backbone, work = trainer.backbone, trainer.work()
    step_bytes = backbone.step_bytes(backbone.fits(trainer.recipe.batch_size)) if any(work.predictions.values()) else 0
    return Plan(
        1 + work.encodings + work.kept, sum(work.predictions.values()), work.gradients,
        work.kept * trainer.prompt_bytes,
        work.latents * backbone.start(1, backbone.sigmas(1)[0], Generator()).nbytes if work.latents else 0,
        step_bytes if work.gradients else 0, work.kept,
    )  # fmt: skip
