"""What a training run will take, counted before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Generator

from .learner import Learner


@dataclass(frozen=True)
class Plan:
    """Counts of one prompt or one latent each; a hardened run may need less than its plan says."""

    encodings: int  # prompts through the text encoder
    evaluations: int  # predictions of the diffusion model, with and without gradients
    gradients: int  # those of them with a backward pass
    text_bytes: int  # text and what is made of it, kept at once
    latent_bytes: int  # noisy latents and targets that are kept at once
    step_bytes: int  # of the model's activations in one training step; 0 where that is not known
    prompts: int  # that are learned from, calibrated and checked with; some of them are encoded more than once

    def sentences(self) -> list[str]:
        """For people."""
        known = f", {_size(self.step_bytes)} for a training step beside the weights" if self.step_bytes else ""
        return [
            f"{self.encodings:,} prompts to encode: {self.prompts:,} to learn from, to calibrate and to check with, "
            "some of them twice, and those for trajectories and pictures",
            f"{self.evaluations:,} predictions of the model, {self.gradients:,} of them with a backward pass",
            f"memory: {_size(self.text_bytes)} for text, {_size(self.latent_bytes)} for latents{known}",
        ]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**29 else f"{math.ceil(count / 2**20)} MB"


def plan(learner: Learner) -> Plan:
    """What `learner.run()` will take. Encodes a prompt or two and asks the model once, so that a model and a text
    encoder that do not belong together are found before anything is learned; trains nothing."""
    backbone, stages = learner.backbone, learner.stages
    encodings, predictions, gradients, latents = (
        sum(getattr(stage, name) for stage in stages) for name in ("encodings", "predictions", "gradients", "latents")
    )
    step_bytes = backbone.step_bytes(backbone.fits(learner.recipe.batch_size)) if predictions else 0
    return Plan(
        1 + encodings, predictions, gradients, learner.text_bytes(),
        latents * backbone.start(1, backbone.sigmas(1)[0], Generator()).nbytes if latents else 0,
        step_bytes if gradients else 0, learner.count_prompts(),
    )  # fmt: skip
