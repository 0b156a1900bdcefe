"""Watching a run in a terminal: a display that stays in place, or a few plain lines where that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..training.progress import Progress, View, thinned

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
WIDTH = 32  # of a curve, in letters
LINES = 10  # of a run in a log, beside one for each stage


def sparkline(values: Sequence[float], width: int = WIDTH, blocks: str = BLOCKS) -> str:
    """A curve as a row of letters, from 0 to its largest value."""
    points = thinned(values, width)
    high = max([*points, 1e-9])
    return "".join(blocks[min(int(max(point, 0) / high * len(blocks)), len(blocks) - 1)] for point in points)


def plain_lines(write: Callable[[str], Any]) -> Callable[[Progress], None]:
    """One line when a stage begins, and one for every tenth of the run."""
    view, stages, tenths = View(), set(), 0

    def visit(progress: Progress) -> None:
        nonlocal tenths
        view.see(progress)
        now = LINES * progress.step // max(progress.total, 1)
        if progress.stage in stages and now <= tenths:
            return
        stages.add(progress.stage)
        tenths = max(now, tenths)
        write("; ".join(filter(None, (f"{progress.step / max(progress.total, 1):4.0%}  {view.line()}", view.words()))))

    return visit


class _Display:
    """What rich draws of a view: a bar, and below it the curve and the walls."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.view = View()
        self.bar = Bars(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                        TextColumn("{task.fields[line]}", markup=False))  # fmt: skip
        self.task = self.bar.add_task("", total=None, line="start")

    def see(self, progress: Progress) -> None:
        self.view.see(progress)
        self.bar.update(self.task, completed=progress.step, total=progress.total, line=self.view.line())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self.bar
        view, blocks = self.view, PLAIN_BLOCKS if options.ascii_only else BLOCKS
        if view.losses:
            yield Text(f"{sparkline(view.losses, blocks=blocks)} {view.loss:.3g}  {view.measure}")
        if view.separation:
            yield Text(view.separation.words())


@contextmanager
def watching() -> Iterator[Callable[[Progress], None]]:
    """What a run reports to while it is watched: on standard error, so that standard output holds results only."""
    try:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        plain = not console.is_terminal or console.is_dumb_terminal
    except ImportError:
        plain = True
    if plain:
        yield plain_lines(lambda line: print(line, file=sys.stderr, flush=True))
        return
    display = _Display()
    with Live(display, console=console, refresh_per_second=4):
        yield display.see
