"""From the tokens of a text encoder back to the prompt's own words. Plain text only: no model, no ComfyUI.

A tokenizer's pieces are matched with the prompt letter by letter, from both ends. What lies between the two matches
(an emoji that the tokenizer does not know) is taken as one; a piece that cannot be found keeps its own text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Span = tuple[int, int]  # characters of the prompt, the end not included

# East Asian writing has no spaces: each character stands alone
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
                   r"|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")  # fmt: skip
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SURE = 3  # letters that say enough when they are in a text just once
LONGEST = 20_000  # letters of a prompt; the words of longer ones are not looked for
_UNKNOWN = {"<unk>", "[UNK]", "<|unk|>"}


@dataclass(frozen=True)
class Token:
    """One token as the encoder reads it: `kind` is text, start, end, template or embedding."""

    kind: str
    piece: bytes | None = None  # None: the tokenizer cannot say
    span: Span | None = None  # where in the prompt it stands

    @property
    def text(self) -> str:
        return (self.piece or b"").decode("utf-8", "replace").strip()


# --- pieces as bytes ---


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (Radford et al., 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def decoder(vocabulary: Iterable[str]) -> Callable[[str], bytes | None]:
    """How a tokenizer's pieces are read as UTF-8, told from what most of its vocabulary looks like; unknown pieces are
    None."""
    looks = {"clip": 0, "pairs": 0, "marks": 0, "words": 0}
    for piece in vocabulary:
        looks["clip"] += piece.endswith("</w>")
        looks["pairs"] += piece.startswith("\u0120")
        looks["marks"] += piece.startswith("\u2581")
        looks["words"] += piece.startswith("##") and len(piece) > 2
    most = max(looks, key=lambda look: looks[look])
    clip, pairs, marks, words = (look == most and looks[most] > 0 for look in looks)

    def read(piece: str) -> bytes | None:
        if piece in _UNKNOWN:
            return None
        if clip or pairs:
            letters = piece.removesuffix("</w>") if clip else piece
            known = all(letter in BYTE_LETTERS for letter in letters)
            return bytes(BYTE_LETTERS[letter] for letter in letters) if known else letters.encode()
        if marks:
            found = _BYTE.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("\u2581", " ").encode()
        if words:
            return piece.removeprefix("##").encode()
        return bytes([ord(piece)]) if len(piece) == 1 and ord(piece) < 256 else piece.encode()

    return read


# --- the prompt as the tokenizer gets it ---


def _groups(letters: Sequence[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Cut where brackets of the outermost level begin and end, as ComfyUI's `parse_parentheses` does."""
    groups: list[list[tuple[str, int]]] = []
    current: list[tuple[str, int]] = []
    level = 0
    for letter in letters:
        if letter[0] == "(":
            if level == 0:
                groups.append(current)
                current = []
            current.append(letter)
            level += 1
        elif letter[0] == ")":
            level -= 1
            current.append(letter)
            if level == 0:
                groups.append(current)
                current = []
        else:
            current.append(letter)
    return [group for group in (*groups, current) if group]


def _unweighted(letters: Sequence[tuple[str, int]], depth: int = 0) -> list[tuple[str, int]]:
    plain: list[tuple[str, int]] = []
    for group in _groups(letters):
        if len(group) < 2 or group[0][0] != "(" or group[-1][0] != ")" or depth > 50:
            plain += group
            continue
        inner = group[1:-1]
        colon = max((i for i, (letter, _) in enumerate(inner) if letter == ":"), default=0)
        if colon > 0:
            try:
                float("".join(letter for letter, _ in inner[colon + 1 :]))
                inner = inner[:colon]
            except ValueError:
                pass
        plain += _unweighted(inner, depth + 1)
    return plain


def without_weights(prompt: str) -> list[tuple[str, int]]:
    r"""The letters that are left of ComfyUI's `(words:1.3)` and `\(`, each with its place in the prompt."""
    escaped, letters, i = {"(": "\0", ")": "\1"}, [], 0
    while i < len(prompt):
        if prompt[i] == "\\" and prompt[i + 1 : i + 2] in escaped:
            letters.append((escaped[prompt[i + 1]], i + 1))
            i += 1
        else:
            letters.append((prompt[i], i))
        i += 1
    back = {hidden: shown for shown, hidden in escaped.items()}
    return [(back.get(letter, letter), place) for letter, place in _unweighted(letters)]


FOLDS: tuple[Callable[[str], str], ...] = (
    lambda letter: letter,
    str.lower,
    lambda letter: unicodedata.normalize("NFKC", letter),
    lambda letter: unicodedata.normalize("NFKC", letter).lower(),
)


# --- matching ---


def _matched(pieces: Sequence[bytes | None], prompt: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """How the first pieces lie in the prompt's bytes, as begin and end, up to the first one that does not fit."""
    places, at = [], 0
    for piece in pieces:
        if piece is None or bytes(byte for byte, _ in prompt[at : at + len(piece)]) != piece:
            break
        places.append((at, at + len(piece)))
        at += len(piece)
    return places


def _bytes(letters: Sequence[tuple[str, int]], fold: Callable[[str], str]) -> list[tuple[int, int]]:
    return [(byte, place) for letter, place in letters if not letter.isspace()
            for byte in "".join(fold(letter).split()).encode("utf-8", "replace")]  # fmt: skip


def _runs(pieces: Sequence[bytes | None]) -> list[Span]:
    """Stretches of pieces that the tokenizer knows, the longest first."""
    unknown = [-1, *(i for i, piece in enumerate(pieces) if piece is None), len(pieces)]
    runs = [(a + 1, b) for a, b in pairwise(unknown) if b > a + 1]
    return sorted(runs, key=lambda run: -sum(len(piece or b"") for piece in pieces[slice(*run)]))


def _aligned(
    pieces: Sequence[bytes | None], prompt: Sequence[tuple[int, int]], begin: int = 0, cuts: int = 40,
    beside: bool = False,
) -> list[Span | None]:
    """Spans of bytes, from both ends; what lies between is one span for all the pieces there.

    A stretch of it that is in the prompt just once divides it further, up to `cuts` times. Where nothing is found
    at all, only text that has a known neighbour (`beside`) is taken for what the pieces mean.
    """
    first = _matched(pieces, prompt)
    spans: list[Span | None] = [(begin + a, begin + b) for a, b in first]
    at = first[-1][1] if first else 0
    rest, left = pieces[len(first) :], prompt[at:]
    if not rest:
        return spans
    back = _matched([piece and piece[::-1] for piece in reversed(rest)], left[::-1])
    size = len(left) - (back[-1][1] if back else 0)
    middle, between, begin = rest[: len(rest) - len(back)], left[:size], begin + at
    last = [(begin + len(left) - stop, begin + len(left) - start) for start, stop in reversed(back)]
    letters = bytes(byte for byte, _ in between)
    for a, b in _runs(middle) if cuts and len(middle) > 1 else []:
        run = b"".join(piece or b"" for piece in middle[a:b])
        if len(run) >= SURE and letters.count(run) == 1 and (a, b) != (0, len(middle)):
            place = letters.index(run)
            return [*spans, *_aligned(middle[:a], between[:place], begin, cuts - 1, True),
                    *_aligned(middle[a:], between[place:], begin + place, cuts - 1, True), *last]  # fmt: skip
    known = bool(between) and bool(first or last or beside)
    return [*spans, *[(begin, begin + size) if known else None] * len(middle), *last]


def locate(pieces: Sequence[bytes | None], prompt: str) -> list[Span | None]:
    """Where in the prompt each piece stands; None for one that cannot be found, or that is only a space.

    Args:
        pieces: bytes of each token of the prompt, in order; None where the tokenizer does not say.
    """
    solid = [piece if piece is None else b"".join(piece.split()) for piece in pieces]
    if not any(solid) or len(prompt) > LONGEST:
        return [None] * len(pieces)
    written = [(letter, place) for place, letter in enumerate(prompt)]
    best: list[Span | None] = [None] * len(pieces)
    most = -1
    for letters in (written, without_weights(prompt)):
        for fold in FOLDS:
            raw = _bytes(letters, fold)
            spans = _aligned(solid, raw)
            one_by_one = len(set(spans)) if None not in spans else 0
            fits = len(_matched(solid, raw))
            score = 2 * len(pieces) if fits == len(pieces) else one_by_one
            if score > most:
                best, most = [_characters(span, raw) for span in spans], score
            if fits == len(pieces):
                return best
    return best


def _characters(span: Span | None, raw: Sequence[tuple[int, int]]) -> Span | None:
    if span is None or span[0] >= span[1]:
        return None
    return raw[span[0]][1], raw[span[1] - 1][1] + 1


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def tokens_of(
    ids: Sequence[object], special: Sequence[bool], template: Sequence[object], read: Callable[[object], bytes | None],
    prompt: str,
) -> list[Token]:
    """What each token of an encoder is: its piece, and where in the prompt it stands.

    Args:
        ids: the tokens in order; what is no number is an embedding.
        special: whether each stands for no text: the start, the end, padding.
        template: the tokens of the empty prompt that stand for text: a chat template, or none.
        read: a token's piece as bytes.
    """
    places = [i for i, one in enumerate(special) if not one]
    found = [Token("start" if not places or i < places[0] else "end") for i in range(len(ids))]
    text = [ids[i] if isinstance(ids[i], int) else None for i in places]
    pieces = [None if one is None else read(one) for one in text]
    before = common(template, text)
    after = common(template[before:][::-1], text[before:][::-1])
    # a prompt may bring its own template; then it is all the prompt's
    whole = [Token("embedding" if one is None else "text", piece, span)
             for one, piece, span in zip(text, pieces, locate(pieces, prompt))]  # fmt: skip
    if template and not all(token.span or token.piece in (None, b"") for token in whole):
        inner = slice(before, len(text) - after)
        spans = locate(pieces[inner], prompt)
        whole = [Token("template", piece) for piece in pieces]
        whole[inner] = [Token("embedding" if one is None else "text", piece, span)
                        for one, piece, span in zip(text[inner], pieces[inner], spans)]  # fmt: skip
    for place, token in zip(places, whole):
        found[place] = token
    return found


def fitted(tokens: Sequence[Token], count: int) -> list[Token] | None:
    """The tokens of a tensor with `count` positions; None when that cannot be told.

    Encoders with a chat template cut its beginning off, so fewer positions are counted from the end; where more are
    missing than it has, its end is cut off too.
    """
    cut, own = len(tokens) - count, ("start", "template")
    begin = min(cut, next((i for i, token in enumerate(tokens) if token.kind not in own), len(tokens)))
    if cut < 0 or any(token.kind not in (*own, "end") for token in tokens[begin + count :]):
        return None
    return list(tokens[begin : begin + count])


def agreed(readings: Sequence[Sequence[Token]], count: int) -> list[Token | None]:
    """For encoders side by side in one tensor: the tokens on which all of them agree; None where they do not."""
    if not readings:
        return [None] * count
    return [tokens[0] if all(one.kind == tokens[0].kind and one.span == tokens[0].span for one in tokens) else None
            for tokens in zip(*readings)]  # fmt: skip


def words(prompt: str, spans: Iterable[Span]) -> list[Span]:
    """The prompt's words; those that one of these tokens covers together are one. None of a prompt that is too long."""
    if len(prompt) > LONGEST:
        return []
    cuts = [match.span() for match in _WORD.finditer(prompt)]
    for begin, end in sorted(set(spans)):
        touched = [i for i, (first, last) in enumerate(cuts) if first < end and last > begin]
        if len(touched) > 1:
            cuts[touched[0] : touched[-1] + 1] = [(cuts[touched[0]][0], cuts[touched[-1]][1])]
    return cuts
