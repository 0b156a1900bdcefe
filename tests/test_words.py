"""Which tokens are the prompt's own, with tokenizers of the shapes that ComfyUI's families have."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from comfyui_safe_region.nodes.words import readings

PAD = 0
LETTERS = {PAD: "<pad>"} | {number: chr(number) for number in range(32, 127)}


def letters(text: str, *marks: int) -> list[tuple[float, ...]]:
    """A token for each letter; with `marks` it says of which word it is, as most of ComfyUI's tokenizers do."""
    return [(ord(letter), 1.0, *marks) for letter in text]


def boogu(text: str) -> list[tuple[float, ...]]:
    """The empty prompt gets another system prompt."""
    return letters(f"[draw this]{text}[end]" if text.strip() else "[tell what the picture shows][end]", 1)


def longcat(text: str) -> list[tuple[float, ...]]:
    """Tokens say nothing of words, the empty prompt is a space, and padding stands before the end of the template."""
    prompt = letters(text or " ")
    return [*letters("[caption]"), *prompt, *[(PAD, 1.0)] * (40 - len(prompt)), *letters("[go]")]


def minimax(text: str) -> list[tuple[float, ...]]:
    """No template, and nothing at all for the empty prompt."""
    return letters(text)


def clip_l(text: str) -> list[tuple[float, ...]]:
    """A start, an end and padding, which stand for no word."""
    return [(PAD, 1.0, 0), *letters(text, 1), *[(PAD, 1.0, 0)] * (20 - len(text))]


def clip(tokenize: Callable[[str], list[tuple[float, ...]]]) -> Any:
    return SimpleNamespace(
        tokenize=lambda text, return_word_ids: {"one": [tokenize(text)], "tags": "no tokens at all"},
        tokenizer=SimpleNamespace(one=SimpleNamespace(inv_vocab=LETTERS)),
    )


@pytest.mark.parametrize("tokenize", [boogu, longcat, minimax, clip_l])
@pytest.mark.parametrize("prompt", ["a knife", "x", ".", "draw a cat", "xx..", "draw this [end"])
def test_the_prompts_own_tokens_are_told_from_the_template(tokenize, prompt):
    tokens = readings(clip(tokenize), prompt)["one"]
    own = [(token.text, token.span) for token in tokens if token.kind == "text" and token.span]
    written = [(letter, (i, i + 1)) for i, letter in enumerate(prompt) if letter != " "]
    assert own == written
    assert len(tokens) == len(tokenize(prompt))
    others = [token for token in tokens if not token.span and token.text and token.piece != b"<pad>"]
    assert {token.kind for token in others} <= {"template"}


@pytest.mark.parametrize("tokenize", [boogu, longcat, minimax, clip_l])
def test_the_empty_prompt_has_no_words(tokenize):
    for tokens in readings(clip(tokenize), "").values():
        assert not [token for token in tokens if token.span]
