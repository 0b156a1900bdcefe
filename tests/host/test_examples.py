"""Every example workflow: it fits the nodes, draws what it says on the demo model, and runs nothing twice."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from examples import (
    APPLY,
    BALANCE,
    CFG_1,
    FLUX,
    NAMES,
    QUICK,
    TRAIN_AND_APPLY,
    TWO_CONCEPTS,
    changed,
    example,
    misfits,
    on_demo_model,
)  # fmt: skip
from host import to_api
from PIL import Image

# What hangs on a sampler's seed.
AFTER_SEED = {"KSampler", "VAEDecode", "ImageStitch", "PreviewImage"}
SECOND = {"Second prompt: without | with"}
SAME = {APPLY: SECOND, TRAIN_AND_APPLY: SECOND, TWO_CONCEPTS: {"Second prompt: without | both regions"}}


@pytest.mark.parametrize("name", NAMES)
def test_fits_the_nodes(object_info, name):
    assert misfits(example(name), object_info) == []
    assert misfits(on_demo_model(example(name), object_info), object_info) == []


def test_misfits_are_seen(object_info):
    workflow = changed(example(FLUX), object_info, {"VAELoader": {"vae_name": "none"}})
    workflow["links"][0][5] = "VAE"
    workflow["nodes"][1]["type"] = "NoSuchNode"
    workflow["nodes"][-2]["inputs"][0]["link"] = None
    inner = workflow["definitions"]["subgraphs"][0]
    sampler = next(node for node in inner["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][3] = -1
    found = "\n".join(misfits(workflow, object_info))
    assert all(words in found for words in ("cfg: -1 is out of range", "vae_name: 'none' is not among", "VAE joins",
                                            "no node NoSuchNode", "not connected as it wants"))  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def run(comfy, object_info, request) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """An example's name; on the demo model and made quick: its workflow, in the API's format, and what it drew."""
    workflow = changed(on_demo_model(example(request.param), object_info), object_info, QUICK)
    prompt = to_api(workflow, object_info)
    return request.param, workflow, prompt, comfy.run(prompt)


def shown_by(comfy: Any, output: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(comfy.image(image)))) for image in output["images"]]


def test_draws_what_it_says(comfy, run):
    name, workflow, _, outputs = run
    shown = {node["title"]: shown_by(comfy, outputs[str(node["id"])]) for node in workflow["nodes"]
             if node["type"] == "PreviewImage"}  # fmt: skip
    assert shown
    for title, pictures in shown.items():
        side = pictures[0].shape[0]
        if "|" in title:  # left and right half
            same = [np.array_equal(picture[:, :side], picture[:, -side:]) for picture in pictures]
            assert same == [title in SAME.get(name, ())] * len(pictures), title
    if name == CFG_1:
        nothing, negative, region = shown.values()
        assert np.array_equal(nothing, negative), "a negative prompt acted at CFG 1"
        assert not any(map(np.array_equal, nothing, region))
    if name == BALANCE:
        before, after = shown.values()
        assert not any(map(np.array_equal, before, after))


def test_another_seed_only_draws_anew(comfy, run):
    """Training, loading and applying come from the cache: all but the samplers has the same inputs as before."""
    _, _, prompt, _ = run
    samplers = [node for node in prompt.values() if node["class_type"] == "KSampler"]
    for node in samplers:
        node["inputs"]["seed"] += 1
    history = comfy.wait(comfy.queue(prompt))
    assert history["status"]["status_str"] == "success", history["status"]["messages"]
    cached = {node for kind, message in history["status"]["messages"] if kind == "execution_cached"
              for node in message["nodes"]}  # fmt: skip
    ran = {node["class_type"] for name, node in prompt.items() if name not in cached}
    assert ran <= AFTER_SEED and ("KSampler" in ran) == bool(samplers)
