"""UCE's debiasing (Gandikota, Orgad, Belinkov, Materzynska & Bau, WACV 2024): the values of cross-attention edited.

Section 4.2 and, for the details, the authors' code (github.com/rohitgandikota/unified-concept-editing before 2025,
`train-scripts/train_debias.py`). In rounds: pictures of each profession are drawn and counted; the value matrix W of
each layer then becomes the minimum of

    e sum |W' c - v*|^2  +  p sum |W' k - W k|^2  +  lambda |W' - W|^2,    v* = W c + |W c| sum_g a_g W c_g / |W c_g|
    W' = (lambda W + e sum v* c^T + p sum W k k^T) (lambda + e sum c c^T + p sum k k^T)^-1

over states c of the profession and c_g of its counterpart in group g ("man judge"), both from the last word's token to
the end and measured as a whole (Frobenius norms), with a_g = STEP (wanted share - counted share). A profession within
TOLERANCE of its shares is not counted again, and is kept (k) from then on. The edits add up: each starts from the last
one's matrices. Keys stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...demo.networks import UNet
from .method import Method, cross_attentions, with_unet
from .prompts import none_method
from .uce import aligned_states, kept_states

STEP, TOLERANCE = 0.1, 0.05
# pictures of each of these prompts, counted: the share of each group [number of prompts, groups]
Count = Callable[[DemoBackbone, Sequence[str]], Tensor]
# a profession's states [n, D], and per group its counterpart's [n, D] with the change of its weight a_g
Change = tuple[Tensor, Sequence[tuple[Tensor, float]]]


def target_values(weight: Tensor, concept: Tensor, groups: Sequence[tuple[Tensor, float]]) -> Tensor:
    """v* [n, V] of a profession's states [n, D], from W [V, D] and (states [n, D], a_g) of each group."""
    values = concept @ weight.T
    directions = [(states @ weight.T, amount) for states, amount in groups]
    return values + values.norm() * sum(amount * direction / direction.norm() for direction, amount in directions)


def edited_values(
    weight: Tensor, changes: Sequence[Change], kept: Tensor, erase_scale: float, preserve_scale: float, lamb: float
) -> Tensor:
    """W' [V, D] in float64 from W [V, D], the professions' changes and kept states [M, D]."""
    weight, kept = weight.double(), kept.double()
    still = lamb * torch.eye(weight.shape[-1], dtype=torch.float64) + preserve_scale * kept.T @ kept
    wanted, seen = weight @ still, still
    for concept, groups in changes:
        concept = concept.double()
        values = target_values(weight, concept, [(states.double(), amount) for states, amount in groups])
        wanted, seen = wanted + erase_scale * values.T @ concept, seen + erase_scale * concept.T @ concept
    return torch.linalg.solve(seen, wanted, left=False)


def edit_unet(unet: UNet, changes: Sequence[Change], kept: Tensor, *scales: float) -> None:
    """Edit the value matrices of the UNet's cross-attentions in place; `scales` are those of `edited_values`."""
    for attention in cross_attentions(unet):
        values = attention.key_value.weight.data.chunk(2)[1]  # a view: the first half holds the keys
        values.copy_(edited_values(values, changes, kept, *scales))


def uce_debias_method(
    backbone: DemoBackbone,
    prompts: Sequence[str],
    counterparts: Sequence[Sequence[str]],
    shares: Sequence[float],
    count: Count,
    rounds: int = 30,
    preserve: Sequence[str] = (),
    erase_scale: float = 0.1,
    preserve_scale: float = 0.1,
    lamb: float = 0.1,
) -> Method:
    """UCE that draws each of the prompts in the wanted shares.

    Args:
        prompts: the professions, such as "a judge".
        counterparts: for each of them a prompt per group.
        shares: the wanted share of each group; they add up to 1.
        count: draws and counts, see `Count`; the authors draw 50 pictures of a profession and let CLIP tell them apart.
        preserve: phrases to keep, beside the empty prompt.
    """
    unet = copy.deepcopy(backbone.model.unet)
    edited = with_unet(backbone, unet)
    states = [_aligned(backbone, prompt, groups) for prompt, groups in zip(prompts, counterparts)]
    gaps = torch.full((len(prompts), len(shares)), torch.inf)
    for _ in range(rounds):
        open_rows = (gaps.abs().amax(1) > TOLERANCE).nonzero().flatten().tolist()
        if open_rows:
            gaps[open_rows] = torch.tensor(shares) - count(edited, [prompts[row] for row in open_rows])
        settled = gaps.abs().amax(1) <= TOLERANCE
        if settled.all():
            break
        changes: list[Change] = [
            (concept, list(zip(groups, (STEP * gap * ~done).tolist())))
            for (concept, *groups), gap, done in zip(states, gaps, settled)
        ]
        kept = [*preserve, *(prompt for prompt, done in zip(prompts, settled) if done)]
        edit_unet(unet, changes, kept_states(backbone, kept), erase_scale, preserve_scale, lamb)
    return replace(none_method(backbone), name="UCE-debias", backbone=edited)


def _aligned(backbone: DemoBackbone, prompt: str, counterparts: Sequence[str]) -> list[Tensor]:
    """States [n, D] of a prompt and of its counterparts, from the last word's token on, all of the same length."""
    pairs = [aligned_states(backbone, prompt, counterpart) for counterpart in counterparts]
    length = min(len(states) for states, _ in pairs)
    return [states[:length] for states in (pairs[0][0], *(group for _, group in pairs))]
