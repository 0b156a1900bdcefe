"""debias_vl (Chuang, Jampani, Li, Torralba & Jegelka, 2023, arXiv 2302.00070): text states in a calibrated projection.

Equation 7 of the paper. Among all matrices near P0 the one that takes pairs of prompts, which differ in the attribute
only, to nearly the same state:

    min_P |P - P0|^2 + lambda / |S| sum |P z_i - P z_j|^2
    P = P0 (I + lambda / |S| sum (z_i - z_j) (z_i - z_j)^T)^-1

P0 projects away the span of the attribute's own prompts ("a photo of a man", "a photo of a woman"). As in the authors'
code for Stable Diffusion (github.com/chingyaoc/debias_vl, `generative/main.py`): z are the end-of-text states of
"A photo of a male judge." and so on, of length 1; lambda 500; P acts on every state of the prompt and not on the empty
prompt. That code leaves P0 out (P0 = I), as this does unless prompts are given for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...region.conditioning import CROSS_ATTENTION, with_blocks
from .method import Conditioning, Method
from .prompts import none_method
from .safree import _end_states, _token_ids, subspace_projection

LAMBDA = 500.0


def calibrated_projection(differences: Tensor, spurious: Tensor | None = None, lamb: float = LAMBDA) -> Tensor:
    """P [D, D] in float64, from the pairs' differences z_i - z_j [|S|, D] and the attribute's own states [n, D]."""
    differences = differences.double()
    identity = torch.eye(differences.shape[-1], dtype=torch.float64)
    first = identity if spurious is None else identity - subspace_projection(spurious)
    return torch.linalg.solve(identity + lamb / len(differences) * differences.T @ differences, first, left=False)


def debias_vl_method(
    backbone: DemoBackbone,
    counterparts: Sequence[Sequence[str]],
    spurious: Sequence[str] = (),
    lamb: float = LAMBDA,
) -> Method:
    """debias_vl.

    Args:
        counterparts: for each subject a prompt per group, such as ("A photo of a male judge.", "... female judge.").
        spurious: the attribute's own prompts, for P0; the authors' code for pictures has none.
    """
    states = [_end_states(backbone, _token_ids(backbone, prompts)) for prompts in zip(*counterparts)]
    groups = [F.normalize(ends, dim=-1) for ends in states]
    differences = torch.cat([one - other for one, other in combinations(groups, 2)])
    own = _end_states(backbone, _token_ids(backbone, spurious)) if spurious else None
    change = calibrated_projection(differences, own, lamb).float()

    def positive(prompts: Sequence[str]) -> list[Conditioning]:
        entries = backbone.encode(prompts)
        return [[with_blocks(entry, {CROSS_ATTENTION: entry[0] @ change.T})] for entry in entries]

    return replace(none_method(backbone), name="debias_vl", positive=positive)
