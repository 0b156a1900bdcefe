"""Built-in prompt packs in a real ComfyUI: chosen on the node, added to, trained from."""
from __future__ import annotations

import pytest
from host import PACK, Graph, Rejected

from comfyui_safe_region.training.packs import load_pack

PACKS = PACK / "training" / "packs"


def names(folder: str = ".") -> list[str]:
    return sorted(path.stem for path in (PACKS / folder).glob("*.txt"))


def test_packs_are_the_last_input_of_both_nodes(object_info):
    for node, folder in (("SafeRegionPromptPairs", "."), ("TrainBalanceRegion", "attributes")):
        assert object_info[node]["input_order"]["optional"][-1] == "pack"
        kind, options = object_info[node]["input"]["optional"]["pack"]
        choices = options["options"] if kind == "COMBO" else kind
        assert choices == ["none", *names(folder)] and options["default"] == "none"


def test_a_pack_is_read_instead_of_the_text_box_and_a_file_adds_to_it(comfy):
    (comfy.base / "input" / "own.txt").write_text("a slingshot => a spoon\n", encoding="utf-8")
    g = Graph()
    pairs = g.add("SafeRegionPromptPairs", text="no pair at all", file="own.txt", pack="weapons")
    shown = g.add("PreviewAny", source=pairs(1))
    output = comfy.run(g.prompt)
    text = output[shown()[0]]["text"][0]
    assert "a pistol => a flashlight" in text and "a slingshot => a spoon" in text and "held-out: " in text
    summary = f"Weapons: {len(load_pack('weapons').pairs) + 1} pairs, "  # and the file's one
    assert output[pairs()[0]]["text"][0].startswith(summary)


def test_a_pack_that_is_not_there_is_refused(comfy):
    g = Graph()
    g.add("PreviewAny", source=g.add("SafeRegionPromptPairs", text="", file="none", pack="../weapons")(1))
    with pytest.raises((Rejected, RuntimeError), match="pack"):  # refused, or by older servers run into an error
        comfy.run(g.prompt)


def test_an_attribute_is_learned_from_a_pack(comfy):
    g = Graph()
    small = g.add("TestOtherModel", prediction="epsilon", weights="fp32")
    train = g.add("TrainBalanceRegion", model=small(0), clip=small(1), text="nothing", file="none", preset="instant",
                  steps=0, contrast=1.0, size=64, seed=1, pack="gender")  # fmt: skip
    g.add("PreviewImage", images=train(2))
    assert "17 prompts about new people or things are too few to tell" in comfy.run(g.prompt)[train()[0]]["text"][0]
