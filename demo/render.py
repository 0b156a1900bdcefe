"""Draws scenes of the demo world from an emoji set. Needed only to train the demo model anew.

Pictograms: Noto Emoji (Apache-2.0), as the JSON of the npm package `@iconify-json/noto`; the pistol is ours.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from .world import COLOURS, THINGS, Scene

SIZE = 128  # pixels
ALONE, BESIDE = 92, 60  # size of a thing that is alone, or one of two

PISTOL = """<path fill="#4a4f55" d="M8 34h104c4 0 6 2 6 6v10c0 4-2 6-6 6H74c-2 0-3 1-3 3v6c0 7-4 11-11 11h-8l-10 38
c-1 3-3 5-7 5H14c-4 0-6-3-5-7l13-40c1-3 0-5-3-6l-7-2c-3-1-4-3-4-6z"/>
<path fill="#6d747b" d="M8 34h104c4 0 6 2 6 6v3H8z"/><path fill="#2f3337" d="M100 28h8v6h-8zM10 28h12v6H10z"/>
<path fill="#fff" fill-opacity=".35" d="M54 58h10v7c0 3-2 5-5 5h-8z"/>
<path fill="#7a5234" d="M24 74h18l-10 38c-1 2-2 3-4 3H16c-2 0-3-2-3-4z"/>"""


def load_icons(path: Path, sizes: tuple[int, ...]) -> dict[tuple[str, int], np.ndarray]:
    """Every icon of the world as RGBA float arrays [size, size, 4] in 0..1, by (icon name, size)."""
    import resvg_py

    table = json.loads(Path(path).read_text(encoding="utf-8"))["icons"] | {"pistol": {"body": PISTOL}}
    icons = {}
    for name in {thing.icon for thing in THINGS}:
        box = f"0 0 {table[name].get('width', 128)} {table[name].get('height', 128)}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{table[name]["body"]}</svg>'
        for size in sizes:
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
            icons[name, size] = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.float32) / 255
    return icons


def _bands(top: tuple[int, int, int], bottom: tuple[int, int, int], horizon: int) -> np.ndarray:
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:horizon], picture[horizon:] = top, bottom
    return picture


def draw_background(name: str) -> np.ndarray:
    """The background as a float array [SIZE, SIZE, 3] in 0..1."""
    if name in COLOURS:
        picture = np.full((SIZE, SIZE, 3), COLOURS[name], np.float32)
    elif name == "park":
        picture = _bands((176, 222, 250), (122, 190, 96), 78)
    elif name == "beach":
        picture = _bands((190, 232, 252), (240, 220, 160), 92)
        picture[62:92] = (76, 160, 214)
    elif name == "night":
        picture = _bands((30, 36, 84), (18, 22, 52), 92)
        for x, y in ((14, 14), (42, 8), (70, 20), (110, 10), (118, 44), (10, 56), (30, 34), (94, 30)):
            picture[y : y + 3, x : x + 3] = (250, 244, 200)
    elif name == "snow":
        picture = _bands((200, 214, 228), (252, 252, 255), 78)
        for x, y in ((12, 12), (36, 30), (60, 8), (92, 24), (116, 12), (18, 56), (110, 60), (76, 44)):
            picture[y : y + 4, x : x + 4] = (255, 255, 255)
    elif name == "desert":
        picture = _bands((252, 196, 120), (226, 160, 84), 84)
    else:
        raise ValueError(f"no background named {name!r}")
    return picture / 255


class Painter:
    """Draws scenes as uint8 pictures [SIZE, SIZE, 3]; positions and sizes vary a little."""

    def __init__(self, icon_file: Path) -> None:
        self.scales = {1: (ALONE - 6, ALONE, ALONE + 6), 2: (BESIDE - 3, BESIDE)}
        self.icons = load_icons(icon_file, self.scales[1] + self.scales[2])
        self.backgrounds = {
            name: draw_background(name) for name in (*COLOURS, "park", "beach", "night", "snow", "desert")
        }

    def draw(self, scene: Scene, rng: Random) -> np.ndarray:
        picture = self.backgrounds[scene.background].copy()
        centres = [SIZE // 2] if len(scene.things) == 1 else [SIZE // 4, SIZE - SIZE // 4]
        for thing, centre in zip(scene.things, centres):
            size = rng.choice(self.scales[len(scene.things)])
            jitter = 6 if len(scene.things) == 1 else 2
            x = min(max(centre - size // 2 + rng.randint(-jitter, jitter), 0), SIZE - size)
            y = min(max(SIZE // 2 - size // 2 + rng.randint(-6, 6), 0), SIZE - size)
            icon = self.icons[thing.icon, size]
            patch = picture[y : y + size, x : x + size]
            patch += icon[..., 3:] * (icon[..., :3] - patch)
        return (picture * 255 + 0.5).astype(np.uint8)
