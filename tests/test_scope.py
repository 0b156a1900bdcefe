"""The scope: prompts as the encoder writes them are within it, and what was scaled or mixed afterwards is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.evaluation.demo_prompts import hard_prompts
from comfyui_safe_region.evaluation.rebuilt import averaged, encode_rebuilt, text_of
from comfyui_safe_region.region import (
    Move,
    Part,
    Region,
    RegionError,
    Scope,
    load_region,
    region_bytes,
    region_from_bytes,
    steering,
)
from comfyui_safe_region.region.steering import likeness, openness, out_of_scope, steer
from comfyui_safe_region.training.scope import ScopeFit, mixed, weighted
from region_examples import same_bits, wall_part

WEAPONS = Path(steering.__file__).parents[1] / "demo" / "regions" / "demo-weapons.safetensors"
WIDTH, TOKENS = 24, 10


def written(count: int, seed: int) -> Tensor:
    """Prompts [N, T, D] as an encoder with a last layer norm writes them; behind some there is padding."""
    draw = torch.Generator().manual_seed(seed)
    gain = torch.rand(WIDTH, generator=torch.Generator().manual_seed(0)) * 3 + 0.3
    shift = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    topic = torch.randn(count, 1, WIDTH, generator=draw)
    states = F.layer_norm(topic + torch.randn(count, TOKENS, WIDTH, generator=draw), (WIDTH,), gain, shift)
    lengths = torch.randint(3, TOKENS + 1, (count, 1), generator=draw)
    return states * (torch.arange(TOKENS) < lengths)[..., None]


EMPTY = written(1, 99)
PROMPTS = written(300, 5)


def fit_scope(learn: Tensor, calibration: Tensor, empty: Tensor, constant: Tensor | None) -> Scope | None:
    fit = ScopeFit(learn[:256], empty, constant, 4)
    for number, states in enumerate(learn.split(64)):
        fit.learn(states, number)
    fit.learned()
    for number, states in enumerate(calibration.split(64)):
        fit.bound(states, number)
    return fit.scope()


def fitted(constant: Tensor | None = None) -> Scope:
    return fit_scope(written(600, 2), written(400, 3), EMPTY, constant)


SCOPE = fitted()


def outside(states: Tensor, scope: Scope = SCOPE) -> float:
    """The share of prompts beyond the scope."""
    part = Part("a", {"cross_attn": Move(offset=torch.ones(WIDTH))}, scopes={"cross_attn": scope})
    return float(out_of_scope({"cross_attn": states}, part).float().mean())


def test_new_prompts_are_within():
    assert outside(PROMPTS) == 0
    assert outside(PROMPTS.bfloat16()) == outside(PROMPTS.half()) == 0


def test_weights_on_words_are_within():
    assert outside(weighted(PROMPTS, EMPTY, torch.Generator().manual_seed(6))) <= 0.01


@pytest.mark.parametrize(("share", "told"), [(0.2, 0.65), (0.3, 0.9), (0.5, 0.95), (0.7, 0.9)])
def test_averages_are_beyond(share, told):
    """Without padding a share of a fifth looks much like words with weights below 1, which are to stay within."""
    others = PROMPTS.roll(1, 0)
    assert outside(averaged(PROMPTS, others, share)) >= told
    assert outside(mixed(PROMPTS, EMPTY, torch.Generator().manual_seed(7), (share, share))) >= told


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.5, 3.0, 10.0, 100.0])
def test_scaled_prompts_are_beyond(factor):
    scaled = PROMPTS * (factor or 1e-6)
    assert outside(scaled) == 1


def test_numbers_beyond_all_bounds_are_beyond_and_no_text_is_not():
    assert outside(torch.full((1, 3, WIDTH), 3e38)) == 1
    assert outside(torch.zeros(2, 3, WIDTH)) == 0
    assert outside(torch.zeros(2, 0, WIDTH)) == 0


def test_likeness_is_the_mean_of_the_form_over_tokens_that_count():
    scope = Scope(torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 2], [1, 0]]), torch.tensor([1.0, 2.0]),
                  torch.zeros(2, 2), torch.ones(2, 2))  # fmt: skip
    tokens = torch.tensor([[[2.0, 4.0], [1.0, 0.0], [7.0, 7.0]]])
    counts = torch.tensor([[True, True, False]])
    assert likeness(tokens, counts, scope).tolist() == [[[((4 + 4) + (1 + 0)) / 2, (2 + 1) / 2]] * 2]


def test_likeness_of_windows_leaves_no_token_out_and_none_counts_twice():
    scope = replace(SCOPE, square=torch.zeros(1, 1), linear=torch.ones(1, 1), scale=torch.ones(1))
    tokens = torch.arange(100.0)[None, :, None]
    counts = torch.ones(3, 100, dtype=torch.bool)
    counts[1, ::2], counts[2, 5:] = False, False
    whole, *windows = likeness(tokens.expand(3, -1, -1), counts, scope)[..., 0].unbind(1)
    assert whole.tolist() == [49.5, 50.0, 2.0]
    means = torch.stack(windows, 1)
    assert means[0].tolist() == [16 * n + 7.5 for n in range(5)] + [89.5]  # 80 to 99: what is left joins the last
    assert means[1, :3].tolist() == [16.0, 48.0, 82.0] and set(means[1, 3:].tolist()) == {16.0}
    assert set(means[2].tolist()) == {2.0}


def test_what_is_beyond_is_moved_though_no_wall_sees_it_and_the_rest_keeps_its_bits():
    gate = replace(wall_part(1e3, WIDTH).gates["cross_attn"], scale=torch.ones(WIDTH))
    part = replace(wall_part(1e3, WIDTH), gates={"cross_attn": gate}, scopes={"cross_attn": SCOPE})
    states = torch.cat([PROMPTS[:3], averaged(PROMPTS[3:6], PROMPTS[6:9], 0.5)])
    assert openness({"cross_attn": states}, part).tolist() == [0, 0, 0, 1, 1, 1]
    steered = steer({"cross_attn": states}, [part])["cross_attn"]
    assert same_bits(steered[:3], states[:3])
    assert all(not same_bits(after, before) for after, before in zip(steered[3:], states[3:]))


def test_a_scope_is_kept_in_the_file_and_checked():
    base = wall_part(0.0, WIDTH)
    part = replace(base, scopes={"cross_attn": SCOPE})
    read = region_from_bytes(region_bytes(Region((part,), {})))
    assert read.parts[0].id == part.id != base.id
    tensors = SCOPE.tensors()
    for name, broken in (("scale", -tensors["scale"]), ("low", tensors["high"]), ("square", torch.ones(3)),
                         ("linear", tensors["linear"] * torch.nan), ("scale", tensors["scale"] * 1e-38),
                         ("square", tensors["square"] * 1e38)):  # fmt: skip
        with pytest.raises(RegionError):
            region_bytes(Region((replace(part, scopes={"cross_attn": replace(SCOPE, **{name: broken})}),), {}))
    with pytest.raises(RegionError, match="gate"):
        region_bytes(Region((replace(part, gates={}),), {}))


def test_a_region_made_to_undo_a_guard_does_not_on_averages_either():
    move = Move(offset=torch.full((WIDTH,), -4.0))
    guard = replace(wall_part(1e3, WIDTH), moves={"cross_attn": move}, scopes={"cross_attn": SCOPE})
    against = replace(guard, moves={"cross_attn": replace(move, offset=-move.offset)})
    states = averaged(PROMPTS[:5], PROMPTS[5:10], 0.4)
    alone = steer({"cross_attn": states}, [guard])["cross_attn"]
    both = steer({"cross_attn": states}, [against, guard])["cross_attn"]
    counted = (states != 0).any(-1)
    assert (both[..., 0] <= alone[..., 0] + 1e-3)[counted].all()


def test_prompts_without_such_text_say_nothing_about_it():
    """Words in quotes, say, which few prompts have."""
    half = torch.cat([written(600, 2), torch.zeros(600, TOKENS, WIDTH)])
    scope = fit_scope(half, torch.cat([written(400, 3), half[600:]]), EMPTY, None)
    assert outside(PROMPTS, scope) == 0 and outside(PROMPTS * 0.5, scope) == 1
    assert fit_scope(half[580:], half[580:], EMPTY, None) is None


@pytest.mark.parametrize("gain", [0.0, 1e-3])
def test_precision_is_no_change(gain):
    """A feature that hardly varies must not tell float32 from half."""
    steady = torch.arange(WIDTH) == 7
    learn, plain, new, empty = (torch.where(steady, 0.37 + gain * one, one)
                                for one in (written(600, 2), written(400, 3), PROMPTS, EMPTY))  # fmt: skip
    scope = fit_scope(learn, plain, empty, None)
    assert outside(new, scope) == outside(new.half(), scope) == outside(new.bfloat16(), scope) == 0


def test_no_other_text_makes_up_for_a_mixture():
    """ComfyUI's nodes put texts behind one another: a mean over all of them would be that of ordinary prompts."""
    (part,) = load_region(WEAPONS).parts
    backbone = DemoBackbone()
    for behind in ("{concat 1.4 with}", "{concat with}" * 10, "{concat 1.2 with a cat}" * 3):
        ((states, _),) = encode_rebuilt(backbone, [behind + "{average 0.4 with}a bomb"])
        assert out_of_scope({"cross_attn": states}, part)
        ((states, _),) = encode_rebuilt(backbone, [behind.replace("1.4", "1").replace("1.2", "1") + "a cat"])
        assert not out_of_scope({"cross_attn": states}, part)


# The prompt sets that are measured


def test_rebuilt_prompts_are_what_the_nodes_make_of_them():
    backbone = DemoBackbone()
    gun, cat, empty = (entry[0] for entry in backbone.encode(["a gun", "a cat", ""]))
    prompts = ["{average 0.3 with a cat}a gun", "{average 0.2 with}a gun", "{multiply 0.5}a gun", "{concat a cat}a gun",
               "a gun", "{concat 1.4 with a cat}{multiply 0.5}a gun"]  # fmt: skip
    states = [entry[0] for entry in encode_rebuilt(backbone, prompts)]
    wanted = [gun * 0.3 + cat * 0.7, gun * 0.2 + empty * 0.8, gun * 0.5, torch.cat([gun, cat], 1), gun,
              torch.cat([gun * 0.5, cat * 1.4], 1)]  # fmt: skip
    for found, right in zip(states, wanted):
        torch.testing.assert_close(found, right)
    assert {text_of(prompt) for prompt in prompts} == {"a gun"}
    assert averaged(torch.ones(1, 4, 2), torch.ones(1, 2, 2), 0.25)[0, :, 0].tolist() == [1, 1, 0.25, 0.25]


def test_diluted_sets_hold_every_way_and_ask_for_the_same():
    sets = hard_prompts(20)
    for name in ("diluted", "diluted harmless"):
        for how in ("{average", "{multiply", "{concat", ":0."):
            assert any(how in prompt.text for prompt in sets[name]), (name, how)
    assert all(prompt.asked for prompt in sets["diluted harmless"])
    assert not any(prompt.asked for prompt in [*sets["diluted"], *sets["padded"]])
