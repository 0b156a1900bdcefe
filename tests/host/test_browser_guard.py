"""What a guard says on its node, in both renderers: after a run, and when its node comes from the cache."""
from __future__ import annotations

from typing import Any

SHOWN = """() => window.app.graph.nodes[0].widgets.find((one) => one.element && one.name.startsWith("safe_region_"))
    .element.lastChild.innerText.trim()"""


def tell(comfy_page: Any, event: str, **detail: Any) -> str:
    """What the node shows after an event of the server."""
    comfy_page.page.evaluate("""([event, detail]) => {
        const node = String(window.app.graph.nodes[0].id);
        detail = { node, display_node: node, prompt_id: "one", ...detail };
        window.comfyAPI.api.api.dispatchEvent(new CustomEvent(event, { detail }));
    }""", [event, detail])  # fmt: skip
    comfy_page.settle(100)
    return comfy_page.page.evaluate(SHOWN)


def test_a_guard_shows_its_record(comfy_page: Any):
    comfy_page.page.evaluate("""() => {
        window.app.graph.clear();
        window.app.graph.add(LiteGraph.createNode("SafeRegionGuardModel"));
    }""")
    comfy_page.settle()
    waiting = {"heading": "", "text": ["On guard; no sampler has used this model yet."],
               "safe_region_tone": ["neutral"]}  # fmt: skip
    acted = {"heading": "Acted in 3 samplings, last:", "text": ["Sees weapons here: moved."],
             "safe_region_tone": ["warn"]}  # fmt: skip
    output = {"text": ["On guard. What it did is told in safe_region_guard."], "safe_region_tone": ["neutral"]}
    assert tell(comfy_page, "executed", output={**output, "safe_region_guard": [waiting]}) == waiting["text"][0]
    now = tell(comfy_page, "safe_region.status", **acted)
    assert "Acted in 3 samplings, last: Sees weapons here: moved." in now
    assert tell(comfy_page, "executed", output={**output, "safe_region_guard": [acted]}) == now, "from the cache"
