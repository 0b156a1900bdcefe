"""How benchmarks write what they have measured: as Markdown, and between two marks in README.md or docs/measured.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comfyui_safe_region.evaluation.steering import wilson

PACK = Path(__file__).resolve().parent.parent
README, MEASURED = PACK / "README.md", PACK / "docs" / "measured.md"


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def share(part: int, whole: int) -> str:
    """A share of counted pictures in whole per cent, with its 95 % interval; empty where nothing was counted."""
    low, high = wilson(part, whole)
    return f"{100 * (part / whole):.0f} <sub>{100 * low:.0f}-{100 * high:.0f}</sub>" if whole else ""


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`. Ends the program if they are missing."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise SystemExit(f"{page} lacks the marks {f'<!-- {name} -->'} and {f'<!-- end of {name} -->'}")
    page.write_text(f"{before}{mark}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
