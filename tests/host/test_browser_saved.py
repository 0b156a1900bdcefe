"""Workflows saved by earlier versions still open, ask for the same, and draw the same pictures.

tests/host/saved holds what version 0.1 saved: the workflow, and the prompt that its page sent for it.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SAVED = sorted((Path(__file__).parent / "saved").glob("*.json"))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_saved_workflows_ask_for_the_same(comfy_page, path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    comfy_page.load(saved["workflow"])
    asked = comfy_page.prompt()
    assert asked.keys() == saved["prompt"].keys()
    modules = {name: info["python_module"] for name, info in comfy_page.host.get("/object_info").items()}
    for name, node in saved["prompt"].items():
        if "safe-region" not in modules[node["class_type"]]:  # other nodes have versions of their own
            continue
        assert asked[name]["class_type"] == node["class_type"]
        assert asked[name]["inputs"].items() >= node["inputs"].items(), node["class_type"]


def test_a_saved_workflow_draws_the_same_pictures(comfy_page):
    saved = json.loads(next(path for path in SAVED if path.stem == "apply").read_text(encoding="utf-8"))
    comfy_page.load(saved["workflow"])
    seen = drawn(comfy_page, comfy_page.run()["outputs"])
    comfy_page.host.request("/free", {"free_memory": True})  # forget what was drawn
    comfy_page.settle(1500)
    assert seen == drawn(comfy_page, comfy_page.host.run(saved["prompt"]))


def drawn(comfy_page: Any, outputs: dict[str, Any]) -> dict[str, list[bytes]]:
    """The pixels of a run's pictures, by node."""
    found = {node: [Image.open(BytesIO(comfy_page.host.image(one))).tobytes() for one in output["images"]]
             for node, output in outputs.items() if "images" in output}  # fmt: skip
    assert found
    return found
