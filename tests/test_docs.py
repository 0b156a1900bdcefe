"""The pages for people: their links and pictures lead somewhere, and no picture lies about unused."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "web" / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)|<img [^>]*src=\"([^\"]+)\"")


def text_of(page: Path) -> str:
    """Without code, in which brackets mean something else."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def targets(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each link and picture that leads to something in the repository."""
    found = ("".join(link) for link in LINK.findall(text_of(page)))
    ends = (unquote(link).partition("#") for link in found if not re.match(r"[a-z]+:", link))
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in ends]


def anchors(page: Path) -> set[str]:
    """Headings, as GitHub names them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page: Path):
    for file, anchor in targets(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


def test_every_picture_is_shown():
    shown = {file for page in PAGES for file, _ in targets(page)}
    assert {file for folder in ("docs", "web/docs") for file in (ROOT / folder / "images").iterdir()} <= shown
