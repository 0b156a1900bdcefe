"""Combine Safe Regions in a real ComfyUI; an example draws with it."""

from __future__ import annotations

import pytest
from host import Graph


def test_input_order_is_final(object_info):
    order = object_info["SafeRegionCombine"]["input_order"]
    assert order == {"required": ["region_1", "region_2"], "optional": ["region_3", "region_4"]}


def test_the_groups_of_an_attribute_are_refused_at_once(comfy):
    g = Graph()
    names = [g.add("SafeRegionLoader", region_name=f"demo-{name}.safetensors")(0) for name in ("weapons", "gender")]
    both = g.add("SafeRegionCombine", region_1=names[0], region_2=names[1])
    g.add("SaveSafeRegion", region=both(0), name="both", author="", license="", description="", overwrite=False)
    with pytest.raises(RuntimeError, match="Balance Safe Region"):
        comfy.run(g.prompt)


def test_a_combined_region_is_saved_as_one_file(comfy):
    g = Graph()
    weapons = g.add("SafeRegionLoader", region_name="demo-weapons.safetensors")
    both = g.add("SafeRegionCombine", region_1=weapons(0), region_2=weapons(0))
    save = g.add("SaveSafeRegion", region=both(0), name="both", author="", license="", description="", overwrite=True)
    assert "both.safetensors" in comfy.run(g.prompt)[save()[0]]["text"][0]
    g = Graph()
    again = g.add("SafeRegionLoader", region_name="both.safetensors")
    save = g.add("SaveSafeRegion", region=again(0), name="again", author="", license="", description="", overwrite=True)
    assert "again.safetensors" in comfy.run(g.prompt)[save()[0]]["text"][0]
