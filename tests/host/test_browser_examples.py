"""The example workflows and the blueprints in a real page, in both renderers; and the pictures for the docs."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pictures
import pytest
from browser import add_blueprint
from examples import (
    APPLY,
    FEW_PAIRS,
    FLUX_TRAIN,
    GUARD,
    NAMES,
    QUICK,
    SDXL,
    TRAIN,
    TRAIN_AND_APPLY,
    TRY_IT,
    TWO_CONCEPTS,
    Workflow,
    changed,
    example,
    on_demo_model,
    slug,
)  # fmt: skip
from host import PACK, to_api
from PIL import Image

MINE = "safe-region"  # the pack's folder
# Training takes longest. Here these are only opened; test_comfyui.py and test_examples.py run them.
TRAINED_ELSEWHERE = {TRAIN, TRAIN_AND_APPLY, SDXL, FLUX_TRAIN}
READABLE = 0.6  # the zoom from which on the classic renderer draws text
SEARCHED = ("nsfw", "safety", "censor", "moderation", "bias", "kids", "remove")
OVERLAPS = """() => {
    const nodes = window.app.graph.nodes.map((node) => [node.title, ...node.boundingRect]);
    const apart = ([, x, y, w, h], [, u, v, p, q]) => x + w <= u || u + p <= x || y + h <= v || v + q <= y;
    const over = (one, others) => others.filter((other) => !apart(one, other)).map((other) => [one[0], other[0]]);
    return nodes.flatMap((one, i) => over(one, nodes.slice(i + 1)));
}"""  # fmt: skip
REPORTING = {"SafeRegionBalance", "SafeRegionPromptPairs", "SaveSafeRegion"}
REPORTS = "[...document.querySelectorAll('[role=status]')].filter((one) => one.textContent && one.checkVisibility())"
UNKNOWN = "window.app.graph.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type])"


@pytest.fixture(scope="module")
def page_info(page_host: Any) -> dict[str, Any]:
    return page_host.get("/object_info")


@pytest.fixture(scope="module", autouse=True)
def model_files(page_host: Any) -> None:
    """Empty files in place of real models, and regions, so that nothing is missing when their examples are opened."""
    models, given = page_host.base / "models", PACK / "demo" / "regions"
    (models / "safe_regions").mkdir(exist_ok=True)
    for node in (node for name in NAMES for node in example(name)["nodes"]):
        for file in node["properties"].get("models", []):
            (models / file["directory"]).mkdir(parents=True, exist_ok=True)
            (models / file["directory"] / file["name"]).touch()
        if node["type"] == "SafeRegionLoader" and not (given / (name := node["widgets_values"][0])).exists():
            shutil.copy(given / "demo-weapons.safetensors", models / "safe_regions" / name)


def drawn(page: Any, history: dict[str, Any], workflow: Workflow) -> list[list[Image.Image]]:
    """The pictures of each preview but of reports, in the order of the nodes."""
    outputs = history["outputs"]
    return [[Image.open(io.BytesIO(page.host.image(image))) for image in outputs[str(node["id"])]["images"]]
            for node in workflow["nodes"]
            if node["type"] == "PreviewImage" and "Report" not in node["title"]]  # fmt: skip


def test_the_template_browser_is_given_all_of_them(page_host):
    assert sorted(page_host.get("/workflow_templates")[MINE]) == NAMES
    for name in map(quote, NAMES):
        assert page_host.request(f"/api/workflow_templates/{MINE}/{name}.jpg").startswith(b"\xff\xd8")
        assert page_host.get(f"/api/workflow_templates/{MINE}/{name}.json") == example(unquote(name))


def test_the_template_browser_shows_finds_and_opens_them(comfy_page):
    page = comfy_page.page
    page.set_viewport_size({"width": 1920, "height": 1080})
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    for word in SEARCHED:
        dialog.get_by_role("textbox").or_(dialog.get_by_role("searchbox")).first.fill(word)
        found = [name for name in NAMES if word in name.lower()]
        for name in found:
            dialog.get_by_text(name).first.wait_for()
    comfy_page.keep("templates", fit=False)
    dialog.get_by_role("textbox").or_(dialog.get_by_role("searchbox")).first.fill("try it nsfw")
    card = dialog.get_by_text(TRY_IT).first
    card.wait_for()
    comfy_page.until("[...document.images].some((one) => one.alt.includes('Try it') && one.naturalWidth === 520)")
    comfy_page.settle()
    for _ in range(4):  # a busy page may lay its cards anew just then, and miss a click
        if card.is_visible():
            card.click()
        if comfy_page.within(15, "window.app.graph.nodes.some((node) => node.type === 'SafeRegionDemoModel')"):
            break
    else:
        pytest.fail("the template was not opened")
    comfy_page.settle(1500)
    assert page.evaluate("window.app.canvas.ds.scale") >= READABLE


@pytest.mark.parametrize("name", NAMES)
def test_an_example_opens_and_runs(comfy_page, page_info, name):
    comfy_page.page.set_viewport_size({"width": 1920, "height": 1080})
    comfy_page.load(example(name))
    assert comfy_page.page.evaluate(UNKNOWN) == []
    comfy_page.until(f"({OVERLAPS})().length === 0")  # older frontends make room for Nodes 2.0 in a while
    assert comfy_page.page.locator("[role=dialog]").count() == 0
    assert comfy_page.page.evaluate("window.app.canvas.ds.scale") >= READABLE
    comfy_page.keep(f"{slug(name)}-opened", fit=False)
    workflow = on_demo_model(example(name), page_info)
    if (not comfy_page.vue if pictures.FOLDER else
            name in TRAINED_ELSEWHERE or (not comfy_page.vue and name == TWO_CONCEPTS)):  # fmt: skip
        return
    quick = {} if pictures.FOLDER else QUICK | FEW_PAIRS  # a picture must be good
    workflow = changed(workflow, page_info, quick)
    comfy_page.load(workflow)
    assert asked(comfy_page.prompt()) == asked(to_api(workflow, page_info)), "the page expands subgraphs otherwise"
    history = comfy_page.run(timeout=3000)
    assert history["status"]["status_str"] == "success"
    comfy_page.until(f"{REPORTS}.length >= {sum(node['type'] in REPORTING for node in workflow['nodes'])}")
    comfy_page.keep(slug(name))
    if pictures.FOLDER:
        take(comfy_page, name, drawn(comfy_page, history, workflow), pictures.FOLDER)


def asked(prompt: dict[str, Any]) -> dict[str, Any]:
    """What a prompt asks of samplers and what hangs on them, wherever they stand."""
    return {name: node["inputs"] for name, node in prompt.items()
            if node["class_type"] in ("KSampler", "EmptyLatentImage", "VAEDecode")}  # fmt: skip


def take(page: Any, name: str, previews: list[list[Image.Image]], folder: Path) -> None:
    """Write the pictures of one example."""
    for kind, where in pictures.NODES.items():
        if where == name:
            pictures.save(pictures.node_picture(page, kind), folder / "web" / "docs" / "images" / f"{kind}.png")
    if kind := pictures.NODE_THUMBNAILS.get(name):
        previews = [[pictures.node_picture(page, kind)]]
    pictures.save(pictures.thumbnail(name, previews), folder / "example_workflows" / f"{name}.jpg")
    if name == TRY_IT:
        pictures.save(pictures.graph_picture(page), folder / "docs" / "images" / f"workflow_{slug(name)}.jpg")


@pytest.mark.parametrize("kind", [kind for kind, name in pictures.NODES.items() if name is None])
def test_a_node_that_is_in_no_example(comfy_page, kind):
    comfy_page.page.evaluate("""(kind) => {
        window.app.graph.clear();
        window.app.graph.add(LiteGraph.createNode(kind));
    }""", kind)  # fmt: skip
    pictured = pictures.node_picture(comfy_page, kind)
    assert len(pictured.convert("L").resize((40, 40)).getcolors()) > 8, "an empty picture"
    if pictures.FOLDER and comfy_page.page.evaluate("window.LiteGraph.vueNodesMode"):
        pictures.save(pictured, pictures.FOLDER / "web" / "docs" / "images" / f"{kind}.png")


def halves_are_the_same(pictures_: list[Image.Image]) -> list[bool]:
    return [np.array_equal(one[:, : one.shape[0]], one[:, -one.shape[0] :]) for one in map(np.asarray, pictures_)]


def test_the_blueprint_replaces_the_text_encoder_in_one_step(comfy_page, page_info):
    """Its picture is the very one that CLIP Text Encode and Apply Safe Region give."""
    workflow = changed(example(APPLY), page_info, QUICK)
    comfy_page.load(workflow)
    add_blueprint(comfy_page, "Safe Text Encode")
    comfy_page.page.evaluate("""() => {
        const named = (title) => window.app.graph.nodes.find((node) => node.title === title);
        const one = named('Safe Text Encode');
        one.widgets.find((widget) => widget.name === 'text').value = named('First prompt').widgets[0].value;
        named('Safe Region Demo Model').connect(1, one, 0);
        one.connect(0, named('Compare Without and With Region'), 'without_region');
    }""")
    history = comfy_page.run()
    assert history["status"]["status_str"] == "success"
    first, _ = drawn(comfy_page, history, workflow)
    assert all(halves_are_the_same(first))


def test_the_blueprint_compares_without_and_with_a_region(comfy_page):
    """In a graph that has none, put between Apply Safe Region and a preview."""
    workflow = example(TRY_IT)
    comfy_page.load(workflow)
    comfy_page.page.evaluate("""() => {
        const { graph } = window.app;
        graph.remove(graph.nodes.find((node) => node.title === 'Compare Without and With Region'));
    }""")
    add_blueprint(comfy_page, "Compare Without and With Region")
    comfy_page.page.evaluate("""() => {
        const named = (title) => window.app.graph.nodes.find((node) => node.title === title);
        const one = named('Compare Without and With Region'), model = named('Safe Region Demo Model');
        ['model', 'clip', 'vae'].forEach((name, i) => model.connect(i, one, name));
        named('Prompt').connect(0, one, 'without_region');
        named('Apply Safe Region').connect(0, one, 'with_region');
        one.connect(0, named('Without | with the region'), 0);
        const values = { steps: 2, width: 128, height: 128, batch_size: 3 };
        Object.entries(values).forEach(([name, value]) => {
            one.widgets.find((widget) => widget.name === name).value = value;
        });
    }""")
    history = comfy_page.run()
    assert history["status"]["status_str"] == "success"
    (pairs,) = drawn(comfy_page, history, workflow)
    assert halves_are_the_same(pairs) == [False] * 3


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_notes_are_readable(comfy_page, theme):
    """Its text stands out from the note, by WCAG's measure, as the page draws them."""
    page = comfy_page.page
    page.evaluate("(theme) => window.app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
    comfy_page.load(example(TRY_IT))
    left, top = 300, 300
    width, height = pictures.show(comfy_page, "MarkdownNote", 2, left, top)
    note = pictures.cut(comfy_page, left + 20, top + 80, left + width - 20, top + min(height, 400))
    page.evaluate("window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    levels = np.asarray(note.convert("RGB"), dtype=float) / 255
    linear = np.where(levels <= 0.04, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    paper = np.median(linear)
    ink = max(np.quantile(linear, [0.002, 0.998]), key=lambda one: abs(one - paper))
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5


def test_the_help_panel_shows_pages_with_their_pictures(comfy_page):
    comfy_page.load(example(GUARD))
    page = comfy_page.page
    pictures.show(comfy_page, "SafeRegionGuardModel", 1, 500, 400)
    page.evaluate("""() => {
        const { canvas, graph } = window.app;
        canvas.selectNode(graph.nodes.find((node) => node.type === "SafeRegionGuardModel"));
        canvas.setDirty(true, true);
    }""")
    page.get_by_test_id("info-button").first.click()
    page.get_by_text("Use it where a workflow must not").first.wait_for()
    comfy_page.until("[...document.images].some((one) => one.src.endsWith('/docs/images/SafeRegionGuardModel.png') "
                     "&& one.naturalWidth > 100)")  # fmt: skip
