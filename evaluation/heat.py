"""What a region does to a prompt, told by the prompt's own words: the numbers behind the heat strip, and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from ..region.blocks import POOLED
from ..region.inspection import Inspection, PartInspection
from ..region.words import Token, words

HOTTEST = 100  # ramps beyond a wall, from where on a word's colour no longer changes
LONGEST_NAME = 120
MOST = 600  # words and tokens that are shown
INSIDE = "Inside: comes out unchanged, bit for bit."
NUMBERED = "Some tokens are numbered: which words they stand for cannot be told."
NAMES = {"start": "start of text", "end": "end of text", "template": "the model's own words",
         POOLED: "whole prompt"}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A word of the prompt, or what else the encoder makes a token of: the worst of all its tokens.

    `kind` is word, start, end, template, pooled, piece (of a word that could not be found) or token.
    """

    text: str
    kind: str
    depth: float | None = None  # ramps beyond the nearest wall, positive outside; None where no wall looks
    after: float | None = None  # the same after the move
    shift: float = 0.0  # as a share of the token's own length
    part: str = ""  # the concept whose wall is nearest
    wall: int = 0  # its number, from 1

    @property
    def heat(self) -> float:
        """0 inside, rising to 1 with the depth's logarithm."""
        if self.depth is None or not self.depth > 0:
            return 0.0
        return min(1.0, 0.1 + 0.9 * math.log1p(self.depth) / math.log1p(HOTTEST))


@dataclass(frozen=True)
class Concept:
    """What one concept of the region says about the prompt."""

    label: str
    gated: bool
    inside: bool
    openness: float
    depth: float | None
    after: float | None
    inside_after: bool
    word: str  # where it is deepest
    wall: int  # the wall there, from 1
    walls: int
    pooled: float | None


@dataclass(frozen=True)
class Strip:
    """One prompt's heat strip."""

    region: str
    verdict: str
    inside: bool
    moved: bool
    pooled: float | None  # share of the whole shift, by squared length; None where there is no pooled vector
    concepts: tuple[Concept, ...]
    items: tuple[Item, ...]
    left_out: int = 0
    note: str = ""

    @property
    def safe(self) -> bool:
        """Whether the prompt comes out inside of every concept that has walls."""
        return all(concept.inside_after for concept in self.concepts if concept.gated)

    @property
    def lines(self) -> list[str]:
        """What is worth knowing besides the verdict and the words."""
        lines = [*map(concept_text, self.concepts), pooled_text(self), self.note]
        return [line for line in lines if line]

    def plain(self) -> dict[str, object]:
        """As JSON, numbers rounded."""
        found = asdict(self) | {"safe": self.safe, "lines": self.lines}
        found["items"] = [asdict(item) | {"heat": item.heat} for item in self.items]
        return _rounded(found)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _keys(option: str, tokens: Sequence[Token | None], order: Mapping[int, int]) -> list[tuple[object, ...]]:
    """Which item each position belongs to; `order` gives a character's word."""
    if option == POOLED:
        return [("pooled",)]
    keys: list[tuple[object, ...]] = []
    for place, token in enumerate(tokens):
        if token is None:
            keys.append(("token", option, place))
        elif token.span and token.span[0] in order:
            keys.append(("word", order[token.span[0]]))
        elif token.kind in ("text", "embedding"):
            keys.append(("piece", option, place) if token.text or token.piece is None else ("space",))
        else:
            keys.append((token.kind,))
    for place in reversed(range(len(keys))):  # a space goes with the word after it, or else the one before
        if keys[place] == ("space",):
            beside = [keys[at] for at in (place + 1, place - 1) if 0 <= at < len(keys)]
            keys[place] = next((key for key in beside if key != ("space",)), ("piece", option, place))
    return keys


def _text(key: tuple[object, ...], tokens: Mapping[str, Sequence[Token | None]], found: Sequence[str]) -> str:
    kind = key[0]
    if kind == "word":
        return found[key[1]]
    if kind == "token":
        return f"token {key[2] + 1}"
    if kind == "piece":
        token = tokens[key[1]][key[2]]
        return token.text if token and token.text else token.kind if token and token.kind == "embedding" else "space"
    return NAMES[POOLED if kind == "pooled" else kind]


def _number(value: Tensor | float) -> float | None:
    return None if math.isnan(float(value)) else float(value)


def _most(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def heat_strip(
    inspection: Inspection, tokens: Mapping[str, Sequence[Token | None]], prompt: str, region: str,
    strength: float = 1.0,
) -> Strip:  # fmt: skip
    """The strip of one prompt.

    Args:
        tokens: by option, what stands at each position; options that are missing have numbered tokens.
        region: its name.
    """
    counts = {key: len(shift) for key, shift in inspection.shift.items()}
    known = {key: tokens.get(key) or [None] * count for key, count in counts.items()}
    cuts = words(prompt, [token.span for read in known.values() for token in read if token and token.span])
    order = {at: number for number, (begin, end) in enumerate(cuts) for at in range(begin, end)}
    found = [prompt[begin:end] for begin, end in cuts]
    # the first item is the start, where there is one; then the words in their order, and what else there is
    places: dict[tuple[object, ...], list[tuple[str, int]]] = {("start",): []}
    places |= {("word", number): [] for number in range(len(found))}
    for option, read in known.items():
        for place, key in enumerate(_keys(option, read, order)):
            places.setdefault(key, []).append((option, place))
    several = len(inspection.parts) > 1
    items = []
    for key, where in places.items():
        item = _item(_text(key, known, found), str(key[0]), where, inspection, several)
        if item.kind == "word" or item.depth is not None or item.shift:
            items.append(item)
    name_of = {where: _text(key, known, found) for key, all_of_it in places.items() for where in all_of_it}
    concepts = tuple(_concept(part, name_of) for part in inspection.parts)
    name = "".join(filter(str.isprintable, region))[:LONGEST_NAME]  # a file's text may end up in a terminal
    return Strip(
        name, verdict(inspection, concepts, strength), inspection.inside, inspection.moved, inspection.pooled_share,
        concepts, tuple(items[:MOST]), max(len(items) - MOST, 0),
        NUMBERED if any(item.kind == "token" for item in items) else "",
    )  # fmt: skip


def _item(
    text: str, kind: str, where: Sequence[tuple[str, int]], inspection: Inspection, several: bool
) -> Item:
    seen = [(depth, part, int(part.wall[option][place]) + 1) for part in inspection.parts for option, place in where
            if option in part.depth and (depth := _number(part.depth[option][place])) is not None]  # fmt: skip
    after = [_number(part.depth_after[option][place]) for part in inspection.parts for option, place in where
             if option in part.depth_after]  # fmt: skip
    shift = max((float(inspection.shift[option][place]) for option, place in where), default=0.0)
    if not seen:
        return Item(text, kind, shift=shift)
    depth, part, wall = max(seen, key=lambda one: one[0])
    return Item(text, kind, depth, _most(after), shift, part.label if several or depth > 0 else "", wall)


def _concept(part: PartInspection, names: Mapping[tuple[str, int], str]) -> Concept:
    where = max(
        ((float(depth), option, place) for option, read in part.depth.items() for place, depth in enumerate(read)
         if not math.isnan(float(depth))), default=None,
    )  # fmt: skip
    word, wall = (names[where[1:]], int(part.wall[where[1]][where[2]]) + 1) if where else ("", 0)
    return Concept(
        part.label, part.gated, part.inside, part.openness, _number(part.deepest), _number(part.deepest_after),
        part.inside_after, word, wall, part.walls, part.pooled_share,
    )  # fmt: skip


# --- as text ---


def verdict(inspection: Inspection, concepts: Sequence[Concept], strength: float) -> str:
    """The outcome in one line."""
    outside = [concept for concept in concepts if concept.gated and not concept.inside]
    open_to_all = [concept for concept in concepts if not concept.gated]
    if not inspection.moved:
        if inspection.inside:
            return INSIDE
        why = f"strength {strength:g} moves nothing" if strength == 0 else "nothing of it is moved"
        return " ".join([*map(_outside, outside), f"Comes out unchanged: {why}."])
    lines = [*map(_outside, outside), *(f'"{one.label}" has no walls: it moves every prompt.' for one in open_to_all)]
    if inspection.inside:
        lines.append("Inside, and moved all the same: mode always moves every prompt.")
    elif outside:
        left = [one.label for one in concepts if one.gated and not one.inside_after]
        lines.append(f"Moved; still outside of {', '.join(left)} afterwards." if left else "Moved inside.")
    return " ".join(lines)


def _outside(concept: Concept) -> str:
    return f'Outside of "{concept.label}" at “{concept.word}”.'


def depth_text(depth: float | None) -> str:
    """`+56.5` outside, `-3.2` inside, in ramps."""
    return "" if depth is None else f"{depth:+.1f}"


def concept_text(concept: Concept) -> str:
    """One line about a concept."""
    if not concept.gated:
        return f"{concept.label}: no walls, acts on every prompt"
    wall = f"wall {concept.wall} of {concept.walls}" if concept.walls > 1 else "the wall"
    if concept.depth is None:
        return f"{concept.label}: there is nothing to look at"
    gate = f"gate {concept.openness:.0%} open" if concept.openness > 0 else "gate closed"
    if not concept.depth > 0:
        return f"{concept.label}: {-concept.depth:.1f} before {wall} at “{concept.word}”, {gate}"
    return f"{concept.label}: {concept.depth:.1f} beyond {wall} at “{concept.word}”, {gate}; {_later(concept)}"


def _later(concept: Concept) -> str:
    if concept.after is None:
        return "nothing to look at afterwards"
    return f"afterwards {abs(concept.after):.1f} {'beyond' if concept.after > 0 else 'before'} the nearest wall"


def pooled_text(strip: Strip) -> str:
    """Which share of the shift is in the pooled vector; empty where there is none, or nothing moves."""
    if strip.pooled is None or not strip.moved:
        return ""
    return f"{strip.pooled:.0%} of the shift is in the pooled vector" if strip.pooled else "pooled vector not moved"


def report(strip: Strip) -> str:
    """The strip as text, a line for each word."""
    lines = [f'Safe region "{strip.region}"', strip.verdict, *strip.lines]
    shown = [item for item in strip.items if item.depth is not None or item.shift]
    width = min(max((len(item.text) for item in shown), default=0), 40)
    if shown:
        lines.append(f"{'word'.ljust(width)}  {'depth':>7} {'after':>7} {'moved':>6}")
    for item in shown:
        numbers = f"{depth_text(item.depth):>7} {depth_text(item.after):>7} {item.shift:>6.0%}"
        lines.append(f"{item.text[:40].ljust(width)}  {numbers}")
    if strip.left_out:
        lines.append(f"and {strip.left_out} more")
    return "\n".join(lines)
