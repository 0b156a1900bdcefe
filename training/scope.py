"""The scope: what prompts look like as the text encoder writes them, so that text which was changed afterwards is told.

Averages of two prompts, scaled ones and the like draw what is in them, while every wall sees a mixture. Encoders that
end in a normalisation put their tokens on an ellipsoid, and whatever is mixed lies within it. For any encoder, Fisher's
linear discriminant (1936) on the squares and the values of a token's features finds the quadratic form that tells both
apart best, as far as that can be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..region.blocks import WIDEST, key_of
from ..region.region import Part, Scope
from ..region.steering import judged, likeness, out_of_scope
from . import processes
from .gate import judged_all, statistics
from .text_states import cut

SHARES = (0.2, 0.8)  # of a prompt in a mixture
WEIGHTS = (0.7, 1.6)  # of words, as people write them: (word:1.3)
WEIGHTED = 0.5  # of a prompt's tokens at most
MARGIN = 0.25  # of the way from what was seen to mixtures; and beyond the largest that was seen
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2)
PROMPTS = 2_000  # to fit with
FEWEST = 50  # prompts with such text, to fit anything
SOME = 4_096  # tokens, for where sums of squares are seen from
TOKENS = 4  # for each number that is fitted
WIDE = 2_048  # features
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


class ScopeFit:
    """Two forms and between which values prompts lie: one that tells mixtures from prompts best, and the tokens' size.

    Whoever scales tokens may by chance stay on the ellipsoid; their size alone tells that. Batches of prompts are first
    learned from (`learn`), then others say where the bounds are (`bound`): neither these nor these with weighted words
    are beyond the scope.
    """

    def __init__(self, sample: Tensor, empty: Tensor, constant: Tensor | None, seed: int) -> None:
        """Args:
            sample: some prompts [N, T, D] as the encoder writes them: how large their features are, and how many tokens
                count.
            empty: the empty prompt [1, T, D].
            constant: tokens [n, D] that are left out.
        """  # fmt: skip
        counts = judged_all(sample, constant)
        self.empty, self.constant, self.seed = empty.float(), constant, seed
        self.scale = statistics([sample], [counts])[1]
        width = len(self.scale)
        self._chosen = torch.arange(0, width, -(-width // WIDEST))  # the widest hold several layers
        found = sample[counts]
        found = found[:: -(-len(found) // SOME)].float() / self.scale
        some = _features(found[:, self._chosen].double())
        self._middle, count = some.mean(0), some.shape[1]  # sums of squares lose nothing, seen from there
        # a few tokens are looked at of each prompt: with all of those of a wide encoder memory would not last
        self._share = min((TOKENS * count + 10_000) / max(float(counts.sum()) / len(sample) * PROMPTS, 1), 1.0)
        self._number, self._total = torch.zeros(2).double(), torch.zeros(2, count).double()
        self._product, self._prompts = torch.zeros(count, count).double(), torch.zeros(2).double()
        self._inside: list[Tensor] = []
        self._outside: list[Tensor] = []

    def _blank(self, states: Tensor) -> Tensor:
        """The empty prompt, as long as these."""
        empty = self.empty[:, : states.shape[1]]
        return F.pad(empty, (0, 0, 0, states.shape[1] - empty.shape[1]))

    def learn(self, states: Tensor, number: int) -> None:
        """From prompts [N, T, D], and their mixtures; `number`: of the batch, which chance hangs on."""
        states, generator = _with_text(states, self.constant), Generator().manual_seed(self.seed + number)
        self._prompts[0] += len(states)
        for kind, changed in enumerate((states, mixed(states, self._blank(states), generator))):
            found = changed[judged(changed, self.constant)]
            found = found[torch.rand(len(found), generator=generator) < self._share]
            features = _features((found / self.scale)[:, self._chosen].double()) - self._middle
            self._number[kind] += len(features)
            self._total[kind] += features.sum(0)
            if kind == 0:
                self._product.addmm_(features.T, features)

    def learned(self) -> None:
        """All is learned now, by all processes."""
        self._candidates  # noqa: B018 - made here once and for all

    @cached_property
    def _candidates(self) -> Scope:
        """Forms [RIDGES + 1, 2 D], squares before values: Fisher's, whose means over prompts and over their mixtures
        are 1 apart, and at the end a token's size, which is 1 on average."""
        width, count = len(self.scale), len(self._product)
        number, total, product = map(processes.summed, (self._number, self._total, self._product))
        means = total / number[:, None].clamp(min=1)
        covariance = product / number[0].clamp(min=1) - torch.outer(means[0], means[0])
        middle = self._middle + means[0]
        # features that hardly vary do so by rounding, and other precisions round otherwise
        spread = torch.maximum(covariance.diagonal().clamp(min=1e-24).sqrt(), ROUNDING * middle.abs())
        covariance, gap = covariance / spread / spread[:, None], (means[0] - means[1]) / spread
        unit = torch.eye(count, dtype=torch.double)
        found = torch.stack([torch.linalg.solve(covariance + ridge * unit, gap) for ridge in RIDGES])
        found = found / (found @ gap).clamp(min=1e-12)[:, None] / spread
        forms, chosen = torch.zeros(len(RIDGES) + 1, 2 * width, dtype=torch.double), self._chosen
        forms[:-1, chosen] = found[:, : len(chosen)]
        if count > len(chosen):
            forms[:-1, width + chosen] = found[:, len(chosen) :]
        forms[-1, chosen] = 1 / middle[: len(chosen)].sum()
        forms, none = forms.float(), torch.zeros(2, len(forms))
        return Scope(forms[:, :width].contiguous(), forms[:, width:].contiguous(), self.scale, none, none)

    def bound(self, states: Tensor, number: int) -> None:
        """By other prompts [N, T, D], and their mixtures, when all is learned."""
        states, generator = _with_text(states, self.constant), Generator().manual_seed(self.seed + number)
        self._prompts[1] += len(states)
        blank = self._blank(states)
        self._inside.append(torch.cat([self._summary(changed)
                                       for changed in (states, weighted(states, blank, generator))]))  # fmt: skip
        self._outside.append(self._summary(mixed(states, blank, generator)))

    def _summary(self, states: Tensor) -> Tensor:
        """The lowest and the highest value of each prompt, over all of its tokens and over those of any window:
        [N, 2, 2, forms]."""
        like = likeness(states, judged(states, self.constant), self._candidates)
        return torch.stack([torch.stack([like[:, 0], like[:, 0]], 1),
                            torch.stack([like[:, 1:].amin(1), like[:, 1:].amax(1)], 1)], 1)  # fmt: skip

    def scope(self) -> Scope | None:
        """None where too few prompts have such text."""
        if processes.summed(self._prompts).min() < FEWEST:
            return None
        inside, outside = (torch.cat(processes.gathered(found)) for found in (self._inside, self._outside))
        low, high = inside[:, :, 0].amin(0), inside[:, :, 1].amax(0)  # [2, forms]
        lowest = outside[:, :, 0]
        best = int((lowest >= low).all(1)[:, : len(RIDGES)].float().mean(0).argmin())
        chosen = torch.tensor([best, len(RIDGES)])
        room = (low - lowest.median(0).values)[:, best]
        room = MARGIN * torch.stack([room, torch.ones(2)], 1).clamp(min=0)
        made = self._candidates
        return Scope(made.square[chosen], made.linear[chosen], self.scale, low[:, chosen] - room,
                     high[:, chosen] + MARGIN)  # fmt: skip


def _with_text(states: Tensor, constant: Tensor | None) -> Tensor:
    """The prompts of which some token counts."""
    states = states.float()
    return states[judged(states, constant).any(1)]


def beyond_scope(encoded: Mapping[str, Tensor], part: Part) -> Tensor:
    """Which stacked prompts are beyond one of the part's scopes: [N]."""
    blocks = {block: cut(encoded, block) for block in part.scopes if key_of(block) in encoded}
    count = len(next(iter(encoded.values())))
    return out_of_scope(blocks, part) if blocks else torch.zeros(count, dtype=torch.bool)


def _features(u: Tensor) -> Tensor:
    """What the forms are made of: [..., 2 D]; of wide encoders the squares alone, [..., D], as theirs end without shift
    (T5's and Llama's RMS norm)."""
    return torch.cat([u.square(), u], -1) if u.shape[-1] <= WIDE else u.square()
