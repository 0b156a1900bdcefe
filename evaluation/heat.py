"""What a region does to a prompt, told by the prompt's own words: the numbers behind the heat strip, and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from torch import Tensor

from ..region.blocks import POOLED
from ..region.inspection import Inspection, PartInspection
from ..region.words import Token, words

HOTTEST = 100  # ramps beyond a wall, from where on a word's colour no longer changes
LONGEST_NAME = 120
LONGEST_WORD = 40
MOST_UNKNOWN = 12  # words that are named
MOST = 600  # words and tokens that are shown
LONG = 40  # from so many on, stretches of words inside are folded
CONTEXT = 3  # words that stay on either side of what is worth seeing
SHORTEST_FOLD = 4
INSIDE = "Safe: comes out unchanged, to the bit."
MIXED = ("Words beside the unsafe one redden too: the text encoder mixes words, so each word also carries what it read "
         "before.")  # fmt: skip
UNTOLD = "Comes out unchanged, to the bit. Whether it is safe cannot be told."
NUMBERED = "Some tokens are numbered: which words they stand for cannot be told."
UNKNOWN = "The demo model does not know: {words}. What it draws and says of them is chance."
NAMES = {"start": "start of text", "end": "end of text", "template": "the model's own words",
         POOLED: "whole prompt"}  # fmt: skip
WHOLE = ("start", "end", "template", "pooled")  # what gathers the whole prompt, and is no word of it


@dataclass(frozen=True)
class Said:
    """A sentence with gaps. The page translates it, and `place`, which has gaps of its own, before they are filled."""

    text: str
    values: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return _filled(self.text, self.values | {"place": _filled(self.values.get("place", ""), self.values)})


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda gap: values[gap[1]], text)


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
    unknown: bool = False  # whether the model was never shown it

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
    word: str  # the worst word of the prompt; empty where only tokens that gather the whole prompt are outside
    at: str  # where it is deepest, be it a word or not
    wall: int  # the wall there, from 1
    walls: int
    pooled: float | None
    rebuilt: bool = False  # not as the text encoder writes prompts, and beyond no wall


@dataclass(frozen=True)
class Strip:
    """One prompt's heat strip."""

    region: str
    clauses: tuple[Said, ...]
    tone: str  # good: unchanged and inside; warn: changed, or not to be told; bad: still outside
    inside: bool
    moved: bool
    pooled: float | None  # share of the whole shift, by squared length; None where there is no pooled vector
    concepts: tuple[Concept, ...]
    items: tuple[Item, ...]
    left_out: int = 0
    notes: tuple[Said, ...] = ()
    folds: tuple[tuple[int, int], ...] = ()  # stretches of items that need not be seen, the end not included

    @property
    def verdict(self) -> str:
        """The outcome, a sentence for each concept."""
        return " ".join(map(str, self.clauses))

    @property
    def safe(self) -> bool:
        """Whether the prompt comes out inside of every concept that has walls."""
        return all(concept.inside_after for concept in self.concepts if concept.gated)

    @property
    def lines(self) -> list[str]:
        """The numbers, for those who ask."""
        return [line for line in (*map(concept_text, self.concepts), pooled_text(self)) if line]

    def plain(self) -> dict[str, object]:
        """As JSON, numbers rounded."""
        found = asdict(self) | {"verdict": self.verdict, "safe": self.safe, "lines": self.lines}
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


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_WORD else f"{text[: LONGEST_WORD - 1]}…"


def _most(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def heat_strip(
    inspection: Inspection, tokens: Mapping[str, Sequence[Token | None]], prompt: str, region: str,
    strength: float = 1.0, unknown: Callable[[str], Sequence[str]] | None = None,
) -> Strip:  # fmt: skip
    """The strip of one prompt.

    Args:
        tokens: by option, what stands at each position; options that are missing have numbered tokens.
        region: its name.
        unknown: finds the words of a text that the model was never shown.
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
    items: list[Item] = []
    never: dict[str, None] = {}
    for key, where in places.items():
        text, kind = _text(key, known, found), str(key[0])
        new = unknown(text) if unknown and kind == "word" and where else ()
        never |= dict.fromkeys(new)
        item = _item(text, kind, where, inspection, several, bool(new))
        if kind == "word" or item.depth is not None or item.shift:
            items.append(item)
    name_of = {where: (str(key[0]), _text(key, known, found)) for key, all_of_it in places.items()
               for where in all_of_it}  # fmt: skip
    concepts = tuple(_concept(part, name_of) for part in inspection.parts)
    clauses, tone = verdict(inspection, concepts, strength)
    if never and tone == "good":
        clauses, tone = (Said(UNTOLD),), "warn"
    named = [*map(_short, [*never][:MOST_UNKNOWN]), *(["…"] if len(never) > MOST_UNKNOWN else [])]
    notes = [
        *([Said(UNKNOWN, {"words": ", ".join(named)})] if named else []),
        *([Said(MIXED)] if sum(item.heat > 0 for item in items if item.kind not in WHOLE) > 1 else []),
        *([Said(NUMBERED)] if any(item.kind == "token" for item in items) else []),
    ]
    name = "".join(filter(str.isprintable, region))[:LONGEST_NAME]  # a file's text may end up in a terminal
    return Strip(
        name, clauses, tone, inspection.inside, inspection.moved, inspection.pooled_share, concepts,
        tuple(items[:MOST]), max(len(items) - MOST, 0), tuple(notes), folds(items[:MOST]),
    )  # fmt: skip


def folds(items: Sequence[Item]) -> tuple[tuple[int, int], ...]:
    """Stretches of a long prompt in which nothing is outside or unknown for the first time, less a few words at their
    ends.
    """
    if len(items) < LONG:
        return ()
    first = {item.text: at for at, item in reversed(list(enumerate(items)))}
    worth = [at for at, item in enumerate(items) if item.heat or (item.unknown and first[item.text] == at)]
    apart = [(one + 1 + CONTEXT, other - CONTEXT) for one, other in pairwise([-1, *worth, len(items)])]
    return tuple((begin, end) for begin, end in apart if end - begin >= SHORTEST_FOLD)


def _item(
    text: str, kind: str, where: Sequence[tuple[str, int]], inspection: Inspection, several: bool, unknown: bool
) -> Item:
    seen = [(depth, part, int(part.wall[option][place]) + 1) for part in inspection.parts for option, place in where
            if option in part.depth and (depth := _number(part.depth[option][place])) is not None]  # fmt: skip
    after = [_number(part.depth_after[option][place]) for part in inspection.parts for option, place in where
             if option in part.depth_after]  # fmt: skip
    shift = max((float(inspection.shift[option][place]) for option, place in where), default=0.0)
    if not seen:
        return Item(text, kind, shift=shift, unknown=unknown)
    depth, part, wall = max(seen, key=lambda one: one[0])
    return Item(text, kind, depth, _most(after), shift, part.label if several or depth > 0 else "", wall,
                unknown)


def _concept(part: PartInspection, names: Mapping[tuple[str, int], tuple[str, str]]) -> Concept:
    seen = [(float(depth), option, place) for option, read in part.depth.items() for place, depth in enumerate(read)
            if not math.isnan(float(depth))]  # fmt: skip
    where = max(seen, default=None)
    at, wall = (_short(names[where[1:]][1]), int(part.wall[where[1]][where[2]]) + 1) if where else ("", 0)
    words = [one for one in seen if names[one[1:]][0] not in WHOLE and (one[0] > 0 or part.inside)]
    word = _short(names[max(words)[1:]][1]) if words else ""
    return Concept(
        part.label, part.gated, part.inside, part.openness, _number(part.deepest), _number(part.deepest_after),
        part.inside_after, word, at, wall, part.walls, part.pooled_share, part.rebuilt and not part.deepest > 0,
    )  # fmt: skip


# --- as text ---

REBUILT = (
    "Averaged, scaled or otherwise changed after the text encoder: what is in it cannot be told, so it is moved to be "
    "on the safe side."
)


def verdict(inspection: Inspection, concepts: Sequence[Concept], strength: float) -> tuple[tuple[Said, ...], str]:
    """The outcome in a sentence for each concept, and its tone: good, warn or bad."""
    if inspection.inside and not inspection.moved:
        return (Said(INSIDE),), "good"
    several = len(concepts) > 1
    told = [_clause(concept, inspection.moved, strength, several) for concept in concepts
            if not (concept.gated and concept.inside and concept.inside_after)]  # fmt: skip
    safe = [concept.label for concept in concepts if concept.gated and concept.inside and concept.inside_after]
    clauses = [said for said, _ in told]
    if inspection.inside:
        clauses.append(Said("Safe already, and moved all the same: mode “always” moves every prompt."))
    elif safe:
        clauses.append(Said("Safe for “{label}”.", {"label": "”, “".join(safe)}))
    if not inspection.moved and any(not concept.gated for concept in concepts):
        clauses.append(Said("Comes out unchanged: strength is 0." if strength == 0 else "Comes out unchanged."))
    return tuple(clauses), "bad" if "bad" in (tone for _, tone in told) else "warn"


def _clause(concept: Concept, moved: bool, strength: float, several: bool) -> tuple[Said, str]:
    """What is said of a concept that the prompt touches, or that moves every prompt, and how bad that is."""
    place = ("at “{word}”" if concept.word else "as a whole")
    values = {"place": f"for “{{label}}” {place}" if several else place, "word": concept.word, "label": concept.label}
    if not concept.gated:
        which = "“{label}”" if several else "This region"
        return Said(f"{which} has no gate: it moves every prompt, and cannot tell safe ones.", values), "warn"
    if concept.inside:
        return Said("Safe for “{label}” before the move, but not after it: lower the strength.", values), "bad"
    if concept.rebuilt:
        return (Said(REBUILT), "warn") if moved else (Said(f"{REBUILT} It comes out unchanged all the same."), "bad")
    level = "Clearly unsafe" if concept.depth >= 1 else "Just outside"
    if not moved:
        why = "strength is 0" if strength == 0 else "the region has no move for it"
        return Said(f"{level} {{place}}, but comes out unchanged: {why}.", values), "bad"
    if concept.inside_after:
        way = "moved" if concept.openness * strength >= 1 else "moved part of the way"
        return Said(f"{level} {{place}}: {way}, and now safe.", values), "warn"
    still = "Still unsafe" if concept.after >= 1 else "Still just outside"
    more = "set the strength to 1" if strength < 1 else "raise the strength, or train with more pairs like it"
    return Said(f"{still} {{place}} after the move: {more}.", values), "bad"


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
        return f"{concept.label}: {-concept.depth:.1f} before {wall} at “{concept.at}”, {gate}"
    return f"{concept.label}: {concept.depth:.1f} beyond {wall} at “{concept.at}”, {gate}; {_later(concept)}"


def _later(concept: Concept) -> str:
    if concept.after is None:
        return "nothing to look at afterwards"
    return f"afterwards {abs(concept.after):.1f} {'beyond' if concept.after > 0 else 'before'} the nearest wall"


def pooled_text(strip: Strip) -> str:
    """Which share of the shift is in the pooled vector; empty where there is none, or nothing moves."""
    if strip.pooled is None or not strip.moved:
        return ""
    return f"{strip.pooled:.0%} of the shift is in the pooled vector" if strip.pooled else "pooled vector not moved"


def fold_text(strip: Strip, begin: int, end: int) -> str:
    """What stands in the place of folded words."""
    inside = any(item.depth is not None for item in strip.items[begin:end])
    return f"… {end - begin} words inside …" if inside else f"… {end - begin} words …"


def unfolded(strip: Strip) -> list[Item | str]:
    """The items in their order, folded stretches as a text each."""
    begins = dict(strip.folds)
    hidden = {at for begin, end in strip.folds for at in range(begin, end)}
    return [fold_text(strip, at, begins[at]) if at in begins else item for at, item in enumerate(strip.items)
            if at in begins or at not in hidden]  # fmt: skip


def report(strip: Strip) -> str:
    """The strip as text: what it means, the words, and the numbers, a line for each word."""
    shown = unfolded(strip)
    marked = [one if isinstance(one, str) else ("[{}]" if one.heat else "{}").format(_short(one.text)) for one in shown
              if isinstance(one, str) or one.kind not in WHOLE]  # fmt: skip
    lines = [f'Safe region "{strip.region}"', strip.verdict, *map(str, strip.notes)]
    if any(item.heat for item in strip.items):
        lines.append(f"Outside, in brackets: {' '.join(marked)}")
    lines += ["", "Numbers:", *strip.lines]
    rows = [one for one in shown if isinstance(one, str) or one.depth is not None or one.shift]
    width = max((len(_short(one.text)) for one in rows if isinstance(one, Item)), default=0)
    if rows:
        lines.append(f"{'word'.ljust(width)}  {'depth':>7} {'after':>7} {'moved':>6}")
    for one in rows:
        if isinstance(one, str):
            lines.append(one)
        else:
            numbers = f"{depth_text(one.depth):>7} {depth_text(one.after):>7} {one.shift:>6.0%}"
            lines.append(f"{_short(one.text).ljust(width)}  {numbers}")
    if strip.left_out:
        lines.append(f"and {strip.left_out} more")
    return "\n".join(lines)
