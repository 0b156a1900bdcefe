"""Reliable and Efficient Concept Erasure (Gong, Chen, Wei, Chen & Jiang, ECCV 2024): UCE against its own loopholes.

After UCE, some other state c' may still draw the concept c. The closest one is known in closed
form from the key and value matrices W of the original model and W' of the edited one (all tokens alike):

    c' = argmin  sum |W' c' - W c|^2 + lambda |c'|^2  =  (lambda + sum W'^T W')^-1 (sum W'^T W) c

It is erased in turn, with UCE's formula from W' on, and so on for some rounds. As in the authors' code
(github.com/CharlesGong12/RECE, `close_regzero`): lambda .1, and in the edits of the rounds all 77 tokens of c' and of
the guide, erase scale 1, preserve scale .1, regularisation .1; 2 rounds for unsafe concepts, 3 for nudity. The
code keeps only the empty prompt, and picks the best round with a detector; here the phrases to keep stay kept, and the
last round counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...demo.networks import UNet
from .method import Method, cross_attentions, with_unet
from .prompts import none_method
from .uce import closed_form, edited_unet, kept_states, uce_method


def adversarial_map(original: UNet, edited: UNet, regular: float) -> Tensor:
    """The matrix [D, D], in float64, that takes a concept's state c to c'."""
    before, after = (
        torch.cat([attention.key_value.weight.double() for attention in cross_attentions(unet)])
        for unet in (original, edited)
    )
    return torch.linalg.solve(after.T @ after + regular * torch.eye(after.shape[1]).double(), after.T @ before)


def rece_method(
    backbone: DemoBackbone,
    concepts: Sequence[str],
    guide: str,
    preserve: Sequence[str] = (),
    rounds: int = 2,
    regular: float = 0.1,
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
    lamb: float = 0.1,
) -> Method:
    """RECE, starting from UCE with the same phrases. `regular` is the lambda of the adversarial states."""
    unet = uce_method(backbone, concepts, guide, preserve).backbone.model.unet
    of_concepts = torch.cat([entry[0][0] for entry in backbone.encode(concepts)]).double()
    of_guide = backbone.encode([guide])[0][0][0].repeat(len(concepts), 1)
    kept = kept_states(backbone, preserve)
    for _ in range(rounds):
        adversarial = of_concepts @ adversarial_map(backbone.model.unet, unet, regular).T
        unet = edited_unet(unet, closed_form(adversarial, of_guide, kept, erase_scale, preserve_scale, lamb))
    return replace(none_method(backbone), name="RECE", backbone=with_unet(backbone, unet))
