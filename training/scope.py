"""The scope: what prompts look like as the text encoder writes them, so that text which was changed afterwards is told.

Averages of two prompts, scaled ones and the like draw what is in them, while every wall sees a mixture. Encoders that
end in a normalisation put their tokens on an ellipsoid, and whatever is mixed lies within it. For any encoder, Fisher's
linear discriminant (1936) on the squares and the values of a token's features finds the quadratic form that tells both
apart best, as far as that can be told.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from ..region.blocks import WIDEST, key_of
from ..region.region import Part, Scope
from ..region.steering import judged, likeness, out_of_scope
from .gate import judged_all, statistics
from .text_states import cut

SHARES = (0.2, 0.8)  # of a prompt in a mixture
WEIGHTS = (0.7, 1.6)  # of words, as people write them: (word:1.3)
WEIGHTED = 0.5  # of a prompt's tokens at most
MARGIN = 0.25  # of the way from what was seen to mixtures; and beyond the largest that was seen
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2)
PROMPTS = 2_000  # to fit with
FEWEST = 50  # prompts with such text, to fit anything
TOKENS = 4  # for each number that is fitted
WIDE = 2_048  # features
CHUNK, CHUNK_NUMBERS = 128, 2**24  # prompts at once, and the numbers in them
ROUNDING = 2.0**-8  # of a square, in bfloat16


def _uniform(bounds: tuple[float, float], shape: tuple[int, ...], generator: Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)


def mixed(states: Tensor, empty: Tensor, generator: Generator, shares: tuple[float, float] = SHARES) -> Tensor:
    """Prompts [N, T, D], each averaged with another one or with the empty one, as ComfyUI's ConditioningAverage does.

    Args:
        empty: the empty prompt [1, T, D].
        shares: between which each prompt's own share lies.
    """
    others = states[torch.randperm(len(states), generator=generator)]
    alone = torch.rand(len(states), 1, 1, generator=generator) < 0.5
    share = _uniform(shares, (len(states), 1, 1), generator)
    return torch.lerp(torch.where(alone, empty.to(states), others), states, share.to(states))


def weighted(states: Tensor, empty: Tensor, generator: Generator) -> Tensor:
    """Prompts [N, T, D] with weights on some of their tokens: ComfyUI scales a token's distance to the empty prompt."""
    shape = (*states.shape[:2], 1)
    chosen = torch.rand(shape, generator=generator) < WEIGHTED * torch.rand(len(states), 1, 1, generator=generator)
    weight = torch.where(chosen, _uniform(WEIGHTS, shape, generator), 1.0)
    padding = (states == 0).all(-1, keepdim=True)
    return torch.lerp(empty.to(states), states, weight.to(states)).masked_fill(padding, 0.0)


def fit_scope(
    learn: Tensor, calibration: Tensor, empty: Tensor, constant: Tensor | None, generator: Generator
) -> Scope | None:
    """Two forms and between which values prompts lie: one that tells mixtures from prompts best, and the tokens' size.

    Whoever scales tokens may by chance stay on the ellipsoid; their size alone tells that. None where too few prompts
    have such text.

    Args:
        learn: prompts [N, T, D] as the encoder writes them.
        calibration: others [M, T, D]; neither they nor they with weighted words are beyond the scope.
        empty: the empty prompt [1, T, D].
        constant: tokens [n, D] that are left out.
    """
    counts = judged_all(learn, constant)
    rows, others = (which.any(1).nonzero()[:, 0] for which in (counts, judged_all(calibration, constant)))
    if min(len(rows), len(others)) < FEWEST:
        return None
    length, width = max(learn.shape[1], calibration.shape[1]), learn.shape[-1]
    empty = torch.nn.functional.pad(empty.float()[:, :length], (0, 0, 0, max(length - empty.shape[1], 0)))
    scale = statistics([learn], [counts])[1]
    rows = rows[torch.randperm(len(rows), generator=generator)[:PROMPTS]]
    chosen = torch.arange(0, width, -(-width // WIDEST))  # the widest hold several layers
    forms = _discriminants(learn, rows, empty, constant, scale, chosen, int(counts[rows].sum()), generator)
    none = torch.zeros(2, len(forms))
    candidates = Scope(forms[:, :width].contiguous(), forms[:, width:].contiguous(), scale, none, none)
    inside, outside = [], []
    for some in others.split(_chunk(calibration)):
        states, blank = calibration[some].float(), empty[:, : calibration.shape[1]]
        for changed in (states, weighted(states, blank, generator)):
            inside.append(likeness(changed, judged(changed, constant), candidates))
        changed = mixed(states, blank, generator)
        outside.append(likeness(changed, judged(changed, constant), candidates))
    likes = torch.cat(inside)
    low = torch.stack([likes[:, 0].amin(0), likes[:, 1:].amin((0, 1))])
    high = torch.stack([likes[:, 0].amax(0), likes[:, 1:].amax((0, 1))])
    likes = torch.cat(outside)
    lowest = torch.stack([likes[:, 0], likes[:, 1:].amin(1)], 1)  # [M, 2, forms]
    best = int((lowest >= low).all(1)[:, : len(RIDGES)].float().mean(0).argmin())
    chosen = torch.tensor([best, len(RIDGES)])
    room = (low - lowest.median(0).values)[:, best]
    room = MARGIN * torch.stack([room, torch.ones(2)], 1).clamp(min=0)
    return Scope(candidates.square[chosen], candidates.linear[chosen], scale, low[:, chosen] - room,
                 high[:, chosen] + MARGIN)  # fmt: skip


def _discriminants(
    learn: Tensor, rows: Tensor, empty: Tensor, constant: Tensor | None, scale: Tensor, chosen: Tensor, tokens: int,
    generator: Generator,
) -> Tensor:  # fmt: skip
    """Forms [RIDGES + 1, 2 D], squares before values: Fisher's, whose means over prompts and over their mixtures are 1
    apart, and at the end a token's size, which is 1 on average.

    A few tokens are looked at in a time: with all of those of a wide encoder memory would not last.
    """
    width, count = len(scale), len(_features(scale[None, chosen])[0])
    share = min((TOKENS * count + 10_000) / max(tokens, 1), 1.0)
    number, total, product = torch.zeros(2), torch.zeros(2, count).double(), torch.zeros(count, count).double()
    middle = None
    for some in rows.split(_chunk(learn)):
        states = learn[some].float()
        for kind, changed in enumerate((states, mixed(states, empty[:, : learn.shape[1]], generator))):
            found = changed[judged(changed, constant)]
            found = found[torch.rand(len(found), generator=generator) < share]
            if not len(found):
                continue
            features = _features((found / scale)[:, chosen].double())
            middle = features.mean(0) if middle is None else middle
            features = features - middle  # sums of squares lose nothing then
            number[kind], total[kind] = number[kind] + len(features), total[kind] + features.sum(0)
            if kind == 0:
                product += features.T @ features
    means = total / number[:, None].clamp(min=1)
    covariance = product / number[0] - torch.outer(means[0], means[0])
    middle = middle + means[0]
    # features that hardly vary do so by rounding, and other precisions round otherwise
    spread = torch.maximum(covariance.diagonal().clamp(min=1e-24).sqrt(), ROUNDING * middle.abs())
    covariance, gap = covariance / spread / spread[:, None], (means[0] - means[1]) / spread
    unit = torch.eye(count, dtype=torch.double)
    found = torch.stack([torch.linalg.solve(covariance + ridge * unit, gap) for ridge in RIDGES])
    found = found / (found @ gap).clamp(min=1e-12)[:, None] / spread
    forms = torch.zeros(len(RIDGES) + 1, 2 * width, dtype=torch.double)
    forms[:-1, chosen] = found[:, : len(chosen)]
    if count > len(chosen):
        forms[:-1, width + chosen] = found[:, len(chosen) :]
    forms[-1, chosen] = 1 / middle[: len(chosen)].sum()
    return forms.float()


def _chunk(states: Tensor) -> int:
    """How many prompts [N, T, D] are looked at at once, so that wide ones do not fill the memory."""
    return max(min(CHUNK, CHUNK_NUMBERS // max(states[0].numel(), 1)), 8)


def beyond_scope(encoded: Mapping[str, Tensor], part: Part) -> Tensor:
    """Which stacked prompts are beyond one of the part's scopes: [N]."""
    blocks = {block: cut(encoded, block) for block in part.scopes if key_of(block) in encoded}
    count = len(next(iter(encoded.values())))
    found = [out_of_scope({block: states[begin : begin + 256] for block, states in blocks.items()}, part)
             for begin in range(0, count, 256) if blocks]  # fmt: skip
    return torch.cat(found) if found else torch.zeros(count, dtype=torch.bool)


def _features(u: Tensor) -> Tensor:
    """What the forms are made of: [..., 2 D]; of wide encoders the squares alone, [..., D], as theirs end without shift
    (T5's and Llama's RMS norm)."""
    return torch.cat([u.square(), u], -1) if u.shape[-1] <= WIDE else u.square()
