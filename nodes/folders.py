"""Where region files lie: the `safe_regions` model folder, and the examples that come with the pack."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import folder_paths

FOLDER = "safe_regions"
EXTENSIONS = {".safetensors"}
EXAMPLES = Path(__file__).parent.parent / "demo" / "regions"


def merged(known: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Paths without repetition, those already known first."""
    return list(dict.fromkeys([*known, *paths]))


def register_folders() -> None:
    """Tell ComfyUI about the folder. Paths that extra_model_paths.yaml gave for it stay first, the examples last."""
    own = Path(folder_paths.models_dir) / FOLDER
    with contextlib.suppress(OSError):  # a read-only model folder is no reason not to load
        own.mkdir(parents=True, exist_ok=True)
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    # An empty set would list every kind of file.
    folder_paths.folder_names_and_paths[FOLDER] = (
        merged(paths, [str(own), str(EXAMPLES)]),
        set(extensions) | EXTENSIONS,
    )


def save_folder() -> Path:
    """The folder that new regions are saved in: the first one that the loader looks in."""
    return Path(next(path for path in folder_paths.get_folder_paths(FOLDER) if Path(path) != EXAMPLES))


def region_path(name: object) -> Path | None:
    """The file of a listed name, or None. ComfyUI cuts `..` off, so it lies inside one of the folders."""
    found = folder_paths.get_full_path(FOLDER, str(name)) if name else None
    return Path(found) if found else None
