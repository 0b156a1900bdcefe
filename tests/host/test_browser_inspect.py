"""The heat strip on its node, in a real page and both renderers."""

from __future__ import annotations

from itertools import count
from typing import Any

FRESH = count(1)
STRIP = "document.querySelector('[aria-label=\"What the region does to the prompt\"]')"
WORDS = f"[...{STRIP}.querySelectorAll('[role=toolbar] button')]"


def workflow(text: str, drawn: str = "auto") -> dict[str, Any]:
    """The demo model, the demo's region and an inspector, with the prompt as a string of its own."""

    def node(number: int, kind: str, position: list[int], size: list[int], inputs: list, outputs: list, values: list):
        return {"id": number, "type": kind, "pos": position, "size": size, "flags": {}, "order": number, "mode": 0,
                "inputs": inputs, "outputs": outputs, "properties": {}, "widgets_values": values}  # fmt: skip

    def slot(name: str, kind: str, link: int | None = None) -> dict[str, Any]:
        return {"name": name, "type": kind, "link": link}

    def output(name: str, kind: str, *links: int) -> dict[str, Any]:
        return {"name": name, "type": kind, "links": list(links)}

    nodes = [
        node(1, "SafeRegionDemoModel", [40, 60], [240, 90], [],
             [output("model", "MODEL", 1), output("clip", "CLIP", 2), output("vae", "VAE", 3)], []),
        node(2, "SafeRegionLoader", [40, 240], [260, 90], [], [output("region", "SAFE_REGION", 4)],
             ["demo-weapons.safetensors"]),
        node(3, "SafeRegionInspect", [360, 60], [560, 620],
             [slot("clip", "CLIP", 2), slot("region", "SAFE_REGION", 4), slot("model", "MODEL", 1),
              slot("vae", "VAE", 3), slot("conditioning", "CONDITIONING")],
             [output("strip", "IMAGE"), output("report", "STRING"), output("conditioning", "CONDITIONING")],
             [text, 1.0, "auto", drawn]),
    ]  # fmt: skip
    links = [[1, 1, 0, 3, 2, "MODEL"], [2, 1, 1, 3, 0, "CLIP"], [3, 1, 2, 3, 3, "VAE"], [4, 2, 0, 3, 1, "SAFE_REGION"]]
    return {"last_node_id": 3, "last_link_id": 4, "nodes": nodes, "links": links, "groups": [], "config": {},
            "extra": {}, "version": 0.4}  # fmt: skip


def run(page: Any, text: str, drawn: str = "never") -> None:
    page.load(workflow(text, drawn))
    history = page.run()
    assert history["status"]["status_str"] == "success", history["status"]
    page.until(f"{STRIP}?.querySelector('[role=status]')")


def test_an_unsafe_prompt_is_shown_by_its_words(comfy_page):
    run(comfy_page, "a kitchen knife on a (red:1.2) table, <b>bold</b>", "auto")
    page = comfy_page.page
    words = page.evaluate(f"{WORDS}.map(b => b.firstChild.textContent)")
    assert "knife" in words and "(red:1.2)" in words and "<b>bold</b>" in words
    assert page.evaluate(f"{STRIP}.querySelectorAll('b').length") == 0
    colours = page.evaluate(f"Object.fromEntries({WORDS}.map(b => [b.firstChild.textContent,"
                            " getComputedStyle(b.firstChild).backgroundColor]))")  # fmt: skip
    assert colours["knife"] != colours["a"]
    assert "Outside" in page.evaluate(f"{STRIP}.querySelector('[role=status]').textContent")
    page.evaluate(f"{WORDS}.find(b => b.firstChild.textContent === 'knife').focus()")
    said = page.evaluate(f"{STRIP}.querySelector('[role=toolbar]').nextSibling.textContent")
    assert said.startswith("knife: outside, ") and "moved by" in said
    comfy_page.page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.firstChild.textContent") == "on"
    assert page.evaluate(f"{STRIP}.querySelectorAll('img[alt]').length") == 2
    page.wait_for_function(f"[...{STRIP}.querySelectorAll('img')].every(i => i.naturalWidth > 0)")
    assert "safe_region_strip" not in str(comfy_page.workflow())
    comfy_page.keep("unsafe")


def test_running_again_replaces_the_strip_and_inside_is_said(comfy_page):
    run(comfy_page, "a knife")
    comfy_page.page.evaluate("window.app.graph.nodes.find(n => n.type === 'SafeRegionInspect')"
                             ".widgets.find(w => w.name === 'text').value = 'a cup on a table'")  # fmt: skip
    comfy_page.run()
    comfy_page.until(f"{STRIP}.querySelector('[role=status]').textContent.startsWith('Inside: comes out unchanged')")
    assert comfy_page.page.evaluate(f"{STRIP}.querySelectorAll('[role=status]').length") == 1
    comfy_page.keep("inside")


def test_a_long_prompt_keeps_all_its_words(comfy_page):
    text = "a red cup and a blue tree " * 14 + "and a gun"
    run(comfy_page, text)
    words = comfy_page.page.evaluate(f"{WORDS}.map(b => b.firstChild.textContent)")
    assert [word for word in words if word in text.split()] == text.split()
    comfy_page.keep("long")


def test_the_strip_is_there_again_on_coming_back_to_the_tab(comfy_page):
    # with pictures that are in no cache: ComfyUI's page keeps for a tab only what came after the server's answer to Run
    run(comfy_page, "a knife" + " on a table" * next(FRESH), "auto")
    command = "window.app.extensionManager.command.execute"
    comfy_page.page.evaluate(f"{command}('Comfy.NewBlankWorkflow')")
    comfy_page.until(f"!{STRIP}")
    comfy_page.page.evaluate(f"{command}('Workspace.PreviousOpenedWorkflow')")
    comfy_page.until(f"{STRIP}?.querySelector('[role=status]')?.textContent.startsWith('Outside')", 15)
