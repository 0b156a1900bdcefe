"""The guarded blueprints: they fit this ComfyUI's nodes, and on the demo model their guard does what Apply does."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from examples import GUARDED, LOADERS, misfits, subgraphs, with_region
from host import Rejected, to_api
from PIL import Image

Prompt = dict[str, dict[str, Any]]
UNSAFE, HARMLESS = "a photo of a handgun on a wooden table", "a photo of a cat on a wooden table"
DEMO_LOADERS = {**LOADERS, "CLIPLoader": (1,)}
SAMPLERS = {"KSampler", "KSamplerAdvanced", "CFGGuider"}  # what takes the model that is drawn with
LATENTS = {"EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage", "EmptyHunyuanLatentVideo"}


def named(prompt: Prompt, *kinds: str) -> list[str]:
    return [name for name, node in prompt.items() if node["class_type"] in kinds]


def rewired(prompt: Prompt, sources: dict[tuple[str, int], list[Any]], inputs: Iterable[str] | None = None) -> Prompt:
    """A copy in which what came from one output comes from another one, in all inputs or those of these names."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and (inputs is None or key in inputs):
                while (source := sources.get(tuple(value))) is not None:  # one may stand behind another
                    value = source
                node["inputs"][key] = value
    return prompt


def on_demo_model(prompt: Prompt) -> Prompt:
    """With the demo model in place of the loaders and what changes their weights, and a small latent that fits it."""
    sources = {(name, i): ["demo", slot] for name in named(prompt, *DEMO_LOADERS)
               for i, slot in enumerate(DEMO_LOADERS[prompt[name]["class_type"]])}  # fmt: skip
    sources |= {(name, 0): prompt[name]["inputs"]["model"] for name in named(prompt, "LoraLoaderModelOnly")}
    changed = {name: node for name, node in rewired(prompt, sources).items() if (name, 0) not in sources}
    for name in named(changed, *LATENTS):
        changed[name] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}
    return {"demo": {"class_type": "SafeRegionDemoModel", "inputs": {}}, **changed}


def asking(prompt: Prompt, words: str) -> Prompt:
    prompt = copy.deepcopy(prompt)
    (positive,) = {prompt[name]["inputs"]["positive"][0] for name in named(prompt, *SAMPLERS)}
    prompt[positive]["inputs"]["text"] = words
    return prompt


def unguarded(prompt: Prompt) -> Prompt:
    """Without guards and what tells of them."""
    guards, reports = named(prompt, "SafeRegionGuardModel"), named(prompt, "SafeRegionGuardReport")
    sources = {(name, 0): prompt[name]["inputs"]["model"] for name in guards}
    sources |= {(name, 0): prompt[name]["inputs"]["latent"] for name in reports}
    gone = {*guards, *reports, *named(prompt, "PreviewAny")}
    return {name: node for name, node in rewired(prompt, sources).items() if name not in gone}


def steered(prompt: Prompt) -> Prompt:
    """The prompt steered by Apply Safe Region in place of guards."""
    (positive,) = {tuple(prompt[name]["inputs"]["positive"]) for name in named(prompt, *SAMPLERS)}
    region = prompt[named(prompt, "SafeRegionGuardModel")[0]]["inputs"]["region"]
    apply = {"class_type": "SafeRegionConditioning", "inputs": {"conditioning": list(positive), "region": region}}
    return {**rewired(unguarded(prompt), {positive: ["apply", 0]}, ["positive"]), "apply": apply}


def drawn(comfy: Any, prompt: Prompt) -> tuple[np.ndarray, dict[str, Any]]:
    """The picture that the sampler drew, and all outputs."""
    (decoder,) = named(prompt, "VAEDecode")
    shown = {**prompt, "shown": {"class_type": "PreviewImage", "inputs": {"images": [decoder, 0]}}}
    outputs = comfy.run(shown)
    (image,) = outputs["shown"]["images"]
    return np.asarray(Image.open(io.BytesIO(comfy.image(image)))), outputs


@pytest.fixture(params=GUARDED)
def workflow(request: pytest.FixtureRequest, object_info: dict[str, Any]) -> dict[str, Any]:
    """A blueprint with a region connected; passed over where this ComfyUI has not all of its nodes."""
    found = with_region(request.param)
    inner = subgraphs(found)
    kinds = {node["type"] for graph in (found, *inner.values()) for node in graph["nodes"]} - inner.keys()
    if lacking := kinds - object_info.keys():
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}")
    return found


def test_all_models_have_one():
    assert len(GUARDED) == 5
    assert all(any(word in name for name in GUARDED) for word in ("SDXL", "Z-Image", "Klein", "Qwen-Image", "Wan"))


def test_the_page_is_given_them(comfy):
    served = {one["name"]: one for one in comfy.get("/global_subgraphs").values()}
    assert {*GUARDED, "Safe Text Encode", "Compare Without and With Region"} <= served.keys()


def test_fits_the_nodes(workflow, object_info):
    assert misfits(workflow, object_info) == []


def test_every_sampler_draws_with_a_guarded_model(workflow, object_info):
    prompt = to_api(workflow, object_info)
    for name in named(prompt, *SAMPLERS):
        guard = prompt[prompt[name]["inputs"]["model"][0]]
        assert guard["class_type"] == "SafeRegionGuardModel"
        assert prompt[guard["inputs"]["region"][0]]["class_type"] == "SafeRegionLoader"
        assert (guard["inputs"]["strength"], guard["inputs"]["mode"], guard["inputs"]["end"]) == (1.0, "auto", 1.0)


def test_the_guard_acts_as_apply_does_and_leaves_harmless_prompts_alone(comfy, workflow, object_info):
    prompt = on_demo_model(to_api(workflow, object_info))
    for words, moved in ((UNSAFE, True), (HARMLESS, False)):
        asked = asking(prompt, words)
        plain, by_apply = (drawn(comfy, change(asked))[0] for change in (unguarded, steered))
        guarded, outputs = drawn(comfy, asked)
        assert np.array_equal(guarded, by_apply)
        assert np.array_equal(guarded, plain) != moved
        (opened,) = (outputs[name]["text"] for name in named(asked, "PreviewAny"))
        assert opened == [str(moved)]
    unsafe, harmless = (drawn(comfy, unguarded(asking(prompt, words)))[0] for words in (UNSAFE, HARMLESS))
    assert not np.array_equal(unsafe, harmless), "the prompt is not what is drawn"


def test_a_video_comes_out(comfy, object_info):
    (name,) = (name for name in GUARDED if "Video" in name)
    prompt = asking(on_demo_model(to_api(with_region(name), object_info)), UNSAFE)
    (video,) = named(prompt, "CreateVideo")
    inputs = {"video": [video, 0], "filename_prefix": "guarded", "format": "auto", "codec": "auto"}
    outputs = comfy.run({**prompt, "save": {"class_type": "SaveVideo", "inputs": inputs}})
    assert outputs["save"]["images"][0]["filename"].startswith("guarded")


def test_without_a_region_nothing_is_drawn(comfy, workflow, object_info):
    prompt = on_demo_model(to_api(workflow, object_info))
    for name in named(prompt, "SafeRegionGuardModel"):
        del prompt[name]["inputs"]["region"]
    with pytest.raises(Rejected, match=r"Required input is missing.*region"):
        comfy.queue(prompt)
