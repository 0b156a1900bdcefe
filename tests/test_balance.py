"""Balancing an attribute: who gets what, what moves and what does not, what is refused, and learning it."""
from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_safe_region.cli import main
from comfyui_safe_region.region import (
    Gate,
    Move,
    Part,
    Region,
    RegionError,
    apply_to_conditioning,
    assign,
    attribute_of,
    balance_conditioning,
    combine,
    load_region,
    parse_shares,
    save_region,
)  # fmt: skip
from comfyui_safe_region.region.balance import GROUPS, STATED, known_groups
from comfyui_safe_region.region.conditioning import ACTED, check_together
from comfyui_safe_region.training.attribute_trainer import AttributeTrainer
from comfyui_safe_region.training.attributes import demo_attribute, parse_attribute
from comfyui_safe_region.training.pairs import PairsError
from comfyui_safe_region.training.recipe import PRESETS
from region_examples import DTYPES, example_region, same_bits
from toy_model import ToyBackbone

seeds = st.integers(0, 2**64 - 1)
share_lists = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)


# Who gets what


def counts(groups: torch.Tensor, number: int) -> list[int]:
    return torch.bincount(groups, minlength=number).tolist()


@given(seeds)
def test_eight_at_half_and_half_is_four_and_four(seed):
    assert counts(assign([0.5, 0.5], 8, seed), 2) == [4, 4]


@given(share_lists, st.integers(1, 40), seeds)
@settings(max_examples=300, deadline=None)
def test_each_count_is_less_than_one_off(shares, count, seed):
    found = counts(assign(shares, count, seed), len(shares))
    assert sum(found) == count
    for share, number in zip(shares, found):
        assert abs(number - Fraction(share * count, sum(shares))) < 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(any), st.integers(1, 40), seeds)
@settings(max_examples=200, deadline=None)
def test_any_shares_give_every_image_a_group_that_has_a_share(shares, count, seed):
    found = counts(assign(shares, count, seed), len(shares))
    assert len(found) == len(shares) and sum(found) == count
    assert all(number == 0 for share, number in zip(shares, found) if share == 0)


@given(share_lists, st.integers(1, 12), seeds)
def test_the_same_seed_gives_the_same_groups(shares, count, seed):
    assert torch.equal(assign(shares, count, seed), assign(shares, count, seed))
    assert assign(shares, count, seed).device.type == "cpu"


def test_the_order_is_shuffled():
    orders = {tuple(assign([1, 1], 8, seed).tolist()) for seed in range(40)}
    assert len(orders) > 25
    first = torch.stack([assign([1, 1], 8, seed) for seed in range(400)]).float().mean(0)
    assert ((first - 0.5).abs() < 0.125).all()  # five standard deviations: no place is for one group


@given(st.integers(0, 2**40), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_totals_over_consecutive_seeds_keep_close_to_the_shares(first, count, shares):
    """The discrepancy of {n sqrt 2}: sqrt 2 = [1; 2, 2, ...] has partial quotients of at most K = 2, so N points are
    off by at most 3 + (1 / log golden ratio + 2 / log 3) log N (Kuipers & Niederreiter, 1974, theorem 3.4 of chapter
    2); a group is cut out by two bounds. Independent draws would be off by about sqrt N.
    """
    total = torch.zeros(len(shares))
    for number in range(1, 301):
        total += torch.bincount(assign(shares, count, first + number), minlength=len(shares))
        wanted = torch.tensor(shares) / sum(shares) * count * number
        proven = 3 + (1 / math.log((1 + 5**0.5) / 2) + 2 / math.log(3)) * math.log(number)
        assert ((total - wanted).abs() <= 2 * proven).all()
        assert ((total - wanted).abs() <= 4).all()  # what is met in practice is far below


def test_random_seeds_are_not_biased():
    draw = torch.Generator().manual_seed(0)
    found = torch.zeros(2)
    for seed in torch.randint(2**62, (4000,), generator=draw).tolist():
        found += torch.bincount(assign([0.3, 0.7], 1, seed), minlength=2)
    assert abs(found[0] / 4000 - 0.3) < 0.03  # four standard deviations


@given(seeds, st.sampled_from([8, 16, 4]))
@settings(max_examples=100, deadline=None)
def test_two_attributes_are_even_together(seed, count):
    first = assign([1, 1], count, seed).tolist()
    second = assign([1, 1], count, seed, [first]).tolist()
    assert set(Counter(zip(first, second)).values()) == {count // 4}


@given(seeds, st.integers(1, 24), share_lists, share_lists)
@settings(max_examples=200, deadline=None)
def test_the_second_attribute_keeps_its_own_shares(seed, count, shares, others):
    first = assign(shares, count, seed).tolist()
    found = counts(assign(others, count, seed, [first]), len(others))
    assert all(abs(n - Fraction(share * count, sum(others))) < 1 for share, n in zip(others, found))


def test_two_attributes_of_single_images_meet_in_all_combinations():
    met = Counter()
    for seed in range(400):
        first = assign([1, 1], 1, seed).tolist()
        met[first[0], int(assign([1, 1], 1, seed, [first]))] += 1
    assert all(abs(met[pair] - 100) < 12 for pair in ((0, 0), (0, 1), (1, 0), (1, 1)))


# What moves. A token's first number says whether the prompt is about a person, its second whether it states a gender.


def wall(column: int, limit: float = 0.5, width: int = 6) -> Gate:
    weight = torch.zeros(1, width)
    weight[0, column] = 1.0
    return Gate(weight, torch.tensor([limit]), torch.zeros(width), torch.ones(width), torch.tensor(0.01))


def towards(column: int, width: int = 6) -> Move:
    offset = torch.zeros(width)
    offset[column] = 2.0
    return Move(offset=offset)


def attribute(
    name: str = "gender", groups: tuple[str, ...] = ("man", "woman"), first: int = 2, stated: bool = True,
    shares: Any = None,
) -> Region:  # fmt: skip
    parts = [Part(group, {"cross_attn": towards(first + i)}, {"cross_attn": wall(0)}) for i, group in enumerate(groups)]
    if stated:
        parts.append(Part(STATED, {"cross_attn": Move(offset=torch.zeros(6))}, {"cross_attn": wall(1)}))
    return Region(tuple(parts), {"name": name, "attribute": name, "shares": shares or dict.fromkeys(groups, 0.5)})


def entry(person: bool = True, stated: bool = False, rows: int = 1, dtype: torch.dtype = torch.float32, **options: Any):
    tokens = torch.zeros(rows, 5, 6)
    tokens[:, :, 4:] = torch.randn(rows, 5, 2, generator=torch.Generator().manual_seed(1))
    tokens[:, 2, 0], tokens[:, 3, 1] = float(person), float(stated)
    return [tokens.to(dtype), {"pooled_output": torch.ones(rows, 3, dtype=dtype), **options}]


def groups_of(out: list[Any], name: str = "gender") -> list[str]:
    return out[1][GROUPS][name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_image_moves_to_its_group(dtype):
    (out,) = balance_conditioning([entry(dtype=dtype)], attribute(), 8, 3)
    assert out[0].shape == (8, 5, 6) and out[0].dtype == dtype and out[1]["pooled_output"].shape == (8, 3)
    assert Counter(groups_of(out)) == {"man": 4, "woman": 4}
    assert groups_of(out) == [["man", "woman"][i] for i in assign([1, 1], 8, 3).tolist()]
    for group, moved in zip(groups_of(out), (out[0] - entry(dtype=dtype)[0]).float()):
        assert (moved[:, 2] == (2.0 if group == "man" else 0.0)).all()
        assert (moved[:, 3] == (2.0 if group == "woman" else 0.0)).all()
        assert (moved[:, [0, 1, 4, 5]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("person", "stated"), [(False, False), (False, True), (True, True)])
def test_other_prompts_keep_their_bits(dtype, person, stated):
    source = entry(person, stated, dtype=dtype)
    source[0][0, 4, 5] = -0.0
    (out,) = balance_conditioning([source], attribute(), 4, 0)
    assert all(same_bits(row, source[0][0]) for row in out[0])
    assert all(same_bits(row, source[1]["pooled_output"][0]) for row in out[1]["pooled_output"])


def test_rows_are_judged_one_by_one():
    both = entry(rows=2)
    both[0][1, 2, 0] = 0  # the second image's prompt shows nobody
    (out,) = balance_conditioning([both], attribute(), 2, 0)
    assert not same_bits(out[0][0], both[0][0]) and same_bits(out[0][1], both[0][1])


def test_the_input_stays_and_other_options_pass_as_they_are():
    hooks, mask, area = object(), torch.ones(1, 8, 8), (8, 8, 0, 0)
    source = entry(hooks=hooks, mask=mask, area=area, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    before, keys = source[0].clone(), dict(source[1])
    (out,) = balance_conditioning([source], attribute(), 4, 0)
    assert same_bits(source[0], before) and source[1] == keys
    assert out[1]["hooks"] is hooks and out[1]["mask"] is mask and out[1]["area"] is area
    assert out[1]["attention_mask"].tolist() == [[1, 1, 1, 1, 0]] * 4
    assert (out[0][:, 4] == source[0][0, 4]).all(), "padding must not move"


def test_a_masked_word_does_not_open_the_gate():
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    (out,) = balance_conditioning([entry(attention_mask=mask)], attribute(), 2, 0)
    assert (out[0] == entry()[0]).all()


def test_shares_and_strength():
    (out,) = balance_conditioning([entry()], attribute(), 4, 0, {"man": 1, "woman": 3}, strength=0.5)
    assert Counter(groups_of(out)) == {"man": 1, "woman": 3}
    assert sorted((out[0] - entry()[0])[:, 0, 2].tolist()) == [0, 0, 0, 1.0]
    (out,) = balance_conditioning([entry()], attribute(shares={"man": 0, "woman": 2}), 4, 0)
    assert groups_of(out) == ["woman"] * 4
    source = entry()
    assert balance_conditioning([source], attribute(), 4, 0, strength=0.0)[0] is source


def test_a_range_splits_the_entry_and_the_groups_stay_the_same_throughout():
    region, second = attribute(), attribute("age", ("old", "young"), 4)
    early, inner, late = balance_conditioning([entry()], region, 8, 1, start=0.2, end=0.8)
    assert [e[1]["start_percent"] for e in (early, inner, late)] == [0.0, 0.2, 0.8]
    assert same_bits(early[0], entry()[0]) and len(inner[0]) == 8
    again = balance_conditioning([early, inner, late], second, 8, 1)
    drawn = [groups_of(e, "age") for e in again]
    assert drawn[0] == drawn[1] == drawn[2]
    assert set(Counter(zip(groups_of(inner), drawn[0])).values()) == {2}


def test_balancing_never_looks_at_numbers():
    """Tensors without numbers: whoever asks for one, as a host that waits for its device does, gets an error."""
    source = entry(attention_mask=torch.ones(1, 5))
    ghost = [source[0].to("meta"), {name: tensor.to("meta") for name, tensor in source[1].items()}]
    (out,) = balance_conditioning([ghost], attribute(), 8, 0)
    assert out[0].is_meta and out[0].shape == (8, 5, 6) and Counter(groups_of(out)) == {"man": 4, "woman": 4}
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(out[0].sum() > 0)


# Chains


def test_the_same_attribute_acts_once():
    once = balance_conditioning([entry()], attribute(), 8, 3)
    twice = balance_conditioning(once, attribute(), 8, 4)
    assert same_bits(once[0][0], twice[0][0]) and groups_of(once[0]) == groups_of(twice[0])


@given(st.integers(0, 1000), st.floats(0.1, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_order_with_a_safe_region_does_not_matter(seed, strength, ranged):
    safe, region = example_region(seed=seed), attribute()
    options = {"start": 0.25, "end": 0.75} if ranged else {}
    one = apply_to_conditioning(balance_conditioning([entry()], region, 4, seed, **options), safe, strength)
    other = balance_conditioning(apply_to_conditioning([entry()], safe, strength), region, 4, seed, **options)
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert (a[0] == b[0]).all() and a[1][ACTED] == b[1][ACTED] and a[1].get(GROUPS) == b[1].get(GROUPS)
        assert a[1].get("start_percent") == b[1].get("start_percent")


def test_two_attributes_both_act():
    first = balance_conditioning([entry()], attribute(), 8, 5)
    (out,) = balance_conditioning(first, attribute("age", ("old", "young"), 4), 8, 5)
    assert set(Counter(zip(groups_of(out), groups_of(out, "age"))).values()) == {2}
    moved = out[0] - entry()[0]
    for i, pair in enumerate(zip(groups_of(out), groups_of(out, "age"))):
        columns = {"man": 2, "woman": 3, "old": 4, "young": 5}
        assert {c for c in range(6) if moved[i, 0, c] != 0} == {columns[name] for name in pair}


def test_what_is_remembered_goes_with_the_text():
    (out,) = balance_conditioning([entry()], attribute(), 4, 0)
    kept = [weakref.ref(out[0]), weakref.ref(out[1]["pooled_output"])]
    del out
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_the_options_stay_plain_data():
    (out,) = balance_conditioning([entry()], attribute(), 2, 0)
    assert out[1][GROUPS] == {"gender": groups_of(out)} and all(type(group) is str for group in groups_of(out))
    assert known_groups([out], 2) == {"gender": groups_of(out)} and known_groups([out], 3) == {}


def test_a_file_keeps_the_attribute(tmp_path):
    region = attribute(shares={"man": 1, "woman": 3})
    found = load_region(save_region(region, tmp_path / "gender.safetensors"))
    assert attribute_of(found).shares == {"man": 1.0, "woman": 3.0} and attribute_of(found).stated is not None
    (one,), (other,) = (balance_conditioning([entry()], each, 8, 3) for each in (region, found))
    assert same_bits(one[0], other[0])


# What is refused


def test_an_attribute_is_not_a_safe_region_and_the_other_way_round():
    for region in (attribute(), combine(attribute(), example_region())):
        with pytest.raises(RegionError, match="Balance Safe Region"):
            apply_to_conditioning([entry()], region)
        with pytest.raises(RegionError, match="Balance Safe Region"):
            check_together([example_region(), region])
    with pytest.raises(RegionError, match="Apply Safe Region"):
        balance_conditioning([entry()], example_region(), 8, 0)


@pytest.mark.parametrize("shares", [
    {"man": 1}, {"man": 1, "woman": 1, "child": 1}, {"man": 0, "woman": 0}, {"man": -1, "woman": 2}, [1, 1], "half",
    {"man": math.nan, "woman": 1}, {"man": math.inf, "woman": 1}, {"man": "1", "woman": 1}, {"man": True, "woman": 1},
    {"man": 10**400, "woman": 1}, {"man": None, "woman": 1},
])  # fmt: skip
def test_shares_of_a_file_are_checked(shares):
    region = replace(attribute(), metadata={"attribute": "gender", "shares": shares})
    with pytest.raises(RegionError) as error:
        attribute_of(region)
    assert "man" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "  ", 3, ["gender"], {}])
def test_an_attribute_needs_a_name(name):
    with pytest.raises(RegionError):
        attribute_of(replace(attribute(), metadata={"attribute": name}))


@pytest.mark.parametrize(("text", "shares"), [
    ("", None), ("  \n", None), ("man: 50, woman: 50", [50, 50]), ("woman=3; man=1", [1, 3]),
    ("man: 25%,woman: 75 %", [25, 75]), ("man 1\nwoman 2.5", [1, 2.5]),
])  # fmt: skip
def test_shares_as_people_write_them(text, shares):
    found = parse_shares(text, ["man", "woman"])
    assert found == (None if shares is None else dict(zip(["man", "woman"], shares)))


@pytest.mark.parametrize("text", ["man", "man: x, woman: 1", "man: 1, man: 2", "man: 1, women: 2", "man: nan, woman: 1",
                                  "man: 1", "man: -1, woman: 3", "50/50", "man: 0, woman: 0"])  # fmt: skip
def test_shares_that_make_no_sense(text):
    with pytest.raises(RegionError) as error:
        parse_shares(text, ["man", "woman"])
    assert "woman" in str(error.value)


@pytest.mark.parametrize(("options", "words"), [
    ({"batch_size": 0}, "batch_size"), ({"strength": math.nan}, "strength"), ({"start": 0.8, "end": 0.2}, "start"),
])  # fmt: skip
def test_numbers_that_make_no_sense(options, words):
    with pytest.raises(RegionError, match=words):
        balance_conditioning([entry()], attribute(), **{"batch_size": 8, "seed": 0} | options)


def test_a_conditioning_of_another_batch_names_both_numbers():
    with pytest.raises(RegionError, match=r"3 images.*batch_size is 8"):
        balance_conditioning([entry(rows=3)], attribute(), 8, 0)


# Rows to learn from


def test_rows_with_alternatives():
    pairs = parse_attribute(
        "# a comment\nattribute: gender\n"
        "a {judge|doctor} {at night|in the park} => woman: a woman {judge|doctor} {at night|in the park} => "
        "man: a man {judge|doctor} {at night|in the park}\nsomebody => man: a man => woman: a woman\n"
        "keep: a {cat|dog}\n"
    )
    assert pairs.attribute == "gender" and pairs.groups == ("man", "woman") and pairs.keep == ("a cat", "a dog")
    rows = dict(pairs.rows)
    assert rows["a doctor at night"] == ("a man doctor at night", "a woman doctor at night")
    assert rows["somebody"] == ("a man", "a woman") and len(rows) == 5
    assert parse_attribute(pairs.text()) == pairs


@pytest.mark.parametrize(("text", "words"), [
    ("a judge", r"line 2.*no row"), ("a judge => man: a man judge", r"line 2.*no row"),
    ("a judge => a man judge => woman: a woman judge", r"line 2.*no group"),
    ("a judge => man: a man judge => man: a woman judge", r"line 2.*twice"),
    ("a {judge|cook} => man: a man {judge|cook|chef} => woman: a woman {judge|cook}", r"line 2.*the same numbers"),
    ("a {judge => man: a man => woman: a woman", r"line 2.*brace"),
    ("a judge => man: => woman: a woman judge", r"line 2.*empty"),
    ("a judge => man: a man => woman: a woman\na cook => man: a man => child: a child", r"line 3.*groups"),
    ("a judge => man: a judge => woman: a woman judge", "elsewhere"),
])  # fmt: skip
def test_wrong_rows_are_named_by_line(text, words):
    with pytest.raises(PairsError, match=words):
        parse_attribute("attribute: gender\n" + text)


def test_an_attribute_without_a_name_says_what_to_write():
    with pytest.raises(PairsError, match="attribute: gender"):
        parse_attribute("a judge => man: a man judge => woman: a woman judge")


def test_the_demos_rows_leave_some_names_out():
    pairs = demo_attribute()
    text = pairs.text()
    assert pairs.groups == ("man", "woman") and "a female judge" in text
    assert not [word for word in ("magistrate", "rescuer", "aviator", "medic", "tutor", "baker") if word in text]


def test_the_command_names_file_and_line_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "rows.txt").write_text("attribute: gender\nno row here\n", encoding="utf-8")
    out = tmp_path / "r.safetensors"
    with pytest.raises(SystemExit) as stop:
        main(["train-balance", "--pairs", str(tmp_path / "rows.txt"), "--out", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("safe-region: ") and error.count("\n") == 1
    assert "rows.txt" in error and "line 2" in error and not out.exists()


# Learning


TOY = """\
attribute: kind
a {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|on a table|at night|by the sea} => \
left: a leftish {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|on a table|at night|by the sea} => \
right: a rightish {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|on a table|at night|by the sea}
{zzcook|zzjudge|zzpilot} and a {dog|cat} => left: leftish {zzcook|zzjudge|zzpilot} and a {dog|cat} => \
right: rightish {zzcook|zzjudge|zzpilot} and a {dog|cat}
"""
SHORT = replace(PRESETS["region"], steps=30, trajectories=24, sampling_steps=6, rank=8)


@pytest.fixture(scope="module")
def learned() -> Region:
    return AttributeTrainer(ToyBackbone(), parse_attribute(TOY), SHORT).run()


def test_an_encoder_that_reads_all_prompts_alike_is_named():
    class Deaf(ToyBackbone):
        def encode(self, prompts):
            return super().encode(["a lamp"] * len(prompts))

    with pytest.raises(PairsError, match="all prompts of every row alike"):
        AttributeTrainer(Deaf(), parse_attribute(TOY), SHORT).run()


def test_what_is_learned_is_an_attribute_region(learned, tmp_path):
    found = attribute_of(load_region(save_region(learned, tmp_path / "kind.safetensors")))
    assert list(found.groups) == ["left", "right"] and found.shares == {"left": 0.5, "right": 0.5}
    one, other = (part.gates["cross_attn"] for part in found.groups.values())
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_what_is_learned_draws_each_group_and_leaves_the_rest(learned):
    backbone = ToyBackbone()
    opened = ["a zztutor by the river", "a zzpilot and a horse"]
    x, sigma = torch.zeros(1, 4, 4, 4), torch.full((1,), 0.8)
    for prompt, source in zip(opened, backbone.encode(opened)):
        moved = [balance_conditioning([source], learned, 1, 0, groups=[group])[0] for group in ("left", "right")]
        wanted = backbone.encode([prompt.replace("zz", f"{group}ish zz") for group in ("left", "right")])
        difference, direction = (
            backbone.denoise(x, sigma, sides[:1]) - backbone.denoise(x, sigma, sides[1:]) for sides in (moved, wanted)
        )
        assert (difference * direction).sum() > 0.5 * direction.square().sum(), "the groups' pictures come apart"
        assert torch.cosine_similarity(difference.flatten(), direction.flatten(), dim=0) > 0.5
    calm = ["a lamp in the hall", "green apples and a horse"]
    stated = ["a leftish zzcook at night", "a rightish zzjudge by the sea"]
    for source in backbone.encode(calm + stated):
        (out,) = balance_conditioning([source], learned, 3, 0)
        assert all(same_bits(row, source[0][0]) for row in out[0])
