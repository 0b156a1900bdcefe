"""Baselines that are only words: nothing at all, a negative prompt, harmless words added to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...backbones.demo import DemoBackbone
from .method import Conditioning, Method, plain_positive, shown


def none_method(backbone: DemoBackbone) -> Method:
    """The model as it is."""
    return Method("none", backbone, plain_positive(backbone), backbone.encode([""])[0])


def negative_prompt_method(backbone: DemoBackbone, concepts: Sequence[str]) -> Method:
    """Classifier-free guidance away from the concept's words. At guidance 1 there is no guidance: it does nothing."""
    return replace(none_method(backbone), name="negative prompt", negative=backbone.encode([shown(concepts)])[0])


def sfw_words_method(backbone: DemoBackbone, words: Sequence[str]) -> Method:
    """Harmless words after each prompt, as prompt templates for ComfyUI have them."""

    def positive(prompts: Sequence[str]) -> list[Conditioning]:
        return plain_positive(backbone)([shown([*filter(None, [prompt]), *words]) for prompt in prompts])

    return replace(none_method(backbone), name="SFW words", positive=positive)
