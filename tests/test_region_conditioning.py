"""Regions on a conditioning as ComfyUI passes it around: composition, once only, ranges, and everything left alone."""
from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_safe_region.region import Part, Region, RegionError, apply_to_conditioning, combine, steer
from comfyui_safe_region.region.blocks import FAMILIES
from comfyui_safe_region.region.conditioning import ACTED, check_together, steer_once, steer_poses
from region_examples import DTYPES, example_move, example_part, example_region, same_bits, wall_part

WIDTHS = {"cross_attn": 6, "pooled_output": 8}


def entry(seed: int = 0, dtype: torch.dtype = torch.float32, batch: int = 1, **options: Any) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    tokens, pooled = (torch.randn(shape, generator=draw).to(dtype) for shape in ((batch, 5, 6), (batch, 8)))
    return [tokens, {"pooled_output": pooled, **options}]


def same(one: list[Any], other: list[Any]) -> bool:
    """The same text to the bit, over the same ranges, marked with the same parts."""
    return len(one) == len(other) and all(
        same_bits(a[0], b[0])
        and same_bits(a[1]["pooled_output"], b[1]["pooled_output"])
        and all(a[1].get(key) == b[1].get(key) for key in ("start_percent", "end_percent", ACTED))
        for a, b in zip(one, other)
    )


# What is left alone


def test_the_input_is_never_mutated_and_unknown_options_pass_as_they_are():
    anything = object()
    nested = {"deep": [torch.ones(2)]}
    options = {"mask": torch.ones(1, 4, 4), "strength": 0.5, "hooks": anything, "model_conds": nested, "area": (1, 2)}
    conditioning = [entry(1, **options), entry(2, batch=3, control=anything)]
    tensors = [t for e in conditioning for t in (e[0], *(v for v in e[1].values() if isinstance(v, torch.Tensor)))]
    before = [tensor.clone() for tensor in tensors]
    keys = [dict(e[1]) for e in conditioning]
    result = apply_to_conditioning(conditioning, example_region(**WIDTHS), start=0.2, end=0.7)
    assert all(same_bits(tensor, kept) for tensor, kept in zip(tensors, before))
    for e, kept in zip(conditioning, keys):
        assert list(e[1]) == list(kept) and all(e[1][key] is kept[key] for key in kept)
    assert len(result) == 6
    for out in result:
        source = conditioning[0] if "mask" in out[1] else conditioning[1]
        added = {"pooled_output", "start_percent", "end_percent", ACTED}
        assert set(out[1]) - set(source[1]) <= added
        assert all(out[1][key] is value for key, value in source[1].items() if key not in added)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes_stay(dtype):
    (out,) = apply_to_conditioning([entry(dtype=dtype, batch=2)], example_region(**WIDTHS))
    assert out[0].shape == (2, 5, 6) and out[0].dtype == out[1]["pooled_output"].dtype == dtype
    assert not same_bits(out[0], entry(dtype=dtype, batch=2)[0])


def test_entries_as_tuples_and_an_empty_conditioning():
    assert apply_to_conditioning([], example_region()) == []
    (out,) = apply_to_conditioning([tuple(entry())], example_region())
    assert isinstance(out, list) and not same_bits(out[0], entry()[0])


@given(st.integers(0, 10_000), st.sampled_from(DTYPES))
@settings(max_examples=50, deadline=None)
def test_strength_zero_and_inside_change_no_bit(seed, dtype):
    conditioning = [entry(seed, dtype)]
    for mode in ("auto", "gated", "always"):
        assert apply_to_conditioning(conditioning, example_region(**WIDTHS), 0.0, mode)[0] is conditioning[0]
    (out,) = apply_to_conditioning(conditioning, example_region(bias=1e4, **WIDTHS))
    assert same_bits(out[0], conditioning[0][0])
    assert same_bits(out[1]["pooled_output"], conditioning[0][1]["pooled_output"])


def test_a_result_needs_no_gradient_and_works_in_inference_mode():
    region = Region((Part("a", {"cross_attn": example_move(6)}),))
    region.parts[0].moves["cross_attn"].offset.requires_grad_()
    (out,) = apply_to_conditioning([entry()], region)
    assert not out[0].requires_grad
    with torch.inference_mode():
        once = apply_to_conditioning([entry()], region)
        assert apply_to_conditioning(once, region)[0][0] is once[0][0]


@pytest.mark.parametrize("option", ["attention_mask", None])
def test_the_attention_mask_says_what_is_padding(option):
    tokens = torch.full((1, 3, 4), -1.0)
    tokens[0, 2] = 9.0
    options = {option: torch.tensor([[1, 1, 0]])} if option else {}
    (out,) = apply_to_conditioning([[tokens, options]], Region((wall_part(0.0),)))
    assert same_bits(out[0], tokens) == bool(option)


# Composition


REGIONS = [
    example_region("a", 1, 0.0, cross_attn=6),
    example_region("b", 2, 0.0, pooled_output=8),
    example_region("c", 3, 0.0, cross_attn=6, pooled_output=8),
    Region((Part("d", {"pooled_output": example_move(8, 4)}),), {"name": "d"}),
]


@given(
    st.integers(0, 10_000), st.permutations(range(4)), st.sampled_from(DTYPES),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
    st.lists(st.sampled_from(["auto", "always"]), min_size=4, max_size=4),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_chain_gives_the_same_bits_in_every_order(seed, order, dtype, strengths, modes):
    def chain(numbers):
        conditioning = [entry(seed, dtype)]
        for i in numbers:
            conditioning = apply_to_conditioning(conditioning, REGIONS[i], strengths[i], modes[i])
        return conditioning

    assert same(chain(order), chain(range(4)))


@given(st.integers(0, 10_000), st.permutations(range(4)))
@settings(max_examples=50, deadline=None)
def test_combined_is_the_same_as_chained(seed, order):
    chained = [entry(seed)]
    for i in order:
        chained = apply_to_conditioning(chained, REGIONS[i])
    combined = combine(*(REGIONS[i] for i in order))
    assert same(apply_to_conditioning([entry(seed)], combined), chained)


@given(st.integers(0, 10_000), st.lists(st.sets(st.integers(0, 4), min_size=2, max_size=2), min_size=2, max_size=2))
@settings(max_examples=100, deadline=None)
def test_chains_with_ranges_agree_everywhere_in_every_order(seed, quarters):
    ranges = [sorted(pair) for pair in quarters]

    def chain(numbers):
        conditioning = [entry(seed)]
        for i in numbers:
            start, end = (q / 4 for q in ranges[i])
            conditioning = apply_to_conditioning(conditioning, REGIONS[2 * i], start=start, end=end)
        return sorted(conditioning, key=lambda e: e[1].get("start_percent", 0.0))

    one, other = chain([0, 1]), chain([1, 0])
    for percent in (0.1, 0.3, 0.6, 0.9):
        (a,), (b,) = active(one, percent), active(other, percent)
        assert same_bits(a[0], b[0]) and same_bits(a[1]["pooled_output"], b[1]["pooled_output"])


def test_acting_twice_moves_once():
    region = example_region(**WIDTHS)
    once = apply_to_conditioning([entry()], region)
    assert once[0][1][ACTED] == [region.parts[0].id]
    for again in (region, combine(region, region), example_region("renamed", **WIDTHS)):
        for strength in (1.0, 0.5, 0.0):
            assert apply_to_conditioning(once, again, strength) == once, "the very same tensors"
    more = apply_to_conditioning(once, combine(region, REGIONS[0]))
    assert same(more, apply_to_conditioning([entry()], combine(region, REGIONS[0])))


@given(
    st.integers(0, 10_000), st.sampled_from(DTYPES), st.floats(-3, 3),
    st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.5, 1.0, 4.0]), st.sampled_from(["auto", "always"])),
             min_size=1, max_size=4),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_strongest_steering_counts_whatever_came_first(seed, dtype, bias, uses):
    region = example_region(bias=bias, **WIDTHS)
    conditioning = [entry(seed, dtype, batch=2)]
    for strength, mode in uses:
        conditioning = apply_to_conditioning(conditioning, region, strength, mode)
    acting = [(strength, mode) for strength, mode in uses if strength]
    strength, always = max((s for s, _ in acting), default=0.0), any(mode == "always" for _, mode in acting)
    mode = "always" if always else "auto"
    assert same(conditioning, apply_to_conditioning([entry(seed, dtype, batch=2)], region, strength, mode))


def test_a_weaker_or_shut_node_before_does_not_disarm_a_later_one():
    wall = Region((wall_part(0.0),))
    unsafe, inside = [torch.full((1, 2, 4), 5.0), {}], [torch.full((1, 2, 4), -5.0), {}]
    for strength in (0.01, 0.25, 0.5):
        weak = apply_to_conditioning([unsafe], wall, strength)
        assert torch.equal(apply_to_conditioning(weak, wall)[0][0], unsafe[0] + 0.25)
    shut = apply_to_conditioning([inside], wall)
    assert torch.equal(apply_to_conditioning(shut, wall, mode="always")[0][0], inside[0] + 0.25)


def test_a_part_that_acted_on_some_rows_only_acts_on_the_others_later():
    part = wall_part(0.0)
    unsafe = [torch.full((2, 2, 4), 5.0), {}]
    some = steer_once(unsafe, [part], [torch.tensor([0.0, 2.0])])  # as a balance region with the guard's part does
    assert torch.equal(some[0] - unsafe[0], torch.tensor([0.0, 0.5])[:, None, None].expand(2, 2, 4))
    (all_rows,) = apply_to_conditioning([some], Region((part,)))
    assert torch.equal(all_rows[0] - unsafe[0], torch.tensor([0.25, 0.5])[:, None, None].expand(2, 2, 4))
    weaker = steer_once(all_rows, [part], [torch.tensor([1.0, 0.0])])
    assert weaker is all_rows, "nothing weakens"


def test_a_range_before_takes_nothing_from_a_later_one():
    region = example_region(**WIDTHS)
    whole = apply_to_conditioning([entry()], region)
    for first in ({"start": 0.3, "end": 0.6}, {"strength": 0.2, "start": 0.3, "end": 0.6}, {"end": 0.5}):
        split = apply_to_conditioning([entry()], region, **first)
        guarded = apply_to_conditioning(split, region)
        assert len(guarded) == len(split) > 1
        assert all(same_bits(e[0], whole[0][0]) for e in guarded)
        late = apply_to_conditioning(split, region, start=0.5)
        for percent in (0.55, 0.7, 0.9):
            assert same_bits(active(late, percent)[0][0], whole[0][0])


def test_steered_text_that_is_edited_in_place_counts_as_new():
    region = example_region(bias=0.5, **WIDTHS)
    for number, key in ((0, None), (1, "pooled_output")):
        (steered,) = apply_to_conditioning([entry()], region)
        edited = steered[number] if key is None else steered[number][key]
        edited.copy_(entry(7)[number] if key is None else entry(7)[number][key])
        fresh = [steered[0].clone(), {**steered[1], "pooled_output": steered[1]["pooled_output"].clone()}]
        assert same(apply_to_conditioning([steered], region), apply_to_conditioning([fresh], region))


def test_text_beside_the_steered_that_is_edited_in_place_is_judged_anew():
    part = wall_part(0.0, 6)
    part = Part("wall", part.moves, {"pooled_output": wall_part(0.0, 8).gates["cross_attn"]})
    harmless = [torch.ones(1, 2, 6), {"pooled_output": torch.full((1, 8), -5.0)}]
    (out,) = apply_to_conditioning([harmless], Region((part,)))
    out[1]["pooled_output"].fill_(5.0)
    (again,) = apply_to_conditioning([out], Region((part,)))
    assert same_bits(out[0], harmless[0]) and not same_bits(again[0], out[0])


def test_a_mask_that_is_taken_away_later_lets_no_token_through():
    tokens = torch.full((1, 3, 4), -1.0)
    tokens[0, 2] = 9.0
    (out,) = apply_to_conditioning([[tokens, {"attention_mask": torch.tensor([[1, 1, 0]])}]], Region((wall_part(0.0),)))
    assert same_bits(out[0], tokens)
    (again,) = apply_to_conditioning([[out[0], {}]], Region((wall_part(0.0),)))
    assert torch.equal(again[0], tokens + 0.25)


def test_other_nodes_between_two_regions_change_nothing_about_the_text():
    (between,) = apply_to_conditioning([entry()], REGIONS[0])
    marked = [between[0], {**between[1], "mask": torch.ones(1, 8, 8), "strength": 0.5}]
    result = apply_to_conditioning([marked], REGIONS[2])
    assert same(result, apply_to_conditioning([entry()], combine(REGIONS[0], REGIONS[2])))
    assert result[0][1]["mask"] is marked[1]["mask"]


def test_text_that_another_node_rebuilt_counts_as_new():
    region = Region((wall_part(0.0),))
    (safe,) = apply_to_conditioning([[torch.full((1, 2, 4), 5.0), {}]], region)
    joined = torch.cat([safe[0], torch.full((1, 2, 4), 7.0)], 1)  # as ConditioningConcat does, with unsteered text
    (out,) = apply_to_conditioning([[joined, safe[1]]], region)
    assert torch.equal(out[0], joined + 0.25)


def test_text_that_another_node_replaced_is_not_brought_back():
    (out,) = apply_to_conditioning([entry()], REGIONS[2])
    other = [out[0], {**out[1], "pooled_output": torch.zeros(1, 8)}]
    (result,) = apply_to_conditioning([other], REGIONS[0])
    assert not result[1]["pooled_output"].any()


def test_what_is_remembered_of_a_steered_text_goes_with_it():
    source = entry()
    kept = weakref.ref(source[0])
    result = apply_to_conditioning([source], example_region())
    del source
    gc.collect()
    assert kept() is not None, "a second region in the chain needs it"
    del result
    gc.collect()
    assert kept() is None


def test_the_options_stay_plain_data():
    (out,) = apply_to_conditioning([entry()], example_region(**WIDTHS))
    assert all(isinstance(part, str) for part in out[1][ACTED])
    copy.deepcopy(out)


# Ranges


def active(conditioning: list[Any], percent: float) -> list[Any]:
    return [e for e in conditioning if e[1].get("start_percent", 0.0) <= percent < e[1].get("end_percent", 1.0)]


tenths = st.integers(0, 10).map(lambda n: n / 10)


@given(st.tuples(tenths, tenths).filter(lambda r: r[0] != r[1]), tenths, tenths, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_range_splits_the_entry_and_covers_it_exactly(chosen, first, last, own):
    (start, end), (first, last) = sorted(chosen), sorted((first, last)) if own else (0.0, 1.0)
    source = entry(start_percent=first, end_percent=last) if own else entry()
    result = apply_to_conditioning([source], example_region(**WIDTHS), start=start, end=end)
    (steered,) = steer({"cross_attn": source[0]}, example_region().parts).values()
    for percent in (n / 20 for n in range(1, 20, 2)):
        found = active(result, percent)
        assert len(found) == (first <= percent < last)
        if found:
            inside = start <= percent < end
            assert same_bits(found[0][0], steered if inside else source[0])
            assert (ACTED in found[0][1]) == inside
    for e in result:
        assert e[1].get("start_percent", 0.0) < e[1].get("end_percent", 1.0) or len(result) == 1


@pytest.mark.parametrize("point", [0.0, 0.25, 0.5, 1.0])
def test_a_range_of_a_single_point_is_steered_too(point):
    """ComfyUI draws it at a step that falls on it."""
    source = entry(start_percent=point, end_percent=point)
    (out,) = apply_to_conditioning([source], example_region(**WIDTHS))
    assert not same_bits(out[0], source[0]) and (out[1]["start_percent"], out[1]["end_percent"]) == (point, point)
    (left,) = apply_to_conditioning([source], example_region(**WIDTHS), start=0.3, end=0.4)
    assert left is source


@pytest.mark.parametrize("value", [None, "half", torch.tensor(0.5)])
def test_a_range_that_is_no_number_is_refused(value):
    assert "range of sampling is no number" in message([entry(start_percent=value)], example_region(**WIDTHS))


def region_of(family: str) -> Region:
    shapes = next(one for one in FAMILIES if one.name == family).shapes
    moves = {key: example_move(shape[-1]) for key, shape in shapes.items() if len(shape) < 3}
    return Region((replace(example_part(6), gates={}, constant={}, moves=moves),), {"name": "weapons"})


def prompt_of(family: str) -> list[Any]:
    shapes = dict(next(one for one in FAMILIES if one.name == family).shapes)
    text = {key: torch.ones(1, *shape) for key, shape in shapes.items()}
    return [text.pop("cross_attn"), text]


@pytest.mark.parametrize(("learned", "met"), [
    ("Wan", "Flux"), ("Chroma and PixArt", "HiDream"), ("AuraFlow", "SDXL"), ("Cosmos", "HunyuanDiT"),
    ("HunyuanImage and HunyuanVideo 1.5", "Kandinsky 5 and 6"), ("Z-Image", "Ming-Image"),
])  # fmt: skip
def test_a_family_with_more_texts_than_the_region_learned_is_refused(learned, met):
    assert "was learned on" in message([prompt_of(met)], region_of(learned))
    assert apply_to_conditioning([prompt_of(learned)], region_of(learned))


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x"])
def test_a_text_that_the_model_does_not_read_may_be_missing_in_a_region(family):
    """As in regions that were learned in diffusers."""
    (part,) = region_of(family).parts
    region = Region((replace(part, moves={"cross_attn": part.moves["cross_attn"]}),))
    assert apply_to_conditioning([prompt_of(family)], region)


def test_layers_that_no_region_learned_are_refused_in_any_family():
    region = example_region(cross_attn=6)
    for extra in ("conditioning_llama3", "conditioning_mt5xl", "direct_context"):
        states = torch.ones(1, 2, 5, 6) if extra.endswith("llama3") else torch.ones(1, 5, 6)
        assert "was learned on" in message([[torch.ones(1, 5, 6), {extra: states}]], region)


def test_the_whole_range_adds_no_schedule():
    (out,) = apply_to_conditioning([entry()], example_region())
    assert "start_percent" not in out[1] and "end_percent" not in out[1]


# Bad input


def message(*arguments: Any, **options: Any) -> str:
    with pytest.raises(RegionError) as caught:
        apply_to_conditioning(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_a_wrong_width_names_both_sides():
    region = Region(example_region(cross_attn=768).parts, {"name": "weapons", "encoder": {"name": "SD1ClipModel"}})
    text = message([entry()], region)
    named = ("weapons", "SD1ClipModel", "cross_attn 768", "cross_attn 6", "pooled_output 8")
    assert all(word in text for word in named)


def test_a_move_of_a_wrong_width_without_a_gate():
    assert "cross_attn 9" in message([entry()], Region((Part("a", {"cross_attn": example_move(9)}),)))


def test_a_missing_block_names_both_sides():
    lacking = entry()
    lacking[1]["pooled_output"] = None
    text = message([lacking], example_region(**WIDTHS))
    assert all(word in text for word in ("pooled_output 8", "has cross_attn 6.", "another text encoder"))


def test_a_gate_on_a_missing_block_is_an_error_too():
    gate = example_region(pooled_output=8).parts[0].gates
    region = Region((Part("a", example_region().parts[0].moves, gate),))
    assert "pooled_output 8" in message([[torch.ones(1, 5, 6), {}]], region)


def test_an_entry_without_text():
    assert "no text" in message([[None, {}]], example_region())


def test_one_entry_that_does_not_fit_stops_all():
    assert message([entry(), [torch.ones(1, 5, 7), {}]], example_region())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "sometimes"}, "auto, gated or always"),
        ({"start": 0.8, "end": 0.2}, "start before end"),
        ({"start": -0.1}, "between 0 and 1"),
        ({"end": 1.5}, "between 0 and 1"),
        ({"end": float("nan")}, "between 0 and 1"),
        ({"start": 0.5, "end": 0.5}, "start before end"),
        ({"start": 1.0}, "start before end"),
        ({"end": 0.0}, "start before end"),
        ({"start": "0"}, "between 0 and 1"),
        *(({"strength": strength}, "must be a number from 0 to 4")
          for strength in (float("nan"), float("inf"), -1, -1e-9, 4.1, 1e30, None, "1")),
    ],
)
def test_options_that_make_no_sense(options, words):
    assert words in message([entry()], example_region(), **options)


def test_gated_needs_a_gate():
    assert "no gate" in message([entry()], REGIONS[3], mode="gated")
    assert apply_to_conditioning([entry()], REGIONS[3], mode="auto")


def test_combine_keeps_names_apart_and_counts_equal_parts_once():
    regions = [example_region("a", 1), example_region("a", 2), example_region("a-2", 3), example_region("a", 1)]
    combined = combine(*regions)
    assert sorted(part.label for part in combined.parts) == ["a", "a-2", "a-2-2"]
    assert {part.id for part in combined.parts} == {region.parts[0].id for region in regions}
    long = combine(example_region("x" * 64, 1), example_region("x" * 64, 2))
    assert all(len(part.label) <= 64 for part in long.parts)


def test_regions_of_different_encoders_do_not_go_together():
    small, large = (replace(example_region(name, **widths), metadata={"name": name, "encoder": {"name": encoder}})
                    for name, encoder, widths in (("a", "CLIP-L", {"cross_attn": 6}), ("b", "T5", {"cross_attn": 8})))
    with pytest.raises(RegionError, match=r'"a" was learned on CLIP-L \(cross_attn 6\) and "b" was learned on T5'):
        check_together([small, large])
    check_together([small, example_region(**WIDTHS)])  # the pooled vector is one that the other leaves alone


def test_combine_keeps_the_encoder_that_all_agree_on():
    same = {"encoder": {"name": "A"}, "family": "a"}
    one, other = (Region(example_region("a", n).parts, same | {"base_model": n}) for n in (1, 2))
    combined = combine(one, other).metadata
    assert combined.items() >= same.items() and "base_model" not in combined


def test_only_takes_concepts_by_name():
    both = combine(example_region("a", 1), example_region("b", 2))
    assert [part.label for part in both.only(["b"]).parts] == ["b"]
    with pytest.raises(RegionError, match=r"no concept named c; it has: a, b\."):
        both.only(["b", "c"])


def test_text_for_a_controlnet_alone_is_steered_as_text_of_its_own():
    inside, outside = ([torch.full((1, 5, 6), v), {"pooled_output": torch.full((1, 8), v)}] for v in (0.0, 9.0))
    region = Region((wall_part(1.0, 6),), {"name": "wall"})
    alone = apply_to_conditioning([outside], region)[0]
    options = {"pooled_output": inside[1]["pooled_output"], "cross_attn_controlnet": outside[0],
               "pooled_output_controlnet": outside[1]["pooled_output"]}  # fmt: skip
    given = [inside[0], dict(options)]
    ((text, found),) = apply_to_conditioning([given], region)
    assert same_bits(text, inside[0]) and same_bits(found["cross_attn_controlnet"], alone[0])
    assert not same_bits(alone[0], outside[0])
    assert given[1] == options, "the input stays as it is"
    again = apply_to_conditioning([[text, found]], region)[0]
    assert same_bits(again[1]["cross_attn_controlnet"], alone[0]), "once only"


def test_the_text_with_a_pose_is_steered_in_prompts_that_are_not_drawn_too():
    inside, outside = (torch.full((1, 5, 6), v) for v in (0.0, 9.0))
    region = Region((wall_part(1.0, 6),), {"name": "wall"})
    alone = apply_to_conditioning([[outside, {}]], region)[0][0]
    ((text, options),) = apply_to_conditioning([[inside, {"cross_attn_pose": outside, "attention_mask": None}]], region)
    assert same_bits(text, inside) and same_bits(options["cross_attn_pose"], alone)
    negative = [[outside, {"cross_attn_pose": outside}], [outside, {}]]
    with_pose, without = steer_poses(negative, region)
    assert with_pose[0] is outside and same_bits(with_pose[1]["cross_attn_pose"], alone)
    assert without is negative[1]
    first, second, *_ = steer_poses(negative, region, 1.0, "auto", 0.5)
    assert first[1]["cross_attn_pose"] is outside and same_bits(second[1]["cross_attn_pose"], alone)


@pytest.mark.parametrize(("family", "options"), [
    ("Ming-Image", {}), ("Qwen-Image 2.1", {"image_slots": [3]}), ("Kandinsky 5 and 6", {}),
])  # fmt: skip
def test_families_of_a_newer_comfyui_are_steered_in_every_text(family, options):
    entry = prompt_of(family)
    ((text, found),) = apply_to_conditioning([[entry[0], entry[1] | options]], region_of(family))
    assert not same_bits(text, entry[0])
    assert all(not same_bits(found[key], tensor) for key, tensor in entry[1].items())
    assert all(found[key] is value for key, value in options.items())
