"""Translations: every language says everything that English says, as text, with the same places to fill in."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).parent.parent / "locales"
SCRIPTS = LOCALES.parent / "web" / "js"
SENT = LOCALES.parent / "evaluation" / "heat.py"  # puts sentences together that the page looks up
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir() if folder.name != "en")


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def test_there_are_three_languages():
    assert len(LANGUAGES) >= 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_translated(language):
    english, other = leaves(read("en", "nodeDefs")), leaves(read(language, "nodeDefs"))
    assert other.keys() == english.keys()
    long = [path for path, text in english.items() if len(text.split()) > 3]
    assert not [path for path in long if other[path] == english[path]]
    assert not [path for path, text in other.items() if not text.strip() or "<" in text]
    # the page reads these as its message syntax and cuts the text off there
    assert not [path for path, text in [*other.items(), *english.items()] if set("{}|@") & set(text)]


def texts_of(file: Path) -> list[re.Pattern[str]]:
    """The texts in a Python file; gaps of f-strings are groups."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [piece.value if isinstance(piece, ast.Constant) else None for piece in pieces]
        if any(isinstance(text, str) and re.search(r"\w", text) for text in texts):
            found.append(re.compile("".join("(.+)" if text is None else re.escape(str(text)) for text in texts)))
    return found


def is_said(text: str, patterns: list[re.Pattern[str]]) -> bool:
    """Whether one of these is the whole text, and others are what stands in its gaps."""
    found = (pattern.fullmatch(text) for pattern in patterns)
    return any(match and all(is_said(gap, patterns) for gap in match.groups()) for match in found)


def test_sentences_that_nobody_says_are_found():
    patterns = texts_of(SENT)
    assert is_said("Just outside {place}: moved part of the way, and now safe.", patterns)
    for text in ("Just outside {place}: moved part of the road, and now safe.", "Just outside {place}: moved.",
                 "Nearly outside {place}: moved, and now safe.", "moved part of the way {place}"):  # fmt: skip
        assert not is_said(text, patterns), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_the_page_is_translated(language):
    pattern = re.compile(r"""\bt\(\s*"((?:[^"\\]|\\.)+)\"""")
    called = [pattern.findall(path.read_text(encoding="utf-8")) for path in SCRIPTS.glob("*.js")]
    english = {json.loads(f'"{text}"') for texts in called for text in texts}
    translated = read(language, "main")["safeRegion"]
    assert translated.keys() == read(LANGUAGES[0], "main")["safeRegion"].keys() and english <= translated.keys()
    patterns = texts_of(SENT)
    assert not [text for text in translated.keys() - english if not is_said(text, patterns)]
    for text, other in translated.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", other)), text
