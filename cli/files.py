"""safe-region info, combine, import: what has to do with region files only."""

from __future__ import annotations

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
    from ..reports.card import card

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
