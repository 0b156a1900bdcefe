"""How the demo model reads prompts (long ones, weights), the hard prompt sets, and how methods are compared on them."""

from __future__ import annotations

import pytest
import torch

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.model import Judge, PictureTextScore, tokenize, weighted_tokens, without_weights
from comfyui_safe_region.demo.networks import LATENT_CHANNELS
from comfyui_safe_region.evaluation.baselines import none_method, sfw_words_method
from comfyui_safe_region.evaluation.demo_prompts import NEIGHBOURS, demo_prompts, hard_prompts
from comfyui_safe_region.evaluation.steering import HARMLESS_SETS, compare, dominated, draw_set, wilson
from comfyui_safe_region.training.pairs import demo_pairs, everyday_prompts

BACKBONE = DemoBackbone()
MODEL = BACKBONE.model


def test_a_plain_prompt_is_read_as_its_tokenizer_reads_it():
    for prompt in ("", "a knife in the park", "Two words, and (brackets)."):
        ids, weights = weighted_tokens(MODEL, prompt)
        assert torch.equal(ids, tokenize(MODEL, [prompt])) and torch.all(weights == 1)


def test_long_prompts_take_several_chunks_and_lose_nothing():
    words = ["knife"] * 80
    ids, _ = weighted_tokens(MODEL, " ".join(words))
    assert ids.shape == (2, 77)
    assert torch.all(ids[:, 0] == MODEL.tokenizer.bos_token_id)
    knife = tokenize(MODEL, ["knife"])[0, 1]
    assert (ids == knife).sum() == 80
    ((states, options),) = BACKBONE.encode([" ".join(words)])
    assert states.shape == (1, 154, MODEL.text_encoder.config.hidden_size) and options == {}


def test_prompts_of_different_lengths_are_drawn_together_as_alone():
    long, short = BACKBONE.encode([", ".join(["a cat on a red background"] * 14), "a dog"])
    assert long[0].shape[1] == 2 * short[0].shape[1]
    x, sigma = torch.randn(2, LATENT_CHANNELS, 16, 16), torch.tensor([3.0, 3.0])
    together = BACKBONE.denoise(x, sigma, [long, short])
    for i, entry in enumerate((long, short)):
        alone = BACKBONE.denoise(x[i : i + 1], sigma[i : i + 1], [entry])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_weight_scales_a_token_s_distance_to_the_empty_prompt():
    plain, heavy, empty = (entry[0] for entry in BACKBONE.encode(["a knife", "a (knife:1.5)", ""]))
    assert without_weights("a (knife:1.5) and (a fork:0.7)") == "a knife and a fork"
    place = (tokenize(MODEL, ["a knife"])[0] == tokenize(MODEL, ["knife"])[0, 1]).nonzero().item()
    wanted = empty[0, place] + 1.5 * (plain[0, place] - empty[0, place])
    torch.testing.assert_close(heavy[0, place], wanted)
    others = [i for i in range(77) if i != place]
    assert torch.equal(heavy[0, others], plain[0, others])
    assert torch.equal(BACKBONE.encode(["a (knife:1.0)"])[0][0], plain)


def test_hard_prompts_are_what_their_names_say():
    sets = hard_prompts(24)
    assert all(len(prompts) == 24 for prompts in sets.values())
    assert sets == hard_prompts(24)
    weapons = {word.split(" ", 1)[-1] for thing in world.WEAPONS for word in thing.words}
    for prompt in sets["long"]:
        head = MODEL.tokenizer(prompt.text, add_special_tokens=False)["input_ids"][:75]
        first, rest = MODEL.tokenizer.decode(head), prompt.text.lower()
        assert any(word in rest for word in weapons)
        assert not any(f" {word} " in f" {first} " for word in weapons), first
    assert all(":" in prompt.text and without_weights(prompt.text) != prompt.text for prompt in sets["weighted"])
    assert all(prompt.asked for prompt in sets["negated"])
    assert any("no " in prompt.text for prompt in sets["negated"])
    for name in ("near neighbours", "word salad"):
        words = [word for prompt in sets[name] for word in prompt.text.replace(",", " ").split()]
        assert not weapons & set(words) - {"arms"}


def test_no_hard_prompt_is_trained_on():
    pairs = demo_pairs()
    trained = {side for pair in pairs.pairs for side in pair} | set(pairs.keep) | set(everyday_prompts())
    for name, prompts in hard_prompts(60).items():
        shared = {prompt.text for prompt in prompts} & trained
        assert len(shared) <= 2, f"{name}: {shared}"
    assert len(set(NEIGHBOURS) & trained) <= len(NEIGHBOURS) / 10


def test_methods_are_compared_on_the_same_noise():
    prompts = demo_prompts(6, 6)["harmless"]
    judge, score, plain = Judge(), PictureTextScore(MODEL), none_method(BACKBONE)
    first = draw_set(plain, judge, prompts, 4.0, 4, 3)
    again = draw_set(plain, judge, prompts, 4.0, 4, 3)
    assert torch.equal(first.pictures, again.pictures)
    nothing = compare(prompts, first, again, score)
    assert nothing.identical == nothing.count == 6 and nothing.pixel_change == 0 and nothing.kept == nothing.before
    words = draw_set(sfw_words_method(BACKBONE, ["a flower"]), judge, prompts, 4.0, 4, 3, first)
    changed = compare(prompts, first, words, score)
    assert changed.identical == 0 and changed.pixel_change > 0


def test_wilson_is_the_textbook_interval():
    low, high = wilson(8, 10)  # Wilson (1927), as tabulated by Brown, Cai & DasGupta (2001)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert wilson(0, 200)[0] == 0 and wilson(0, 200)[1] == pytest.approx(0.0188, abs=1e-3)
    assert wilson(0, 0) == (0, 1)


def test_a_point_is_dominated_where_another_is_better_in_one_and_no_worse_in_the_other():
    assert dominated([(0, 1), (1, 0), (1, 1), (0, 1)]) == [False, False, True, False]


def test_the_harmless_sets_are_known_by_name():
    assert set(HARMLESS_SETS) <= {*demo_prompts(1, 1), *hard_prompts(1)}
