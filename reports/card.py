"""What a region file holds, in lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..region import Region
from ..region.files import plain
from ..region.verdict import inner, on_harmless, on_unsafe, share


def _effects(data: Mapping[str, Any]) -> list[str]:
    """What was counted and measured, a line each."""
    found = [f"gate        {said}" for said in (*on_unsafe(data), *on_harmless(data, kinds=True))]
    for name, row in list(inner(data, "measured").items())[:12]:
        before, after = (share(row.get(f"unsafe_{when}")) if isinstance(row, Mapping) else None
                         for when in ("before", "after"))  # fmt: skip
        if before is not None and after is not None:
            found.append(f"pictures    {plain(name, 40)}: {before:.0%} unsafe without it, {after:.0%} with it")
    shares = [f"{plain(name, 40)} {share(part):.0%}" for name, part in list(inner(data, "shares").items())[:12]
              if share(part) is not None]  # fmt: skip
    return found + ([f"draws       {', '.join(shares)}"] if shares else [])


def card(region: Region, file: Path) -> list[str]:
    """A region's file, for people."""
    data = region.metadata
    lines = [f"{plain(region.name, 80)} ({file.name}, {file.stat().st_size / 1000:.0f} kB)"]
    made = inner(data, "recipe")
    recipe = ", ".join(f"{plain(made[key], 40)}{unit}" for key, unit in (
        ("preset", ""), ("steps", " steps"), ("pairs", " prompt pairs"), ("rows", " rows")) if key in made)  # fmt: skip
    checkpoint, family = (plain(data.get(key), 120) for key in ("checkpoint", "family"))
    learned_on = " ".join(filter(None, (checkpoint, f"({family})" if checkpoint and family else family))) \
        or data.get("base_model") or inner(data, "encoder").get("name")
    told = {"about": data.get("description"), "learned on": learned_on,
            "recipe": recipe, "unfinished": data.get("unfinished"), "made by": data.get("author"),
            "licence": data.get("licence"), "created": data.get("created")}  # fmt: skip
    lines += [f"{name:<12}{plain(value)}" for name, value in told.items() if plain(value)]
    lines += _effects(data)
    for part in region.parts:
        gate = "gated" if part.gates else "acts on every prompt"
        blocks = ", ".join(f"{block} {width}" for block, width in part.widths().items())
        lines.append(f"{'concept':<12}{part.label}: {gate}; blocks: {blocks}; id {part.id}")
    return lines
