"""The example workflows and the subgraph blueprint, as files; tests/host runs them in a real ComfyUI."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(importlib.import_module("comfyui_safe_region").__file__).parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
# ComfyUI's own colours of nodes, which follow the theme: title and body.
COLOURS = {
    ("#322", "#533"), ("#332922", "#593930"), ("#232", "#353"), ("#223", "#335"), ("#2a363b", "#3f5159"),
    ("#233", "#355"), ("#323", "#535"), ("#432", "#653"), ("#222", "#000"), (None, None),
}  # fmt: skip
TITLE = 30  # pixels above a node's position


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def boxes(workflow: dict[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """Name, left, top, right and bottom of each node."""
    return [
        (node.get("title") or node["type"], x, y - TITLE, x + width, y + height)
        for node in workflow["nodes"] for (x, y), (width, height) in [(node["pos"], node["size"])]
    ]  # fmt: skip


def links_of(graph: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    """Source, its slot, target and its slot by the links' ids; a subgraph's own ends are nodes -10 and -20."""
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    rows = [[link[end] for end in ends] if isinstance(link, dict) else link for link in graph["links"]]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: tuple(row[1:5]) for row in rows}


@pytest.mark.parametrize("path", EXAMPLES + BLUEPRINTS, ids=lambda p: p.stem)
def test_a_workflow_is_whole(path: Path):
    workflow = read(path)
    assert workflow["last_node_id"] == len(workflow["nodes"]) and workflow["last_link_id"] == len(workflow["links"])
    for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", [])):
        nodes, links = {node["id"]: node for node in graph["nodes"]}, links_of(graph)
        assert len(nodes) == len(graph["nodes"])
        into = {slot["link"]: (node["id"], i) for node in nodes.values() for i, slot in enumerate(node["inputs"])}
        outof = {link: (node["id"], i) for node in nodes.values() for i, slot in enumerate(node["outputs"])
                 for link in slot["links"]}  # fmt: skip
        into |= {link: (-20, i) for i, slot in enumerate(graph.get("outputs", [])) for link in slot["linkIds"]}
        outof |= {link: (-10, i) for i, slot in enumerate(graph.get("inputs", [])) for link in slot["linkIds"]}
        into.pop(None, None)
        assert {name: outof[name] + into[name] for name in into} == links and outof.keys() == into.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_easy_to_read(path: Path):
    workflow = read(path)
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert text.startswith("## ") and "**Run**" in text and "**Look at**" in text and len(text) < 900
    assert {(node.get("color"), node.get("bgcolor")) for node in workflow["nodes"]} <= COLOURS
    for (one, *a), (other, *b) in itertools.combinations(boxes(workflow), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"{one} lies over {other}"
    _, lefts, tops, rights, bottoms = zip(*boxes(workflow))
    assert max(rights) - min(lefts) <= 1800 and max(bottoms) - min(tops) <= 1040  # a page shows it with readable text
    assert workflow["extra"] == {}, "a view of its own, which fits no other page"
    if match := re.match(r"Safe Region ([123]) - ", path.stem):  # understood in a minute
        assert len(workflow["nodes"]) <= (7, 6, 10)[int(match[1]) - 1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_has_a_name_that_is_found_and_served(path: Path):
    assert re.fullmatch(r"Safe Region (\d|for [A-Z]\w+( 1)?)( - [\w -]+)?", path.stem) and path.stem.isascii()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_has_a_small_thumbnail(path: Path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size <= 60_000
    assert Image.open(thumbnail).size == (520, 520)


@pytest.mark.parametrize("path", EXAMPLES + BLUEPRINTS, ids=lambda p: p.stem)
def test_nothing_in_a_workflow_is_of_the_machine_that_made_it(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r'"(/|[A-Z]:|~|\\\\)', text), "an absolute path"
    assert set(re.findall(r"https?://([^/\"]+)", text)) <= {"huggingface.co"}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_a_blueprint_is_one_node_of_its_own_subgraph(path: Path):
    (node,), (subgraph,) = read(path)["nodes"], read(path)["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and path.stem == subgraph["name"] and subgraph["description"]
    assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in subgraph["inputs"]]
    assert len(node["widgets_values"]) == sum("widget" in slot for slot in node["inputs"])


def test_there_are_blueprints_and_examples():
    names = [path.stem for path in EXAMPLES]
    assert [name for name in names if "Safe Region 1 - " in name] == names[:1] and len(names) >= 10
    assert len(BLUEPRINTS) >= 2


@pytest.mark.parametrize("word", ["nsfw", "safety", "censor", "moderation", "bias", "kids", "remove"])
def test_the_template_browser_finds_one_by(word: str):
    """It knows only the names of the files, and frontend 1.32.9 only what stands in their first 40 letters."""
    assert [path.stem for path in EXAMPLES if 0 <= path.stem.lower().find(word) <= 40]


@pytest.mark.parametrize("page", sorted((ROOT / "web" / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_pictures_of_help_pages_are_there_and_small(page: Path):
    for description, name in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8")):
        assert description and re.fullmatch(r"images/\w+\.(png|jpg)", name)  # beside the page
        assert (page.parent / name).stat().st_size <= 60_000
