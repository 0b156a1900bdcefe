"""Training that is watched, in a real page and in both renderers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from host import PACK

CHART = '[aria-label="Training"]'
PICTURES = os.environ.get("SAFE_REGION_PICTURES")  # a folder for screenshots, to look at


def open_example(comfy_page: Any, steps: int, inside: bool = False) -> None:
    """The example of training with few steps and without the rest of it."""
    workflow = json.loads((PACK / "example_workflows" / "train_and_apply.json").read_text(encoding="utf-8"))
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] in (2, 3, 4)]
    kept = {2, 3, 4}
    workflow["links"] = [link for link in workflow["links"] if {link[1], link[3]} <= kept]
    train = next(node for node in workflow["nodes"] if node["id"] == 4)
    train["widgets_values"][2], train["size"] = steps, [360, 400]
    for node in workflow["nodes"]:
        for output in node.get("outputs", []):
            output["links"] = [n for n in output["links"] or [] if n in {link[0] for link in workflow["links"]}]
    comfy_page.load(workflow)


def shot(comfy_page: Any, name: str, request: Any) -> None:
    if PICTURES:
        comfy_page.screenshot(Path(PICTURES) / f"{name}-{request.node.callspec.id}.png")


def test_the_chart_grows_and_stays(comfy_page, request):
    open_example(comfy_page, 60)
    page = comfy_page.page
    page.evaluate("window.app.queuePrompt(0, 1)")
    comfy_page.until(f"document.querySelector('{CHART} [role=img]')?.ariaLabel.includes('outside')", 300)
    shot(comfy_page, "walls", request)
    comfy_page.until(f"document.querySelector('{CHART}')?.textContent.includes('left')", 300)
    comfy_page.until(f"document.querySelector('{CHART}')?.textContent.match('discover, step [3-4]')", 300)
    shot(comfy_page, "learning", request)
    comfy_page.until(f"document.querySelector('{CHART} img')?.naturalWidth > 0", 300)
    shot(comfy_page, "pictures", request)
    comfy_page.until(f"document.querySelector('{CHART}')?.textContent.includes('learned in')", 300)
    shot(comfy_page, "end", request)
