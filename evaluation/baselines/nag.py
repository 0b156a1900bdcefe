"""Normalized Attention Guidance (Chen, Bandyopadhyay, Zou & Song, 2025, arXiv 2505.21179).

In each cross-attention layer, with features Z+ that attend to the prompt and Z- that attend to the negative prompt:

    Z~ = s Z+ - (s - 1) Z-                              extrapolated; the paper's phi is s - 1
    Z^ = Z~ min(r, tau) / r,  r = |Z~|_1 / |Z+|_1       for each pixel, so that no norm grows more than tau-fold
    Z  = alpha Z^ + (1 - alpha) Z+

The L1 norm is the paper's and that of the authors' ComfyUI-NAG (their Flux code takes L2). Scale 5, tau 2.5 and alpha
.25 are ComfyUI-NAG's defaults; it holds at every step, as it does there by default. It works at guidance 1; under
classifier-free guidance it changes the prompt's prediction only, not that for the empty prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.demo import DemoBackbone
from ...backbones.protocol import Backbone
from ...demo.networks import Attention, TextBlock, UNet
from ...region.conditioning import Entry
from .method import Method, shown, with_unet
from .prompts import none_method

EXTRA = 0.07  # more operations in an evaluation of the demo UNet, counted with torch.utils.flop_counter


def normalized_guidance(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Features [..., D] guided from `negative` to `positive`, both [..., D]."""
    away = scale * positive - (scale - 1) * negative
    norms = (z.abs().sum(-1, keepdim=True).clamp(min=1e-6) for z in (away, positive))
    growth = torch.div(*norms)
    return alpha * away * growth.clamp(max=tau) / growth + (1 - alpha) * positive


def attended(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """What pixels x [B, N, C] read from text states [B, T, D]: features [B, N, C] before the output layer."""
    q, (k, v) = attention.query(attention.norm(x)), attention.key_value(context).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GuidedAttention(nn.Module):
    """A cross-attention layer led away from a negative prompt, whose text states are [1, T, D]."""

    def __init__(self, attention: Attention, negative: Tensor, scale: float, tau: float, alpha: float) -> None:
        super().__init__()
        self.attention, self.negative = attention, negative
        self.numbers = (scale, tau, alpha)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        positive = attended(self.attention, x, context)
        negative = attended(self.attention, x, self.negative.to(context).expand(len(x), -1, -1))
        return x + self.attention.out(normalized_guidance(positive, negative, *self.numbers))


def guided_unet(unet: UNet, negative: Tensor, scale: float, tau: float, alpha: float) -> UNet:
    """The UNet with guided cross-attention: new modules around the same weights."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    wrapped = copy.deepcopy(unet, shared)
    for module in wrapped.modules():
        if isinstance(module, TextBlock):
            module.cross_attention = GuidedAttention(module.cross_attention, negative, scale, tau, alpha)
    return wrapped


def nag_method(
    backbone: DemoBackbone, concepts: Sequence[str], scale: float = 5.0, tau: float = 2.5, alpha: float = 0.25
) -> Method:
    """NAG away from the concept's words."""
    negative = backbone.encode([shown(concepts)])[0][0]
    away = with_unet(backbone, guided_unet(backbone.model.unet, negative, scale, tau, alpha))

    def guide(
        drawing: Backbone, x: Tensor, sigma: Tensor, entries: Sequence[Entry], empty: Entry | None, guidance: float
    ) -> Tensor:
        of_prompt = drawing.denoise(x, sigma, entries)
        if guidance == 1 or empty is None:
            return of_prompt
        of_empty = backbone.denoise(x, sigma, [empty] * len(entries))
        return of_empty + guidance * (of_prompt - of_empty)

    return replace(
        none_method(backbone), name="NAG", backbone=away, guide=lambda steps: guide, evaluations=(2 + EXTRA, 1 + EXTRA)
    )
