"""How unsafe a moved prompt still is, the strength that suffices, and the search for prompts that evade the gate."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from test_training import PAIRS, SHORT

from comfyui_safe_region.region import Move, Part
from comfyui_safe_region.training.discovery import LEAST, scaled, settle_strength, steer_entry, unsafe_shares
from comfyui_safe_region.training.hardening import EDITS, MOST_WORDS, edited, evading
from comfyui_safe_region.training.pairs import everyday_prompts, parse_pairs
from comfyui_safe_region.training.prompts import without_named
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer
from toy_model import WIDTH, ToyBackbone

BACKBONE = ToyBackbone()
UNSAFE, SAFE = "a zzknife in the park", "a flower in the park"


def entries(*prompts):
    return BACKBONE.encode(prompts)


def between(share: float):
    """The safe prompt's entry with some share of the way to the unsafe one added."""
    (unsafe,), (safe,) = entries(UNSAFE), entries(SAFE)
    return [safe[0] + share * (unsafe[0] - safe[0]), {}]


def moved_by(step: float) -> Part:
    """A part that moves every token by `step` times the mean way from the unsafe prompt to the safe one."""
    (unsafe,), (safe,) = entries(UNSAFE), entries(SAFE)
    return Part("test", {"cross_attn": Move(offset=step * (safe[0] - unsafe[0])[0, 1:].mean(0))})


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.4])
def test_the_share_of_the_gap_is_read_off_the_predictions(share):
    pair = (entries(UNSAFE)[0], entries(SAFE)[0])
    found = unsafe_shares(BACKBONE, [between(share)] * 3, [pair] * 3, torch.Generator().manual_seed(0))
    assert found.tolist() == pytest.approx([share] * 3, abs=1e-4)


def test_scaled_moves_go_that_far():
    generator = torch.Generator().manual_seed(2)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    move = Move(random(2, WIDTH), random(WIDTH, 2), random(WIDTH), torch.ones(WIDTH), random(WIDTH), random(5),
                random(WIDTH))  # fmt: skip
    part, (entry,) = Part("test", {"cross_attn": move}), entries(UNSAFE)
    whole, half = (steer_entry(entry, p.moves, {})[0] - entry[0] for p in (part, scaled(part, 0.5)))
    torch.testing.assert_close(half, whole / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("step", "least", "most"), [(1.0, LEAST, LEAST + 0.05), (0.6, 0.8, 0.9), (0.3, 1.0, 1.0)])
def test_the_strength_is_the_smallest_that_suffices(step, least, most):
    pair = (entries(UNSAFE)[0], entries(SAFE)[0])
    # the share that is left is 1 - step * strength, and below a half is enough
    strength = settle_strength(BACKBONE, [pair] * 4, moved_by(step), torch.Generator().manual_seed(0))
    assert least <= strength <= most


def test_what_evades_is_inside_and_still_draws_the_concept():
    pairs = [(UNSAFE, SAFE), ("a zzgun and a dog", "a flower and a dog")]
    arguments = (pairs, ["a lamp", "green apples"])

    def blind(prompts):
        return -torch.ones(len(prompts))

    def short_sighted(prompts):  # long prompts look harmless to this gate
        return torch.tensor([8.0 - len(prompt.split()) for prompt in prompts])

    found = evading(BACKBONE, *arguments, blind, Random(0), torch.Generator().manual_seed(0))
    assert len(found) == 2 and all("zz" in unsafe.lower() and "zz" not in safe.lower() for unsafe, safe in found)
    assert not evading(BACKBONE, *arguments, lambda p: -blind(p), Random(0), torch.Generator().manual_seed(0))
    longer = evading(BACKBONE, *arguments, short_sighted, Random(1), torch.Generator().manual_seed(0))
    assert all(8 <= len(text.split()) <= MOST_WORDS for text, _ in longer) and EDITS > 1
    harmless = evading(
        BACKBONE, [("a lamp", SAFE)], ["a lamp"], blind, Random(0), torch.Generator().manual_seed(0)
    )  # "a lamp" is its own unsafe side here: it draws itself
    assert len(harmless) == 1


def test_both_sides_are_edited_alike():
    rng = Random(4)
    for _ in range(60):
        unsafe, safe = edited("a zzknife in the park", ["a lamp", "green apples"], rng, beside="a flower in the park")
        assert unsafe.lower().replace("zzknife", "flower") == safe.lower() or "zzknife" not in unsafe.lower()
        same = edited("a zzgun and a dog", ["a lamp"], rng, beside="a zzgun and a dog")
        assert same[0] == same[1]


def test_the_gate_is_fitted_again_with_what_evaded(monkeypatch):
    from comfyui_safe_region.training import trainer as module

    # words that no pair holds and that look like nothing unsafe: the gate learns them from here only
    places = ("in the park", "on a table", "at night", "by the sea", "", "and a dog", "and a cat", "in town")
    extra = [(f"a {word} {place}", f"a flower {place}") for word in ("kubota", "rimfire") for place in places] * 6
    asked = []

    def found(backbone, pairs, fillers, depth_of, rng, generator):
        asked.append(depth_of([unsafe for unsafe, _ in extra]))
        return extra if len(asked) == 1 else []

    monkeypatch.setattr(module, "evading", found)
    trainer = Trainer(ToyBackbone(), PAIRS, replace(SHORT, steps=0, harden=3), "bad things")
    trainer.run()
    assert trainer.numbers["evaded"] == [len(extra), 0]
    before, after = ((depths > 0).float().mean() for depths in asked)
    assert before < 0.5 < after


def test_the_hardened_preset_runs_and_says_what_it_found():
    recipe = replace(PRESETS["hardened"], steps=4, trajectories=8, sampling_steps=4, rank=4)
    trainer = Trainer(ToyBackbone(), PAIRS, recipe, "bad things")
    seen = []
    trainer.run(seen.append)
    assert len(trainer.numbers["evaded"]) in (1, 2) and 0.7 <= trainer.numbers["strength"] <= 1
    assert {"harden", "strength"} <= {progress.stage for progress in seen}
    assert [p.step for p in seen] == sorted(p.step for p in seen) and seen[-1].step == seen[-1].total


def test_everyday_prompts_that_name_what_the_pairs_replace_are_not_harmless():
    pairs = parse_pairs("a {kitchen knife|red bus} on a table => a {cup|horse} on a table")
    prompts = ["a knife", "the kitchen", "Kitchen knives", "a big kitchen knife, shiny", "two red buses", "a red bus.",
               "a table", "red busy street"]  # fmt: skip
    assert without_named(prompts, pairs.pairs) == [prompts[i] for i in (0, 1, 2, 4, 6, 7)]
    everyday = everyday_prompts()
    kept = without_named(everyday, PAIRS.pairs)
    assert kept == list(everyday)  # made-up words
