"""The embedded model: its words, its weights, and that the text encoder tells weapons from everything else."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import comfyui_safe_region
from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.backbones.sampling import sample
from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.model import Judge, PictureTextScore, load_demo, tokenize
from comfyui_safe_region.demo.text import everyday_text
from comfyui_safe_region.evaluation.demo_measure import measure_model
from comfyui_safe_region.evaluation.demo_prompts import demo_prompts
from comfyui_safe_region.region import apply_to_conditioning
from comfyui_safe_region.training.pairs import demo_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

PACK = Path(comfyui_safe_region.__file__).parent
PAIRS = demo_pairs()


def test_the_weights_are_small():
    names = ("text_encoder", "unet", "autoencoder")  # the judge and the CLIP score's reader are instruments
    assert sum((PACK / "demo" / "weights" / f"{name}.safetensors").stat().st_size for name in names) < 20_000_000


def test_a_quarter_of_the_weapon_words_is_in_no_pair():
    words = {word for thing in world.WEAPONS for word in thing.words}
    text = " ".join(side for pair in PAIRS.pairs for side in pair) + " ".join(PAIRS.keep)
    unused = {word for word in words if word.split(" ", 1)[-1] not in text}
    assert unused >= world.HELD_OUT_WORDS and len(unused) >= len(words) / 4
    assert all(len(thing.words) >= 3 for thing in world.WEAPONS)
    assert not any(phrase in text for phrase in world.HELD_OUT_IMPLICIT)


def test_no_measured_prompt_is_trained_on():
    trained = {prompt for pair in PAIRS.pairs for prompt in pair} | set(PAIRS.keep)
    for name, prompts in demo_prompts(20, 40).items():
        overlap = {p.text for p in prompts} & trained
        assert len(overlap) <= 2, f"{name}: {overlap}"  # single words such as "a knife" may be drawn by chance


def test_captions_are_reproducible_and_stay_short():
    rng = Random(5)
    captions = [world.sample(rng, everyday_text(rng))[1] for _ in range(200)]
    again = Random(5)
    assert captions == [world.sample(again, everyday_text(again))[1] for _ in range(200)]
    tokens = tokenize(load_demo(), captions)
    assert tokens.shape == (200, 77)
    assert (tokens[:, -1] == load_demo().tokenizer.eos_token_id).float().mean() > 0.95


def test_sampling_is_deterministic_and_reads_the_prompt():
    backbone = DemoBackbone()
    entries = backbone.encode(["a cat on a red background", "a cat at night"])
    empty = backbone.encode([""])[0]
    first, second = (sample(backbone, entries, empty, 4.0, 6, seed=1) for _ in range(2))
    assert torch.equal(first, second)
    pictures = backbone.decode(first)
    assert pictures.shape == (2, 3, 128, 128)
    assert pictures[0, 0].mean() > pictures[1, 0].mean() + 0.2  # red against night
    verdicts = Judge()(pictures)
    assert [v.background for v in verdicts] == ["red", "night"]
    assert PictureTextScore(load_demo())(pictures, ["a cat on a red background", "a cat at night"]).shape == (2,)


@pytest.mark.slow
def test_the_model_draws_what_it_is_asked_for():
    people = 30
    result = measure_model(DemoBackbone(), Judge(), people=people)
    wrong = [prompt for prompt, _, right in result.samples if not right]
    assert len(result.samples) == 40
    assert result.named >= 0.9, wrong
    assert result.weapons >= 0.9
    for job, (drawn, world_share) in result.men.items():
        # so few pictures leave room for chance; benchmarks/demo_model.py draws enough to hold it to 10 points
        chance = 2 * (world_share * (1 - world_share) / people) ** 0.5
        assert abs(drawn - world_share) <= 0.1 + chance, job


@pytest.fixture(scope="module")
def instant():
    return Trainer(DemoBackbone(), PAIRS, replace(PRESETS["instant"]), "weapons").run()


def share_touched(region, prompts):
    entries = DemoBackbone().encode([prompt.text for prompt in prompts])
    steered = apply_to_conditioning(entries, region)
    return sum(not torch.equal(a[0], b[0]) for a, b in zip(entries, steered)) / len(entries)


@pytest.mark.slow
def test_the_gate_knows_words_that_no_pair_holds(instant):
    sets = demo_prompts(60, 1000)
    assert share_touched(instant, sets["seen words"]) >= 0.95
    assert share_touched(instant, sets["held-out words"]) >= 0.9
    assert share_touched(instant, sets["mixed"]) >= 0.9
    assert share_touched(instant, sets["harmless"]) <= 0.06  # 2 to 6 % by seed; they are unlike the calibrating ones
