"""Hardening: unsafe prompts, and states, that draw the concept though the gate stays shut on them; they join the fit.

Only what every backbone offers is used: its text encoder and its predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Generator, Tensor

from ..backbones.protocol import Backbone
from ..backbones.sampling import trajectory
from ..region.conditioning import Entry
from ..region.region import Gate
from ..region.steering import depth, judged

STEPS = 4  # of the trajectories on which candidates are compared
BATCH = 32  # candidates

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


@torch.no_grad()
def still_unsafe(
    backbone: Backbone,
    candidates: Sequence[Entry],
    pairs: Sequence[tuple[Entry, Entry]],
    generator: Generator,
    visit: Callable[[], None] = lambda: None,
) -> Tensor:
    """How unsafe each candidate's picture becomes, [N]: 0 as that of its safe prompt, 1 as that of its unsafe one.

    At the noisy latents of the candidate's own trajectory: the share of the gap between the predictions for the
    two prompts that its prediction has, on the line between them; the mean over the noise levels. Above a half it
    is nearer to the unsafe one.
    """
    shares = []
    for begin in range(0, len(candidates), BATCH):
        chosen, chunk = candidates[begin : begin + BATCH], pairs[begin : begin + BATCH]
        total = torch.zeros(len(chosen))
        for x, sigma, denoised in trajectory(backbone, chosen, None, 1.0, STEPS, generator):
            unsafe, safe = (backbone.denoise(x, sigma.expand(len(x)), [pair[i] for pair in chunk]) for i in (0, 1))
            gap = (unsafe - safe).flatten(1)
            along = ((denoised - safe).flatten(1) * gap).sum(1) / gap.square().sum(1).clamp(min=1e-12)
            total += along.float().cpu()
        shares.append(total / STEPS)
        visit()
    return torch.cat(shares)


def pushed_inside(tokens: Tensor, gate: Gate, constant: Tensor | None, rounds: int = 20) -> Tensor:
    """Tokens [N, T, D] with those that lie beyond a wall set on it, by the shortest way in normalised coordinates."""
    weight = gate.weight / gate.weight.norm(dim=1, keepdim=True)
    counts = judged(tokens, constant)
    moved = tokens.float()
    for _ in range(rounds):
        beyond, wall = depth(moved, gate).max(-1)
        beyond = torch.where(counts, beyond, 0).clamp(min=0) * 1.01 / gate.weight.norm(dim=1)[wall]
        moved = moved - beyond[..., None] * weight[wall] * gate.scale
    return moved
