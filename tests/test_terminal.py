"""What a run shows in a terminal, and in a log."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from comfyui_safe_region.cli.terminal import PLAIN_BLOCKS, _Display, plain_lines, sparkline, watching
from comfyui_safe_region.training.progress import Ledger, Progress, separation

rich_console = pytest.importorskip("rich.console")
WALLS = separation(torch.full((9,), -1.0), torch.ones(4))


def test_a_curve_as_letters():
    assert sparkline([0, 1, 2, 4], blocks=PLAIN_BLOCKS) == "_-+#"
    assert len(sparkline(range(10_000), 20)) <= 20 and sparkline([]) == "" and sparkline([0.0, 0.0]) == "▁▁"


def run(visit, steps: int = 1000) -> None:
    ledger = Ledger({"gate": 1, "discover": steps, "preview": steps // 50}, {}, visit, clock=lambda: 0.0)
    ledger.report("gate", loss=0.5, measure="error of the walls", separation=WALLS)
    for step in range(steps):
        ledger.report("discover", loss=1 / (step + 1), measure="share left", message=f"step {step + 1}")
        if step % 50 == 49:
            ledger.report("preview")


def test_a_log_is_not_flooded_and_ends_at_100_per_cent():
    lines: list[str] = []
    run(plain_lines(lines.append))
    assert 10 <= len(lines) <= 14
    assert "gate; error of the walls: 0.5 after 1; outside of the walls: 0.0% of harmless" in lines[0]
    assert lines[-1].startswith("100%")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_display_shows_bar_curve_walls_and_time(encoding):
    raw = io.BytesIO()
    console = rich_console.Console(file=io.TextIOWrapper(raw, encoding=encoding), width=100, force_terminal=True,
                                   legacy_windows=False)  # fmt: skip
    display = _Display()
    display.see(Progress("gate", 1, 10, 0.4, measure="share left", separation=WALLS))
    display.see(Progress("discover", 5, 10, 0.2, message="step 3 [of] 8", measure="share left", seconds_left=200))
    console.print(display)
    console.file.flush()
    text = raw.getvalue().decode(encoding)
    assert "50%" in text and "discover, step 3 [of] 8, about 3 min left" in text
    assert ("█▅ 0.3" if encoding == "utf-8" else "#+ 0.3") in text and "100.0% of unsafe" in text


def test_without_a_terminal_there_are_plain_lines(capsys):
    with watching() as visit:
        visit(Progress("encode", 1, 4))
    assert capsys.readouterr().err == " 25%  encode\n"


def test_without_rich_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with watching() as visit:
        visit(Progress("encode", 1, 4, message="64 of 256 prompts"))
    assert capsys.readouterr().err == " 25%  encode, 64 of 256 prompts\n"
