"""The guarded blueprints in a real page, in both renderers: found by a search, put into the graph, what they ask."""

from __future__ import annotations

from typing import Any

import pytest
from browser import add_blueprint
from examples import GUARDED, with_region
from host import to_api

EMPTY = {"id": "4a1a4a52-95b4-4f0e-8d0e-0d6f2c6ac6a1", "revision": 0, "last_node_id": 0, "last_link_id": 0, "nodes": [],
         "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4}  # fmt: skip
CONNECT = """(name) => {
    const { graph } = window.app;
    const [loader, shown] = ["SafeRegionLoader", "PreviewAny"].map((kind) => LiteGraph.createNode(kind));
    const one = graph.nodes.find((node) => node.title === name);
    [loader.pos, shown.pos] = [[one.pos[0] - 460, one.pos[1]], [one.pos[0] + 520, one.pos[1]]];
    graph.add(loader);
    graph.add(shown);
    loader.connect(0, one, "region");
    one.connect("opened", shown, 0);
}"""
ENTER = """(name) => {
    const one = window.app.graph.nodes.find((node) => node.title === name);
    window.app.canvas.openSubgraph(one.subgraph, one);
}"""


@pytest.fixture(scope="module", autouse=True)
def model_files(page_host: Any) -> None:
    """Empty files in place of real models, so that nothing is missing."""
    inner = (with_region(name)["definitions"]["subgraphs"][0] for name in GUARDED)
    for file in (file for graph in inner for node in graph["nodes"] for file in node["properties"].get("models", [])):
        folder = page_host.base / "models" / file["directory"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file["name"]).touch()


def asked(prompt: dict[str, Any], known: set[tuple[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """Kinds of nodes and the values of their known widgets, whichever names the nodes have, but for seeds."""
    return sorted(((node["class_type"], {name: value for name, value in node["inputs"].items()
                                         if (node["class_type"], name) in known and not isinstance(value, list)
                                         and not name.endswith("seed")})
                   for node in prompt.values()), key=str)  # fmt: skip


def seeds(prompt: dict[str, Any]) -> list[int]:
    """Of what draws the first noise."""
    return [value for node in prompt.values() if node["inputs"].get("add_noise") != "disable"
            for name, value in node["inputs"].items() if name.endswith("seed")]  # fmt: skip


@pytest.mark.parametrize("name", GUARDED)
def test_is_found_and_asks_what_it_says(comfy_page, page_host, name):
    page = comfy_page.page
    page.set_viewport_size({"width": 1920, "height": 1080})
    comfy_page.load(EMPTY)
    add_blueprint(comfy_page, name)
    page.evaluate(CONNECT, name)
    comfy_page.keep(f"blueprint-{name}")
    expected = to_api(with_region(name), page_host.get("/object_info"))
    known = {(node["class_type"], key) for node in expected.values() for key in node["inputs"]}  # newer nodes have more
    assert asked(comfy_page.prompt(), known) == asked(expected, known)

    sent = []

    def accept(route: Any) -> None:
        sent.append(route.request.post_data_json["prompt"])
        route.fulfill(json={"prompt_id": "1", "number": 1, "node_errors": {}})

    page.route("**/prompt", accept)
    for _ in range(3):
        page.evaluate("window.app.queuePrompt(0, 1)")
    assert [asked(prompt, known) for prompt in sent] == [asked(expected, known)] * 3
    assert len({seed for prompt in sent for seed in seeds(prompt)}) == 3, "every Run draws another picture"

    page.evaluate(ENTER, name)
    comfy_page.until("window.app.canvas.graph.nodes.some((node) => node.type === 'SafeRegionGuardModel')")
    comfy_page.keep(f"inside-{name}")
