"""Learning on a model whose weights are moved, managed, wrapped or quantised as they are on small cards."""
from __future__ import annotations

import pytest
from host import Graph

FAMILY, SIZE = "Z-Image", 64
PLAIN = ("streamed", "resident")  # the very same numbers


def kinds(comfy) -> list[str]:
    return comfy.get("/object_info/TestWeightKind")["TestWeightKind"]["input"]["required"]["kind"][1]["options"]


@pytest.mark.parametrize("kind", [*PLAIN, "wrapped", "fp8", "nvfp4", "int8"])
def test_gradients_are_those_of_plain_weights_and_no_second_copy_is_kept(comfy, kind):
    if kind not in kinds(comfy):
        pytest.skip(f"this ComfyUI has no {kind} weights")
    g = Graph()
    place = 2 * kinds(comfy).index(kind)  # models are changed in their places, and ComfyUI keeps what it has loaded
    ours, plain = (g.add("TestFamily", family=FAMILY, copy=number) for number in (place, place + 1))
    model = g.add("TestWeightKind", model=ours(0), kind=kind)
    other = g.add("TestWeightKind", model=plain(0), kind="plain" if kind in PLAIN else f"{kind} as numbers")
    seen = g.add("TestSameGradients", model=model(0), other=other(0), clip=ours(1), size=SIZE)
    outputs = comfy.run(g.prompt)
    apart, apart_saving, second, along = outputs[seen()[0]]["text"]
    if kind in ("fp8", "int8"):  # the layers round what flows through them, too
        assert float(along) > 0.95
    else:
        assert max(float(apart), float(apart_saving)) < 1e-5
    assert (second == "True") == (kind in (*PLAIN, "wrapped")), "quantised weights are kept as they are"


def test_text_that_is_left_on_the_card_is_learned_from_beside_it(comfy):
    g = Graph()
    seen = g.add("TestGpuOnly")
    assert comfy.run(g.prompt)[seen()[0]]["text"] == ["cpu False"] * 3 + ["3.5"]
