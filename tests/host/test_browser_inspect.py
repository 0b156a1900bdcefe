"""The heat strip on its node, in a real page and both renderers."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

FRESH = count(1)
STRIP = "document.querySelector('[aria-label=\"What the region does to the prompt\"]')"
SAID = f"{STRIP}.querySelector('[role=status]').textContent"
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
    assert "Clearly unsafe at “knife”: moved, and now safe." in page.evaluate(SAID)
    page.evaluate(f"{WORDS}.find(b => b.firstChild.textContent === 'knife').focus()")
    said = page.evaluate(f"{STRIP}.querySelector('[role=toolbar]').nextSibling.textContent")
    assert said.startswith("knife: far outside; afterwards inside; moved by ")
    comfy_page.page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.firstChild.textContent") == "on"
    assert page.evaluate(f"{STRIP}.querySelectorAll('img[alt]').length") == 2
    page.wait_for_function(f"[...{STRIP}.querySelectorAll('img')].every(i => i.naturalWidth > 0)")
    assert "safe_region_strip" not in str(comfy_page.workflow())
    comfy_page.keep("unsafe")


def test_running_again_replaces_the_strip_and_inside_is_said(comfy_page):
    run(comfy_page, "a knife")
    comfy_page.page.evaluate("window.app.graph.nodes.find(n => n.type === 'SafeRegionInspect')"
                             ".widgets.find(w => w.name === 'text').value = 'an apple on a table'")  # fmt: skip
    comfy_page.run()
    comfy_page.until(f"{SAID}.includes('Safe: comes out unchanged')")
    assert comfy_page.page.evaluate(f"{STRIP}.querySelectorAll('[role=status]').length") == 1
    comfy_page.keep("inside")


LONG = "a red apple and a blue tree in the park near a river, " * 22 + "a gun"
SIZE = "[...window.app.graph.nodes.find(n => n.type === 'SafeRegionInspect').size]"


def test_a_long_prompt_is_folded_and_opens_where_it_is(comfy_page):
    run(comfy_page, LONG)
    page = comfy_page.page
    assert page.evaluate(f"{WORDS}.length") < 40
    wide, high = page.evaluate(SIZE)
    assert high < 1000, "the node stays on the screen"
    comfy_page.keep("folded")
    fold = page.evaluate(f"{WORDS}.findIndex(b => b.textContent.includes('words inside'))")
    page.evaluate(f"{WORDS}[{fold}].focus()")
    page.keyboard.press("Enter")
    comfy_page.until(f"{WORDS}.length > 280")
    words = page.evaluate(f"{WORDS}.map(b => b.firstChild.textContent)")
    assert [word for word in words if word in LONG.split()] == LONG.split()
    assert page.evaluate(f"{WORDS}.indexOf(document.activeElement)") == fold, "the first of them has the focus"
    row = f"{STRIP}.querySelector('[role=toolbar]')"
    assert page.evaluate(f"{row}.clientHeight <= 220 && {row}.scrollHeight > 400")
    assert page.evaluate(SIZE)[0] == wide and page.evaluate(SIZE)[1] < high + 250
    rendered = page.evaluate(f"{STRIP}.getBoundingClientRect().height / window.app.canvas.ds.scale")
    assert rendered < 700
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.firstChild.textContent") == "end of text"
    comfy_page.keep("unfolded")


def test_nothing_moves_while_the_pointer_goes_over_the_words(comfy_page):
    run(comfy_page, "a kitchen knife on a red table")
    page = comfy_page.page
    places = f"JSON.stringify([...{STRIP}.querySelectorAll('*')].map(e => Math.round(e.getBoundingClientRect().top)))"
    before = page.evaluate(places)
    for kind in ("mouseenter", "focus"):
        page.evaluate(f"{WORDS}.forEach(b => b.dispatchEvent(new Event('{kind}')))")
        assert page.evaluate(places) == before


def test_numbers_are_there_when_asked_for(comfy_page):
    run(comfy_page, "a kitchen knife on a red table")
    page = comfy_page.page
    numbers = f"[...{STRIP}.querySelectorAll('.number')].filter(one => one.checkVisibility())"
    assert page.evaluate(f"{numbers}.length") == 0 and "beyond" not in page.evaluate(f"{STRIP}.innerText")
    page.evaluate(f"{STRIP}.querySelector('summary').focus()")
    page.keyboard.press("Enter")
    comfy_page.until(f"{numbers}.length > 0 && {STRIP}.innerText.includes('beyond wall')")
    comfy_page.keep("numbers")
    page.keyboard.press("Enter")
    comfy_page.until(f"{numbers}.length === 0")


def test_words_that_the_demo_does_not_know_are_marked(comfy_page):
    run(comfy_page, "a sniper with knives and an apple")
    page = comfy_page.page
    marked = page.evaluate(f"{WORDS}.filter(b => getComputedStyle(b.firstChild).textDecorationLine === 'underline')"
                           ".map(b => b.firstChild.textContent)")  # fmt: skip
    assert marked == ["sniper", "knives"]
    assert "The demo model does not know: sniper, knives." in page.evaluate(f"{STRIP}.innerText")
    assert "cannot be told" in page.evaluate(SAID)


CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => rgba(colour).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (one) => {
        const own = getComputedStyle(one).backgroundColor;
        return rgba(own)[3] === 255 ? own : ground(one.parentElement);
    };
    const strip = STRIP;
    const texts = [...strip.querySelectorAll("*")].filter((one) =>
        [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
    return texts.map((one) => {
        const [dark, pale] = [light(getComputedStyle(one).color), light(ground(one))].sort((a, b) => a - b);
        return [one.textContent, (pale + 0.05) / (dark + 0.05)];
    });
}""".replace("STRIP", STRIP)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_every_text_has_contrast_and_fits_a_narrow_node(comfy_page, theme):
    page = comfy_page.page
    page.evaluate(f"window.app.extensionManager.setting.set('Comfy.ColorPalette', '{theme}')")
    comfy_page.settle()
    try:
        run(comfy_page, "a kitchen knife 刀 🔪 on a naïve нож, סכין with_a_word_longer_than_nodes_are_wide_" * 2)
        pale = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
        assert not pale
        page.evaluate("(() => { const n = window.app.graph.nodes.find(n => n.type === 'SafeRegionInspect');"
                      " n.setSize([300, n.size[1]]); })()")  # fmt: skip
        comfy_page.keep(f"narrow-{theme}")
        assert page.evaluate(f"{STRIP}.scrollWidth <= {STRIP}.clientWidth + 1"), "nothing is cut off at the side"
    finally:
        page.evaluate("window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_a_prompt_from_right_to_left_goes_that_way(comfy_page):
    run(comfy_page, "סכין על השולחן knife")
    page = comfy_page.page
    lefts = page.evaluate(f"{WORDS}.filter(b => /[א-ת]/.test(b.textContent)).map(b => b.getBoundingClientRect().left)")
    assert len(lefts) == 3 and lefts == sorted(lefts, reverse=True)
    page.evaluate(f"{WORDS}.find(b => b.textContent.startsWith('סכין')).focus()")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.firstChild.textContent") == "על"
    comfy_page.keep("right_to_left")


def test_the_strip_is_there_again_on_coming_back_to_the_tab(comfy_page):
    # with pictures that are in no cache: ComfyUI's page keeps for a tab only what came after the server's answer to Run
    run(comfy_page, "a knife" + " on a table" * next(FRESH), "auto")
    command = "window.app.extensionManager.command.execute"
    comfy_page.page.evaluate(f"{command}('Comfy.NewBlankWorkflow')")
    comfy_page.until(f"!{STRIP}")
    comfy_page.page.evaluate(f"{command}('Workspace.PreviousOpenedWorkflow')")
    comfy_page.until(f"{STRIP}?.querySelector('[role=status]')?.textContent.includes('unsafe')", 15)
