"""Built-in prompt packs: concepts and attributes to choose from, instead of writing pairs.

A pack is a text file as `pairs.py` or, in the folder `attributes`, `attributes.py` reads them. Its first two comment
lines are its title and a description.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .attributes import AttributePairs, load_attribute
from .pairs import PairsError, PromptPairs, load_pairs

FOLDER = Path(__file__).parent / "packs"


def pack_names() -> list[str]:
    """The packs of prompt pairs."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def attribute_pack_names() -> list[str]:
    """The packs of attribute rows."""
    return sorted(path.stem for path in (FOLDER / "attributes").glob("*.txt"))


def _path(name: str, names: list[str] | None = None) -> Path:
    """The file of a pack; `names`: those to choose from, if not all."""
    names = pack_names() + attribute_pack_names() if names is None else names
    if name not in names:
        raise PairsError(f'There is no pack "{name[:60]}". The packs are: {", ".join(names)}.')
    return (FOLDER if name in pack_names() else FOLDER / "attributes") / f"{name}.txt"


def pack_title(name: str) -> tuple[str, str]:
    """A pack's title and its description, of any kind of pack. Raises PairsError for an unknown name."""
    with _path(name).open(encoding="utf-8") as lines:
        title, description = (next(lines).removeprefix("#").strip() for _ in range(2))
    return title, description


def load_pack(name: str) -> PromptPairs:
    """A concept's prompt pairs. Raises PairsError for an unknown name."""
    if name in attribute_pack_names():
        raise PairsError(f'"{name}" is an attribute\'s pack, for train-balance.')
    return replace(load_pairs(_path(name, pack_names())), title=pack_title(name)[0])


def load_attribute_pack(name: str) -> AttributePairs:
    """An attribute's rows. Raises PairsError for an unknown name."""
    if name in pack_names():
        raise PairsError(f'"{name}" is a pack of prompt pairs, for train.')
    return load_attribute(_path(name, attribute_pack_names()))
