"""Prompts encoded together in a real ComfyUI: the same as one by one, in every family's text encoder."""
from __future__ import annotations

import json
from typing import Any

import pytest
from host import Graph, Host

# Encoders that ComfyUI asks in ways of their own, and one that leaves something behind for the code around it.
ALONE = {"Lens", "HiDream-O1", "MiniMax H3"}


def encoded(host: Host, family: str, kind: str = "plain") -> dict[str, Any]:
    g = Graph()
    made = g.add("TestFamily", family=family)
    node = g.add("TestEncoding", model=made(0), clip=made(1), kind=kind)(0)[0]
    found = json.loads(host.run(g.prompt)[node]["text"][0])
    print(family, kind, found)
    assert found["same_keys"] and found["left_as_found"] and found["apart"] < 1e-4, (family, kind, found)
    assert found["threads"] == [1] or family in ALONE, "small models do best with one thread"
    return found


def test_prompts_are_the_same_together_and_one_by_one(comfy, object_info):
    families = object_info["TestFamily"]["input"]["required"]["family"][1]["options"]
    assert len(families) > 20
    for family in families:
        found = encoded(comfy, family)
        together = found["works"] and not found["barred"] and found["passes"] < found["passes_alone"]
        assert together if family not in ALONE else found["passes"] == found["passes_alone"], (family, found)


@pytest.mark.parametrize("kind", ["mixes", "first", "joins", "tells", "refuses"])
@pytest.mark.parametrize("family", ["SD 1.x", "SDXL"])
def test_an_encoder_that_cannot_is_asked_one_by_one(comfy, family, kind):
    found = encoded(comfy, family, kind)
    if kind in ("first", "tells"):  # that shows only in whole prompts
        assert found["works"] is False and found["passes"] == found["passes_alone"]
    else:
        assert found["barred"] == ["clip_l"]
        alone = found["passes"] == found["passes_alone"]
        assert alone if family == "SD 1.x" else not alone, "the other part goes on"
