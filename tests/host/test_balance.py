"""Balancing an attribute in a real ComfyUI: learning it, a batch of eight, and what is refused."""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from examples import BALANCE, example
from host import PACK, Graph, to_api

ROWS = """\
attribute: gender
{a judge|a pilot|a doctor|a teacher|a cook} => man: a male {judge|pilot|doctor|teacher|cook} => woman: a female \
{judge|pilot|doctor|teacher|cook}
a photo of {a judge|a pilot|a doctor} {at night|in the park} => man: a photo of a man {judge|pilot|doctor} \
{at night|in the park} => woman: a photo of a woman {judge|pilot|doctor} {at night|in the park}
keep: a {man|woman} working as a {judge|pilot|doctor|teacher|cook}
"""
SHIPPED = PACK / "demo" / "regions" / "demo-gender.safetensors"


def instant_region(g: Graph, demo: Callable[[int], list[Any]], text: str = ROWS) -> list[Any]:
    return g.add("TrainBalanceRegion", model=demo(0), clip=demo(1), text=text, file="none", preset="instant", steps=0,
                 size=0, seed=1)(0)  # fmt: skip


def drawn(g: Graph, demo: Callable[[int], list[Any]], positive: list[Any], batch: int, cfg: float = 4.0) -> str:
    """Nodes that draw a batch from a fixed seed; the id of the one that shows it."""
    empty = g.add("CLIPTextEncode", clip=demo(1), text="")
    latent = g.add("EmptyLatentImage", width=128, height=128, batch_size=batch)
    sampled = g.add("KSampler", model=demo(0), positive=positive, negative=empty(0), latent_image=latent(0), seed=7,
                    steps=6, cfg=cfg, sampler_name="euler", scheduler="normal", denoise=1.0)  # fmt: skip
    decoded = g.add("VAEDecode", samples=sampled(0), vae=demo(2))
    return g.add("PreviewImage", images=decoded(0))(0)[0]


def balanced(g: Graph, conditioning: list[Any], region: list[Any], **others: Any) -> Callable[[int], list[Any]]:
    options = {"batch_size": 8, "seed": 3, "shares": "", "strength": 1.0, "start": 0.0, "end": 1.0} | others
    return g.add("SafeRegionBalance", conditioning=conditioning, region=region, **options)


def pictures(comfy: Any, output: dict[str, Any]) -> list[bytes]:
    return [comfy.image(image) for image in output["images"]]


def named(text: str) -> Counter:
    """`1 man, 2 woman` as counts."""
    return Counter(piece.split(" ")[1] for piece in text.split(", "))


needs_example = pytest.mark.skipif(not SHIPPED.exists(), reason="the example region is not made yet")


@needs_example
@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_a_batch_of_eight_is_four_and_four_and_other_prompts_stay_the_same_to_the_bit(comfy, cfg):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name=SHIPPED.name)(0)
    shown, groups = {}, {}
    for text in ("a judge", "a woman working as a teacher", "a cat in the park"):
        prompt = g.add("CLIPTextEncode", clip=demo(1), text=text)
        balance = balanced(g, prompt(0), region)
        shown[text] = drawn(g, demo, prompt(0), 8, cfg), drawn(g, demo, balance(0), 8, cfg)
        groups[text] = g.add("PreviewAny", source=balance(1))(0)[0]
    outputs = comfy.run(g.prompt)
    assert all(named(outputs[node]["text"][0]) == {"man": 4, "woman": 4} for node in groups.values())
    for text, nodes in shown.items():
        before, after = (pictures(comfy, outputs[node]) for node in nodes)
        assert len(before) == len(after) == 8
        same = [one == other for one, other in zip(before, after)]
        assert not any(same) if text == "a judge" else all(same), text


@needs_example
def test_shares_ranges_combined_prompts_and_safe_regions(comfy):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name=SHIPPED.name)(0)
    weapons = g.add("SafeRegionLoader", region_name="demo-weapons.safetensors")
    judge, knife = (g.add("CLIPTextEncode", clip=demo(1), text=text) for text in ("a judge", "a judge and a knife"))
    both = g.add("ConditioningCombine", conditioning_1=judge(0), conditioning_2=knife(0))
    ways = []
    for first in (True, False):
        chain = both(0)
        if not first:
            chain = g.add("SafeRegionConditioning", conditioning=chain, region=weapons(0), strength=1.0, mode="auto",
                          start=0.0, end=1.0)(0)  # fmt: skip
        balance = balanced(g, chain, region, batch_size=4, shares="man: 25, woman: 75", start=0.2)
        chain = balance(0)
        if first:
            chain = g.add("SafeRegionConditioning", conditioning=chain, region=weapons(0), strength=1.0, mode="auto",
                          start=0.0, end=1.0)(0)  # fmt: skip
        ways.append((drawn(g, demo, chain, 4), g.add("PreviewAny", source=balance(1))(0)[0]))
    outputs = comfy.run(g.prompt)
    assert all(named(outputs[text]["text"][0]) == {"man": 1, "woman": 3} for _, text in ways)
    one, other = (pictures(comfy, outputs[shown]) for shown, _ in ways)
    assert len(one) == 4 and one == other


def test_regions_in_the_wrong_node_are_sent_to_the_right_one(comfy):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    prompt = g.add("CLIPTextEncode", clip=demo(1), text="a judge")
    wrong = g.add("SafeRegionConditioning", conditioning=prompt(0), region=instant_region(g, demo), strength=1.0,
                  mode="auto", start=0.0, end=1.0)  # fmt: skip
    drawn(g, demo, wrong(0), 1)
    with pytest.raises(RuntimeError, match="Balance Safe Region"):
        comfy.run(g.prompt)
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    prompt = g.add("CLIPTextEncode", clip=demo(1), text="a judge")
    weapons = g.add("SafeRegionLoader", region_name="demo-weapons.safetensors")
    drawn(g, demo, balanced(g, prompt(0), weapons(0))(0), 8)
    with pytest.raises(RuntimeError, match="Apply Safe Region"):
        comfy.run(g.prompt)


@pytest.mark.parametrize(("shares", "words"), [("man: 50", "woman"), ("man: many, woman: 1", "many")])
def test_shares_that_make_no_sense(comfy, shares, words):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    prompt = g.add("CLIPTextEncode", clip=demo(1), text="a judge")
    drawn(g, demo, balanced(g, prompt(0), instant_region(g, demo), shares=shares)(0), 8)
    with pytest.raises(RuntimeError, match=words):
        comfy.run(g.prompt)


def test_rows_come_from_a_file_and_wrong_ones_are_named_by_line(comfy):
    (comfy.base / "input" / "gender.txt").write_text(ROWS + "a judge without groups\n", encoding="utf-8")
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    train = g.add("TrainBalanceRegion", model=demo(0), clip=demo(1), text=ROWS, file="gender.txt", preset="instant",
                  steps=0, size=0, seed=2)  # fmt: skip
    g.add("PreviewImage", images=train(2))
    with pytest.raises(RuntimeError, match=r"gender\.txt, line 5"):
        comfy.run(g.prompt)
    (comfy.base / "input" / "gender.txt").write_text(ROWS, encoding="utf-8")
    assert len(comfy.run(g.prompt)[train()[0]]["images"]) == 1


@pytest.mark.parametrize(("preset", "steps"), [("region", 2), ("paper", 1)])
def test_training_through_the_model_with_a_report(comfy, preset, steps):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    train = g.add("TrainBalanceRegion", model=demo(0), clip=demo(1), text=ROWS, file="none", preset=preset,
                  steps=steps, size=0, seed=1, vae=demo(2))  # fmt: skip
    g.add("LossGraphNode", loss=train(1), filename_prefix="loss")
    name = f"gender-{preset}"
    g.add("SaveSafeRegion", region=train(0), name=name, author="", license="", description="", overwrite=True)
    comfy.run(g.prompt)
    content = (comfy.base / "models" / "safe_regions" / f"{name}.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    card = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["region"])
    assert card["attribute"] == "gender" and set(card["shares"]) == {"man", "woman"}


@needs_example
def test_example_balance(comfy, object_info):
    workflow = example(BALANCE)
    prompt = to_api(workflow, object_info)
    outputs = comfy.run(prompt)
    before, after = (
        pictures(comfy, outputs[name]) for name in sorted(outputs) if prompt[name]["class_type"] == "PreviewImage"
    )
    assert len(before) == len(after) == 8 and not set(before) & set(after)
    (node,) = (name for name in prompt if prompt[name]["class_type"] == "SafeRegionBalance")
    assert named(outputs[node]["text"][0]) == {"man": 4, "woman": 4}


@needs_example
def test_the_batch_size_is_read_from_the_latent_that_is_connected(comfy):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name=SHIPPED.name)(0)
    latent = g.add("EmptyLatentImage", width=128, height=128, batch_size=6)
    prompt = g.add("CLIPTextEncode", clip=demo(1), text="a judge")
    balance = balanced(g, prompt(0), region, batch_size=3, latent=latent(0))
    shown = g.add("PreviewAny", source=balance(1))
    outputs = comfy.run(g.prompt)
    assert named(outputs[shown()[0]]["text"][0]) == {"man": 3, "woman": 3}
    groups, doubt = outputs[balance()[0]]["text"]
    assert [groups] == outputs[shown()[0]]["text"] and doubt.startswith("This region is weak")
