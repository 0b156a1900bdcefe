"""What a conditioning holds: attention masks of every kind, batches of unequal rows, and text that is not known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from comfyui_safe_region.nodes.steering_status import steering_status
from comfyui_safe_region.region import Part, Region, RegionError, apply_to_conditioning, balance_conditioning
from comfyui_safe_region.region.blocks import LLAMA, NO_TEXT, UNREACHED
from comfyui_safe_region.region.conditioning import ACTED, text_masks
from comfyui_safe_region.region.inspection import judge
from comfyui_safe_region.region.known import check_known, could_be_text, keep_mask
from region_examples import example_move, same_bits, wall_part

WALL = Region((wall_part(0.0),), {"name": "wall"})
KEEP = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])  # of two prompts
ADDED = torch.where(KEEP == 1, 0.0, -torch.inf)


def text(*firsts: float, batch: int = 1, **options: Any) -> list[Any]:
    """A prompt [batch, len(firsts), 4] whose tokens lie outside of the wall where their number is above 0."""
    return [torch.tensor(firsts, dtype=torch.float32)[None, :, None].expand(batch, -1, 4).clone(), options]


def refused(conditioning: list[Any], **how: Any) -> str:
    with pytest.raises(RegionError) as caught:
        apply_to_conditioning(conditioning, WALL, **how)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".")
    return said


# --- attention masks ---


@pytest.mark.parametrize(
    "mask",
    [
        KEEP, KEEP.bool(), KEEP.to(torch.uint8), 7 * KEEP, ADDED, ADDED.half(), ADDED.bfloat16(),
        torch.where(KEEP == 1, 0.7, torch.finfo(torch.float32).min),  # a bias, too, leaves a token
        torch.where(KEEP == 1, 0, -10_000),
        KEEP[:, None], KEEP[:, None, None], ADDED[:, None, None], ADDED[:, None, None].expand(2, 8, 4, 4),
        KEEP[:, None].expand(2, 4, 4).tril(), ADDED[:, None].expand(2, 4, 4),
    ],
    ids=lambda mask: f"{str(mask.dtype)[6:]} {list(mask.shape)}",
)  # fmt: skip
def test_masks_of_every_kind(mask):
    assert torch.equal(keep_mask(mask, 2, 4), KEEP.bool())
    other = keep_mask(mask, 3, 4)
    assert torch.equal(other, KEEP.bool().any(0, keepdim=True)), "any of its rows may meet any prompt"


@pytest.mark.parametrize("mask", [KEEP[0], KEEP[:1], ADDED[0], ADDED[:1, None], KEEP[:1].expand(4, 4)])
def test_masks_of_one_row_hold_for_all(mask):
    assert torch.equal(keep_mask(mask, 1, 4), KEEP[:1].bool())


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).half(),
        torch.full((1, 4), -torch.inf), torch.full((1, 4), torch.nan), torch.ones(1, 4), torch.ones(1, 4).bool(),
        torch.full((1, 4, 4), 2.3),  # as StyleModelApply adds to the tokens of a picture
    ],
)  # fmt: skip
def test_masks_that_leave_all_or_nothing_leave_all(mask):
    assert keep_mask(mask, 1, 4).all()


def test_row_by_row_nothing_left_is_all():
    assert keep_mask(torch.tensor([[0, 0, 0], [1, 0, 0]]), 2, 3).tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("mask", [torch.ones(1, 5), torch.zeros(1, 7, 7), torch.ones(0, 4), torch.ones(1, 0)])
def test_masks_for_another_number_of_tokens_take_none_away(mask):
    assert keep_mask(mask, 1, 4) is None
    assert not same_bits(apply_to_conditioning([text(-1, -1, -1, 5, attention_mask=mask)], WALL)[0][0],
                         text(-1, -1, -1, 5)[0])  # fmt: skip


@pytest.mark.parametrize("mask", [[1, 1], "all", torch.tensor(1), torch.ones(1, 1, 1, 1, 4), torch.ones(1, 4) * 1j])
def test_other_masks_are_refused(mask):
    assert "attention mask" in refused([text(-1, -1, -1, 5, attention_mask=mask)])


@pytest.mark.parametrize("kind", ["additive", "zero", "square", "of both", "of more rows"])
def test_an_unsafe_token_is_seen_through_every_mask_and_padding_is_not(kind):
    masks: dict[str, Tensor] = {
        "additive": ADDED[:1], "zero": torch.zeros(1, 4, dtype=torch.int64), "square": ADDED[:1, None].expand(1, 4, 4),
        "of both": ADDED[:1, None, None].expand(1, 1, 4, 4), "of more rows": KEEP[:1].repeat(3, 1),
    }  # fmt: skip
    (out,) = apply_to_conditioning([text(-1, 5, -1, -1, attention_mask=masks[kind])], WALL)
    assert torch.equal(out[0][0, 1], torch.tensor([5.25] * 4)) and out[0].shape == (1, 4, 4)
    (padded,) = apply_to_conditioning([text(-1, -1, -1, 5, attention_mask=masks[kind])], WALL)
    assert same_bits(padded[0], text(-1, -1, -1, 5)[0]) == (kind != "zero")


def test_masks_are_read_without_looking_at_a_number():
    with torch.device("meta"):  # has none
        masks = (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 1, 4, 4), torch.ones(4).bool())
        assert [keep_mask(mask, 2, 4).shape for mask in masks] == [(2, 4), (2, 4), (1, 4), (1, 4)]


# --- rows ---


def layers(batch: int, value: float, tokens: int = 3) -> Tensor:
    return torch.full((batch, 2, tokens, 4), value)


LAYERED = Region(
    (Part("wall", {"cross_attn": wall_part(0.0).moves["cross_attn"], f"{LLAMA}__layer1": example_move(4)},
          wall_part(0.0).gates),), {"name": "layered"},
)  # fmt: skip


def test_one_row_of_layers_beside_several_of_tokens_and_the_reverse():
    mixed = torch.cat([text(5, -1)[0], text(-1, -1)[0]])
    (out,) = apply_to_conditioning([[mixed, {LLAMA: layers(1, -1.0)}]], LAYERED)
    assert out[0].shape == mixed.shape and same_bits(out[0][1], mixed[1]) and not same_bits(out[0][0], mixed[0])
    moved = out[1][LLAMA]
    assert len(moved) == 2 and same_bits(moved[1], layers(1, -1.0)[0]) and not same_bits(moved[0], moved[1])
    (out,) = apply_to_conditioning([text(5, -1, **{LLAMA: layers(3, -1.0)})], LAYERED)
    assert len(out[0]) == 1 or all(same_bits(row, out[0][0]) for row in out[0])
    assert len(out[1][LLAMA]) == 3 and not same_bits(out[1][LLAMA], layers(3, -1.0))
    again = apply_to_conditioning([out], LAYERED)
    assert again == [out], "once only"


def test_one_pooled_row_beside_several_prompts():
    part = Part("wall", wall_part(0.0).moves, {"pooled_output": wall_part(0.0).gates["cross_attn"]})
    for value, opens in ((5.0, True), (-5.0, False)):
        entry = text(-1, -1, batch=3, pooled_output=torch.full((1, 4), value))
        (out,) = apply_to_conditioning([entry], Region((part,)))
        assert out[0].shape == (3, 2, 4) and same_bits(out[0], entry[0]) != opens
        assert out[1]["pooled_output"] is entry[1]["pooled_output"]


def test_two_rows_beside_three_are_refused():
    with pytest.raises(RegionError, match="texts of 2 images beside those of 3"):
        apply_to_conditioning([text(5, -1, batch=2, **{LLAMA: layers(3, -1.0)})], LAYERED)


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_prompt_without_tokens_is_inside_and_untouched(mode):
    for batch in (1, 2):
        empty = [torch.zeros(batch, 0, 4), {"attention_mask": torch.zeros(batch, 0, dtype=torch.int64)}]
        (out,) = apply_to_conditioning([empty], Region((wall_part(0.0, constant=torch.zeros(1, 4)),)), mode=mode)
        assert same_bits(out[0], empty[0])
        (again,) = apply_to_conditioning([out], WALL, mode=mode)
        assert same_bits(again[0], empty[0])
        assert text_masks(empty)["cross_attn"].shape == (batch, 0)


# --- text that is not known ---


@pytest.mark.parametrize(
    ("value", "is_text"),
    [
        (torch.ones(1, 7, 64), True), (torch.ones(1, 768), True), (torch.ones(7, 64).half(), True),
        (torch.ones(1, 7, dtype=torch.int64), True), (torch.ones(7, dtype=torch.int32), True),
        ([torch.ones(1, 7, 64)], True), ({"a": (1, [torch.ones(1, 7, 64)])}, True),
        ([[torch.ones(1, 7, 64), {}]], True), (SimpleNamespace(cond=torch.ones(1, 7, 64)), True),
        (torch.ones(1, 4, 64, 64), False), (torch.ones(1, 16, 5, 64, 64), False), (torch.ones(1, 64, 64).bool(), False),
        (torch.ones(1, 7, 6), False), (torch.ones(64), False), (torch.tensor([3]), False), (torch.tensor(3.0), False),
        (None, False), (0.5, False), ("words", False), ([1, 2, 3], False), (object(), False), ([], False),
    ],
)  # fmt: skip
def test_what_could_be_text(value, is_text):
    assert could_be_text(value) == is_text
    if is_text:
        assert '"new_words"' in refused([text(-1, new_words=value)])
        assert '"new_words"' in refused([text(-1), text(-1, new_words=value)], strength=0.0)
        assert apply_to_conditioning([text(5, new_words=value)], WALL, unknown_text=True)[0][1]["new_words"] is value
    else:
        assert apply_to_conditioning([text(5, new_words=value)], WALL)


@pytest.mark.parametrize("states", [
    torch.ones(5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 5, 4).to(torch.float8_e4m3fn), "words",
    torch.ones(1, 5, 4).to_sparse(), torch.ones(1, 5, 4, dtype=torch.int64),
    torch.nested.nested_tensor([torch.ones(5, 4)], layout=torch.jagged),
])  # fmt: skip
def test_text_of_a_form_that_no_encoder_writes_is_refused(states):
    assert "a form that no region can read" in refused([[states, {}]])
    assert "a form that no region can read" in refused([[torch.ones(1, 5, 4), {"cross_attn_controlnet": states}]])


def test_lists_without_end_count_as_text():
    circle: list[Any] = []
    circle.append(circle)
    assert could_be_text(circle)


@pytest.mark.parametrize("key", sorted(UNREACHED))
def test_text_that_is_known_to_be_out_of_reach_is_always_refused(key):
    value = ("position", object(), [(torch.ones(1, 768), 8, 8, 0, 0)]) if key == "gligen" else torch.ones(1, 5, 64)
    for how in ({}, {"unknown_text": True}, {"strength": 0.0}, {"start": 0.9}):
        hidden = text(-1, start_percent=0.0, end_percent=0.1, **{key: value})
        assert refused([text(-1), hidden], **how) == UNREACHED[key]
    assert apply_to_conditioning([text(5, **{key: None})], WALL)
    with pytest.raises(RegionError):
        check_known([[None, {key: value}]], True)


def test_options_of_known_names_pass_whatever_they_hold():
    states = torch.ones(1, 7, 64)
    read = {"attention_mask", "attention_mask_mt5xl", "start_percent", "end_percent", ACTED}
    for key in sorted(NO_TEXT - read):
        assert apply_to_conditioning([text(5, **{key: states})], WALL)[0][1][key] is states


def test_what_a_node_gives_the_model_by_name_is_looked_into():
    cond = SimpleNamespace(cond=torch.ones(1, 7, 64))
    assert '"c_crossattn"' in refused([text(-1, model_conds={"c_crossattn": cond})])
    assert apply_to_conditioning([text(-1, model_conds={"keyframe_idxs": cond, "x": SimpleNamespace(cond=1)})], WALL)
    assert '"?"' in refused([text(-1, **{"\n": torch.ones(1, 7, 64)})]), "a name of nothing is a name"


@pytest.mark.parametrize("key", ["pooled_output", LLAMA, "cross_attn_controlnet"])
@pytest.mark.parametrize("value", [[torch.ones(1, 4)], torch.ones(1, 4, dtype=torch.int64), torch.tensor(1.0), "words"])
def test_known_text_in_another_form_is_refused(key, value):
    assert f'"{key}"' in refused([text(-1, **{key: value})], unknown_text=True)


def test_text_in_the_option_where_the_entry_has_none():
    (out,) = apply_to_conditioning([[None, {"cross_attn": text(5, -1)[0]}]], WALL)  # as ComfyUI reads it
    assert same_bits(out[0], apply_to_conditioning([text(5, -1)], WALL)[0][0])


def test_balancing_refuses_text_out_of_reach_too():
    region = Region(WALL.parts, {"name": "b", "attribute": "kind"})
    with pytest.raises(RegionError, match="lyrics"):
        balance_conditioning([text(-1, conditioning_lyrics=torch.ones(1, 7))], region, 2, 0)


# --- what is said ---


def told(conditioning: list[Any], strength: float = 1.0, mode: str = "auto") -> list[str]:
    judged = judge(conditioning, WALL)
    return [line for line, _ in steering_status(judged, conditioning, WALL, strength, mode, 0.0, 1.0)]


def test_what_is_said_of_text_that_passes():
    assert told([text(-1, new_words=torch.ones(1, 7, 64))]) == [
        "Sees nothing of wall here: comes out unchanged.",
        'Unguarded: "new_words" may be text, and unknown_text lets it pass.',
    ]  # fmt: skip


def test_what_is_said_after_another_node():
    strong = apply_to_conditioning([text(5, -1)], WALL, 2.0)
    (line,) = told(strong, 0.5)
    assert line.startswith("Sees wall here: moved at strength 0.5, or as strongly as an earlier node does.")
    assert told(strong, 2.0)[0].startswith("Sees wall here: moved at strength 2.")
    assert told(strong, 0.0) == ["Switched off: strength 0 moves nothing; what an earlier node moved stays so."]
    always = apply_to_conditioning([text(-1)], WALL, mode="always")
    assert told(always) == ["Moved: an earlier node moves every prompt."]
