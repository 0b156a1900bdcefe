"""What our nodes say on themselves, in both renderers: status and tone, errors, text that is not used, fresh seeds."""

from __future__ import annotations

import json
from typing import Any

import pytest

SAID = ["SafeRegionBalance", "SafeRegionCombine", "SafeRegionConditioning", "SafeRegionGuardModel",
        "SafeRegionGuardReport", "SafeRegionPromptPairs", "SaveSafeRegion"]  # fmt: skip
NODES = [*SAID, "SafeRegionDemoModel", "SafeRegionInspect", "SafeRegionLoader", "TrainBalanceRegion", "TrainSafeRegion"]
TRAIN = ["TrainBalanceRegion", "TrainSafeRegion"]
TEXTS = ["outside at \"knife\", moved", "すべてのプロンプトは領域の内側にあります。何も変わりません 🔫🌷",
         "This region is weak: 40 % of prompts with new words stay unsafe. Train with more pairs, or another seed.",
         "saved: /home/someone/" + "a-very-long-name-without-a-space-" * 4 + ".safetensors"]  # fmt: skip
MARKS = {"good": "✓", "warn": "!", "bad": "✗", "neutral": ""}
SENTENCE = "This text encoder has 768 numbers a token, the region wants 1280: train one on this model."
# What is seen of a node's panel: where, and its two halves.
PANEL = """(kind) => {
    const node = window.app.graph.nodes.find((one) => one.type === kind);
    const root = node.widgets.find((one) => one.element && one.name.startsWith("safe_region_")).element;
    const [alert, note, content] = root.children;
    const text = (part) => (part?.checkVisibility() ? part.innerText.trim() : "");
    return { alert: text(alert), note: text(note), content: text(content) };
}"""
CONTRAST = """() => {
    const numbers = (colour) => {
        const shown = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
        shown.fillStyle = colour;
        shown.fillRect(0, 0, 1, 1);
        return [...shown.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255);
    };
    const light = (colour) => numbers(colour)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    return window.app.graph.nodes.map((node) => {
        const root = node.widgets.find((one) => one.name === "safe_region_status").element;
        const text = root.lastChild.firstChild;
        const [high, low] = [getComputedStyle(text).color, getComputedStyle(root).backgroundColor].map(light)
            .sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    });
}"""  # fmt: skip


def place(comfy_page: Any, kinds: list[str], width: int = 0) -> None:
    """Nodes of these kinds, new, beside each other."""
    comfy_page.page.evaluate("""([kinds, width]) => {
        window.app.graph.clear();
        kinds.forEach((kind, i) => {
            const node = LiteGraph.createNode(kind);
            node.pos = [(i % 3) * 430, Math.floor(i / 3) * 480];
            if (width) node.setSize([width, node.size[1]]);
            window.app.graph.add(node);
        });
    }""", [kinds, width])  # fmt: skip
    comfy_page.settle()


def tell(comfy_page: Any, event: str, kind: str, **detail: Any) -> None:
    """What the server would send about the node of this kind."""
    comfy_page.page.evaluate("""([event, kind, detail]) => {
        const node = String(window.app.graph.nodes.find((one) => one.type === kind).id);
        detail = { node, display_node: node, node_id: node, node_type: kind, prompt_id: "one", ...detail };
        window.comfyAPI.api.api.dispatchEvent(new CustomEvent(event, { detail }));
    }""", [event, kind, detail])  # fmt: skip


def fail(comfy_page: Any, kind: str) -> None:
    tell(comfy_page, "execution_error", kind, exception_type="comfyui_safe_region.region.region.RegionError",
         exception_message=f"comfyui_safe_region.region.region.RegionError: {SENTENCE}\n", executed=[], traceback=[],
         current_inputs={}, current_outputs=[])  # fmt: skip


def seen(comfy_page: Any, kind: str) -> dict[str, str]:
    return comfy_page.page.evaluate(PANEL, kind)


def close_dialogs(comfy_page: Any) -> None:
    comfy_page.page.keyboard.press("Escape")
    comfy_page.settle()


def test_a_status_is_said_by_mark_and_colour(comfy_page):
    place(comfy_page, SAID, width=240)
    empty = {kind: seen(comfy_page, kind)["content"] for kind in SAID}
    assert set(empty.values()) == {""}
    expected = {}
    for i, kind in enumerate(SAID):
        tone, text = list(MARKS)[i % 4], TEXTS[i % 4]
        if i % 2:
            tell(comfy_page, "safe_region.status", kind, text=[text], safe_region_tone=[tone])
        else:
            tell(comfy_page, "executed", kind, output={"text": [text], "safe_region_tone": [tone]})
        expected[kind] = f"{MARKS[tone]}{text}"
    for theme in ("dark", "light"):
        comfy_page.page.evaluate("theme => window.app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        comfy_page.settle(700)
        comfy_page.keep(f"status-{theme}")
        assert min(comfy_page.page.evaluate(CONTRAST)) >= 4.5
    comfy_page.page.evaluate("window.app.canvas.ds.scale = 1; window.app.canvas.setDirty(true, true)")
    comfy_page.settle()
    for kind in SAID:
        shown = comfy_page.page.evaluate("""(kind) => {
            const root = window.app.graph.nodes.find((one) => one.type === kind).widgets
                .find((one) => one.name === "safe_region_status").element;
            const cut = [root.scrollHeight - root.clientHeight, root.scrollWidth - root.clientWidth];
            return [root.lastChild.textContent, ...cut];
        }""", kind)  # fmt: skip
        assert shown[0] == expected[kind]
        assert max(shown[1:]) <= 1, f"{kind}: the text is cut"


@pytest.mark.parametrize("kind", NODES)
def test_an_error_takes_the_place_of_a_result(comfy_page, kind):
    place(comfy_page, [kind])
    if kind == "SafeRegionLoader":
        comfy_page.until(f"({PANEL})('{kind}').content.includes('hash')")  # the card asks the server about the file
    before = seen(comfy_page, kind)["content"]
    if kind in SAID:
        tell(comfy_page, "executed", kind, output={"text": ["a result"]})
        assert seen(comfy_page, kind)["content"] == "a result"
    elif kind in TRAIN:
        tell(comfy_page, "executed", kind, output={"text": ["a result"], "safe_region_verdict": [
            {"text": "good", "tone": "good"}]})  # fmt: skip
        assert seen(comfy_page, kind)["content"].split() == ["✓", "good", "a", "result"]
    fail(comfy_page, kind)
    close_dialogs(comfy_page)
    failed = seen(comfy_page, kind)
    assert failed["alert"].replace("\n", "") == f"✗{SENTENCE}"
    assert kind == "SafeRegionLoader" or not failed["content"]  # the card says how the file is now
    tell(comfy_page, "execution_start", kind)
    assert seen(comfy_page, kind)["alert"] == ""
    comfy_page.until(f"({PANEL})('{kind}').content === {json.dumps(before)}")


def pairs_node(comfy_page: Any, text: str, file: str = "none") -> None:
    comfy_page.page.evaluate("""([text, file]) => {
        const node = window.app.graph.nodes.find((one) => one.type === "SafeRegionPromptPairs");
        node.widgets.find((one) => one.name === "text").value = text;
        node.widgets.find((one) => one.name === "file").value = file;
    }""", [text, file])  # fmt: skip


def test_the_servers_own_errors_stand_on_the_node_until_the_next_run(comfy_page):
    """One that a run ends with, and one for which the server refuses it."""
    kind = "SafeRegionPromptPairs"
    place(comfy_page, [kind, "PreviewAny"])
    comfy_page.page.evaluate("""() => {
        const [pairs, preview] = window.app.graph.nodes;
        pairs.connect(1, preview, 0);
    }""")
    alert = """document.querySelectorAll("[role=alert] ") && [...document.querySelectorAll("[role=alert]")]
        .some((one) => one.checkVisibility() && one.textContent.includes(%r))"""
    for good, bad, said in (
        ("a gun => a cup", ("nothing at all",), "nothing at all"),
        ("a knife => a cup", ("a gun => a hat", "gone.txt"), '"gone.txt" is no .txt, .csv or .jsonl file'),
    ):
        pairs_node(comfy_page, good)
        assert comfy_page.run()["status"]["status_str"] == "success"
        comfy_page.until(f"({PANEL})('{kind}').content.startsWith('1 pairs, ')")
        pairs_node(comfy_page, *bad)
        comfy_page.page.evaluate("window.app.queuePrompt(0, 1)")
        comfy_page.until(alert % said)
        close_dialogs(comfy_page)
        comfy_page.keep(f"error-{said.split()[0].strip(chr(34))}")
        shown = seen(comfy_page, kind)
        assert shown["content"] == "" and "Error" not in shown["alert"] and "file - " not in shown["alert"]
        assert shown["alert"].count(said) == 1
    pairs_node(comfy_page, "a knife => a cup")  # which ComfyUI has in its cache, and does not report again
    assert comfy_page.run()["status"]["status_str"] == "success"
    comfy_page.until(f"({PANEL})('{kind}').content.startsWith('1 pairs, ')")
    assert seen(comfy_page, kind)["alert"] == ""
    assert comfy_page.page.locator("body").inner_text().count("1 pairs, ") == 1  # ComfyUI's page says it nowhere else


def test_an_error_in_a_subgraph_stands_on_its_own_node(comfy_page):
    place(comfy_page, ["SafeRegionCombine"])
    inner = comfy_page.page.evaluate("""() => {
        const graph = window.app.graph;
        const { node } = graph.convertToSubgraph(new Set([graph.nodes[0]]));
        return `${node.id}:${node.subgraph.nodes[0].id}`;
    }""")
    comfy_page.page.evaluate("""([node_id, message]) => window.comfyAPI.api.api.dispatchEvent(
        new CustomEvent("execution_error", { detail: { node_id, node_type: "SafeRegionCombine", prompt_id: "one",
            executed: [], exception_message: message, exception_type: "ValueError", traceback: [] } }))""",
        [inner, SENTENCE])  # fmt: skip
    assert comfy_page.page.evaluate("""() => [...window.app.rootGraph.subgraphs.values()][0].nodes[0].widgets
        .find((one) => one.name === "safe_region_status").element.firstChild.textContent""") == f"✗{SENTENCE}"


@pytest.mark.parametrize(("kind", "name"), [("SafeRegionPromptPairs", "pack"), ("TrainBalanceRegion", "pack")])
def test_a_text_box_that_is_not_used_is_dimmed(comfy_page, kind, name):
    place(comfy_page, [kind])
    page = comfy_page.page
    saved = comfy_page.workflow()["nodes"][0]
    box = "[...document.querySelectorAll('textarea')].find((one) => one.checkVisibility())"
    choose = """([name, value]) => {
        const combo = window.app.graph.nodes[0].widgets.find((one) => one.name === name);
        combo.value = value ?? combo.options.values[1];
        combo.callback(combo.value);
        return combo.value;
    }"""
    plain, dimmed = (f"{box} && getComputedStyle({box}).opacity === '{opacity}'" for opacity in ("1", "0.4"))
    comfy_page.until(plain)
    assert seen(comfy_page, kind)["note"] == ""
    chosen = page.evaluate(choose, [name, None])
    comfy_page.until(dimmed)
    assert seen(comfy_page, kind)["note"] == f"The text box is not used: the {name} {chosen} is."
    comfy_page.keep(f"unused-{kind}")
    comfy_page.load(comfy_page.workflow())  # as it is opened again
    comfy_page.until(dimmed)
    assert seen(comfy_page, kind)["note"]
    page.evaluate(choose, [name, "none"])
    comfy_page.until(plain)
    assert seen(comfy_page, kind)["note"] == ""
    again = comfy_page.workflow()["nodes"][0]
    assert (again["widgets_values"], again["properties"]) == (saved["widgets_values"], saved["properties"])


@pytest.mark.parametrize("kind", TRAIN)
def test_a_new_node_that_trains_has_a_fixed_seed_and_a_saved_one_its_own(comfy_page, kind):
    place(comfy_page, [kind])
    control = "window.app.graph.nodes[0].widgets.find((one) => one.name === 'seed').linkedWidgets[0].value"
    assert comfy_page.page.evaluate(control) == "fixed"
    workflow = comfy_page.workflow()
    values = workflow["nodes"][0]["widgets_values"]
    values[values.index("fixed")] = "increment"
    comfy_page.load(workflow)
    assert comfy_page.page.evaluate(control) == "increment"
