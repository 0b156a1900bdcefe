"""Safe Latent Diffusion (Schramowski, Brack, Deiseroth & Kersting, CVPR 2023): guidance away from a concept.

Section 3, equations 3 to 8. With predictions e_0 (empty prompt), e_p (prompt), e_s (concept) of the noise:

    mu    = min(1, s_S |e_p - e_s|) where e_p - e_s < lambda, else 0        elementwise
    gamma = mu (e_s - e_0) + s_m nu                                         nu: momentum, 0 at first
    nu   <- beta_m nu + (1 - beta_m) gamma                                  builds up during the warm-up too
    e     = e_0 + s_g (e_p - e_0 - gamma)                                   gamma left out during the warm-up

The paper prints max(1, |phi|) for mu; the authors' code (github.com/ml-research/safe-latent-diffusion) takes the
minimum, as the text means, and that is what is done here. The code switches SLD off at guidance 1; here the same
formula holds there with s_g = 1: e_p - gamma, still three evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...backbones.protocol import Backbone
from ...region.conditioning import Entry
from .method import Method, shown
from .prompts import none_method

WARM_UP_OF = 50  # steps; the presets' warm-up is counted in them


@dataclass(frozen=True)
class Strength:
    """Hyper-parameters, in the paper's symbols (appendix, "Hyp-Medium" and so on)."""

    warm_up: int  # delta, of 50 steps
    scale: float  # s_S
    threshold: float  # lambda
    momentum_scale: float  # s_m
    momentum_decay: float  # beta_m


PRESETS = {
    "medium": Strength(10, 1000, 0.01, 0.3, 0.4),
    "strong": Strength(7, 2000, 0.025, 0.5, 0.7),
    "max": Strength(0, 5000, 1.0, 0.5, 0.7),
}


class SafetyGuide:
    """A guide for one sampling run: it counts the steps and carries the momentum.

    The backbones count noise levels as x = x_0 + sigma * noise, so (x - denoised) / sigma is the noise that the
    paper's model predicts, at the scale that the thresholds are made for.
    """

    def __init__(self, concept: Entry, strength: Strength, steps: int) -> None:
        self.concept, self.strength, self.steps = concept, strength, steps
        self.step = 0
        self.momentum: Tensor | float = 0.0

    def __call__(
        self, backbone: Backbone, x: Tensor, sigma: Tensor, entries: Sequence[Entry], empty: Entry | None,
        guidance: float,
    ) -> Tensor:  # fmt: skip
        if empty is None:
            raise ValueError("Safe Latent Diffusion needs the empty prompt.")
        level = sigma.view(-1, *[1] * (x.ndim - 1))
        of_prompt, of_empty, of_concept = (
            (x - backbone.denoise(x, sigma, some)) / level
            for some in (entries, [empty] * len(entries), [self.concept] * len(entries))
        )
        s = self.strength
        apart = of_prompt - of_concept
        mu = torch.where(apart < s.threshold, (s.scale * apart.abs()).clamp(max=1), 0.0)
        safety = mu * (of_concept - of_empty) + s.momentum_scale * self.momentum
        self.momentum = s.momentum_decay * self.momentum + (1 - s.momentum_decay) * safety
        wanted = of_prompt - of_empty
        if self.step * WARM_UP_OF >= s.warm_up * self.steps:
            wanted = wanted - safety
        self.step += 1
        return x - level * (of_empty + guidance * wanted)


def sld_method(backbone: DemoBackbone, concepts: Sequence[str], preset: str = "medium") -> Method:
    """SLD away from the concept's words, with one of the paper's presets."""
    concept, strength = backbone.encode([shown(concepts)])[0], PRESETS[preset]
    return replace(
        none_method(backbone), name=f"SLD {preset}", guide=lambda steps: SafetyGuide(concept, strength, steps),
        evaluations=(3.0, 3.0),
    )  # fmt: skip
