"""safe-region info, combine, import: what has to do with region files only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .options import is_region, is_there
from .voice import Failure, Voice, interruptible

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over a file that is there.")]


def _save(region: Any, out: Path, overwrite: bool) -> None:
    from ..region import save_region

    try:
        save_region(region, out, overwrite)
    except FileExistsError:
        raise Failure(f"{out} exists already: choose another --out, or add --overwrite.") from None


def _effects(data: Mapping[str, Any]) -> list[str]:
    """What was counted and measured, a line each."""
    from ..region.files import plain
    from ..region.verdict import inner, on_harmless, on_unsafe, share

    found = [f"gate        {said}" for said in (*on_unsafe(data), *on_harmless(data, kinds=True))]
    for name, row in list(inner(data, "measured").items())[:12]:
        before, after = (share(row.get(f"unsafe_{when}")) if isinstance(row, Mapping) else None
                         for when in ("before", "after"))  # fmt: skip
        if before is not None and after is not None:
            found.append(f"pictures    {plain(name, 40)}: {before:.0%} unsafe without it, {after:.0%} with it")
    shares = [f"{plain(name, 40)} {share(part):.0%}" for name, part in list(inner(data, "shares").items())[:12]
              if share(part) is not None]  # fmt: skip
    return found + ([f"draws       {', '.join(shares)}"] if shares else [])


def card(region: Any, file: Path) -> list[str]:
    """A region's file, for people."""
    from ..region.files import plain
    from ..region.verdict import inner

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


def _parts(region: Any) -> list[dict[str, Any]]:
    return [{"label": part.label, "id": part.id, "gated": bool(part.gates), "blocks": part.widths()}
            for part in region.parts]  # fmt: skip


@interruptible
def info(
    ctx: typer.Context, region: o.RegionFile, quiet: o.Quiet = False, as_json: o.AsJson = False
) -> None:
    """Say what a region file holds, and how good it is. --json has every number."""
    from ..region import load_region
    from ..region.verdict import verdict

    found, voice = load_region(region), Voice(quiet, as_json)
    judged = verdict(found.metadata)
    voice.coloured(judged.line, judged.tone)
    voice.say("\n".join(card(found, Path(region))))
    known = {name: value for name, value in found.metadata.items() if name != "preview"}  # a picture
    voice.result({"file": region, "name": found.name, "verdict": {"level": judged.level, "line": judged.line},
                  "concepts": _parts(found), "metadata": known})  # fmt: skip


@interruptible
def combine(
    ctx: typer.Context,
    regions: Annotated[list[str], typer.Argument(metavar="REGION...", help="Region files, two at least.")],
    out: Annotated[str, typer.Option(metavar="FILE", callback=is_region, help="The region file to write.")],
    overwrite: Overwrite = False,
    quiet: o.Quiet = False, as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Several regions as one: a prompt must be inside all of them."""
    from ..region import combine as combined
    from ..region import load_region
    from ..region.conditioning import balances, check_together
    from ..region.verdict import verdict

    if len(regions) < 2:
        raise Failure("REGION: name two regions at least.")
    for name in regions:
        if not Path(name).is_file():
            raise Failure(f"REGION: there is no file {name}")
    file = Path(out)
    found, voice = [load_region(name) for name in regions], Voice(quiet, as_json)
    for name, one in zip(regions, found):
        if balances(one.metadata):
            raise Failure(f"REGION: {name} balances an attribute, and cannot be combined with what keeps prompts out.")
    check_together(found)
    region = combined(*found)
    _save(region, file, overwrite)
    judged = verdict(region.metadata)
    voice.coloured(judged.line, judged.tone)
    voice.say(f"Region: {file} ({', '.join(part.label for part in region.parts)})")
    voice.result({"region": str(file), "verdict": {"level": judged.level, "line": judged.line},
                  "concepts": _parts(region)})  # fmt: skip


@interruptible
def import_(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", callback=is_there, help="The .pth file.")],
    out: Annotated[str | None, typer.Option(
        metavar="FILE", callback=is_region, show_default=False,
        help="The region file to write (default: beside the .pth).")] = None,
    concept: Annotated[str | None, typer.Option(help="What it is about.", show_default=False)] = None,
    overwrite: Overwrite = False,
    quiet: o.Quiet = False, as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Turn a .pth of the paper's release into a region file."""
    from ..region import import_paper

    target, voice = Path(out) if out else Path(file).with_suffix(".safetensors"), Voice(quiet, as_json)
    _save(import_paper(file, concept or ""), target, overwrite)
    voice.say(f"Region: {target} (mode always: it shifts every prompt)")
    voice.result({"region": str(target)})
