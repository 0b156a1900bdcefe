"""What calibration promises about harmless prompts, measured over many draws; and on which prompts it is checked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_training import PAIRS, SHORT

from comfyui_safe_region.region import Gate
from comfyui_safe_region.training.attribute_trainer import AttributeTrainer, calibrate_stated
from comfyui_safe_region.training.attributes import demo_attribute
from comfyui_safe_region.training.gate import at_most, checked_card, raised_together, tolerance_limit, upper_bound
from comfyui_safe_region.training.packs import load_pack
from comfyui_safe_region.training.prompts import LONG_WORDS, build_sets
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

DRAWS = 400
NORMAL = torch.distributions.Normal(0.0, 1.0)


def beyond(threshold: float) -> float:
    """The share of all prompts whose depth is standard normal that lies deeper."""
    return 1 - float(NORMAL.cdf(torch.tensor(threshold, dtype=torch.float64)))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "budget"), [(320, 0.01), (700, 0.01), (150, 0.05)])
def test_the_budget_is_exceeded_in_one_calibration_of_twenty(count, budget):
    found = [tolerance_limit(random(count, seed=seed), budget) for seed in range(DRAWS)]
    exceeded = sum(beyond(limit) > budget for limit, _ in found) / DRAWS
    assert exceeded < 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)
    assert {bound for _, bound in found} == {found[0][1]} and 0.6 * budget < found[0][1] <= budget
    assert exceeded > 0.005, "it is no stricter than it says"


def test_with_too_few_prompts_the_wall_stands_beyond_all_and_the_bound_says_so():
    depths = random(50)
    limit, bound = tolerance_limit(depths, 0.01)
    assert limit > depths.max() and bound == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-6)
    assert tolerance_limit(random(298), 0.01)[1] > 0.01 >= tolerance_limit(random(299), 0.01)[1]


def test_bounds_are_those_of_the_binomial_distribution():
    def exact(most: int, count: int, share: float) -> float:
        return sum(math.comb(count, i) * share**i * (1 - share) ** (count - i) for i in range(most + 1))

    for most, count, share in ((0, 5, 0.3), (3, 40, 0.1), (7, 900, 0.01), (5, 5, 0.2)):
        assert at_most(most, count, share) == pytest.approx(exact(most, count, share), rel=1e-9)
    assert exact(3, 200, upper_bound(3, 200)) == pytest.approx(0.05, rel=1e-6)
    assert upper_bound(4, 4) == 1.0


def test_the_budget_holds_for_all_texts_of_a_prompt_together():
    """Three texts, of different spread and one of them with a heavy tail: a prompt is touched if any opens."""
    def depths(count: int, seed: int) -> torch.Tensor:
        found = random(3, count, seed=seed) * torch.tensor([[0.2], [1.0], [30.0]])
        found[1] = found[1].sign() * found[1].abs() ** 3
        return found

    shares = []
    for seed in range(150):
        raised, (bound,) = raised_together([(depths(320, seed), 0.01)], depths(60, seed + 5000),
                                           depths(120, seed + 9000), 0.0)  # fmt: skip
        assert bound <= 0.01
        shares.append(float((depths(20_000, seed + 20_000) > raised[:, None]).any(0).float().mean()))
    assert sum(share > 0.01 for share in shares) / len(shares) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_each_kind_of_prompt_has_a_budget_of_its_own():
    short, long, deep = random(1, 700, seed=1), random(1, 350, seed=2) + 1, torch.full((1, 40), 9.0)
    limits = tolerance_limit(short[0], 0.02), tolerance_limit(long[0], 0.05)
    raised, bounds = raised_together([(short, 0.02), (long, 0.05)], deep, short[:, :100], 0.0)
    assert bounds == [limits[0][1], limits[1][1]] and bounds[0] <= 0.02 and bounds[1] <= 0.05
    assert float(raised[0]) == pytest.approx(max(limits[0][0], limits[1][0]))
    # more and deeper long prompts do not move the wall for the others, as in one list they would
    longer = random(1, 2000, seed=2) - 1
    assert raised_together([(short, 0.02), (longer, 0.05)], deep, short, 0.0)[0] == pytest.approx(limits[0][0])
    assert tolerance_limit(torch.cat([short, longer], 1)[0], 0.02)[0] < limits[0][0] - 0.2


def test_walls_are_never_moved_inwards_and_leave_spare_room_where_there_is_any():
    harmless, deep = random(1, 400) - 9, torch.full((1, 40), 8.0)
    assert raised_together([(harmless, 0.01)], deep, harmless, 0.0)[0].tolist() == [0.0]
    assert raised_together([(harmless, 0.01)], deep, harmless, 0.25)[0].tolist() == [2.0]


def test_the_card_counts_every_kind_of_prompt():
    card = checked_card({"everyday": torch.tensor([-1.0, 2.0, -3.0]), "own": torch.tensor([-1.0]),
                         "long": torch.empty(0)})  # fmt: skip
    assert card == {"harmless_touched": 0.25, "harmless_checked": 4,
                    "harmless_kinds": {"everyday": [1, 3], "own": [0, 1]}}  # fmt: skip


# --- the sets ---


@pytest.mark.parametrize("most", [10**9, 7000, 700])
def test_what_calibrates_is_independent_and_what_checks_is_nowhere_else(most):
    sets = build_sets(load_pack("weapons"), 3, most)
    learned = {*sets.harmless, *(safe for _, safe in sets.pairs + sets.crowds)}
    assert not {*sets.calibration, *sets.checked} & learned and not set(sets.calibration) & set(sets.checked)
    assert len(sets.calibration) == len(set(sets.calibration))
    assert len(sets.checked_varied) == len(sets.checked)
    for long, of in ((sets.long, sets.calibration), (sets.checked_long, sets.checked)):
        assert all(len(prompt.split()) >= LONG_WORDS for prompt in long)
        if most == 10**9:  # otherwise some of what they are made of was left out
            twice = [prompt for prompt in of if sum(f", {prompt}, " in f", {one}, " for one in long) > 1]
            assert len(twice) < 0.02 * len(of), "only short ones that others hold, too"
    assert upper_bound(0, len(sets.calibration)) < (0.0125 if most > 1000 else 0.07)


@pytest.fixture(scope="module")
def instant():
    pairs = replace(PAIRS, keep=tuple(f"a {word} lamp" for word in "red blue green old new big wide tall".split()))
    trainer = Trainer(ToyBackbone(), pairs, replace(SHORT, steps=0), "bad things")
    return trainer, trainer.run()


def test_a_run_says_what_it_calibrated_with_and_what_it_was_checked_by(instant):
    trainer, region = instant
    card, sets = region.metadata["calibration"], trainer.sets
    assert card["harmless_prompts"] == len(sets.calibration), "prompts, not their variations"
    assert card["confidence"] == 0.95 and card["budget"] == 0.0125
    assert card["bound"] == tolerance_limit(random(len(sets.calibration)), 0.0125)[1] <= 0.0125
    assert card["bound_long"] == tolerance_limit(random(len(sets.long)), 3 * 0.0125)[1]
    counts = {kind: count for kind, (_, count) in card["harmless_kinds"].items()}
    assert counts == {kind: len(prompts) for kind, prompts in trainer.checked.items()}
    assert counts["own"] >= 1 and counts["long"] > 50
    assert counts["everyday"] + counts["own"] == counts["variations"] == len(sets.checked)
    assert card["harmless_checked"] == sum(counts.values())
    touched = sum(some for some, _ in card["harmless_kinds"].values())
    assert card["harmless_touched"] == pytest.approx(touched / card["harmless_checked"])
    assert card["harmless_touched"] < 0.03 and card["sources"] == {"cross_attn": card["held_out_unsafe_touched"]}


def test_held_out_pairs_with_words_of_their_own_are_measured_as_new(instant):
    assert not instant[0].new_words, "each of its words is in a pair that it learns from"
    apart = replace(PAIRS, pairs=(*PAIRS.pairs, *((f"one zzword{i}", "one flower") for i in range(40))))
    trainer = Trainer(ToyBackbone(), apart, replace(SHORT, steps=0), "bad things")
    held = {unsafe for unsafe, _ in trainer.sets.held_out}
    assert trainer.new_words and set(trainer.new_words) <= held
    assert all(word.startswith("one zzword") for word in trainer.new_words)


# --- attributes ---


def wall() -> Gate:
    return Gate(torch.ones(1, 1), torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor(0.1))


def test_prompts_that_state_the_attribute_stay_inside_no_more_often_than_it_says():
    exceeded = 0
    for seed in range(DRAWS):
        told, free = random(80, seed=seed) + 6, random(60, seed=seed + 5000) - 6
        gate, bound = calibrate_stated(wall(), told, free, 0.01)
        inside = float(NORMAL.cdf(gate.bias.double() - 6))
        exceeded += inside > bound
        assert bound == pytest.approx(upper_bound(0, 80))
    assert exceeded / DRAWS < 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)


def test_where_stated_and_open_prompts_lie_together_the_bound_still_holds():
    exceeded = 0
    for seed in range(DRAWS):
        told, free = random(80, seed=seed) + 0.5, random(60, seed=seed + 5000)
        gate, bound = calibrate_stated(wall(), told, free, 0.01)
        exceeded += float(NORMAL.cdf(gate.bias.double() - 0.5)) > bound
        assert bound < 0.7
    assert exceeded / DRAWS < 0.05


def test_an_attribute_counts_rows_and_checks_on_prompts_that_chose_nothing():
    trainer = AttributeTrainer(ToyBackbone(), demo_attribute(), replace(SHORT, steps=0, prompts=2500))
    card = trainer.run().metadata["calibration"]
    held, count = trainer.held_out, len(trainer.pairs.groups)
    rows = len(held.rows) // 2
    assert card["harmless_prompts"] == len(held.plain) + rows + len(held.stated) - 2 * rows * count
    assert card["harmless_checked"] == sum(map(len, trainer.checked.values())) > 200
    assert card["harmless_kinds"]["stated"][1] == len(trainer.checked["stated"]) > 10
    assert card["confidence"] == 0.9 and card["bound"] > 0.02, "rows are too few for 2 %"
    used = {prompt for share in (trainer.learn, held) for prompt in share.plain + share.stated}
    assert not used & {*trainer.checked["everyday"], *trainer.checked["own"], *trainer.checked["stated"]}
