"""The region card in a real page, in both renderers: what it shows, and what its buttons and a dropped file do."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from host import PACK

from comfyui_safe_region.nodes.names import safe_name
from comfyui_safe_region.region import Move, Part, Region, load_region, region_bytes

DEMO = "demo-weapons.safetensors"
CARD = '[aria-label="Region card"]'
HTML = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script><svg onload="window.harmed=1">'


def flow(name: Any, *carried: Any) -> dict[str, Any]:
    """A loader and a node that shows its region."""
    loader = {"id": 1, "type": "SafeRegionLoader", "pos": [200, 150], "size": [320, 360], "flags": {}, "order": 0,
              "mode": 0, "inputs": [], "outputs": [{"name": "region", "type": "SAFE_REGION", "links": [1]}],
              "properties": {}, "widgets_values": [name, *carried]}  # fmt: skip
    shown = {"id": 2, "type": "PreviewAny", "pos": [700, 150], "size": [200, 80], "flags": {}, "order": 1, "mode": 0,
             "inputs": [{"name": "source", "type": "*", "link": 1}], "outputs": [], "properties": {},
             "widgets_values": []}  # fmt: skip
    return {"version": 0.4, "last_node_id": 2, "last_link_id": 1, "nodes": [loader, shown],
            "links": [[1, 1, 0, 2, 0, "SAFE_REGION"]], "groups": [], "config": {}, "extra": {}}  # fmt: skip


def demo(**metadata: Any) -> bytes:
    region = load_region(PACK / "demo" / "regions" / DEMO)
    return region_bytes(replace(region, metadata=region.metadata | metadata))


def values_of(workflow: dict[str, Any]) -> list[Any]:
    """What the loader's widgets are saved with."""
    return next(node["widgets_values"] for node in workflow["nodes"] if node["id"] == 1)


class Card:
    """The loader of `flow` in the page."""

    def __init__(self, comfy_page: Any) -> None:
        self.comfy, self.page = comfy_page, comfy_page.page
        self.folder = comfy_page.host.base / "models" / "safe_regions"

    def open(self, name: Any, *carried: Any) -> None:
        self.comfy.load(flow(name, *carried))

    def shows(self, *texts: str) -> None:
        """Wait until the card shows the texts."""
        self.page.wait_for_function(
            "([card, texts]) => texts.every(t => document.querySelector(card)?.textContent.includes(t))",
            arg=[CARD, texts], timeout=30_000,
        )  # fmt: skip

    def press(self, label: str) -> None:
        self.page.locator(f"{CARD} button", has_text=label).first.click()

    def labels(self) -> list[str]:
        return self.page.locator(f"{CARD} button").all_text_contents()

    def values(self) -> list[Any]:
        return values_of(self.comfy.workflow())

    def carried(self) -> dict[str, Any]:
        return json.loads(self.values()[1])

    def runs(self) -> bool:
        return self.comfy.run()["status"]["status_str"] == "success"

    def refused(self) -> str:
        """Press Run where the server refuses; what it says about the loader."""
        known = set(self.comfy.host.get("/history"))
        self.page.evaluate("window.app.queuePrompt(0, 1)")
        self.comfy.until("window.app.lastNodeErrors && Object.keys(window.app.lastNodeErrors).length > 0", 30)
        assert set(self.comfy.host.get("/history")) == known
        said = self.page.evaluate("JSON.stringify(window.app.lastNodeErrors)")
        self.page.keyboard.press("Escape")
        self.comfy.settle()
        return said

    def answer(self, confirm: bool) -> None:
        """Answer the dialog."""
        dialog = self.page.get_by_role("dialog").last
        dialog.wait_for(timeout=10_000)
        dialog.get_by_role("button", name="Confirm" if confirm else "Cancel").click()
        dialog.wait_for(state="hidden", timeout=10_000)

    def choose_file(self, name: str, content: bytes) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.press("Upload…")
        chooser.value.set_files({"name": name, "mimeType": "application/octet-stream", "buffer": content})

    def drop(self, name: str, content: bytes, on_card: bool) -> None:
        """Drop a file on the card, or on the title of the node."""
        self.page.evaluate(
            """([name, data, selector, onCard]) => {
              const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], name));
              const node = app.graph.getNodeById(1), at = app.canvas.ds.convertOffsetToCanvas
                ? app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 160, node.pos[1] - 12]) : [0, 0];
              const frame = app.canvas.canvas.getBoundingClientRect();
              const place = { clientX: frame.left + at[0], clientY: frame.top + at[1] };
              const target = onCard ? document.querySelector(selector)
                : document.elementFromPoint(place.clientX, place.clientY);
              for (const kind of ["dragenter", "dragover", "drop"])
                target.dispatchEvent(
                  new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true, ...place }));
            }""",
            [name, base64.b64encode(content).decode(), CARD, on_card],
        )


@pytest.fixture
def card(comfy_page: Any) -> Card:
    return Card(comfy_page)


def test_the_card_shows_the_region_and_follows_the_list(card):
    card.open(DEMO)
    card.shows("weapons", "Safe Region demo CLIP", "held-out words 100% → 0%", "at most 1.2% of prompts")
    card.comfy.keep("card", fit=False)
    assert card.carried() == {"name": DEMO, "sha256": card.carried()["sha256"]} and len(card.carried()["sha256"]) == 64
    assert card.labels() == ["Upload…", "Embed in workflow"]
    assert card.page.locator(f"{CARD} img").evaluate("image => image.naturalWidth") == 256
    # with the keyboard alone
    card.page.locator(f"{CARD} [tabindex='0']").focus()
    for label in card.labels():
        card.page.keyboard.press("Tab")
        assert card.page.evaluate("document.activeElement.textContent") == label
    card.page.evaluate(
        """() => { const combo = app.graph.getNodeById(1).widgets[0];
          combo.value = "demo-gender.safetensors"; combo.callback(combo.value); }"""
    )
    card.shows("gender", "draws man 50%, woman 50%")
    assert card.carried()["name"] == "demo-gender.safetensors"
    assert card.runs()


LONG = "Weak: of 18 held-out prompts with new words 7 stay unsafe. Train with more pairs, or with another seed."
PLACES = """(card) => {
    const about = document.querySelector(card).querySelector("[tabindex='0']");
    const frame = about.getBoundingClientRect();
    return [...about.children].filter((one) => one.textContent.trim())
        .map((one) => [one.innerText.replaceAll("\\n", ""), one.getBoundingClientRect().bottom <= frame.bottom + 1]);
}"""


def test_what_matters_stands_first_and_is_seen_without_scrolling(card, request):
    """On a node of its first size, with a long verdict."""
    name = f"first-{request.node.callspec.id}.safetensors"
    texts = {"name": "knives and more", "description": "d" * 300, "created": "2026-11-26", "author": ""}
    (card.folder / name).write_bytes(demo(**texts))
    words = {"verdict": {"text": LONG, "tone": "warn"}, "unfinished": "120 of 250 steps",
             "checkpoint": "sdxl_base.safetensors", "base_model": "SDXL", "effect": "held-out words 100% → 39%",
             "harmless_touched": "touches at most 1.0% of harmless prompts like those of its calibration"}  # fmt: skip

    def told(route: Any) -> None:
        reply = route.fetch().json()
        route.fulfill(json=reply | {"card": reply["card"] | words})

    card.page.route("**/safe_region/card", told)
    workflow = flow(name)
    workflow["nodes"][0].pop("size")
    card.comfy.load(workflow)
    card.shows(LONG)
    card.page.evaluate("app.canvas.ds.scale = 1; app.canvas.setDirty(true, true)")
    card.comfy.settle()
    card.comfy.keep("order", fit=False)
    places = card.page.evaluate(PLACES, CARD)
    first = [f"!{LONG}", "!120 of 250 steps", "knives and more", "effect held-out words 100% → 39%",
             "harmless touches at most 1.0%", "model sdxl_base (SDXL)"]  # fmt: skip
    assert [text[: len(wanted)] for (text, _), wanted in zip(places, first)] == first
    assert all(seen for _, seen in places[: len(first)])
    assert "made on 2026-11-26" in [text for text, _ in places]


def test_the_list_says_what_each_file_is(card):
    card.open(DEMO)
    card.shows("weapons")
    combo = "app.graph.getNodeById(1).widgets[0]"
    card.comfy.until(f"{combo}.options.getOptionLabel('{DEMO}') === 'demo-weapons · weapons · Safe Region demo CLIP'")
    label = "demo-gender · gender · Safe Region demo CLIP · balance · weak"
    assert card.page.evaluate(f"{combo}.options.getOptionLabel('demo-gender.safetensors')") == label
    if card.comfy.vue:
        return  # where Nodes 2.0 shows other words than values, it asks the same function
    place = card.page.evaluate("""() => {
        const { pos: [x, y], widgets: [combo] } = app.graph.getNodeById(1);
        return app.canvas.ds.convertOffsetToCanvas([x + 160, y + combo.y + 10]);
    }""")
    card.page.mouse.click(*place)
    card.page.locator(".litemenu-entry", has_text=label).click()
    card.comfy.until(f"{combo}.value === 'demo-gender.safetensors'")


def test_a_saved_region_is_listed_at_once(card, request):
    name = f"just saved {request.node.callspec.id}"  # else ComfyUI would not save again for the second renderer
    workflow = flow(DEMO)
    saving = {"id": 2, "type": "SaveSafeRegion", "pos": [700, 150], "size": [320, 300], "flags": {}, "order": 1,
              "mode": 0, "inputs": [{"name": "region", "type": "SAFE_REGION", "link": 1}], "outputs": [],
              "properties": {}, "widgets_values": [name, "", "", "", True, ""]}  # fmt: skip
    workflow["nodes"][1] = saving
    card.comfy.load(workflow)
    assert card.runs()
    listed = "app.graph.getNodeById(1).widgets[0].options.values"
    card.comfy.until(f"{listed}.includes('{safe_name(name)}.safetensors')")


def test_a_large_region_says_why_it_is_not_embedded(card):
    large = Region((Part("a", {"cross_attn": Move(offset=torch.ones(65_536))}),), {"name": "large"})
    (card.folder / "large.safetensors").write_bytes(region_bytes(large))
    card.page.evaluate("app.refreshComboInNodes()")
    card.open("large.safetensors")
    card.shows("large", "acts on every prompt")
    button = card.page.locator(f"{CARD} button", has_text="Embed in workflow")
    assert button.get_attribute("aria-disabled") == "true" and "at most 256 kB" in button.get_attribute("title")
    button.click(force=True)
    card.page.get_by_text("at most 256 kB fit into a workflow").first.wait_for(timeout=10_000)
    assert "data" not in card.carried() and card.runs()


def test_a_file_is_uploaded_chosen_and_never_replaced_unasked(card, request):
    card.open(DEMO)
    card.shows("weapons")
    name = f"uploaded-{request.node.callspec.id}.safetensors"
    first, second, third = (demo(name=f"the {number} one") for number in ("first", "second", "third"))
    card.choose_file(name, first)
    card.shows("the first one")
    assert card.values()[0] == card.carried()["name"] == name
    assert name in card.page.evaluate("app.graph.getNodeById(1).widgets[0].options.values")
    card.choose_file(name, second)
    card.answer(False)
    card.shows("the first one")
    assert (card.folder / name).read_bytes() == first
    card.drop(name, second, on_card=True)
    card.answer(True)
    card.shows("the second one")
    card.drop(name, third, on_card=False)
    card.answer(True)
    card.shows("the third one")
    assert (card.folder / name).read_bytes() == third
    card.choose_file("noise.safetensors", b"noise")
    card.page.get_by_text("this is not a readable .safetensors file").first.wait_for(timeout=10_000)
    assert not (card.folder / "noise.safetensors").exists()
    assert card.values()[0] == name and card.runs()


def test_an_embedded_region_travels_with_the_workflow(card, request):
    name = f"travels-{request.node.callspec.id}.safetensors"
    (card.folder / name).write_bytes(demo(name="travelling"))
    card.page.evaluate("app.refreshComboInNodes()")
    card.open(name)
    card.shows("travelling")
    card.press("Embed in workflow")
    card.shows("embedded, ")
    assert card.labels() == ["Upload…", "Save as file", "Remove from workflow"]
    saved = card.comfy.workflow()
    content = (card.folder / name).read_bytes()
    (card.folder / name).unlink()
    card.page.evaluate("app.refreshComboInNodes()")
    card.comfy.load(saved)
    card.shows("travelling", "embedded, ")
    card.comfy.keep("embedded", fit=False)
    assert card.values() == values_of(saved)
    history = card.comfy.run()
    assert history["status"]["status_str"] == "success"
    assert base64.b64decode(json.loads(history["prompt"][2]["1"]["inputs"]["carried"])["data"]) == content
    card.press("Remove from workflow")  # it is nowhere else
    card.answer(False)
    card.shows("embedded, ")
    with card.page.expect_response("**/safe_region/card"):
        card.press("Save as file")
    card.page.get_by_text("Region saved").first.wait_for(timeout=10_000)
    card.comfy.settle()
    assert (card.folder / name).read_bytes() == content
    card.shows("embedded, ")  # and goes on to travel with the workflow
    assert card.values() == values_of(saved)
    card.press("Remove from workflow")
    card.page.wait_for_function("card => !document.querySelector(card).textContent.includes('embedded')", arg=CARD)
    assert "data" not in card.carried() and card.runs()


def brought(name: str, content: bytes) -> str:
    """What a workflow carries that somebody made."""
    data = base64.b64encode(content).decode()
    return json.dumps({"name": name, "sha256": hashlib.sha256(content).hexdigest(), "data": data})


@pytest.mark.parametrize("choice", ["Use my file", "Use the one in the workflow"])
def test_a_region_that_came_under_the_name_of_ones_own_waits_for_a_yes(card, request, choice):
    name = f"guard-{request.node.callspec.id}".replace(" ", "-") + ".safetensors"
    own, theirs = demo(name="my guard"), demo(name="their guard")
    (card.folder / name).write_bytes(own)
    card.page.evaluate("app.refreshComboInNodes()")
    card.open(name, brought(name, theirs))
    card.shows("Not your file.", "differs from your own file of that name", "their guard")
    card.comfy.keep("differs", fit=False)
    assert "differs from your own file" in card.refused()
    card.press(choice)
    card.page.wait_for_function("card => !document.querySelector(card).textContent.includes('Not your file')", arg=CARD)
    if choice == "Use my file":
        card.shows("my guard")
        assert card.values()[0] == name and "data" not in card.carried()
    else:
        card.shows("Came with the workflow, not from your folder", "their guard", "embedded, ")
        card.comfy.keep("brought", fit=False)
        listed = f"{name.removesuffix('.safetensors')} ({card.carried()['sha256'][:12]}).safetensors"
        assert card.values()[0] == card.carried()["name"] == listed
        assert base64.b64decode(card.carried()["data"]) == theirs
    saved = card.comfy.workflow()
    assert card.runs() and (card.folder / name).read_bytes() == own
    card.comfy.load(saved)  # the choice is in the workflow
    card.shows("my guard" if choice == "Use my file" else "Came with the workflow")
    assert card.values() == values_of(saved)


def test_a_region_that_no_folder_has_says_where_it_is_from(card, request):
    name = f"nowhere-{request.node.callspec.id}.safetensors"
    card.open(name, brought(name, demo(name="from somewhere")))
    card.shows("Came with the workflow, not from your folder", "its effect here is unknown", "from somewhere")
    card.press("Save as file")
    card.page.get_by_text("Region saved").first.wait_for(timeout=10_000)
    card.page.wait_for_function("card => !document.querySelector(card).textContent.includes('Came with')", arg=CARD)
    assert (card.folder / name).is_file() and card.runs()


def test_missing_and_changed_regions_stop_the_run(card, request):
    name = f"changing-{request.node.callspec.id}.safetensors"
    (card.folder / name).write_bytes(demo(name="before", source="https://example.org/region"))
    card.page.evaluate("app.refreshComboInNodes()")
    card.open(name)
    card.shows("before")
    saved = card.comfy.workflow()
    sha256 = card.carried()["sha256"]
    (card.folder / name).write_bytes(demo(name="afterwards"))
    card.comfy.load(saved)
    card.shows("Changed.", name, sha256[:12], "https://example.org/region", "afterwards")
    card.comfy.keep("changed", fit=False)
    assert card.page.locator(f"{CARD} [role=alert]").count() == 1
    assert "Use the file as it is now" in card.refused()
    card.press("Use the file as it is now")
    card.page.wait_for_function("card => !document.querySelector(card).textContent.includes('Changed')", arg=CARD)
    assert card.carried()["sha256"] != sha256 and card.runs()
    (card.folder / name).unlink()
    card.comfy.load(saved)
    card.shows("Missing.", name, sha256[:12], "https://example.org/region")
    card.comfy.keep("missing", fit=False)
    assert "There is no region" in card.refused()


def test_what_is_carried_is_copied_undone_and_goes_into_subgraphs(card):
    card.open(DEMO)
    card.shows("weapons")
    card.press("Embed in workflow")
    card.shows("embedded, ")
    carried = card.values()[1]
    card.page.evaluate(
        """() => { app.canvas.deselectAll?.(); app.canvas.select(app.graph.getNodeById(1));
          app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard(); }"""
    )
    card.comfy.until(f"document.querySelectorAll('{CARD}').length === 2")
    copies = [node for node in card.comfy.workflow()["nodes"] if node["type"] == "SafeRegionLoader"]
    assert [node["widgets_values"] for node in copies] == [[DEMO, carried]] * 2
    card.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    card.press("Remove from workflow")
    card.page.wait_for_function("!app.graph.getNodeById(1).widgets[1].value.includes('data')")
    card.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    card.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    card.page.wait_for_function("app.graph.getNodeById(1)?.widgets[1].value.includes('data')")
    card.page.evaluate("void app.canvas.graph.convertToSubgraph(new Set([app.graph.getNodeById(1)]))")
    card.comfy.settle()
    inner = [node["inputs"] for node in card.comfy.prompt().values() if node["class_type"] == "SafeRegionLoader"]
    assert {"region_name": DEMO, "carried": carried} in inner
    assert card.runs()


@pytest.mark.parametrize("place", ["file", "workflow"])
def test_a_malicious_file_and_workflow_do_nothing(card, place):
    """Markup, wrong types and long texts everywhere; the page stays as it is and says what is wrong."""
    if place == "file":
        fields = ("name", "concept", "description", "base_model", "licence", "author", "created", "source", "preview")
        odd = {"encoder": {"name": HTML}, "recipe": [HTML], "calibration": {"bound": HTML}, "shares": {HTML: 0.5},
               "measured": {HTML: {"unsafe_before": 1.0, "unsafe_after": 0.0}, "x": HTML}}  # fmt: skip
        (card.folder / "odd.safetensors").write_bytes(demo(**dict.fromkeys(fields, HTML), **odd))
        (card.folder / "long.safetensors").write_bytes(demo(**dict.fromkeys(fields, "x" * 100_000)))
        card.page.evaluate("app.refreshComboInNodes()")
        card.open("long.safetensors")
        card.shows("x" * 79 + "…")
        card.open("odd.safetensors")
        card.shows(HTML[:60])
        card.comfy.keep(f"malicious-{place}", fit=False)
        assert card.runs()
    else:
        about = {"name": HTML, "sha256": "ab" * 32, "source": HTML}
        for values, words in (
            ((HTML, json.dumps(about)), "There is no region"),
            (("../../../etc/passwd", "{}"), "There is no region"),
            ((DEMO, HTML), "is damaged"),
            ((DEMO, json.dumps({"name": DEMO, "sha256": HTML})), "is damaged"),
            ((DEMO, json.dumps({"name": DEMO, "sha256": "ab" * 32, "data": HTML})), "is damaged"),
            ((DEMO, "x" * 1_000_000), "is larger than 256 kB"),
            ((DEMO, {"name": [HTML]}), "is damaged"),
            ((DEMO, 5), "is damaged"),
            ((5, None), "There is no region"),
        ):  # fmt: skip
            card.open(*values)
            card.shows(words)
        card.open(DEMO, HTML)
        card.shows("is damaged")
        assert "is damaged" in card.refused()
        card.press("Use the file as it is now")
        card.shows("Safe Region demo CLIP")
        assert card.runs()
    card.comfy.settle(300)
    assert card.page.evaluate("window.harmed") is None
    own = "img[src^='data:image/jpeg;base64,']"
    assert card.page.locator(f"{CARD} :is(script, svg, iframe, a, img):not({own})").count() == 0
