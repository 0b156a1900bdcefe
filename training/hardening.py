"""Hardening: unsafe prompts that draw the concept though the gate stays shut on them; its walls are fitted again.

A search of random edits, like that of an attacker who sees no more than pictures, but guided by the gate's own depth.
Only what every backbone offers is used: its text encoder and its predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from torch import Generator, Tensor

from ..backbones.protocol import Backbone
from .discovery import unsafe_shares

PROMPTS = 128  # that are edited in a round
EDITS = 6  # one after the other
MOST_WORDS = 36  # of an edited prompt: below the 75 tokens of a chunk

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
    texts: Sequence[TextEdit] = TEXTS, beside: str = "",
) -> tuple[str, str]:  # fmt: skip
    """The text, and another one beside it, with one random edit: of one of its longer words, or of the whole.

    The other text gets the same edit: the same word where it has it, the same change of the whole.
    """
    words = text.split()
    if words and rng.random() < 0.5:
        longest = sorted(range(len(words)), key=lambda i: len(words[i]))[-3:]
        old = words[rng.choice(longest)]
        new = rng.choice(letters)(old, rng)
        first, second = (" ".join(new if word == old else word for word in one.split()) for one in (text, beside))
        return first, second
    edit, state = rng.choice(texts), rng.getstate()
    first = edit(text, fillers, rng)
    rng.setstate(state)
    return first, edit(beside, fillers, rng)


def evading(
    backbone: Backbone,
    pairs: Sequence[tuple[str, str]],
    fillers: Sequence[str],
    depth_of: Callable[[Sequence[str]], Tensor],
    rng: Random,
    generator: Generator,
) -> list[tuple[str, str]]:
    """Edits of the pairs' unsafe prompts that are inside and still draw the concept; safe sides are edited alike.

    Args:
        fillers: harmless prompts to put beside unsafe ones.
        depth_of: largest depths [N] of prompts; at most 0 is inside.
    """
    chosen = rng.sample(list(pairs), min(PROMPTS, len(pairs)))
    sides, depths = list(chosen), depth_of([unsafe for unsafe, _ in chosen])
    for _ in range(EDITS):
        tried = [edited(unsafe, fillers, rng, beside=safe) for unsafe, safe in sides]
        found = depth_of([unsafe for unsafe, _ in tried])
        for i, pair in enumerate(tried):
            if found[i] < depths[i] and len(pair[0].split()) <= MOST_WORDS:
                sides[i], depths[i] = pair, found[i]
    inside = [i for i, depth in enumerate(depths.tolist()) if depth <= 0]
    if not inside:
        return []
    candidates = backbone.encode([sides[i][0] for i in inside])
    known = [backbone.encode([chosen[i][side] for i in inside]) for side in (0, 1)]
    shares = unsafe_shares(backbone, candidates, list(zip(*known)), generator)
    return [sides[i] for i, share in zip(inside, shares.tolist()) if share > 0.5]
