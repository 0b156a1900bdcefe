"""Baselines that add one fixed shift to every prompt's text states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...region.conditioning import CROSS_ATTENTION, with_blocks
from .method import Conditioning, Method, plain_positive
from .prompts import none_method


def _shifted(backbone: DemoBackbone, name: str, shift: Tensor) -> Method:
    """Every prompt's states [1, T, D] plus `shift`, [1, T', D]: cut to T tokens, or with zeros after its own."""

    def positive(prompts: Sequence[str]) -> list[Conditioning]:
        result = []
        for (entry,) in plain_positive(backbone)(prompts):
            states = entry[0]
            fitting = F.pad(shift[:, : states.shape[1]], (0, 0, 0, max(0, states.shape[1] - shift.shape[1])))
            result.append([with_blocks(entry, {CROSS_ATTENTION: states + fitting})])
        return result

    return replace(none_method(backbone), name=name, positive=positive)


def mean_difference(backbone: DemoBackbone, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """mean(safe) - mean(unsafe) [D] over all tokens of (unsafe, safe) pairs but the first, which is always the same."""
    unsafe, safe = (torch.cat([e[0] for e in backbone.encode(side)])[:, 1:].mean((0, 1)) for side in zip(*pairs))
    return safe - unsafe


def mean_difference_method(backbone: DemoBackbone, pairs: Sequence[tuple[str, str]]) -> Method:
    """The mean difference added to each token but the first, in every prompt: steering without a gate."""
    shift = mean_difference(backbone, pairs).repeat(1, backbone.encode([""])[0][0].shape[1], 1)
    shift[:, 0] = 0
    return _shifted(backbone, "mean difference", shift)


def condelta_method(backbone: DemoBackbone, wanted: str, unwanted: str, strength: float = 1.0) -> Method:
    """ComfyUI-ConDelta (github.com/envy-ai/ComfyUI-ConDelta): conditioning(wanted) - conditioning(unwanted) is added.

    Token by token, as the pack does: past the difference's last token (77 here) nothing is added. 1 is the strength
    of its node "Apply ConDelta".
    """
    (of_wanted, _), (of_unwanted, _) = backbone.encode([wanted, unwanted])
    return _shifted(backbone, "ConDelta", strength * (of_wanted - of_unwanted))
