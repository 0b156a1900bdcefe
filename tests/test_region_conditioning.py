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
from comfyui_safe_region.region.conditioning import ACTED, check_together
from region_examples import DTYPES, example_move, example_region, same_bits, wall_part

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
    st.lists(st.sampled_from([0.5, 1.0, -0.3]), min_size=4, max_size=4),
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


@given(st.integers(0, 10_000), st.lists(st.integers(0, 4), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_chains_with_ranges_agree_everywhere_in_every_order(seed, quarters):
    ranges = [sorted(quarters[:2]), sorted(quarters[2:])]

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
        assert apply_to_conditioning(once, again, 0.5, "always") == once, "the very same tensors"
    more = apply_to_conditioning(once, combine(region, REGIONS[0]))
    assert same(more, apply_to_conditioning([entry()], combine(region, REGIONS[0])))


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


@given(tenths, tenths, tenths, tenths, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_range_splits_the_entry_and_covers_it_exactly(start, end, first, last, own):
    (start, end), (first, last) = sorted((start, end)), sorted((first, last)) if own else (0.0, 1.0)
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
        assert e[1].get("start_percent", 0.0) < e[1].get("end_percent", 1.0) or (len(result) == 1 and e is source)


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
        ({"strength": float("nan")}, "strength"),
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
