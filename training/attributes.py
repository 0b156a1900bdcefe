"""What an attribute region is learned from: rows as people write them, and the sets that training works on.

One row a line, `open prompt => group: prompt => group: prompt`; `attribute: its name`; `stated: prompt that states the
attribute some other way`; `keep: prompt about something else`; `held-out: a row about a subject that no other has`, to
measure with; `leave-out: word` of everyday prompts that are not about something else; `# comment`. `{a|b}` lists
alternatives, which run in step in all prompts of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ..region.balance import STATED
from ..region.files import slug
from .pairs import PairsError, check_amount, everyday_prompts, expand, lines_of, read_lines
from .prompts import (
    EVERYDAY_SHARES,
    OWN_SHARES,
    USUAL,
    in_a_row,
    in_three,
    sampled,
    vary_harmless,
    vary_pairs,
    without_named,
)

FEWEST_ROWS = 8
RARE = 0.02  # of everyday prompts; a rarer word in an open prompt is taken for one that names its subject


@dataclass(frozen=True)
class AttributePairs:
    """What an attribute is learned from: `rows` of an open prompt and its counterpart for each of `groups`.

    Neither `stated` prompts, which state the attribute some other way, nor `keep`, about something else, may change.
    `held_out` rows are for measuring only. Everyday prompts with a word of `leave_out` are not taken for other things.
    """

    attribute: str
    groups: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    stated: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    held_out: tuple[tuple[str, tuple[str, ...]], ...] = ()
    leave_out: tuple[str, ...] = ()

    def text(self) -> str:
        """The rows in the form that `parse_attribute` reads, with all alternatives written out."""
        lines = [mark + " => ".join([neutral, *(f"{g}: {p}" for g, p in zip(self.groups, prompts))])
                 for mark, rows in (("", self.rows), ("held-out: ", self.held_out))
                 for neutral, prompts in rows]  # fmt: skip
        others = [f"{name.replace('_', '-')}: {prompt}"
                  for name in ("stated", "keep", "leave_out") for prompt in getattr(self, name)]  # fmt: skip
        return "\n".join([f"attribute: {self.attribute}", *lines, *others])


def _row(line: str) -> dict[str, list[tuple[str, str]]]:
    """(open prompt, counterpart) by group, with the alternatives of one line filled in."""
    neutral, *sides = (side.strip() for side in line.split("=>"))
    if len(sides) < 2:
        raise PairsError(f'"{line[:60]}" is no row; write: open prompt => group: prompt => group: prompt')
    found: dict[str, list[tuple[str, str]]] = {}
    letters = 0
    for side in sides:
        group, colon, prompt = (piece.strip() for piece in side.partition(":"))
        if not colon or slug(group) != group or group == STATED:
            raise PairsError(f'"{side[:60]}" names no group; write it in small letters before a colon: man: a man')
        if group in found:
            raise PairsError(f"the group {group} stands there twice")
        left, right = expand(neutral), dict(expand(prompt))
        if len(right) > 1 and set(right) != {chosen for chosen, _ in left}:
            raise PairsError(
                f"the alternatives in braces of {group} are not those of the open prompt; all need the same numbers, "
                "in the same order"
            )
        found[group] = [(text, right.get(chosen) or right.get((), "")) for chosen, text in left]
        letters += sum(len(text) + len(counterpart) for text, counterpart in found[group])
        check_amount(len(left) * len(found), letters)
        if not all(text and counterpart for text, counterpart in found[group]):
            raise PairsError("a prompt of the row is empty; write: open prompt => group: prompt => group: prompt")
    return found


def parse_attribute(text: str, source: str = "the text box") -> AttributePairs:
    """Read an attribute's rows; `source` is what errors call it. Raises PairsError with the line and the remedy."""
    attribute, groups = "", ()
    rows: dict[str, tuple[str, ...]] = {}
    held_out: dict[str, tuple[str, ...]] = {}
    others: dict[str, list[str]] = {"stated": [], "keep": [], "leave-out": []}
    count = letters = 0
    try:
        lines = lines_of(text)
    except PairsError as error:
        raise PairsError(f"{source}, {error}.") from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        name, _, value = (piece.strip() for piece in line.partition(":"))
        try:
            if not line or line.startswith("#"):
                continue
            if name.lower() == "attribute":
                attribute = value
            elif name.lower() in others:
                added = [prompt for _, prompt in expand(value) if prompt]
                count, letters = count + len(added), letters + sum(map(len, added))
                others[name.lower()] += added
            else:
                apart = name.lower() == "held-out"
                found = _row(value if apart else line)
                groups = groups or tuple(sorted(found))
                if tuple(sorted(found)) != groups:
                    has, first = (", ".join(some)[:120] for some in (found, groups))
                    raise PairsError(f"this row has the groups {has}, the first one {first}")
                for filled in zip(*(found[group] for group in groups)):
                    count, letters = count + len(filled), letters + sum(len(a) + len(b) for a, b in filled)
                    (held_out if apart else rows)[filled[0][0]] = tuple(prompt for _, prompt in filled)
            check_amount(count, letters)
        except PairsError as error:
            raise PairsError(f"{source}, line {number}: {error}.") from None
    if not attribute:
        raise PairsError(f"{source}: the attribute has no name; write a line such as  attribute: gender.")
    stated, keep, leave_out = (tuple(dict.fromkeys(prompts)) for prompts in others.values())
    known = {prompt for prompts in rows.values() for prompt in prompts} | {*stated, *keep, *held_out}
    if both := known & rows.keys():
        raise PairsError(f'{source}: "{min(both)[:60]}" is an open prompt of a row and stands elsewhere too.')
    return AttributePairs(attribute, groups, tuple(rows.items()), stated, keep, tuple(held_out.items()), leave_out)


def load_attribute(path: Path | str) -> AttributePairs:
    """Read a text file of attribute rows. Raises PairsError."""
    path = Path(path)
    return parse_attribute(read_lines(path), path.name)


def demo_attribute() -> AttributePairs:
    """The demo's attribute: the gender of people at work."""
    return load_attribute(Path(__file__).parent.parent / "demo" / "gender.txt")


# --- prompt sets ---


@dataclass(frozen=True)
class Share:
    """Prompts to learn from, held out or to check with: `rows`; `plain` ones about something else; `stated` ones of a
    known group.

    `stated` begins with the counterparts of `rows`, group after group. What is not learned from has some of the plain
    prompts side by side in each of `long`; what is to check with has variations of them in `varied`.
    """

    rows: list[tuple[str, tuple[str, ...]]]
    plain: list[str]
    stated: list[str]
    varied: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)


def _words(prompt: str) -> set[str]:
    return set(prompt.lower().replace(",", " ").replace(".", " ").split())


def _subjects(pairs: AttributePairs, everyday: Sequence[str]) -> set[str]:
    """Words of the open prompts that name what they are about: not in prompts to keep, and rare in everyday ones."""
    usual = Counter(word for prompt in everyday for word in _words(prompt))
    rows = [*pairs.rows, *pairs.held_out]
    found = {word for neutral, _ in rows for word in _words(neutral) if usual[word] < RARE * len(everyday)}
    return found.difference(*map(_words, pairs.keep))


def _varied(rows: Sequence[tuple[str, tuple[str, ...]]], everyday: Sequence[str], seed: int) -> list:
    """Each row beside an everyday prompt, in upper case or with its words shuffled: all groups alike."""
    sides = [vary_pairs([(neutral, prompts[i]) for neutral, prompts in rows], everyday, [], Random(seed))
             for i in range(len(rows[0][1]))]  # fmt: skip
    return [(filled[0][0], tuple(prompt for _, prompt in filled)) for filled in zip(*sides)]


def build_shares(pairs: AttributePairs, seed: int, most: int) -> tuple[Share, Share, Share]:
    """Split and vary rows and harmless prompts: to learn from, held out to calibrate with, and to check with.

    Everyday prompts that name the subject of a row (a profession, say) are left out: what they state is not known.

    Args:
        most: roughly how many prompts may be encoded; 0: the usual number.

    Raises PairsError when there are too few rows to learn from.
    """
    if len(pairs.rows) < FEWEST_ROWS:
        raise PairsError(f"{len(pairs.rows)} rows are too few to learn from: write at least {FEWEST_ROWS}, better 50; "
                         "{a|b} makes many from one line.")  # fmt: skip
    rng, most = Random(seed), most or USUAL

    def split(items: Sequence, shares: tuple[float, float], limit: int) -> tuple[list, list, list]:
        return in_three(sampled(list(items), limit, rng), shares, rng)

    everyday = without_named(everyday_prompts(), [], pairs.leave_out)
    subjects = _subjects(pairs, everyday)
    group_words = {word for neutral, prompts in pairs.rows for prompt in prompts for word in _words(prompt)}
    group_words -= {word for neutral, _ in pairs.rows for word in _words(neutral)}
    rows = split(pairs.rows, (0.15, 0.0), most // (4 + 4 * len(pairs.groups)))
    stated, own = (split(prompts, OWN_SHARES, most // 8) for prompts in (pairs.stated, pairs.keep))
    daily = split([prompt for prompt in everyday if not _words(prompt) & subjects], EVERYDAY_SHARES,
                  most // 4)  # fmt: skip
    shares = []
    for i in range(3):
        company = [prompt for prompt in daily[i] if not _words(prompt) & group_words]
        found = rows[i] + _varied(rows[i], company, rng.randrange(2**32)) if rows[i] else []
        told = [prompts[group] for group in range(len(pairs.groups)) for _, prompts in found]
        plain = list(dict.fromkeys([*own[i], *daily[i]]))
        varied, long = vary_harmless(plain, rng, pairs.leave_out), in_a_row(rng.sample(plain, len(plain)))
        if i == 0:
            plain, long = list(dict.fromkeys(["", *plain, *varied])), []
        shares.append(Share(found, plain, told + stated[i], varied, long))
    return shares[0], shares[1], shares[2]
