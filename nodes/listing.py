"""The regions that the loader lists: the newest first; examples, unfinished ones and those that only balance last."""
from __future__ import annotations

from typing import Any

import folder_paths

from .cards import glance
from .folders import EXAMPLES, FOLDER, region_path

_POOR = {"warn": "weak", "bad": "useless"}  # by the tone of a verdict


def _listed() -> dict[str, dict[str, Any]]:
    """Each region file by its name, in the order of the list, with its card; what is no sound region has none."""
    found = {}
    for name in folder_paths.get_filename_list(FOLDER):
        path = region_path(name)
        card = glance(path).card if path else None
        try:
            changed = path.stat().st_mtime if path else 0.0
        except OSError:
            changed = 0.0
        card = card or {"kind": "damaged", "unfinished": ""}
        last = (card["kind"] != "region", bool(card["unfinished"]), path is not None and path.parent == EXAMPLES)
        found[name] = ((card["kind"] == "damaged", *last, -changed), card)
    return {name: card for name, (_, card) in sorted(found.items(), key=lambda one: (one[1][0], one[0].lower()))}


def region_names() -> list[str]:
    """Region files as the loader lists them: the first is one that Apply takes, where there is any."""
    return list(_listed())


def region_labels() -> dict[str, dict[str, str]]:
    """For the page: by file name, what it is about and for which model, its kind (region, balance or damaged), and
    whether its own numbers call it weak or useless."""
    return {
        name: {"label": " · ".join(filter(None, (card.get("concept"), card.get("family") or card.get("encoder")))),
               "kind": card["kind"], "poor": _POOR.get(card.get("verdict", {}).get("tone"), "")}
        for name, card in _listed().items()
    }  # fmt: skip
