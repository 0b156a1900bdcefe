"""SAFREE (Yoon, Yu, Patil, Yao & Bansal, ICLR 2025, arXiv 2410.12761): its projection and its self-validating filter.

Details and constants as in the authors' code for Stable Diffusion (github.com/jaehong31/SAFREE, function
`safree_projection` and what calls it). Left out is the adaptive re-attention in the latents' spectrum: it needs a
UNet with FreeU blocks, and half as many model evaluations again.

- The concept's subspace is spanned by the end-of-text states of its words: projection P_C.
- Each token of the prompt is masked in turn (token 0). The prompt's subspace is spanned by the end-of-text states of
  these masked prompts: projection P_I. A token is toxic when masking it leads further away from the concept than
  masking the others does on average: |(1 - P_C) e_i| >= (1 + alpha) mean |(1 - P_C) e_j|, j != i.
- The state of each toxic token becomes (1 - P_C) P_I e; end-of-text and padding stay.
- The filter: beta = 1 - the mean cosine between each state and its projection. The projected prompt is used in the
  steps 0 ... round(10 sigmoid(5 (10 beta - 5.333))) of 50, the original one after that. (Numbers for nudity, tuned on
  Stable Diffusion's encoder.)
- The authors' script also gives the concept's words as the negative prompt; so does this, unless told otherwise.

Projections are computed in float64; the code inverts near-singular float32 matrices without a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...demo.model import without_weights
from ...region.conditioning import CROSS_ATTENTION, Entry, with_blocks
from .method import Conditioning, Method, plain_positive, shown
from .prompts import none_method

ALPHA = 0.01
MASKED = 0  # the token that stands for a masked one: "!" here as in CLIP
STEPS = 50  # of which the filter lets the first up to `LONGEST` + 1 use the projected prompt
LONGEST = 10
FILTER_MIDDLE, FILTER_SLOPE = 5.333, 2 * 2.5  # the code's numbers for nudity; artists have others


def subspace_projection(vectors: Tensor) -> Tensor:
    """Orthogonal projection [D, D] onto the span of vectors [n, D]: E (E^T E)^-1 E^T with E = vectors^T."""
    columns = vectors.double().T
    return columns @ torch.linalg.pinv(columns)


def toxic_tokens(masked: Tensor, concept: Tensor, alpha: float = ALPHA) -> Tensor:
    """Which tokens are toxic, [n], from end states [n, D] of the prompt with each token masked, and P_C [D, D].

    The only token of a prompt has no others to compare with; as in the authors' code it counts as toxic.
    """
    distance = (masked.double() - masked.double() @ concept).norm(dim=-1)
    others = (distance.sum() - distance) / (len(distance) - 1)
    return ~(distance < (1 + alpha) * others)


def filter_end(states: Tensor, projected: Tensor) -> float:
    """Share of sampling up to which the projected prompt is used, from states [n, D] of start, words and end."""
    beta = 1 - float(torch.cosine_similarity(states.double(), projected.double(), dim=-1).mean())
    last = round(LONGEST / (1 + math.exp(-FILTER_SLOPE * (10 * beta - FILTER_MIDDLE))))
    return (last + 0.5) / (STEPS - 1)  # between step `last` and the next; step i of 50 is at i / 49


def _end_states(backbone: DemoBackbone, ids: Tensor) -> Tensor:
    """States [N, D] of the end-of-text token that closes each row of token ids [N, T]."""
    ends = (ids == backbone.model.tokenizer.eos_token_id).int().argmax(-1)
    with torch.no_grad():
        return backbone.model.text_encoder(input_ids=ids).last_hidden_state[torch.arange(len(ids)), ends]


def _token_ids(backbone: DemoBackbone, prompts: Sequence[str]) -> Tensor:
    """Token ids [N, T], padded to the longest, start and end included."""
    words = [without_weights(prompt) for prompt in prompts]
    tokens = backbone.model.tokenizer(words, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return tokens["input_ids"]


def project(
    backbone: DemoBackbone, prompt: str, entry: Entry, concept: Tensor, alpha: float, filtered: bool
) -> Conditioning:
    """A prompt's conditioning with its toxic tokens projected; unchanged when it has none. `concept` is P_C [D, D]."""
    ids = _token_ids(backbone, [prompt])
    words = ids.shape[1] - 2
    if words == 0:
        return [entry]
    masked_ids = ids.repeat(words, 1)
    masked_ids[torch.arange(words), 1 + torch.arange(words)] = MASKED
    masked = _end_states(backbone, masked_ids)
    toxic = toxic_tokens(masked, concept, alpha)
    if not toxic.any():
        return [entry]
    states = entry[0]
    inside = states.double() @ subspace_projection(masked)
    projected = (inside - inside @ concept).to(states.dtype)
    changes = torch.zeros(states.shape[1], dtype=torch.bool)
    changes[1 : words + 1] = toxic
    safe = with_blocks(entry, {CROSS_ATTENTION: torch.where(changes[None, :, None], projected, states)})
    if not filtered:
        return [safe]
    end = filter_end(states[0, : words + 2], projected[0, : words + 2])
    return [[safe[0], {**safe[1], "end_percent": end}], [entry[0], {**entry[1], "start_percent": end}]]


def safree_method(
    backbone: DemoBackbone,
    concepts: Sequence[str],
    alpha: float = ALPHA,
    filtered: bool = True,
    negative_prompt: bool = True,
) -> Method:
    """SAFREE without re-attention.

    Args:
        filtered: end the projection as the self-validating filter says; otherwise it holds throughout.
        negative_prompt: the concept's words as negative prompt, as in the authors' script.
    """
    concept = subspace_projection(_end_states(backbone, _token_ids(backbone, concepts)))

    def positive(prompts: Sequence[str]) -> list[Conditioning]:
        plain = plain_positive(backbone)(prompts)
        return [project(backbone, p, entry, concept, alpha, filtered) for p, (entry,) in zip(prompts, plain)]

    method = replace(none_method(backbone), name="SAFREE projection", positive=positive)
    return replace(method, negative=backbone.encode([shown(concepts)])[0]) if negative_prompt else method
