"""What Apply and Guard say after a run: whether the prompt was outside, and what became of it. Without ComfyUI."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..region import Region
from ..region.conditioning import acted_before
from ..region.inspection import Judgement
from ..region.known import unknown_text
from ..region.verdict import verdict


def steering_status(
    judged: Sequence[Judgement], conditioning: Sequence[Any], region: Region, strength: float, mode: str, start: float,
    end: float,
) -> list[tuple[str, str]]:  # fmt: skip
    """Lines with their tones, for prompts that the region was applied to: what became of them, what passes unguarded
    by the user's leave, and that the region is poor. `judged` is what `judge` says of them."""
    passing = [(f'Unguarded: "{name}" may be text, and unknown_text lets it pass.', "warn")
               for name in unknown_text(conditioning)]  # fmt: skip
    return [_done(judged, conditioning, region, strength, mode, start, end), *passing, *doubts(region)]


def doubts(region: Region) -> list[tuple[str, str]]:
    """A line for a region that its own numbers speak against; none for others."""
    found = verdict(region.metadata)
    if found.tone not in ("warn", "bad"):
        return []
    return [(f"This region is {found.level}: its card and its report say why, and what to do.", found.tone)]


def _done(
    judged: Sequence[Judgement], conditioning: Sequence[Any], region: Region, strength: float, mode: str, start: float,
    end: float,
) -> tuple[str, str]:  # fmt: skip
    earlier = [how for entry in conditioning for how in acted_before(entry, region.parts)]
    if strength == 0:
        rest = "; what an earlier node moved stays so" if earlier else ""
        return f"Switched off: strength 0 moves nothing{rest}.", "warn"
    more = any(bool((torch.as_tensor(value) > strength).any()) for value, _ in earlier)
    how = f" at strength {strength:g}" if strength != 1 or more else ""
    how += ", or as strongly as an earlier node does" if more else ""
    how += f", from {start:.0%} to {end:.0%} of sampling only" if (start, end) != (0, 1) else ""
    free = [part.label for part in region.parts if not part.gates]
    if mode != "always" and any(always for _, always in earlier):
        return f"Moved{how}: an earlier node moves every prompt.", "neutral"
    if mode == "always" or len(free) == len(region.parts):
        return f"Moved{how}: {'mode always' if mode == 'always' else 'this region'} moves every prompt.", "neutral"
    labels = list(dict.fromkeys(label for row in judged for label in row.concepts))
    if not all(row.judged for row in judged):
        return f"Applied{how}. Inspect Safe Region shows what it did.", "neutral"
    if labels and not free and not any(row.by_wall for row in judged):
        return f"Averaged, scaled or changed after the text encoder, so that it cannot be judged: moved{how}.", "warn"
    if not labels:
        names = ", ".join(part.label for part in region.parts)
        return f"Sees nothing of {names} here: comes out unchanged.", "good"
    return f"Sees {', '.join(labels)} here: moved{how}. Inspect Safe Region shows which words.", "warn"
