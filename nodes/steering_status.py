"""What Apply and Guard say after a run: whether the prompt was outside, and what became of it. Without ComfyUI."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..region import Region
from ..region.inspection import outside
from ..region.verdict import verdict


def steering_status(
    conditioning: Sequence[Any], region: Region, strength: float, mode: str, start: float, end: float
) -> list[tuple[str, str]]:
    """Lines with their tones, for prompts that the region was applied to; the last may be that the region is poor.

    Where the text lies on a GPU it is not looked at, so that nothing waits for it.
    """
    return [_done(conditioning, region, strength, mode, start, end), *doubts(region)]


def doubts(region: Region) -> list[tuple[str, str]]:
    """A line for a region that its own numbers speak against; none for others."""
    found = verdict(region.metadata)
    if found.tone not in ("warn", "bad"):
        return []
    return [(f"This region is {found.level}: its card and its report say why, and what to do.", found.tone)]


def _done(
    conditioning: Sequence[Any], region: Region, strength: float, mode: str, start: float, end: float
) -> tuple[str, str]:
    if strength == 0:
        return "Switched off: strength 0 moves nothing.", "warn"
    if start >= end:
        return "Switched off: there is no step of sampling between start and end.", "warn"
    how = f" at strength {strength:g}" if strength != 1 else ""
    how += f", from {start:.0%} to {end:.0%} of sampling only" if (start, end) != (0, 1) else ""
    free = [part.label for part in region.parts if not part.gates]
    if mode == "always" or len(free) == len(region.parts):
        return f"Moved{how}: {'mode always' if mode == 'always' else 'this region'} moves every prompt.", "neutral"
    labels = outside(conditioning, region)
    if labels is None:
        return f"Applied{how}. Inspect Safe Region shows what it did.", "neutral"
    labels += free
    if not labels:
        names = ", ".join(part.label for part in region.parts)
        return f"Sees nothing of {names} here: comes out unchanged.", "good"
    return f"Sees {', '.join(labels)} here: moved{how}. Inspect Safe Region shows which words.", "warn"
