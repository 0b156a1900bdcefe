"""Unified Concept Editing (Gandikota, Orgad, Belinkov, Materzynska & Bau, WACV 2024): cross-attention edited at once.

Section 4.1, equation 7. Each key or value matrix W becomes the minimum of

    e sum |W' c - W g|^2  +  p sum |W' k - W k|^2  +  lambda |W' - W|^2

over states c of the concepts, g of the guide at the same places, and k that are kept. Since every target is W times
something, the minimum is W' = W T with the same T [D, D] for all layers:

    T = (lambda + e sum g c^T + p sum k k^T) (lambda + e sum c c^T + p sum k k^T)^-1

As in the authors' code for the paper (github.com/rohitgandikota/unified-concept-editing before 2025,
`train-scripts/train_erase.py`, technique `replace`): c and g run from the last word's token to the end, padding
included; k are all tokens of the phrases to keep and of the empty prompt; lambda .5, e 1, p = max(.1, 1 / number of
kept prompts). (Its rewrite of 2025 edits the last word's token only, with p 1.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...demo.model import tokenize
from ...demo.networks import UNet
from .method import Method, cross_attentions, with_unet
from .prompts import none_method


def closed_form(
    concept: Tensor, guide: Tensor, kept: Tensor, erase_scale: float, preserve_scale: float, lamb: float
) -> Tensor:
    """T [D, D] in float64, from states of the concept [N, D], of the guide [N, D], and kept ones [M, D]."""
    concept, guide, kept = concept.double(), guide.double(), kept.double()
    still = lamb * torch.eye(concept.shape[-1], dtype=torch.float64) + preserve_scale * kept.T @ kept
    wanted = still + erase_scale * guide.T @ concept
    return torch.linalg.solve(still + erase_scale * concept.T @ concept, wanted, left=False)


def edited_unet(unet: UNet, change: Tensor) -> UNet:
    """A copy of the UNet that sees `change` @ state in place of each text state; `change` is [D, D]."""
    edited = copy.deepcopy(unet)
    for attention in cross_attentions(edited):
        weight = attention.key_value.weight
        weight.data = (weight.double() @ change).to(weight.dtype)
    return edited


def aligned_states(backbone: DemoBackbone, concept: str, guide: str) -> tuple[Tensor, Tensor]:
    """States [n, D] of both, from the last word's token on, cut at the end to the same length."""
    end = backbone.model.tokenizer.eos_token_id
    last = [int((ids == end).int().argmax()) - 1 for ids in tokenize(backbone.model, [concept, guide])]
    (of_concept, _), (of_guide, _) = backbone.encode([concept, guide])
    count = of_concept.shape[1] - max(last)
    return of_concept[0, last[0] : last[0] + count], of_guide[0, last[1] : last[1] + count]


def kept_states(backbone: DemoBackbone, preserve: Sequence[str]) -> Tensor:
    """All states [M, D] of the empty prompt and the phrases to keep."""
    return torch.cat([entry[0][0] for entry in backbone.encode(["", *preserve])])


def uce_method(
    backbone: DemoBackbone,
    concepts: Sequence[str],
    guide: str,
    preserve: Sequence[str] = (),
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    lamb: float = 0.5,
) -> Method:
    """UCE that draws the guide phrase where a concept phrase is asked for.

    Args:
        guide: the authors take " " for unsafe concepts.
        preserve_scale: p; `None` is the authors' rule.
    """
    pairs = [aligned_states(backbone, concept, guide) for concept in concepts]
    of_concepts, of_guide = (torch.cat(side) for side in zip(*pairs))
    scale = max(0.1, round(1 / (1 + len(preserve)), 3)) if preserve_scale is None else preserve_scale
    change = closed_form(of_concepts, of_guide, kept_states(backbone, preserve), erase_scale, scale, lamb)
    edited = with_unet(backbone, edited_unet(backbone.model.unet, change))
    return replace(none_method(backbone), name="UCE", backbone=edited)
