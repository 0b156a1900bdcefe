"""docs/guarantees.md: each guarantee names tests that exist, and each measurement a command that does."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "guarantees.md"
QUOTED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def sections() -> dict[str, str]:
    """The page's parts, by their headings."""
    _, *parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(part.split("\n", 1) for part in parts)


def rows(text: str) -> list[list[str]]:
    """Of its tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    kept = [line for i, line in enumerate(lines) if not any("---" in near for near in lines[i : i + 2])]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


@cache
def named_in(file: str) -> set[str]:
    """The tests that pytest would collect from a file."""
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")}  # fmt: skip


GUARANTEED = rows(sections()["Guaranteed"])


def test_the_page_has_its_three_parts():
    assert list(sections()) == ["Guaranteed", "Measured, not guaranteed", "Not promised"]
    said = [row[0] for text in sections().values() for row in rows(text)]
    assert len(said) == len(set(said)) and len(GUARANTEED) >= 20


@pytest.mark.parametrize("row", GUARANTEED, ids=lambda row: row[0][:60])
def test_every_guarantee_has_a_test_that_exists(row):
    said, tests = row
    found = QUOTED.findall(tests)
    assert said and found and tests.count("::") == len(found)
    assert not [f"{file}::{name}" for file, name in found if name not in named_in(file)]


@pytest.mark.parametrize("row", rows(sections()["Measured, not guaranteed"]), ids=lambda row: row[0][:60])
def test_every_measurement_has_a_command_that_exists(row):
    (script,) = re.findall(r"`python ((?:benchmarks|tests)/\w+\.py)[^`]*`", row[1])
    assert (ROOT / script).is_file()


def test_what_is_not_promised_has_a_reason():
    assert all(len(row) == 2 and all(row) for row in rows(sections()["Not promised"]))


def test_a_test_that_is_gone_is_found():
    assert "test_a_test_that_is_gone_is_found" in named_in("tests/test_guarantees.py")
    assert not named_in("tests/test_that_nobody_wrote.py")


def test_the_readme_leads_here():
    assert "](docs/guarantees.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
