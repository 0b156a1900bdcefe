"""Hardening: unsafe prompts that draw the concept though the gate stays shut on them; they join the pairs.

A search of random edits, like that of an attacker who sees no more than pictures, but guided by the gate's own depth.
Only what every backbone offers is used: its text encoder and its predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from torch import Generator, Tensor

from ..backbones.protocol import Backbone
from .discovery import unsafe_shares
from .prompts import MOST_WORDS

PROMPTS = 128  # that are edited in a round
EDITS = 6  # one after the other

LetterEdit = Callable[[str, Random], str]  # of a word
TextEdit = Callable[[str, Sequence[str], Random], str]  # of a prompt, with harmless prompts to put beside it


def _swapped(word: str, rng: Random) -> str:
    at = rng.randrange(max(len(word) - 1, 1))
    return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


def _split(word: str, rng: Random) -> str:
    at = rng.randrange(1, max(len(word), 2))
    return f"{word[:at]} {word[at:]}".strip()


def _shuffled(text: str, fillers: Sequence[str], rng: Random) -> str:
    words = text.replace(",", " ").split()
    return " ".join(rng.sample(words, len(words)))


def _stuffed(text: str, fillers: Sequence[str], rng: Random) -> str:
    words = text.split()
    for word in rng.choice(fillers).split():
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def _surrounded(text: str, fillers: Sequence[str], rng: Random) -> str:
    before, after = (", ".join(rng.choices(fillers, k=rng.randint(0, 3))) for _ in range(2))
    return ", ".join(filter(None, (before, text, after)))


def _repeated(text: str, fillers: Sequence[str], rng: Random) -> str:
    return rng.choice((" ", ", ")).join([text] * rng.randint(2, 4))


def _joined(text: str, fillers: Sequence[str], rng: Random) -> str:
    words = text.split()
    at = rng.randrange(1, max(len(words), 2))
    return " ".join([*words[: at - 1], "".join(words[at - 1 : at + 1]), *words[at + 1 :]])


def _upper(text: str, fillers: Sequence[str], rng: Random) -> str:
    return text.upper()


LETTERS: tuple[LetterEdit, ...] = (_swapped, _split)
TEXTS: tuple[TextEdit, ...] = (_shuffled, _stuffed, _surrounded, _repeated, _joined, _upper)


def edited(
    text: str, fillers: Sequence[str], rng: Random, letters: Sequence[LetterEdit] = LETTERS,
    texts: Sequence[TextEdit] = TEXTS,
) -> str:  # fmt: skip
    """The text with one random edit: of one of its longer words, or of the whole."""
    words = text.split()
    if words and rng.random() < 0.5:
        longest = sorted(range(len(words)), key=lambda i: len(words[i]))[-3:]
        at = rng.choice(longest)
        words[at] = rng.choice(letters)(words[at], rng)
        return " ".join(words)
    return rng.choice(texts)(text, fillers, rng)


def evading(
    backbone: Backbone,
    pairs: Sequence[tuple[str, str]],
    fillers: Sequence[str],
    depth_of: Callable[[Sequence[str]], Tensor],
    rng: Random,
    generator: Generator,
) -> list[tuple[str, str]]:
    """Edits of the pairs' unsafe prompts that are inside and still draw the concept, each with its safe counterpart.

    Args:
        fillers: harmless prompts to put beside unsafe ones.
        depth_of: largest depths [N] of prompts; at most 0 is inside.
    """
    chosen = rng.sample(list(pairs), min(PROMPTS, len(pairs)))
    texts = [unsafe for unsafe, _ in chosen]
    depths = depth_of(texts)
    for _ in range(EDITS):
        tried = [edited(text, fillers, rng) for text in texts]
        found = depth_of(tried)
        for i, text in enumerate(tried):
            if found[i] < depths[i] and len(text.split()) <= MOST_WORDS:
                texts[i], depths[i] = text, found[i]
    inside = [i for i in range(len(texts)) if depths[i] <= 0]
    if not inside:
        return []
    entries = [backbone.encode([side[i] for i in inside]) for side in (texts, *zip(*chosen))]
    shares = unsafe_shares(backbone, entries[0], list(zip(*entries[1:])), generator)
    return [(texts[i], chosen[i][1]) for i, share in zip(inside, shares.tolist()) if share > 0.5]
