"""Prompt pairs: what a region is learned from.

One pair a line, `unsafe prompt => safe prompt`; `keep: harmless prompt`; `# comment`. `{a|b}` lists alternatives,
which run in step on both sides of a pair. `held-out: unsafe prompt => safe prompt` is a pair with words that no other
has, to measure with; `leave-out: words` are words whose everyday prompts are not taken for harmless. CSV and JSONL
files hold the same in columns or keys named `unsafe`, `safe`, `keep`, `held_out` and `leave_out`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

MAX_EXPANSION = 20_000  # prompts
_GROUP = re.compile(r"\{([^{}]*)\}")
_MARKED = ("keep", "held_out", "leave_out")  # what begins with a name and a colon
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


def expand(prompt: str) -> list[tuple[tuple[int, ...], str]]:
    """All ways to fill a template, each with the index chosen per group: "a {b|c}" -> ((0,), "a b"), ((1,), "a c")."""
    if "{" in _GROUP.sub("", prompt) or "}" in _GROUP.sub("", prompt):
        raise PairsError("a brace is not closed, or braces stand inside braces; write {first|second}")
    groups = [[choice.strip() for choice in found.split("|")] for found in _GROUP.findall(prompt)]
    pieces = _GROUP.split(prompt)[::2]
    filled = []
    for chosen in product(*(range(len(group)) for group in groups)):
        words = [group[i] for group, i in zip(groups, chosen)]
        text = "".join(piece + word for piece, word in zip(pieces, [*words, ""]))
        filled.append((chosen, " ".join(text.split()).replace(" ,", ",")))
        if len(filled) > MAX_EXPANSION:
            raise PairsError(f"the alternatives make more than {MAX_EXPANSION} prompts; use fewer")
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
        raise PairsError(
            f"the unsafe side lists {_sizes(unsafe)} alternatives in its braces and the safe side {_sizes(safe)}; "
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


def _rows_of_text(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().lstrip("\ufeff")
        if not line or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        name = name.lower().replace("-", "_")
        yield number, {name: rest.strip()} if name in _MARKED else {"pair": line}


def _rows_of_csv(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff")))
    names = {(name or "").strip().lower(): name for name in reader.fieldnames or []}
    if not ({"unsafe", "safe"} <= names.keys() or "keep" in names):
        raise PairsError("line 1: the first line must name the columns: unsafe,safe (and, if you like, keep)")
    for row in reader:
        yield reader.line_num, {k: (row.get(names.get(k, "")) or "").strip() for k in ("unsafe", "safe", *_MARKED)}


def _rows_of_jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        known = {k: row.get(k, "") for k in ("unsafe", "safe", *_MARKED)} if isinstance(row, dict) else {"": None}
        if not all(isinstance(value, str) for value in known.values()):
            raise PairsError(f'line {number}: one JSON object a line is needed, such as {{"unsafe": "…", "safe": "…"}}')
        yield number, {name: value.strip() for name, value in known.items()}


def _collect(rows: Iterator[Row]) -> PromptPairs:
    found: dict[str, list] = {name: [] for name in _LISTS}
    for number, row in rows:
        try:
            for name in ("keep", "leave_out"):
                found[name] += [prompt for _, prompt in expand(row.get(name, "")) if prompt]
            if row.get("held_out"):
                found["held_out"] += expand_pair(*_sides(row["held_out"]))
            if row.get("pair"):
                found["pairs"] += expand_pair(*_sides(row["pair"]))
            elif row.get("unsafe") or row.get("safe"):
                found["pairs"] += expand_pair(row["unsafe"], row["safe"])
            if sum(map(len, found.values())) > MAX_EXPANSION:
                raise PairsError(f"the alternatives make more than {MAX_EXPANSION} prompts; use fewer")
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
    except (PairsError, csv.Error) as error:
        raise PairsError(f"{source}, {error}.") from None


def load_pairs(path: Path | str) -> PromptPairs:
    """Read a .txt, .csv or .jsonl file of pairs. Raises PairsError."""
    path = Path(path)
    form = {".csv": "csv", ".jsonl": "jsonl", ".txt": "text"}.get(path.suffix.lower())
    if form is None:
        raise PairsError(f"{path.name}: prompt pairs come as .txt, .csv or .jsonl.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PairsError(f"{path.name}: the file cannot be read ({reason}).") from None
    return parse_pairs(text, path.name, form)


def everyday_prompts() -> tuple[str, ...]:
    """The pack's own list of varied, harmless, everyday prompts."""
    text = (Path(__file__).parent / "everyday.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def demo_pairs() -> PromptPairs:
    """The demo's prompt pairs: weapons become flowers."""
    return load_pairs(Path(__file__).parent.parent / "demo" / "weapons.txt")
