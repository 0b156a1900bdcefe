"""What the gates said, in a graph and in the API's history; and our nodes' old names, where ComfyUI knows such."""

from __future__ import annotations

import json
import urllib.error
from typing import Any

import pytest
from drawing import Drawing
from host import PACK, RENAMED, error_text

pytestmark = pytest.mark.skipif(
    not (PACK / "demo" / "regions" / "demo-weapons.safetensors").exists(), reason="the example region is not made yet"
)
UNSAFE, HARMLESS = "a kitchen knife on a red background", "a cat in the park"
INSIDE = {"opened": False, "concepts": []}


class Seen(Drawing):
    """`shown` are nodes that show what comes out of a gate: opened, depth, concepts."""

    def show(self, node: list, first: int) -> list[str]:
        return [self.add("PreviewAny", source=[node[0], first + i])()[0] for i in range(3)]

    def apply(self, conditioning: list, **options: Any) -> tuple[list, list[str]]:
        steered = self.steered(conditioning, **options)
        return steered, self.show(steered, 1)

    def report(self, model: list, latent: list) -> tuple[list, list[str]]:
        node = self.add("SafeRegionGuardReport", model=model, latent=latent)(0)
        return node, self.show(node, 1)

    def sampled(self, positive: list, model: list, seed: int = 5) -> list:
        return self.add("KSampler", model=model, positive=positive, negative=self.text(""), latent_image=self.latent(),
                        seed=seed, steps=1, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=1.0)(0)

    def rows(self, first: str, second: str) -> list:
        return self.add("TestRows", first=self.text(first), second=self.text(second))(0)


def texts(outputs: dict[str, Any], shown: list[str]) -> list[list[str]]:
    """What each of these nodes showed, once for each row."""
    return [outputs[name]["text"] for name in shown]


def finite(comfy: Any, prompt: str) -> dict[str, Any]:
    """A run's outputs, read as strictly as browsers and other languages do."""

    def refuse(number: str) -> None:
        raise ValueError(number)

    return json.loads(comfy.request(f"/history/{prompt}"), parse_constant=refuse)[prompt]["outputs"]


def test_apply_says_what_its_gate_says(comfy):
    g = Seen()
    unsafe, shown = g.apply(g.text(UNSAFE))
    harmless, others = g.apply(g.text(HARMLESS), mode="always")
    prompt = comfy.queue(g.prompt)
    comfy.wait(prompt)
    outputs = finite(comfy, prompt)
    (opened,), (depth,), (concepts,) = texts(outputs, shown)
    (row,) = outputs[unsafe[0]]["safe_region_gate"]
    assert row == {"opened": True, "depth": float(depth), "concepts": ["weapons"]} and row["depth"] > 0
    assert (opened, concepts) == ("True", "weapons")
    (row,) = outputs[harmless[0]]["safe_region_gate"]
    assert row["depth"] < 0 and row == {**INSIDE, "depth": row["depth"]}, "mode always moves, and says nothing else"
    assert [one for (one,) in texts(outputs, others)] == ["False", str(row["depth"]), ""]


def test_each_row_of_a_batch_has_its_own(comfy):
    g = Seen()
    steered, shown = g.apply(g.rows(HARMLESS, UNSAFE))
    inspected = g.add("SafeRegionInspect", clip=g.demo(1), text="", region=g.region(0),
                      conditioning=g.rows(UNSAFE, HARMLESS))(0)  # fmt: skip
    others = g.show(inspected, 3)
    model = g.guarded(strength=0.81)
    report, last = g.report(model, g.sampled(g.rows(HARMLESS, UNSAFE), model))
    outputs = comfy.run(g.prompt)
    assert [texts(outputs, names)[0] for names in (shown, others, last)] == [
        ["False", "True"], ["True", "False"], ["False", "True"]]  # fmt: skip
    assert texts(outputs, shown)[2] == ["", "weapons"]
    for node in (steered, report):
        assert [row["opened"] for row in outputs[node[0]]["safe_region_gate"]] == [False, True]
    assert [row["opened"] for row in outputs[inspected[0]]["safe_region_gate"]] == [True, False]


def test_inspect_says_the_same_of_its_text(comfy):
    g = Seen()
    steered, _ = g.apply(g.text(UNSAFE))
    inspected = g.add("SafeRegionInspect", clip=g.demo(1), text=UNSAFE, region=g.region(0))(0)
    outputs = comfy.run(g.prompt)
    assert outputs[inspected[0]]["safe_region_gate"] == outputs[steered[0]]["safe_region_gate"]


def test_a_run_from_the_cache_has_what_apply_said(comfy, object_info):
    if not object_info["SafeRegionConditioning"].get("has_intermediate_output"):
        pytest.skip("this ComfyUI forgets what nodes said that it takes from the cache")
    g = Seen()
    steered = g.steered(g.text(UNSAFE), strength=0.97)
    g.decode(g.sampled(steered, g.demo(0)))
    first = comfy.run(g.prompt)
    next(node for node in g.prompt.values() if node["class_type"] == "KSampler")["inputs"]["seed"] = 6
    again = comfy.wait(comfy.queue(g.prompt))
    cached = [node for kind, message in again["status"]["messages"] if kind == "execution_cached"
              for node in message["nodes"]]  # fmt: skip
    assert steered[0] in cached
    assert again["outputs"][steered[0]] == first[steered[0]]


def test_a_guards_report_comes_after_the_sampler(comfy):
    g = Seen()
    model = g.guarded(strength=0.82)
    unsafe, shown = g.report(model, g.sampled(g.text(UNSAFE), model))
    g.decode(unsafe)
    prompt = comfy.queue(g.prompt)
    comfy.wait(prompt)
    outputs = finite(comfy, prompt)
    (row,) = outputs[unsafe[0]]["safe_region_gate"]
    assert row["opened"] and row["depth"] > 0 and row["concepts"] == ["weapons"]
    assert texts(outputs, shown) == [["True"], [str(row["depth"])], ["weapons"]]
    assert outputs[unsafe[0]]["text"] == ["Outside: weapons."]
    (record,) = outputs[model[0]]["safe_region_guard"]
    assert record["gate"] == {prompt: [row]}
    # a harmless prompt with the same guard, which comes from the cache
    for node in g.prompt.values():
        if node["inputs"].get("text") == UNSAFE:
            node["inputs"]["text"] = HARMLESS
    later = comfy.queue(g.prompt)
    comfy.wait(later)
    outputs = finite(comfy, later)
    (other,) = outputs[unsafe[0]]["safe_region_gate"]
    assert other == {**INSIDE, "depth": other["depth"]} and other["depth"] < 0
    assert outputs[unsafe[0]]["text"] == ["Nothing of weapons was asked for."]
    (record,) = outputs[model[0]]["safe_region_guard"]
    assert record["gate"] == {prompt: [row], later: [other]}


def test_a_report_tells_of_every_sampling_of_its_prompt_and_of_every_guard(comfy):
    g = Seen()
    model = g.guarded(g.guarded(strength=0.83), strength=0.84)
    first = g.sampled(g.text(UNSAFE), model)
    second = g.add("KSampler", model=model, positive=g.text(HARMLESS), negative=g.text(""), latent_image=first, seed=8,
                   steps=1, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=0.5)(0)  # fmt: skip
    _, shown = g.report(g.add("TestMeddle", model=model, kind="clones")(0), second)
    assert texts(comfy.run(g.prompt), shown)[0] == ["True"]


def test_a_report_tells_of_text_that_came_after_the_guard_had_looked(comfy):
    g = Seen()
    model = g.add("TestMeddle", model=g.guarded(strength=0.85), kind="late text", text=g.text(UNSAFE))(0)
    _, shown = g.report(model, g.sampled(g.text(HARMLESS), model))
    assert texts(comfy.run(g.prompt), shown)[0] == ["True"]


@pytest.mark.parametrize("guarded", [False, True])
def test_a_report_of_nothing_is_an_error(comfy, guarded):
    g = Seen()
    g.report(g.guarded(strength=0.86) if guarded else g.demo(0), g.sampled(g.text(UNSAFE), g.demo(0)))
    history = comfy.wait(comfy.queue(g.prompt))
    wanted = "No sampler has used this guarded model" if guarded else "This model has no guard"
    assert history["status"]["status_str"] == "error" and wanted in error_text(history)


@pytest.mark.parametrize("text", [UNSAFE, HARMLESS])
def test_a_prompt_that_opens_the_gate_is_sent_to_a_notice(comfy, object_info, text):
    """As docs/nodes.md tells it: what is not wanted is not drawn either."""
    if "ComfySwitchNode" not in object_info:
        pytest.skip("this ComfyUI has no switch")
    g = Seen()
    steered, _ = g.apply(g.text(text))
    sampled = g.sampled(steered, g.demo(0))
    picture = g.add("VAEDecode", samples=sampled, vae=g.demo(2))(0)
    notice = g.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000)(0)
    shown = g.add("ComfySwitchNode", switch=[steered[0], 1], on_false=picture, on_true=notice)(0)
    g.pictures.append(g.add("PreviewImage", images=shown)()[0])
    prompt = comfy.queue(g.prompt)
    outputs = comfy.wait(prompt)["outputs"]
    ((pixels,),) = g.pixels(comfy, outputs)
    assert (pixels == b"\xff\x00\x00" * 64 * 64) == (text == UNSAFE)


def test_a_node_is_found_by_its_old_name(comfy):
    ((old, new),) = RENAMED.items()
    try:
        (known,) = comfy.get("/node_replacements")[old]
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI knows no old names")
    assert known["new_node_id"] == new
    assert known["old_widget_ids"] == ["strength", "mode", "start", "end", "unknown_text"]
    g = Seen()
    steered, shown = g.apply(g.text(UNSAFE), strength=0.5, unknown_text="refuse")
    for node in g.prompt.values():
        node["_meta"] = {}
    g.prompt[steered[0]]["class_type"] = old
    outputs = comfy.run(g.prompt)
    assert texts(outputs, shown)[2] == ["weapons"] and "strength 0.5" in outputs[steered[0]]["text"][0]
