"""From prompt pairs to the sets that training works on: variations of them, and parts held out for honest numbers."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from .pairs import PairsError, PromptPairs, everyday_prompts

USUAL, MOST, EACH_PAIR = 7_000, 12_000, 6  # prompts that are encoded where nobody says how many: more for long lists
# Of them, without variations: of pairs, of held-out pairs, of harmless prompts, of everyday ones that are drawn from.
PAIRS_SHARE, HELD_SHARE, KEEP_SHARE, EVERYDAY_SHARE = 0.2, 0.025, 0.45, 0.3
VARIED_PAIRS, VARIED_KEEP = 1_000, 2_000  # variations at most
ARTICLES = ("a", "an", "the", "some")
FILLERS = frozenset(
    "a an the some of in on at with and or to by from for into onto over under behind beside near as is are his her "
    "their its it that who up out off no".split()
)  # words that say nothing about a concept
FEWEST = 24  # of a list that is cut to size
CROWDS = 400  # of unsafe prompts in a crowd of harmless ones, and of crowds without
CROWD_WORDS = 24  # beside a prompt: with it, they stay below the 75 tokens of a chunk
LONG_WORDS = 20  # of a long harmless prompt, at least
# Of the pack's everyday prompts and of the user's own: to calibrate with, and to check with. A bound of 1.25 % with 95
# % confidence needs 239 independent prompts at least; with 750 of them, 4 may lie beyond the walls.
EVERYDAY_SHARES, OWN_SHARES = (0.36, 0.12), (0.2, 0.1)


@dataclass(frozen=True)
class PromptSets:
    """Pairs to learn from and held out, harmless prompts to fit the gate with, to calibrate it with and to check it by.

    The `crowds`, pairs in the midst of several harmless prompts, and `calm` ones, crowds of harmless prompts only, are
    for the walls alone. Those of `calibration` are as people wrote them, and each stands in one of the `long` ones at
    most, so that all of one list are independent; the `checked` ones are made alike, with one variation of each.
    """

    pairs: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    harmless: list[str]
    calibration: list[str]
    long: list[str]
    checked: list[str]
    checked_long: list[str]
    crowds: list[tuple[str, str]]
    calm: list[str]
    checked_varied: list[str] = field(default_factory=list)


TWICE = ("pairs", "held_out", "crowds", "checked")  # lists whose items are two prompts each


def _shuffled(prompt: str, rng: Random) -> str:
    words = prompt.replace(",", " ").split()
    rng.shuffle(words)
    return " ".join(words)


def _joined(first: str, second: str, rng: Random) -> str:
    return rng.choice(("{}, {}", "{} and {}", "{} with {}", "{} next to {}")).format(first, second)


def crowded(prompt: str, others: Sequence[str], rng: Random) -> str:
    """The prompt somewhere among two to eight others, as many as there is room for."""
    found, room = [], CROWD_WORDS
    for other in rng.choices(others, k=rng.randint(2, 8)):
        room -= len(other.split())
        if room >= 0:
            found.append(other)
    found.insert(rng.randint(0, len(found)), prompt)
    return ", ".join(filter(None, found))


def in_a_row(prompts: Sequence[str]) -> list[str]:
    """Long prompts, each of some of these side by side; no prompt stands in two of them."""
    found, row = [], []
    for prompt in prompts:
        row.append(prompt)
        if sum(len(one.split()) for one in row) >= LONG_WORDS:
            found.append(", ".join(row))
            row = []
    return found


def crowded_pairs(pairs: Sequence[tuple[str, str]], others: Sequence[str], rng: Random) -> list[tuple[str, str]]:
    """Both sides of each pair in the same crowd."""
    found = []
    for unsafe, safe in pairs:
        state = rng.getstate()
        first = crowded(unsafe, others, rng)
        rng.setstate(state)
        found.append((first, crowded(safe, others, rng)))
    return found


def vary_pairs(
    pairs: Sequence[tuple[str, str]], everyday: Sequence[str], own: Sequence[str], rng: Random
) -> list[tuple[str, str]]:
    """For each pair one variation: beside a harmless prompt (both sides alike), in upper case, or with words shuffled.

    They teach the gate odd forms, and the move to leave alone what stands beside the concept. The harmless prompts
    are the user's `own` as often as `everyday` ones.
    """
    varied = []
    for unsafe, safe in pairs:
        roll, other = rng.random(), rng.choice(own if own and (rng.random() < 0.5 or not everyday) else everyday)
        if roll < 0.7:
            state = rng.getstate()
            first = rng.random() < 0.5
            sides = []
            for side in (unsafe, safe):
                rng.setstate(state)
                rng.random()
                sides.append(_joined(other, side, rng) if first else _joined(side, other, rng))
            varied.append((sides[0], sides[1]))
        elif roll < 0.9:
            varied.append((_shuffled(unsafe, rng), safe))
        else:
            varied.append((unsafe.upper(), safe.upper()))
    return varied


def vary_harmless(prompts: Sequence[str], rng: Random, leave_out: Sequence[str] = ()) -> list[str]:
    """One variation of each harmless prompt: words shuffled, two joined, a heap of words from anywhere, upper case.

    `leave_out`: what is not harmless in any company is in no heap.
    """
    words = [word for prompt in prompts for word in prompt.replace(",", " ").split() if word.lower() not in leave_out]
    varied = []
    for prompt in prompts:
        roll = rng.random()
        if roll < 0.3:
            varied.append(_shuffled(prompt, rng))
        elif roll < 0.6:
            varied.append(_joined(prompt, rng.choice(prompts), rng))
        elif roll < 0.9:
            varied.append(" ".join(rng.choices(words, k=rng.randint(1, 12))))
        else:
            varied.append(prompt.upper())
    return varied


def with_new_words(held_out: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The held-out pairs that replace words which stand on no pair's unsafe side, not in the plural either.

    A pair that replaces nothing, where the safe side only says more, needs one word that stands on none.
    """

    def words(prompt: str) -> set[str]:
        return {word.rstrip("s") for word in re.findall(r"[\w']+", prompt.lower()) if word not in FILLERS}

    known = set().union(*(words(unsafe) for unsafe, _ in pairs))
    found = []
    for unsafe, safe in held_out:
        replaced = words(unsafe) - words(safe)
        if not replaced & known if replaced else words(unsafe) - known:
            found.append((unsafe, safe))
    return found


def without_named(
    prompts: Sequence[str], pairs: Sequence[tuple[str, str]], words: Sequence[str] = ()
) -> list[str]:  # fmt: skip
    """The prompts that do not name what the pairs replace ("kitchen knife", not "kitchen" or "a"): they are unsafe.

    `words`: what they may not name either, in lower case.
    """
    names = set(words)
    for pair in pairs:
        unsafe, safe = (side.lower().replace(",", " ").split() for side in pair)
        while unsafe and safe and unsafe[0] == safe[0]:
            unsafe, safe = unsafe[1:], safe[1:]
        while unsafe and safe and unsafe[-1] == safe[-1]:
            unsafe, safe = unsafe[:-1], safe[:-1]
        name = " ".join(unsafe[1:] if unsafe and unsafe[0] in ARTICLES else unsafe)
        names |= {name, f"{name}s"} if name else set()
    longest = max((len(name.split()) for name in names), default=0)

    def names_one(prompt: str) -> bool:
        said = re.sub(r"[^a-z0-9 ]+", " ", prompt.lower()).split()
        return any(" ".join(said[begin:end]) in names for begin in range(len(said))
                   for end in range(begin + 1, min(begin + longest, len(said)) + 1))  # fmt: skip

    return [prompt for prompt in prompts if not names_one(prompt)]


def sampled(items: list, most: int, rng: Random) -> list:
    """So many of the items at most, in any order."""
    return rng.sample(items, min(len(items), most))


def _split(items: list, share: float, rng: Random) -> tuple[list, list]:
    items = items[:]
    rng.shuffle(items)
    count = round(len(items) * share)
    return items[count:], items[:count]


def in_three(items: list, shares: tuple[float, float], rng: Random) -> tuple[list, list, list]:
    """The items in any order: to learn from, and two shares of them."""
    rest, second = _split(items, shares[0], rng)
    first, third = _split(rest, shares[1] / (1 - shares[0]), rng)
    return first, second, third


def _at_most(sets: PromptSets, most: int, rng: Random) -> PromptSets:
    """The sets, all cut by the same share where together they hold more than `most` prompts.

    By the same share, not to the same length: the gate needs far more harmless prompts than pairs.
    """
    price = {name: 1 + (name in TWICE) for name in vars(sets)}

    def lengths(thousandths: int) -> dict[str, int]:
        return {name: min(len(items), max(len(items) * thousandths // 1000, FEWEST))
                for name, items in vars(sets).items()}  # fmt: skip

    def total(thousandths: int) -> int:
        return sum(price[name] * length for name, length in lengths(thousandths).items())

    if total(1000) <= most:
        return sets
    fitting = lengths(max(bisect_right(range(1001), most, key=total) - 1, 0))
    # the first harmless prompt is the empty one
    return PromptSets(**{name: [*items[:1], *rng.sample(items[1:], max(fitting[name] - 1, 0))]
                         for name, items in vars(sets).items()})  # fmt: skip


def enough(pairs: int) -> int:
    """How many prompts are encoded at most for so many pairs, where nobody says."""
    return min(max(USUAL, EACH_PAIR * pairs), MOST)


def build_sets(pairs: PromptPairs, seed: int, most: int = 0) -> PromptSets:
    """Split and vary the user's pairs and harmless prompts, with the pack's everyday prompts among the harmless.

    Args:
        most: roughly how many prompts the sets may hold together; 0: `enough`.

    Raises PairsError when there are too few pairs to learn anything from.
    """
    rng, most = Random(seed), most or enough(len(pairs.pairs))
    drawn = max(most, USUAL)  # few prompts are a part of the usual ones
    max_pairs, max_held, max_keep, max_everyday = (
        int(share * drawn) for share in (PAIRS_SHARE, HELD_SHARE, KEEP_SHARE, EVERYDAY_SHARE))
    if len(pairs.pairs) < 8:
        raise PairsError(
            f"{len(pairs.pairs)} prompt pairs are too few to learn from: write at least 8, better 50; "
            "{a|b} makes many from one line."
        )
    learn, held_out = _split(list(pairs.pairs), 0.15, rng)
    learn, held_out = [*learn, *held_out[max_held:]], held_out[:max_held]
    rng.shuffle(learn)
    learn = learn[:max_pairs]
    unsafe = {a for a, _ in pairs.pairs}
    safe_learn = list(dict.fromkeys(b for _, b in learn))
    safe_held = [b for b in dict.fromkeys(b for _, b in held_out) if b not in set(safe_learn)]
    taken = unsafe | {b for _, b in pairs.pairs}
    own = [prompt for prompt in dict.fromkeys(pairs.keep) if prompt not in taken]
    apart = pairs.leave_out
    everyday = without_named(everyday_prompts(), [*pairs.pairs, *pairs.held_out], apart)
    everyday = [prompt for prompt in everyday if prompt not in taken.union(own)]
    everyday = sampled(everyday, max_everyday, rng)
    own_learn, own_held, own_checked = in_three(own, OWN_SHARES, rng)
    everyday_learn, everyday_held, everyday_checked = in_three(everyday, EVERYDAY_SHARES, rng)
    room = max(max_keep - len(own_learn) - len(safe_learn), 200)
    harmless = [*own_learn, *safe_learn, *everyday_learn[:room]]
    calibration = list(dict.fromkeys([*own_held, *safe_held, *everyday_held[:room]]))
    checked = [*own_checked, *everyday_checked[:room]]
    learn_varied = vary_pairs(learn[:VARIED_PAIRS], everyday_learn, own_learn + safe_learn, rng)
    of_harmless = sampled(harmless, VARIED_KEEP, rng)
    sets = PromptSets(
        learn + learn_varied,
        held_out + vary_pairs(held_out, everyday_held, own_held + safe_held, rng),
        list(dict.fromkeys(["", *harmless, *vary_harmless(of_harmless, rng, apart), *(b for _, b in learn_varied)])),
        calibration,
        in_a_row(rng.sample(calibration, len(calibration))),
        checked,
        in_a_row(rng.sample(checked, len(checked))),
        crowded_pairs(rng.choices(learn, k=CROWDS), harmless, rng),
        [crowded(prompt, harmless, rng) for prompt in rng.choices(harmless, k=CROWDS)],
    )
    sets = _at_most(sets, most, rng)
    return replace(sets, checked_varied=vary_harmless(sets.checked, rng, apart))
