"""safe-region packs"""

from __future__ import annotations

from typing import Any

import typer

from . import options as o
from .voice import Voice, interruptible


def _about(name: str, **counts: int) -> dict[str, Any]:
    from ..training.packs import pack_title

    title, description = pack_title(name)
    return {"name": name, "title": title, "description": description, **counts}


def _line(pack: dict[str, Any]) -> str:
    name, title, description, *_ = pack.values()
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in list(pack.items())[3:])
    return f"{name:<26}{title}: {counts}\n{'':<26}{description}"


@interruptible
def packs(ctx: typer.Context, quiet: o.Quiet = False, as_json: o.AsJson = False) -> None:
    """List the built-in prompt packs."""
    from ..training.packs import attribute_pack_names, load_attribute_pack, load_pack, pack_names

    concepts = [_about(name, pairs=len(one.pairs), prompts_to_keep=len(one.keep), held_out=len(one.held_out))
                for name in pack_names() for one in [load_pack(name)]]  # fmt: skip
    attributes = [_about(name, rows=len(one.rows), prompts_to_keep=len(one.stated) + len(one.keep),
                         held_out=len(one.held_out))
                  for name in attribute_pack_names() for one in [load_attribute_pack(name)]]  # fmt: skip
    voice = Voice(quiet, as_json)
    voice.say("\n".join(["For train --pack:\n", *map(_line, concepts),
                         "\nFor train-balance --pack:\n", *map(_line, attributes)]))  # fmt: skip
    voice.result({"train": concepts, "train-balance": attributes})
