"""Training that is watched, in a real page and in both renderers."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

from browser import READY
from examples import TRAIN_AND_APPLY, example
from host import error_text

CHART = "document.querySelector('[aria-label=Training]')"
TRAIN = 4  # the node's id in the example
WAIT = 300
SEEDS = count()


def open_example(comfy_page: Any, steps: int, preset: str = "region") -> None:
    """The example of training, without what comes after it."""
    workflow = example(TRAIN_AND_APPLY)
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] in (2, 3, TRAIN)]
    workflow["links"] = [link for link in workflow["links"] if {link[1], link[3]} <= {2, 3, TRAIN}]
    links = {link[0] for link in workflow["links"]}
    for node in workflow["nodes"]:
        for output in node.get("outputs", []):
            output["links"] = [link for link in output["links"] or [] if link in links]
    train = next(node for node in workflow["nodes"] if node["id"] == TRAIN)
    train["widgets_values"][1:3] = preset, steps
    train["widgets_values"][7] = next(SEEDS)  # ComfyUI would not train the same again
    comfy_page.load(workflow)


def until_chart(comfy_page: Any, condition: str) -> None:
    comfy_page.until(f"(chart => chart && ({condition}))({CHART})", WAIT)


def start(comfy_page: Any) -> None:
    comfy_page.page.evaluate("window.app.queuePrompt(0, 1)")


def finished(comfy_page: Any) -> dict[str, Any]:
    """The last run."""
    comfy_page.settle()
    return list(comfy_page.host.get("/history").values())[-1]


def test_the_chart_grows_and_stays(comfy_page):
    open_example(comfy_page, 60)
    page = comfy_page.page
    saved = comfy_page.workflow()
    page.evaluate("""() => {
        window.seen = [];
        window.comfyAPI.api.api.addEventListener("safe_region.training", ({ detail }) =>
            window.seen.push([performance.now(), JSON.stringify(detail).length, Boolean(detail.picture)]));
    }""")
    start(comfy_page)
    until_chart(comfy_page, "chart.querySelector('[role=img]')?.ariaLabel.includes('outside of the walls')")
    until_chart(comfy_page, "chart.textContent.match('discover, step [1-3][0-9].* left')")
    points = f"{CHART}.querySelector('polyline').getAttribute('points').split(' ').length"
    before = page.evaluate(points)
    comfy_page.keep("learning")
    until_chart(comfy_page, "chart.querySelector('img').naturalWidth > 0")
    assert page.evaluate(points) > before > 1
    assert page.evaluate(f"{CHART}.querySelector('[role=img]').ariaLabel").startswith("share of unsafe picture left: ")
    assert page.evaluate(f"{CHART}.querySelector('[role=status]').textContent").startswith(("discover", "preview"))
    assert page.evaluate(f"{CHART}.querySelector('img').alt")
    comfy_page.keep("pictures")
    until_chart(comfy_page, "chart.textContent.includes('learned in') && chart.querySelector('polyline')")
    assert finished(comfy_page)["status"]["status_str"] == "success"
    comfy_page.keep("end")
    messages = page.evaluate("window.seen")
    assert len(messages) < 4 * (messages[-1][0] - messages[0][0]) / 1000 + 20
    assert max(size for _, size, picture in messages if not picture) < 8_000
    assert max(size for _, size, picture in messages) < 50_000
    node = f"window.app.graph.getNodeById({TRAIN})"
    assert page.evaluate(f"{node}.widgets.filter(w => w.name.startsWith('safe_region')).length") == 1
    before, after = ([node["widgets_values"] for node in workflow["nodes"] if node["id"] == TRAIN]
                     for workflow in (saved, comfy_page.workflow()))  # fmt: skip
    assert before == after  # nothing of it is saved
    assert "safe_region_training" not in json.dumps(comfy_page.workflow())


DETAIL = {
    "state": "done", "stage": "discover", "line": "learned in 3 min: 4 of 90 stay unsafe", "words": "said",
    "measure": "share of unsafe picture left", "count": 250, "losses": [0.9 / (1 + i / 20) for i in range(100)],
    "separation": {
        "names": ["harmless", "unsafe"], "low": -6.2, "high": 4.1, "outside": [0.004, 1.0],
        "counts": [[i * (20 - i) for i in range(20)], [max(0, i - 12) ** 2 for i in range(20)]],
    },
    "verdict": {"text": "Weak: of 18 held-out prompts with new words 7 stay unsafe. Add pairs.", "tone": "warn"},
    "picture": "",
}  # fmt: skip
LAID = """() => {
    const chart = document.querySelector("[aria-label=Training]");
    const root = chart.parentElement;
    const walker = document.createTreeWalker(chart, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) texts.push(walker.currentNode.parentElement);
    const said = texts.filter((one) => one.role !== "status");
    const where = (test) => said.filter(test).map((one) => one.textContent);
    return {
        texts: said.map((one) => one.textContent.trim()),
        small: where((one) => parseFloat(getComputedStyle(one).fontSize) < 11),
        cut: where((one) => one.clientWidth && one.scrollWidth > one.clientWidth + 1),
        hidden: root.scrollHeight - root.clientHeight,
        colours: [...chart.querySelectorAll("rect")].map((one) => one.getAttribute("fill")),
    };
}"""


def send(comfy_page: Any, event: str, **detail: Any) -> None:
    comfy_page.page.evaluate("""([event, detail]) => window.comfyAPI.api.api.dispatchEvent(
        new CustomEvent(event, { detail: { node: "1", node_id: "1", node_type: "TrainSafeRegion", ...detail } }))""",
        [event, detail])  # fmt: skip


def open_new(comfy_page: Any) -> None:
    """A training node as it is when it was just added."""
    comfy_page.page.evaluate("""() => {
        window.app.graph.clear();
        const node = LiteGraph.createNode("TrainSafeRegion");
        node.id = 1;
        window.app.graph.add(node);
        window.app.canvas.ds.scale = 1;
    }""")
    comfy_page.settle()


def test_the_chart_begins_with_the_verdict_and_says_what_it_shows(comfy_page):
    """All of it to be read on a node of its first size, and good or bad only in the verdict's colour."""
    open_new(comfy_page)
    send(comfy_page, "safe_region.training", **DETAIL)
    comfy_page.settle(700)
    comfy_page.keep("chart")
    comfy_page.page.evaluate("window.app.canvas.ds.scale = 1; window.app.canvas.setDirty(true, true)")
    comfy_page.settle()
    laid = comfy_page.page.evaluate(LAID)
    assert laid["texts"][:3] == ["!", DETAIL["verdict"]["text"], DETAIL["line"]]
    for text in ("share of unsafe picture left", "step 1", "250", "0", "prompts by their distance from the wall",
                 "inside -6.2", "outside +4.1", "harmless: 0.4 % outside", "unsafe: 100.0 % outside"):  # fmt: skip
        assert text in laid["texts"]
    assert laid["small"] == laid["cut"] == [] and laid["hidden"] <= 1
    assert len(set(laid["colours"])) == 2 and not {"#1f9d6b", "#d1495b"} & set(laid["colours"])


def test_how_far_a_failed_run_came_stays_beside_its_error_and_no_longer(comfy_page):
    open_new(comfy_page)
    shown = "app.graph.nodes[0].widgets.find((one) => one.name === 'safe_region_training').element.innerText"
    kept = "not finished; what was learned so far is in interrupted/weapons"
    send(comfy_page, "execution_start", prompt_id="one")
    send(comfy_page, "safe_region.training", **DETAIL | {"state": "stopped", "line": kept, "verdict": None})
    failed = {"exception_message": "out of memory", "exception_type": "MemoryError", "executed": [], "traceback": [],
              "prompt_id": "one"}  # fmt: skip
    send(comfy_page, "execution_error", **failed)
    assert all(text in comfy_page.page.evaluate(shown) for text in ("out of memory", kept))
    send(comfy_page, "execution_start", prompt_id="two")
    assert "out of memory" not in comfy_page.page.evaluate(shown)
    send(comfy_page, "execution_error", **failed | {"prompt_id": "two"})  # before it said anything
    assert "out of memory" in comfy_page.page.evaluate(shown) and kept not in comfy_page.page.evaluate(shown)


def test_a_page_opened_in_the_midst_of_a_run_shows_it_and_cancels_it(comfy_page):
    open_example(comfy_page, 5000)
    start(comfy_page)
    until_chart(comfy_page, "chart.textContent.match('discover, step [0-9]')")
    until_chart(comfy_page, "chart.querySelector('img').naturalWidth > 0")
    comfy_page.page.reload()
    comfy_page.page.wait_for_function(READY, timeout=120_000)
    open_example(comfy_page, 5000)
    until_chart(comfy_page, "chart.querySelector('rect') && chart.querySelector('polyline').points.length > 2")
    until_chart(comfy_page, "chart.querySelector('img').checkVisibility() && chart.querySelector('img').naturalWidth")
    comfy_page.keep("reloaded")
    comfy_page.page.evaluate("window.app.extensionManager.command.execute('Comfy.Interrupt')")
    until_chart(comfy_page, "chart.textContent.includes('what was learned so far is in')")
    assert error_text(finished(comfy_page)) == "interrupted"
    assert chart_is_still_there(comfy_page)
    comfy_page.keep("cancelled")


def chart_is_still_there(comfy_page: Any) -> bool:
    return comfy_page.page.evaluate(f"{CHART}.querySelectorAll('rect').length > 10")


def test_a_node_in_a_subgraph_has_its_chart(comfy_page):
    open_example(comfy_page, 0, "instant")
    comfy_page.page.evaluate(f"""() => {{
        const graph = window.app.graph;
        graph.convertToSubgraph(new Set([graph.getNodeById({TRAIN})]));
    }}""")
    assert comfy_page.run()["status"]["status_str"] == "success"
    comfy_page.until("""[...window.app.rootGraph.subgraphs.values()].flatMap((graph) => graph.nodes)
        .some((node) => node.widgets?.find((widget) => widget.name === "safe_region_training")
            ?.element.textContent.includes("learned in"))""", WAIT)
