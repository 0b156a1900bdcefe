"""Every example workflow: it fits the nodes of this ComfyUI, and draws what it says on the demo model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from examples import NAMES, QUICK, changed, example, misfits, on_demo_model
from host import to_api
from PIL import Image


@pytest.mark.parametrize("name", NAMES)
def test_fits_the_nodes(object_info, name):
    assert misfits(example(name), object_info) == []
    assert misfits(on_demo_model(example(name), object_info), object_info) == []


def test_misfits_are_seen(object_info):
    workflow = changed(example("flux"), object_info, {"KSampler": {"cfg": -1, "scheduler": "none"}})
    workflow["links"][0][5] = "VAE"
    workflow["nodes"][1]["type"] = "NoSuchNode"
    found = "\n".join(misfits(workflow, object_info))
    assert all(words in found for words in ("cfg: -1 is out of range", "scheduler: 'none' is not among", "VAE joins",
                                            "no node NoSuchNode"))  # fmt: skip


def shown_by(comfy: Any, output: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(comfy.image(image)))) for image in output["images"]]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "train_and_apply"])  # test_comfyui.py runs that one
def test_draws_what_it_says(comfy, object_info, name):
    workflow = changed(on_demo_model(example(name), object_info), object_info, QUICK)
    outputs = comfy.run(to_api(workflow, object_info))
    shown = {node["title"]: shown_by(comfy, outputs[str(node["id"])]) for node in workflow["nodes"]
             if node["type"] == "PreviewImage"}  # fmt: skip
    assert shown
    for title, pictures in shown.items():
        side = pictures[0].shape[0]
        if "|" in title:  # left and right half
            same = [np.array_equal(picture[:, :side], picture[:, -side:]) for picture in pictures]
            assert same == [title.startswith("Harmless")] * len(pictures), title
    if name == "compare_at_cfg_1":
        nothing, negative, region = shown.values()
        assert np.array_equal(nothing, negative), "a negative prompt acted at CFG 1"
        assert not any(map(np.array_equal, nothing, region))
    if name == "balance":
        before, after = shown.values()
        assert not any(map(np.array_equal, before, after))
