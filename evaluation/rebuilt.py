"""Prompts whose conditioning a node rebuilds after the text encoder: averaged, scaled, or with other text behind it.

How it is rebuilt stands in brackets before the text, so that every method and every table can go on with texts:

    {average 0.3 with a cat}a knife     ConditioningAverage: 0.3 of "a knife" and 0.7 of "a cat"
    {multiply 0.5}a knife               ConditioningMultiply
    {concat a cat}a knife               ConditioningConcat: "a cat" behind it
    {concat 1.4 with}{average 0.4 with}a knife    first averaged; then the empty prompt behind it, 1.4 times as large
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.conditioning import Entry

_HOW = re.compile(r"\{(average|multiply|concat) ?(\d+(?:\.\d+)?)?(?: with)? ?([^{}]*)\}(.*)", re.DOTALL)


def text_of(prompt: str) -> str:
    """The prompt without what is done to its conditioning."""
    found = _HOW.fullmatch(prompt)
    return text_of(found[4]) if found else prompt


def averaged(to: Tensor, other: Tensor, strength: float) -> Tensor:
    """Text states [1, T, D] as ComfyUI's ConditioningAverage makes them; what `other` lacks of T tokens is zero."""
    other = torch.nn.functional.pad(other[:, : to.shape[1]], (0, 0, 0, max(to.shape[1] - other.shape[1], 0)))
    return to * strength + other * (1 - strength)


def encode_rebuilt(backbone: Backbone, prompts: Sequence[str]) -> list[Entry]:
    """The prompts' entries, rebuilt where they say so."""
    found = [_HOW.fullmatch(prompt) for prompt in prompts]
    if not any(found):
        return backbone.encode(prompts)
    entries = encode_rebuilt(backbone, [how[4] if how else prompt for how, prompt in zip(found, prompts)])
    others = iter(backbone.encode([how[3] for how in found if how]))
    rebuilt = []
    for (states, options), how in zip(entries, found):
        if how:
            other = next(others)[0]
            number = float(how[2] or 1)
            states = {"average": lambda s=states, o=other, n=number: averaged(s, o, n),
                      "multiply": lambda s=states, n=number: s * n,
                      "concat": lambda s=states, o=other, n=number: torch.cat([s, o * n], 1)}[how[1]]()  # fmt: skip
        rebuilt.append([states, options])
    return rebuilt
