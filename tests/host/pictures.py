"""Pictures for the docs and the template browser, made by the browser tests where SAFE_REGION_PICTURES names a folder.

The folder is laid out as the repository, so that `SAFE_REGION_PICTURES=.` renews what is committed:
`example_workflows/NAME.jpg` shows what an example draws, `docs/images/workflow_SLUG.jpg` the first one's graph, and
`web/docs/images/NODE.png` a node as its help page shows it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import (
    APPLY,
    BALANCE,
    CFG_1,
    FLUX,
    FLUX_TRAIN,
    GIVEN,
    GUARD,
    INSPECT,
    SDXL,
    TRAIN,
    TRAIN_AND_APPLY,
    TWO_CONCEPTS,
)
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(os.environ["SAFE_REGION_PICTURES"]) if os.environ.get("SAFE_REGION_PICTURES") else None
SIDE, GAP = 520, 8
LARGEST = 60_000  # bytes
# The example in which a node is pictured; None: alone, with what it holds at first.
NODES = {
    "SafeRegionBalance": BALANCE,
    "SafeRegionCombine": TWO_CONCEPTS,
    "SafeRegionConditioning": APPLY,
    "SafeRegionDemoModel": APPLY,
    "SafeRegionGuardModel": GUARD,
    "SafeRegionGuardReport": None,
    "SafeRegionInspect": INSPECT,
    "SafeRegionLoader": INSPECT,
    "SafeRegionPromptPairs": TRAIN_AND_APPLY,
    "SaveSafeRegion": None,
    "TrainBalanceRegion": None,
    "TrainSafeRegion": TRAIN_AND_APPLY,
}
FLOATING = ".p-toast, .p-panel, .minimap-main-container, .actionbar-container, .selection-toolbox"
# A thumbnail that shows a node, and one with a word above: what a real model draws is not to be had here.
NODE_THUMBNAILS = {TRAIN: "TrainSafeRegion", FLUX_TRAIN: "TrainSafeRegion", GIVEN: "SafeRegionLoader",
                   INSPECT: "SafeRegionInspect"}  # fmt: skip
WORDS = {SDXL: "SDXL", FLUX: "Flux", FLUX_TRAIN: "Flux"}
# Of how many pictures of each preview a thumbnail is made, and how many stand in a row; otherwise one, in a row.
TILES = {BALANCE: (8, 4), CFG_1: (3, 3)}


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG of few colours or a JPEG, as good as it may be at its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tries = ([{"quality": quality, "optimize": True} for quality in range(90, 30, -5)] if path.suffix == ".jpg"
             else [{"colors": colors} for colors in (128, 64, 32, 16)])  # fmt: skip
    for options in tries:
        packed = io.BytesIO()
        if path.suffix == ".jpg":
            picture.convert("RGB").save(packed, "JPEG", **options)
        else:
            picture.convert("RGB").quantize(dither=Image.Dither.NONE, **options).save(packed, "PNG", optimize=True)
        if packed.tell() <= LARGEST:
            break
    else:
        raise ValueError(f"{path.name} does not fit into {LARGEST} bytes")
    path.write_bytes(packed.getvalue())


def thumbnail(name: str, previews: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """A square of what an example's previews show."""
    count, columns = TILES.get(name, (1, 1))
    tiles = [picture for pictures in previews for picture in pictures[:count]]
    head = SIDE // 4 if name in WORDS else 0
    height, rows = SIDE - head, -(-len(tiles) // columns)
    room = (SIDE - GAP * (columns - 1)) / columns, (height - GAP * (rows - 1)) / rows
    scale = min(room[0] / tiles[0].width, room[1] / tiles[0].height)
    wide, high = round(tiles[0].width * scale), round(tiles[0].height * scale)
    made = Image.new("RGB", (SIDE, SIDE), "white")
    left = (SIDE - columns * wide - (columns - 1) * GAP) // 2
    top = head + (height - rows * high - (rows - 1) * GAP) // 2
    for i, tile in enumerate(tiles):
        place = (left + i % columns * (wide + GAP), top + i // columns * (high + GAP))
        made.paste(tile.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS), place)
    if head:
        font = ImageFont.load_default(head * 2 // 3)
        ImageDraw.Draw(made).text((SIDE // 2, head // 2), WORDS[name], "black", font, anchor="mm")
    return made


def graph_picture(page: Any) -> Image.Image:
    """The open workflow, cut at its outermost nodes."""
    page.page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.page.wait_for_timeout(1000)
    left, top, right, bottom = page.page.evaluate("""() => {
        const boxes = window.app.graph.nodes.map((node) => node.boundingRect);
        const corner = (i, size, pick) => pick(...boxes.map((box) => box[i] + (size ? box[i + 2] : 0)));
        const { scale, offset } = window.app.canvas.ds;
        return [corner(0, 0, Math.min), corner(1, 0, Math.min), corner(0, 1, Math.max), corner(1, 1, Math.max)]
          .map((value, i) => (value + offset[i % 2]) * scale);
    }""")
    pictured = cut(page, left - 12, top - 12, right + 12, bottom + 12)
    pictured.thumbnail((1400, 1400))
    return pictured


def show(page: Any, kind: str, scale: float, left: float, top: float) -> tuple[float, float]:
    """Move the graph so that the first node of a type has its corner there; the node's size on the page."""
    size = page.page.evaluate("""([kind, scale, left, top]) => {
        const { canvas, graph } = window.app;
        const node = graph.nodes.find((one) => one.type === kind);
        const [x, y, width, height] = node.boundingRect;
        canvas.ds.scale = scale;
        canvas.ds.offset[0] = left / scale - x;
        canvas.ds.offset[1] = top / scale - y;
        canvas.setDirty(true, true);
        const shown = document.querySelector(`[data-node-id="${node.id}"]`); // Nodes 2.0 gives it the height it needs
        return [width * scale, Math.max(height * scale, shown?.getBoundingClientRect().height ?? 0)];
    }""", [kind, scale, left, top])  # fmt: skip
    page.page.wait_for_timeout(1000)
    return size


def node_picture(page: Any, kind: str) -> Image.Image:
    """A node at its full size."""
    usual = page.page.evaluate("window.app.canvas.links_render_mode")
    page.page.evaluate("window.app.canvas.links_render_mode = LiteGraph.HIDDEN_LINK")
    show(page, kind, 1, 120, 120)
    width, height = show(page, kind, 1, 120, 120)  # now at its full size
    pictured = cut(page, 104, 104, 136 + width, 136 + height)
    page.page.evaluate("(mode) => { window.app.canvas.links_render_mode = mode; }", usual)
    return pictured


def cut(page: Any, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Part of what the page shows, without what floats above the graph."""
    page.page.add_style_tag(content=f"{FLOATING} {{ visibility: hidden !important }}")
    size = page.page.viewport_size
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size["width"]), min(bottom, size["height"])
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return Image.open(io.BytesIO(page.page.screenshot(clip=clip)))
