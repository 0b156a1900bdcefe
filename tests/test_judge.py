"""What the gates say of each row of a conditioning, and how several such answers go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_safe_region.region import Part, Region, Scope, apply_to_conditioning
from comfyui_safe_region.region.inspection import FARTHEST, Judgement, judge, together
from comfyui_safe_region.region.steering import EDGE, openness
from region_examples import example_move, wall_part

WALL = Region((wall_part(0.0),), {"name": "wall"})
NAN = float("nan")


def text(*firsts: tuple[float, ...], **options: Any) -> list[Any]:
    """One row for each tuple: its tokens lie outside of WALL where their number is above 0, by that number."""
    rows = torch.full((len(firsts), len(firsts[0]), 4), 0.5)
    rows[..., 0] = torch.tensor(firsts)
    return [rows, options]


def test_each_row_is_judged_by_its_deepest_token():
    inside, outside = judge([text((-1, -2), (0.25, 3))], WALL)
    assert inside == Judgement(-1.0, (), False, True) and not inside.opened
    assert outside == Judgement(3.0, ("wall",), True, True) and outside.opened


def test_every_entry_counts_for_its_row():
    both, first = text((-1,), (-1,)), text((2,), (-3,))
    assert [row.opened for row in judge([both, first], WALL)] == [True, False]
    assert [row.opened for row in judge([both, text((2,))], WALL)] == [True, True], "one row is of all images"
    three = judge([text((-1,), (-1,), (-1,)), first], WALL)
    assert [row.depth for row in three] == [2.0, -1.0, 2.0], "repeated as ComfyUI repeats rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opened_is_what_steering_opens(dtype):
    states = torch.randn(200, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    part = replace(wall_part(1.0), scopes={"cross_attn": Scope(
        torch.ones(1, 4), torch.zeros(1, 4), torch.ones(4), torch.full((2, 1), 1.0), torch.full((2, 1), 9.0))})
    gates = openness({"cross_attn": states}, part)
    rows = judge([[states, {}]], Region((part,)))
    assert [row.opened for row in rows] == (gates > 0).tolist() and 20 < sum(row.opened for row in rows) < 180
    torch.testing.assert_close(torch.tensor([row.depth for row in rows]).clamp(0, 1), gates)


def test_text_that_was_rebuilt_is_outside_by_no_wall():
    scope = Scope(torch.ones(1, 4), torch.zeros(1, 4), torch.ones(4), torch.zeros(2, 1), torch.full((2, 1), 1.0))
    (row,) = judge([text((-1,))], Region((replace(wall_part(0.0), scopes={"cross_attn": scope}),)))
    assert row.opened and not row.by_wall and row.judged and row.concepts == ("wall",)
    assert row.depth == pytest.approx(0.75 / EDGE)


def test_what_cannot_be_judged_counts_as_outside():
    lost = Judgement(FARTHEST, ("wall",), False, False)
    assert judge([], WALL) == judge([[None, {}]], WALL) == [lost]
    assert judge([text((-1, NAN), (-1, -1))], WALL) == [lost, Judgement(-1.0, (), False, True)]
    assert judge([text((float("inf"), -1))], WALL) == [lost]
    assert judge([text((2, NAN))], WALL) == [Judgement(2.0, ("wall",), True, True)], "a wall has said enough"
    padded = text((-1, NAN), attention_mask=torch.tensor([[1, 0]]))
    assert judge([padded], WALL) == [Judgement(-1.0, (), False, True)], "padding is no text"
    free = Region((*WALL.parts, Part("free", {"cross_attn": example_move(4)})))
    assert judge([text((-1,))], free) == [Judgement(FARTHEST, ("free",), False, True)]


def test_a_prompt_without_words_is_inside():
    (row,) = judge([[torch.zeros(1, 3, 4), {}]], WALL)
    assert not row.opened and row.depth == -FARTHEST


def test_a_prompt_is_judged_as_it_was_before_a_region_acted():
    prompt = text((2,), (-1,))
    for mode in ("auto", "always"):
        assert judge(apply_to_conditioning([prompt], WALL, mode=mode), WALL) == judge([prompt], WALL)


def test_text_for_a_controlnet_alone_counts():
    hidden = text((-1,), cross_attn_controlnet=text((2,))[0])
    assert judge([hidden], WALL)[0].opened


class Waiting(TorchDispatchMode):
    """Counts what makes a GPU's host wait."""

    seen: list[str]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_before_all_is_known():
    with Waiting() as waiting:
        waiting.seen = []
        judge([text((-1,), (2,)), text((1,))], WALL)
        assert waiting.seen == []
        bool(torch.ones(1))
        assert waiting.seen, "it counts"


def test_several_say_together_what_any_says():
    inside, outside = Judgement(-1.0, (), False, True), Judgement(2.0, ("a",), True, True)
    other = Judgement(3.0, ("b", "a"), False, False)
    assert together([[inside, outside], [other]]) == [
        Judgement(3.0, ("b", "a"), False, False), Judgement(3.0, ("a", "b"), True, False)]
    assert together([[inside]]) == [inside]
