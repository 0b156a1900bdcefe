"""Inspecting a prompt in a real ComfyUI: the demo model, and the words of every family's own tokenizer."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from host import NO_WORDS, Graph, lacks_words
from PIL import Image

FAMILIES = ("SD 1.x", "SDXL", "SD3", "Flux", "Flux.2", "Qwen-Image", "Z-Image", "HiDream", "HunyuanVideo", "Wan",
            "HunyuanDiT", "OmniGen2", "Lumina 2", "HunyuanImage 2.1", "Kandinsky 5", "Chroma", "Ovis",
            "NewBie", "Flux.2 Klein 4B", "LongCat", "PixelDiT", "CogVideoX", "Boogu", "Mage-Flow", "JoyImage",
            "Ernie-Image", "Ideogram 4", "Krea 2", "Lens", "LTX-2", "MiniMax H3")  # fmt: skip
SAME = "on a red table in the park there is a "
OTHER = SAME + "knife"
ONES = "|".join(SAME + word for word in ("cup", "dog", "lamp", "tree", "house", "plate", "chair", "purse", "cable"))


def words(comfy, family: str, one: str, other: str) -> dict:
    known = comfy.get("/object_info/TestFamily")["TestFamily"]["input"]["required"]["family"][1]["options"]
    if family not in known:
        pytest.skip("this ComfyUI does not know the family")
    g = Graph()
    node = g.add("TestWords", clip=g.add("TestFamily", family=family)(1), one=one, other=other)(0)[0]
    found = json.loads(comfy.run(g.prompt)[node]["text"][0])
    return {name: option for name, option in found.items() if not (lacks_words(family) and option["same"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_word_that_makes_the_difference_is_named(comfy, family):
    found = words(comfy, family, ONES, OTHER)
    if not found:
        pytest.skip(NO_WORDS)
    for option in found.values():
        assert "knife" in option["word"].split(), option
        assert " ".join(option["read"]) == OTHER
        assert option["unknown"] == 0


def inspected(comfy, text: str = "", **inputs) -> tuple[dict, dict]:
    """What the inspector says of a prompt, and all outputs."""
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name="demo-weapons.safetensors")
    if inputs.pop("draws", False):
        inputs |= {"model": demo(0), "vae": demo(2)}
    if other := inputs.pop("steered", None):
        encoded = g.add("CLIPTextEncode", clip=demo(1), text=other)
        inputs["conditioning"] = g.add("SafeRegionConditioning", conditioning=encoded(0), region=region(0))(0)
    node = g.add("SafeRegionInspect", clip=demo(1), text=text, region=region(0), **inputs)
    g.add("PreviewImage", images=node(0))
    plain = g.add("CLIPTextEncode", clip=demo(1), text=text)
    g.add("TestCompare", before=plain(0), after=node(2))
    outputs = comfy.run(g.prompt)
    (strip,) = outputs[node()[0]]["safe_region_strip"]
    by_kind = {g.prompt[name]["class_type"]: output for name, output in outputs.items()}
    return strip, by_kind


def test_an_unsafe_prompt_word_by_word(comfy):
    strip, outputs = inspected(comfy, "a kitchen knife on a (red:1.2) table", draws=True)
    assert not strip["inside"] and strip["moved"] and strip["safe"]
    words = {item["text"]: item for item in strip["items"] if item["kind"] == "word"}
    assert list(words) == ["a", "kitchen", "knife", "on", "(red:1.2)", "table"]
    assert words["knife"]["depth"] > 0 > words["knife"]["after"] and words["knife"]["shift"] > 0.1
    assert strip["concepts"][0]["word"] == "knife" and strip["pooled"] == 0
    assert (strip["verdict"], strip["tone"]) == ("Clearly unsafe at “knife”: moved, and now safe.", "warn")
    assert strip["verdict"] in outputs["SafeRegionInspect"]["text"][0].split("\nNumbers:\n")[0]
    assert not any(item["unknown"] for item in strip["items"])
    without, with_it = (np.asarray(Image.open(io.BytesIO(comfy.image(
        {key: one[key] for key in ("filename", "subfolder", "type")})))) for one in strip["pictures"])  # fmt: skip
    assert (without != with_it).any()
    assert comfy.image(outputs["PreviewImage"]["images"][0]).startswith(b"\x89PNG")
    (changed,) = json.loads(outputs["TestCompare"]["text"][0])
    assert not changed["options"]["cross_attn"]["same"]


def test_a_prompt_inside_says_so_and_comes_out_the_same(comfy):
    strip, outputs = inspected(comfy, "a red apple on a table", draws=True)
    assert (strip["verdict"], strip["tone"]) == ("Safe: comes out unchanged, to the bit.", "good")
    assert not any(item["shift"] or item["heat"] for item in strip["items"])
    assert len(strip["pictures"]) == 1
    (changed,) = json.loads(outputs["TestCompare"]["text"][0])
    assert all(option["same"] for option in changed["options"].values())


def test_what_other_nodes_made_has_the_words_that_are_the_texts(comfy):
    text = "a knife and a gun"
    known, _ = inspected(comfy, text, steered=text)
    assert [item["text"] for item in known["items"] if item["kind"] == "word"] == text.split()
    assert not known["inside"] and known["moved"], "looked at as it was before the node in front of it"
    unknown, _ = inspected(comfy, "", steered=text)
    assert not [item for item in unknown["items"] if item["kind"] == "word"]
    assert any(item["text"] == "token 3" and item["heat"] for item in unknown["items"])
    assert "numbered" in unknown["notes"][-1]["text"]


def test_words_that_the_demo_model_does_not_know_are_named(comfy):
    strip, outputs = inspected(comfy, "a rifle and a sniper")
    assert [item["text"] for item in strip["items"] if item["unknown"]] == ["rifle", "sniper"]
    assert "The demo model does not know: rifle, sniper." in outputs["SafeRegionInspect"]["text"][0]
    assert strip["tone"] != "good"


def test_a_prompt_of_300_words_is_folded(comfy):
    strip, outputs = inspected(comfy, "a red apple and a blue tree in the park near a river, " * 22 + "a gun")
    assert sum(item["kind"] == "word" for item in strip["items"]) > 280
    assert strip["folds"] and sum(end - begin for begin, end in strip["folds"]) > 250
    assert "words inside …" in outputs["SafeRegionInspect"]["text"][0]


def test_a_region_of_an_attribute_says_where_it_belongs(comfy):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name="demo-gender.safetensors")
    g.add("SafeRegionInspect", clip=demo(1), text="a judge", region=region(0))
    with pytest.raises(RuntimeError, match="Balance Safe Region"):
        comfy.run(g.prompt)
