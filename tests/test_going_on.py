"""Going on from a region: what it knew stays, what the pairs teach comes on top, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_training import HARMLESS, PAIRS, SHORT, UNSEEN, gap_left, opens, trained

from comfyui_safe_region.region import Gate, Move, Part, Region, RegionError, apply_to_conditioning
from comfyui_safe_region.training.going_on import extended_move, seen_by_old
from comfyui_safe_region.training.instant import instant_move
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.plan import plan
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer
from toy_model import WIDTH, ToyBackbone, token_statistics

INSTANT = replace(PRESETS["instant"], prompts=2500, rank=8)
OTHER = parse_pairs(
    "a {yyape|yycat|yyowl|yyelk|yyfox|yyant} {in the park|on a table|at night|by the sea} => "
    "a {stone|stone|stone|stone|stone|stone} {in the park|on a table|at night|by the sea}\n"
    "{red|blue|green} {yyape|yycat|yyowl} and a {dog|cat} => {red|blue|green} {stone|stone|stone} and a {dog|cat}"
)
OTHERS = [prompt.replace("zz", "yy") for prompt in UNSEEN]


def share(found):
    return sum(found) / len(found)


class Bilingual(ToyBackbone):
    """Words that start with `yy` share another direction, and draw something else."""

    def encode(self, prompts):
        entries = super().encode(prompts)
        for entry, prompt in zip(entries, prompts):
            words = prompt.replace(",", " ").split()
            places = [i + 1 for i, word in enumerate(words) if word.lower().startswith("yy")]
            entry[0][0, places, 1] += 6
            entry[0][0, len(words) + 1 :, 1] += 6 * len(places) / (len(words) + 1)
        return entries


def share_left(region, prompts, safe_word):
    """How much of the way from the unsafe to the safe picture is left."""
    backbone = Bilingual()
    safe = [" ".join(safe_word if word[:2] in ("zz", "yy") else word for word in p.split()) for p in prompts]
    unsafe, safe = backbone.encode(prompts), backbone.encode(safe)
    x, sigma = torch.zeros(len(prompts), 4, 4, 4), torch.full((len(prompts),), 0.8)
    of = [backbone.denoise(x, sigma, e) for e in (unsafe, safe, apply_to_conditioning(unsafe, region))]
    return float((of[2] - of[1]).square().mean() / (of[0] - of[1]).square().mean())


@pytest.fixture(scope="module")
def first():
    return Trainer(Bilingual(), PAIRS, INSTANT, "bad things").run()


@pytest.fixture(scope="module", params=[0, 40], ids=["instant", "region"])
def both(request, first):
    recipe = replace(SHORT, prompts=2500, steps=request.param)
    return Trainer(Bilingual(), OTHER, recipe, "other things", first).run()


def test_it_opens_on_the_new_words_and_still_on_the_old_ones(first, both):
    assert share(opens(first, Bilingual(), UNSEEN)) > 0.7 and not any(opens(first, Bilingual(), OTHERS))
    assert share(opens(both, Bilingual(), UNSEEN)) > 0.7 and share(opens(both, Bilingual(), OTHERS)) > 0.5
    assert not any(opens(both, Bilingual(), HARMLESS))
    old, new = ([f"a {start}{i:03} in the hall" for i in range(60)] for start in ("zz", "yy"))
    assert sum(opens(both, Bilingual(), old)) >= sum(opens(first, Bilingual(), old))
    assert sum(opens(both, Bilingual(), new)) > 25 > 10 > sum(opens(first, Bilingual(), new))
    walls = [len(region.parts[0].gates["cross_attn"].bias) for region in (first, both)]
    assert walls == [4, 8]


def test_the_move_learns_the_new_ones_and_keeps_what_it_did(first, both):
    assert share_left(first, OTHERS, "stone") > 0.9
    assert share_left(both, OTHERS, "stone") < 0.85
    assert share_left(both, UNSEEN, "flower") < share_left(first, UNSEEN, "flower") + 0.2


def test_its_card_says_what_it_was_learned_from_and_what_it_goes_on_from(first, both):
    new, old = both.metadata, first.metadata
    assert new["continued_from"] == {"name": "bad things", "hash": first.parts[0].id}
    assert new["recipe"]["pairs"] == len(OTHER.pairs) and new["recipe"]["pairs_hash"] != old["recipe"]["pairs_hash"]
    assert "continued_from" not in old
    assert new["calibration"]["held_out_unsafe"] > 0 and new["calibration"]["held_out_unsafe_touched"] > 0.8
    assert new["calibration"]["harmless_touched"] < 0.05


def test_with_the_same_pairs_it_needs_no_new_walls(first):
    again = Trainer(Bilingual(), PAIRS, replace(SHORT, prompts=2500, steps=20), "bad things", first).run()
    assert len(again.parts[0].gates["cross_attn"].bias) == 4
    assert share(opens(again, Bilingual(), UNSEEN)) > 0.7
    assert share_left(again, UNSEEN, "flower") < share_left(first, UNSEEN, "flower") + 0.05
    assert gap_left(Bilingual(), again) < 0.7 and again.parts[0].id != first.parts[0].id


def test_the_rank_does_not_grow_without_end(first):
    region = first
    for number in range(3):
        region = Trainer(Bilingual(), (OTHER, PAIRS)[number % 2], INSTANT, "more", region).run()
    assert len(region.parts[0].moves["cross_attn"].down) <= 2 * INSTANT.rank
    assert len(region.parts[0].gates["cross_attn"].bias) == 8
    assert share(opens(region, Bilingual(), UNSEEN + OTHERS)) > 0.7
    assert share_left(region, OTHERS, "stone") < 0.8 and share_left(region, UNSEEN, "flower") < 0.75


@pytest.mark.parametrize("steps", [0, 4])
def test_the_plan_counts_it_right(first, steps):
    class Counting(Bilingual):
        encoded = 0

        def encode(self, prompts):
            self.encoded += len(prompts)
            return super().encode(prompts)

    backbone = Counting()
    trainer = Trainer(backbone, OTHER, replace(SHORT, steps=steps, prompts=900), "other", first)
    expected, seen = plan(trainer), []
    backbone.encoded, backbone.calls = 1, 0
    trainer.run(seen.append)
    assert (expected.encodings, expected.evaluations) == (backbone.encoded, backbone.calls)
    assert seen[-1].step == seen[-1].total and [p.step for p in seen] == sorted(p.step for p in seen)


def test_the_papers_preset_goes_on_from_its_own_regions():
    recipe = replace(PRESETS["paper"], steps=2, sampling_steps=10)
    start, _ = trained(ToyBackbone(), recipe)
    region, _ = trained(ToyBackbone(), recipe, existing=start)
    assert region.parts[0].id != start.parts[0].id
    assert region.metadata["continued_from"]["hash"] == start.parts[0].id


# --- what is refused, before anything is encoded for it ---


def wide(width: int, block: str = "cross_attn", label: str = "bad", **more) -> Region:
    gate = Gate(torch.ones(1, width), torch.zeros(1), torch.zeros(width), torch.ones(width), torch.tensor(0.1))
    return Region((Part(label, {block: Move(offset=torch.zeros(width))}, {block: gate}),), {"name": "old"} | more)


SHIFT = Region((Part("bad", {"cross_attn": Move(profile=torch.zeros(24), direction=torch.zeros(WIDTH))}),), {})
ENCODER = {"name": "SDXLClipModel", "parts": ["clip_g"]}


@pytest.mark.parametrize(
    ("existing", "preset", "why"),
    [
        (Region((*wide(WIDTH).parts, *wide(WIDTH, label="worse").parts), {}), "region", "has several"),
        (wide(WIDTH, attribute="gender"), "region", "balances an attribute"),
        (wide(WIDTH + 8), "region", "but this conditioning has"),
        (wide(WIDTH, "pooled_output"), "region", "but this conditioning has"),
        (wide(WIDTH, "conditioning_llama3__layer3"), "instant", "but this conditioning has"),
        (wide(WIDTH, encoder=ENCODER), "region", "SDXLClipModel, and this model has Toy"),
        (wide(WIDTH), "paper", "not learned with the preset paper"),
        (SHIFT, "region", "has no gate"),
        (SHIFT, "instant", "has no gate"),
    ],
)
def test_what_it_cannot_go_on_from_is_refused_in_one_sentence(existing, preset, why):
    with pytest.raises(RegionError, match=why) as error:
        Trainer(ToyBackbone(), PAIRS, PRESETS[preset], "bad things", existing)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 300


# --- the mathematics ---


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_added_to_a_map_is_added_to_the_displacements():
    source, target = random(2, 50, 3, 6, seed=5)
    mean, scale = random(6, seed=6), random(6, seed=7).abs() + 0.5
    down, up, offset = (random(*shape, seed=8).double() for shape in ((2, 6), (6, 2), (6,)))
    x = ((source - mean) / scale).double()
    further = target + ((x @ down.T @ up.T + offset) * scale).float()
    found = token_statistics(source, target, mean, scale, None).plus(down, up, offset)
    expected = token_statistics(source, further, mean, scale, None)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, atol=1e-4, rtol=1e-4)


def test_an_extended_move_still_does_to_unseen_tokens_what_the_old_one_did():
    """Two kinds of unsafe tokens: the second is learned, of the first nothing is left but the move."""
    still = random(3000, 4, 24, seed=1)
    kinds = []
    for column in (0, 1):
        unsafe = random(400, 4, 24, seed=column + 2)
        unsafe[..., column] += 6
        goal = unsafe.clone()
        goal[..., column] -= 6
        goal[..., 10 + column] += 3
        kinds.append((unsafe, goal))
    zeros, ones = torch.zeros(24), torch.ones(24)
    stays, first, second = (token_statistics(*pair, zeros, ones, None) for pair in ((still, still), *kinds))
    old = instant_move(first.beside(stays), first.beside(stays), 6)

    def left(move: Move, of) -> float:
        return float(of.error(move.down.double(), move.up.double(), move.offset.double()))

    learn = second.beside(seen_by_old(old, stays), 1.0).beside(stays)
    new, forgetful = extended_move(old, learn, learn, 6), instant_move(second.beside(stays), second.beside(stays), 6)
    assert left(forgetful, first) > 0.9 and left(old, second) > 0.9
    assert left(new, first) < left(old, first) + 0.1 and left(new, second) < left(forgetful, second) + 0.15


def test_a_move_that_is_extended_by_nothing_stays():
    source = random(300, 4, 10, seed=1)
    zeros, ones = torch.zeros(10), torch.ones(10)
    target = source + source @ (random(10, 3, seed=2) @ random(3, 10, seed=3)) * 0.1
    known = token_statistics(source, target, zeros, ones, None)
    old = instant_move(known, known, 3)
    new = extended_move(old, known, known, 3)

    def moved(move: Move) -> torch.Tensor:
        return source @ move.down.T @ move.up.T + move.offset

    torch.testing.assert_close(moved(new), moved(old), atol=2e-3, rtol=1e-2)
