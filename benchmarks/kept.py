"""What benchmarks keep in their output folder, so that a run that was broken off goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui_safe_region.region import Region, load_region, save_region
from comfyui_safe_region.region.writing import write_atomically


def load(file: Path) -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def keep(found: dict[str, Any], file: Path) -> None:
    write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())


def trained(file: Path, train: Callable[[], Region]) -> Region:
    """The region in the file; trained now, and kept there, when it is missing."""
    if not file.exists():
        print(f"training {file.stem}", flush=True)
        save_region(train(), file)
    return load_region(file)
