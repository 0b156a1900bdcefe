"""Put what a benchmark has measured between its two marks in README.md or docs/measured.md."""

from __future__ import annotations

from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
README, MEASURED = PACK / "README.md", PACK / "docs" / "measured.md"


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`. Ends the program if they are missing."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise SystemExit(f"{page} lacks the marks {f'<!-- {name} -->'} and {f'<!-- end of {name} -->'}")
    page.write_text(f"{before}{mark}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
