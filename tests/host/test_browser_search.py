"""What the page's node search finds for words that people type, and what it offers to a wire that is dropped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

APPLY, GUARD, TRAIN = "Apply Safe Region", "Guard Model with Safe Region (Moderation)", "Train Safe Region"
PAIRS, BALANCE, INSPECT = "Safe Region Prompt Pairs", "Balance Safe Region (Bias)", "Inspect Safe Region"
# The names themselves.
NAMES = {"apply safe": APPLY, "guard": GUARD, "moderation": GUARD, "prompt pairs": PAIRS, "balance": BALANCE,
         "bias": BALANCE, "inspect safe": INSPECT}  # fmt: skip
# Other words, of which only newer versions of ComfyUI tell their page.
WORDS = {
    **dict.fromkeys(
        ["nsfw", "sfw", "safety", "censor", "nude", "nudity", "pornography", "adult", "gore", "violence", "filter",
         "content filter", "kid safe", "kids", "parental", "content moderation", "forbidden"],
        (APPLY, GUARD),
    ),
    **dict.fromkeys(["block words", "blacklist"], (APPLY, PAIRS)),
    **dict.fromkeys(["remove concept", "unlearn", "concept erasure", "erase concept", "eraser"], (TRAIN,)),
    **dict.fromkeys(["negative prompt", "steer"], (APPLY,)),
    **dict.fromkeys(["diversity", "fairness", "debias"], (BALANCE,)),
    **dict.fromkeys(["heatmap", "explain", "why"], (INSPECT,)),
}  # fmt: skip
# For these the search puts much used nodes with a merely similar name or word first.
CROWDED = {"erase": TRAIN, "steering": APPLY, "porn": APPLY}
BOX = "input[id^=comfy-vue-node-search-box-input], [role=search] input"
RESULTS = "[data-testid=result-item], .p-autocomplete-option"


@pytest.fixture
def words_are_known(page_host: Any) -> None:
    if "search_aliases" not in page_host.get("/object_info/SafeRegionConditioning")["SafeRegionConditioning"]:
        pytest.skip("this ComfyUI tells its page no words but the nodes' names")
    scripts = Path(os.environ["COMFYUI_FRONTEND"], "assets").glob("*.js")
    if not any(b"search_aliases" in script.read_bytes() for script in scripts):
        pytest.skip("this page, older than its ComfyUI, searches the nodes' names alone")


@pytest.fixture
def search(words_are_known: None, comfy_page: Any) -> Any:
    """Types a word into the search box of an empty workflow: the names of the nodes that it lists."""
    page = comfy_page.page
    page.evaluate("window.app.graph.clear()")
    box = page.locator(BOX).first
    for _ in range(3):  # a busy page may miss a double click
        if not box.is_visible():
            page.mouse.dblclick(800, 700)
            page.wait_for_timeout(3000)
    box.wait_for()

    def found(word: str) -> list[str]:
        box.fill(word)
        comfy_page.settle(600)
        return [text.strip().split("\n")[0].strip() for text in page.locator(RESULTS).all_inner_texts()]

    return found


def test_words_that_people_type_find_the_right_node(search: Any) -> None:
    wanted = {word: (name,) for word, name in NAMES.items()} | WORDS
    first = {word: search(word)[:3] for word in wanted}
    assert {word: first[word] for word, names in wanted.items() if not set(names) <= set(first[word])} == {}
    crowded = {word: search(word) for word in CROWDED}
    assert {word: found for word, found in crowded.items() if CROWDED[word] not in found} == {}


def test_a_dropped_wire_is_offered_what_is_used_most(comfy_page: Any) -> None:
    offered = comfy_page.page.evaluate(
        "[LiteGraph.slot_types_default_in.SAFE_REGION, LiteGraph.slot_types_default_out.SAFE_REGION]"
    )
    into_input, from_output = [[kind for kind in kinds if kind != "Reroute"] for kinds in offered]
    assert into_input[:2] == ["SafeRegionLoader", "TrainSafeRegion"]
    assert from_output[:2] == ["SafeRegionConditioning", "SafeRegionGuardModel"]
