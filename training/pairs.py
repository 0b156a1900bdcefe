"""Prompt pairs: what a region is learned from.

One pair a line, `unsafe prompt => safe prompt`; `keep: harmless prompt`; `# comment`. `{a|b}` lists alternatives,
which run in step on both sides of a pair. `held-out: unsafe prompt => safe prompt` is a pair with words that no other
has, to measure with; `leave-out: words` are words whose everyday prompts are not taken for harmless. CSV and JSONL
files hold the same in columns or keys named `unsafe`, `safe`, `keep`, `held_out` and `leave_out`. Files come from
strangers: nothing is guessed, and how large a file and what comes of it may be has limits.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

MAX_EXPANSION, MAX_LETTERS = 20_000, 4_000_000  # prompts of a file, and their letters all together
MAX_BYTES, MAX_LINES = 8 * 2**20, 200_000  # of a file
MAX_GROUPS = 200  # of braces in one prompt
_GROUP = re.compile(r"\{([^{}]*)\}")
_MARKED = ("keep", "held_out", "leave_out")  # what begins with a name and a colon
_NAMES = ("unsafe", "safe", *_MARKED)  # of columns and keys
_LISTS = ("pairs", *_MARKED)  # of PromptPairs


Row = tuple[int, dict[str, str]]  # the number of a line, and what it holds by name


class PairsError(ValueError):
    """Prompt pairs that cannot be read; the text names the line and the remedy."""


@dataclass(frozen=True)
class PromptPairs:
    """`pairs` of (unsafe, safe) prompts and harmless prompts to `keep` as they are.

    `held_out` pairs, with words that no other has, are for measuring only. Everyday prompts with a word of `leave_out`
    are not taken for harmless. `title`: what it is about, if that is known.
    """

    pairs: tuple[tuple[str, str], ...]
    keep: tuple[str, ...] = ()
    held_out: tuple[tuple[str, str], ...] = ()
    leave_out: tuple[str, ...] = ()
    title: str = ""

    def __add__(self, other: PromptPairs) -> PromptPairs:
        lists = {name: _unique(getattr(self, name) + getattr(other, name)) for name in _LISTS}
        return PromptPairs(**lists, title=self.title or other.title)

    def text(self) -> str:
        """The pairs in the form that `parse_pairs` reads, one a line."""
        return "\n".join([
            *(f"{a} => {b}" for a, b in self.pairs), *(f"keep: {prompt}" for prompt in self.keep),
            *(f"held-out: {a} => {b}" for a, b in self.held_out), *(f"leave-out: {words}" for words in self.leave_out),
        ])  # fmt: skip


def _unique(items: tuple) -> tuple:
    return tuple(dict.fromkeys(items))


def check_amount(prompts: int, letters: int) -> None:
    """PairsError when a file, or one line of it, makes more prompts or letters than anyone can train on."""
    if prompts > MAX_EXPANSION:
        raise PairsError(f"the alternatives make more than {MAX_EXPANSION} prompts; use fewer")
    if letters > MAX_LETTERS:
        raise PairsError(f"the prompts have more than {MAX_LETTERS} letters together; use fewer or shorter ones")


def _sound(text: str) -> str:
    """A text without lone surrogates (JSON's \\ud800): no tokenizer and no log takes them."""
    return text.encode(errors="replace").decode()


def lines_of(text: str) -> list[str]:
    """The lines of a text. Only line ends part them: JSON, for one, may hold U+2028 as it is. Raises PairsError."""
    text = text[: MAX_BYTES + 1].lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_BYTES or text.count("\n") > MAX_LINES:
        raise PairsError(f"more than {MAX_BYTES // 2**20} MB or {MAX_LINES} lines are too much; use less")
    return _sound(text).split("\n")


def expand(prompt: str) -> list[tuple[tuple[int, ...], str]]:
    """All ways to fill a template, each with the index chosen per group: "a {b|c}" -> ((0,), "a b"), ((1,), "a c")."""
    check_amount(prompt.count("|"), len(prompt))
    if prompt.count("{") > MAX_GROUPS:
        raise PairsError(f"a prompt has more than {MAX_GROUPS} lists of alternatives in braces; use fewer")
    if "{" in _GROUP.sub("", prompt) or "}" in _GROUP.sub("", prompt):
        raise PairsError("a brace is not closed, or braces stand inside braces; write {first|second}")
    groups = [[choice.strip() for choice in found.split("|")] for found in _GROUP.findall(prompt)]
    pieces = _GROUP.split(prompt)[::2]
    count = 1
    for group in groups:  # before anything is filled in; no further than needed, the number itself can be huge
        count *= len(group)
        check_amount(count, 0)
    letters = sum(map(len, pieces)) + len(groups)
    check_amount(count, count * letters + sum(count // len(group) * sum(map(len, group)) for group in groups))
    filled = []
    for chosen in product(*(range(len(group)) for group in groups)):
        words = [group[i] for group, i in zip(groups, chosen)]
        text = "".join(piece + word for piece, word in zip(pieces, [*words, ""]))
        filled.append((chosen, " ".join(text.split()).replace(" ,", ",")))
    return filled


def _sizes(prompt: str) -> list[int]:
    return [found.count("|") + 1 for found in _GROUP.findall(prompt)]


def expand_pair(unsafe: str, safe: str) -> list[tuple[str, str]]:
    """Fill both sides in step: the n-th group of one side takes the same alternative as the n-th of the other.

    A safe side without any group is the same for every unsafe prompt.
    """
    left, right = expand(unsafe), expand(safe)
    if len(_sizes(safe)) == 0:
        pairs = [(prompt, right[0][1]) for _, prompt in left]
    elif _sizes(unsafe) != _sizes(safe):
        left_sizes, right_sizes = (str(_sizes(side)[:12]) for side in (unsafe, safe))
        raise PairsError(
            f"the unsafe side lists {left_sizes} alternatives in its braces and the safe side {right_sizes}; "
            "both sides need the same numbers, in the same order"
        )
    else:
        table = dict(right)
        pairs = [(prompt, table[chosen]) for chosen, prompt in left]
    for a, b in pairs:
        if not a or not b:
            raise PairsError("one side of the pair is empty; write: unsafe prompt => safe prompt")
        if a == b:
            raise PairsError(f'both sides are the same ("{a[:60]}"); to leave a prompt as it is, write: keep: {a[:60]}')
    return pairs


def _sides(line: str) -> list[str]:
    sides = [side.strip() for side in line.split("=>")]
    if len(sides) != 2:
        raise PairsError(f'"{line[:60]}" is no pair; write: unsafe prompt => safe prompt')
    return sides


def _named(name: object) -> str:
    """A column, a key or what stands before a colon, as it is known here."""
    return str(name).strip().lower().replace("-", "_")


def _rows_of_text(text: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(text), 1):
        line = line.strip().lstrip("\ufeff")
        if not line or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        yield number, {_named(name): rest.strip()} if _named(name) in _MARKED else {"pair": line}


def _rows_of_csv(text: str) -> Iterator[Row]:
    reader = csv.reader((f"{line}\n" for line in lines_of(text)), strict=True)
    try:
        named = [_named(cell) for cell in next(reader, [])]
        places = {name: place for place, name in enumerate(named) if name in _NAMES}
        if not ({"unsafe", "safe"} <= places.keys() or "keep" in places):
            raise PairsError("line 1: the first line must name the columns: unsafe,safe (and, if you like, keep)")
        if twice := [name for name in places if named.count(name) > 1]:
            raise PairsError(f"line 1: there are two columns named {twice[0]}")
        for cells in reader:
            if any(cell.strip() for cell in cells[len(named) :]):
                raise PairsError(f"line {reader.line_num}: it has more cells than line 1 has columns; put a prompt "
                                 "with commas into quotes")  # fmt: skip
            row = {name: cells[place].strip() for name, place in places.items() if place < len(cells)}
            if any(row.values()):
                yield reader.line_num, row
    except csv.Error as error:
        raise PairsError(f"line {reader.line_num}: this is no CSV ({error})") from None


def _rows_of_jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        found = [(_named(name), value) for name, value in row.items()] if isinstance(row, dict) else []
        known = {name: "" if value is None else value for name, value in found if name in _NAMES}
        if not known or not all(isinstance(value, str) for value in known.values()):
            raise PairsError(f'line {number}: one JSON object a line is needed, such as {{"unsafe": "…", "safe": "…"}}')
        yield number, {name: _sound(value).strip() for name, value in known.items()}


def _one(prompt: str) -> str:
    if "=>" in prompt:
        raise PairsError(f'"{prompt[:60]}" must be one prompt, and holds the => of a pair')
    return prompt


def _letters(found: Iterable[str | tuple[str, str]]) -> int:
    return sum(len(one) if isinstance(one, str) else len(one[0]) + len(one[1]) for one in found)


def _read(row: dict[str, str]) -> Iterator[tuple[str, list]]:
    """What one row adds to which list."""
    for name in ("keep", "leave_out"):
        if row.get(name):
            yield name, [prompt for _, prompt in expand(_one(row[name])) if prompt]
    if row.get("held_out"):
        yield "held_out", expand_pair(*_sides(row["held_out"]))
    if row.get("pair"):
        yield "pairs", expand_pair(*_sides(row["pair"]))
    elif row.get("unsafe") or row.get("safe"):
        yield "pairs", expand_pair(_one(row.get("unsafe", "")), _one(row.get("safe", "")))


def _collect(rows: Iterator[Row]) -> PromptPairs:
    found: dict[str, list] = {name: [] for name in _LISTS}
    count = letters = 0
    for number, row in rows:
        try:
            for name, added in _read(row):
                count, letters = count + len(added), letters + _letters(added)
                check_amount(count, letters)
                found[name] += added
        except PairsError as error:
            raise PairsError(f"line {number}: {error}") from None
    return PromptPairs(**{name: _unique(tuple(prompts)) for name, prompts in found.items()})


def parse_pairs(text: str, source: str = "the text box", form: str = "text") -> PromptPairs:
    """Read pairs from text; `form` is text, csv or jsonl, and `source` is what errors call it.

    Raises PairsError with the number of the line and the remedy.
    """
    rows = {"text": _rows_of_text, "csv": _rows_of_csv, "jsonl": _rows_of_jsonl}[form](text)
    try:
        return _collect(rows)
    except PairsError as error:
        raise PairsError(f"{source}, {error}.") from None


def read_lines(path: Path) -> str:
    """The text of a file of pairs or rows. Raises PairsError when it cannot be read, or is no text."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return content.decode("utf-8-sig")
        reason = f"it has more than {MAX_BYTES // 2**20} MB"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or str(error)
    raise PairsError(f"{path.name}: the file cannot be read ({reason}).")


def load_pairs(path: Path | str) -> PromptPairs:
    """Read a .txt, .csv or .jsonl file of pairs. Raises PairsError."""
    path = Path(path)
    form = {".csv": "csv", ".jsonl": "jsonl", ".txt": "text"}.get(path.suffix.lower())
    if form is None:
        raise PairsError(f"{path.name}: prompt pairs come as .txt, .csv or .jsonl.")
    return parse_pairs(read_lines(path), path.name, form)


def everyday_prompts() -> tuple[str, ...]:
    """The pack's own list of varied, harmless, everyday prompts."""
    text = (Path(__file__).parent / "everyday.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def demo_pairs() -> PromptPairs:
    """The demo's prompt pairs: weapons become flowers."""
    return load_pairs(Path(__file__).parent.parent / "demo" / "weapons.txt")
