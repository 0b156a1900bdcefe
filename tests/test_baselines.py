"""The baselines' formulas, each against numbers worked out by other means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.backbones.sampling import guided, sample
from comfyui_safe_region.demo.model import load_demo
from comfyui_safe_region.evaluation import baselines
from comfyui_safe_region.evaluation.baselines.method import cross_attentions, in_force, sigma_at
from comfyui_safe_region.evaluation.baselines.nag import guided_unet, normalized_guidance
from comfyui_safe_region.evaluation.baselines.rece import adversarial_map
from comfyui_safe_region.evaluation.baselines.safree import filter_end, project, subspace_projection, toxic_tokens
from comfyui_safe_region.evaluation.baselines.shift import mean_difference
from comfyui_safe_region.evaluation.baselines.sld import PRESETS, SafetyGuide, Strength
from comfyui_safe_region.evaluation.baselines.uce import aligned_states, closed_form
from comfyui_safe_region.region import Gate, Move, Part, Region
from comfyui_safe_region.region.steering import displacement, openness
from toy_model import ToyBackbone

CONCEPTS = ["a knife", "a gun"]
PROMPTS = ["a knife on a red background", "a cat in the park"]
PAIRS = [("a knife", "a tulip"), ("a photo of a gun", "a photo of a sunflower")]


@pytest.fixture(scope="module")
def backbone():
    return DemoBackbone()


@pytest.fixture(scope="module")
def weights():
    """The shared model's weights as they were before any test."""
    return {name: tensor.clone() for name, tensor in load_demo().unet.state_dict().items()}


def all_methods(backbone):
    make = [
        baselines.none_method, lambda b: baselines.negative_prompt_method(b, CONCEPTS),
        lambda b: baselines.sfw_words_method(b, ["flower"]), lambda b: baselines.sld_method(b, CONCEPTS, "max"),
        lambda b: baselines.safree_method(b, CONCEPTS), lambda b: baselines.nag_method(b, CONCEPTS),
        lambda b: baselines.esd_method(b, CONCEPTS, steps=1, sampling_steps=2),
        lambda b: baselines.uce_method(b, CONCEPTS, "a flower", ["a cat"]),
        lambda b: baselines.rece_method(b, CONCEPTS, "a flower", ["a cat"], rounds=1),
        lambda b: baselines.mean_difference_method(b, PAIRS),
        lambda b: baselines.condelta_method(b, "a flower", "a knife"),
    ]  # fmt: skip
    return [one(backbone) for one in make]


@pytest.fixture(scope="module")
def methods(backbone, weights):
    return all_methods(backbone)


def drawn(method, guidance=4.0, prompts=PROMPTS):
    return method.sample(method.positive(prompts), guidance, steps=2, seed=3)


def solved(rows, targets):
    """The matrix M [D, O] with rows @ M nearest to targets, by least squares."""
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution


# -- what a method is


def test_every_method_draws_something_else_than_the_model_alone(methods):
    plain = drawn(methods[0])
    for method in methods[1:]:
        latents = drawn(method)
        assert latents.isfinite().all(), method.name
        assert not torch.equal(latents, plain), method.name


def test_the_shared_model_is_left_as_it_was(methods, weights):
    now = load_demo().unet
    assert all(torch.equal(tensor, weights[name]) for name, tensor in now.state_dict().items())
    assert not any(p.requires_grad for method in methods for p in method.backbone.model.unet.parameters())
    assert not any("Guided" in type(module).__name__ for module in now.modules())


def test_the_model_alone_draws_as_plain_sampling_does(backbone, methods):
    entries, empty = backbone.encode(PROMPTS), backbone.encode([""])[0]
    assert torch.equal(drawn(methods[0]), sample(backbone, entries, empty, 4.0, 2, seed=3))


def test_only_methods_that_need_no_guidance_act_at_guidance_one(methods):
    plain = drawn(methods[0], 1.0)
    without = {method.name for method in methods[1:] if torch.equal(drawn(method, 1.0), plain)}
    assert without == {"negative prompt"}


@pytest.mark.parametrize("name", ["SLD max", "SAFREE projection", "NAG", "UCE"])
def test_a_region_acts_on_top_of_a_method(methods, name):
    method = next(m for m in methods if m.name == name)
    move = Move(profile=torch.ones(77), direction=torch.full((192,), 0.3))
    both = method.with_region(Region((Part("shift", {"cross_attn": move}),)))
    assert both.name == f"{name} + region" and both.backbone is method.backbone
    for (*entries,), (*steered,) in zip(method.positive(PROMPTS), both.positive(PROMPTS)):
        assert len(entries) == len(steered)
        for before, after in zip(entries, steered):
            assert torch.allclose(after[0], before[0] + 0.3, atol=1e-5)
            assert after[1].get("end_percent") == before[1].get("end_percent")
    assert not torch.equal(drawn(both), drawn(method))


def test_a_gated_region_leaves_the_prompts_inside_to_the_method(backbone, methods):
    away, _ = (entry[0][0, 1:].mean(0) for entry in backbone.encode(PROMPTS))
    wall = Gate(away[None], torch.tensor([1e6]), torch.zeros(192), torch.ones(192), torch.tensor(1.0))
    part = Part("shut", {"cross_attn": Move(offset=torch.ones(192))}, {"cross_attn": wall})
    assert float(openness({"cross_attn": backbone.encode(PROMPTS)[0][0]}, part)) == 0
    assert float(displacement(torch.zeros(1, 192), part.moves["cross_attn"]).sum()) == 192
    method = methods[0]
    assert torch.equal(drawn(method.with_region(Region((part,)))), drawn(method))


# -- schedules


def test_percent_is_that_of_the_timestep(backbone):
    levels = backbone.levels
    assert sigma_at(levels, 0) == math.inf and sigma_at(levels, 1) == 0
    assert sigma_at(levels, 1 - 300 / 999) == pytest.approx(float(levels[300]), rel=1e-5)
    between = float((levels[300] * levels[301]).sqrt())
    assert sigma_at(levels, 1 - 300.5 / 999) == pytest.approx(between, rel=1e-5)


def test_the_entry_in_force_follows_the_noise_level(backbone):
    early, late = ["early", {"end_percent": 0.3}], ["late", {"start_percent": 0.3}]
    seen = [in_force([early, late], float(s), backbone.levels)[0] for s in backbone.sigmas(11)[:-1]]
    assert seen == ["early"] * 3 + ["late"] * 8  # steps at 0, .1, .2, (.300 of 999 rounds past .3), ...
    with pytest.raises(ValueError, match="in force"):
        in_force([late], float(backbone.levels[-1]), backbone.levels)


def test_a_region_that_starts_late_leaves_the_first_steps_alone(backbone, methods):
    move = Move(profile=torch.ones(77), direction=torch.full((192,), 0.3))
    method = methods[0].with_region(Region((Part("shift", {"cross_attn": move}),)), start=0.3)
    used = []

    def recorder(drawing, x, sigma, entries, empty, guidance):
        used.append(entries[0][0])
        return guided(drawing, x, sigma, entries, empty, guidance)

    recording = replace(method, guide=lambda steps: recorder)
    recording.sample(recording.positive(PROMPTS), steps=4)
    plain = backbone.encode(PROMPTS)[0][0]
    assert [torch.equal(tensor, plain) for tensor in used] == [True, False, False, False]


# -- safe latent diffusion


class Noises:
    """A backbone whose noise predictions are given, by prompt and step; x and sigma are whatever they are."""

    def __init__(self, noises):
        self.noises, self.step = noises, 0

    def denoise(self, x, sigma, entries):
        return x - sigma.view(-1, 1) * torch.tensor([[self.noises[entry[0]][self.step]] for entry in entries])


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_sld_against_the_equations_worked_by_hand(guidance):
    # steps of one number: warm-up (10 of 50 is 1 of 5), then e_p - e_s below the threshold, then above it
    noises = {"p": [0.5, 0.52, 0.9], "0": [0.1, 0.2, 0.3], "s": [0.6, 0.5, 0.2]}
    backbone = Noises(noises)
    guide = SafetyGuide(["s", {}], Strength(warm_up=10, scale=20.0, threshold=0.05, momentum_scale=0.3,
                                            momentum_decay=0.4), steps=5)  # fmt: skip
    # step 0: apart -.1, mu = min(1, 2) = 1, gamma = 1 * .5 = .5, momentum .6 * .5 = .3, warm-up: left out
    # step 1: apart .02, mu = .4, gamma = .4 * .3 + .3 * .3 = .21, momentum .4 * .3 + .6 * .21 = .246
    # step 2: apart .7 > .05, mu = 0, gamma = .3 * .246 = .0738
    gammas = [0.0, 0.21, 0.0738]
    x, sigma = torch.tensor([[2.0]]), torch.tensor([3.0])
    for step, safety in enumerate(gammas):
        backbone.step = step
        denoised = guide(backbone, x, sigma, [["p", {}]], ["0", {}], guidance)
        noise = (x - denoised) / 3
        wanted = noises["0"][step] + guidance * (noises["p"][step] - noises["0"][step] - safety)
        assert float(noise) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("preset, steps, first", [("medium", 50, 10), ("strong", 50, 7), ("max", 50, 0),
                                                  ("medium", 12, 3), ("strong", 12, 2)])  # fmt: skip
def test_slds_warm_up_is_a_share_of_the_steps(preset, steps, first):
    backbone = Noises({"p": [0.4], "0": [0.0], "s": [0.5]})
    guide = SafetyGuide(["s", {}], PRESETS[preset], steps)
    x, sigma = torch.zeros(1, 1), torch.ones(1)
    plain = [
        bool(torch.isclose(guide(backbone, x, sigma, [["p", {}]], ["0", {}], 2.0), torch.tensor(-0.8)))
        for _ in range(steps)
    ]
    assert plain.index(False) == first and not any(plain[first:])


def test_sld_starts_anew_with_each_run_and_counts_its_evaluations():
    backbone = ToyBackbone()
    entries, (empty, concept) = backbone.encode(["a zzknife", "a lamp"]), backbone.encode(["", "zzgun"])
    fresh = [
        sample(backbone, entries, empty, 4.0, 5, 0, SafetyGuide(concept, PRESETS["max"], 5)) for _ in range(2)
    ]
    assert torch.equal(*fresh) and backbone.calls == 2 * 5 * 2 * 3


# -- SAFREE


def test_safree_finds_the_token_whose_masking_leads_away_from_the_concept():
    concept = subspace_projection(torch.tensor([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0]]))
    assert torch.allclose(concept, torch.diag(torch.tensor([1.0, 1, 0, 0])).double())
    # distances from the concept 1, 3, 1; the others' means 2, 1, 2
    masked = torch.tensor([[5.0, 2, 1, 0], [0.0, 1, 0, 3], [7.0, 7, 1, 0]])
    assert toxic_tokens(masked, concept).tolist() == [False, True, False]
    # all alike: within alpha = 1 % of the others
    assert not toxic_tokens(torch.tensor([[0.0, 0, 1, 0], [9.0, 0, 0, 1], [0, 0, 1.005, 0]]), concept).any()
    assert toxic_tokens(torch.tensor([[0.0, 0, 1.02, 0], [9.0, 0, 0, 1]]), concept).tolist() == [True, False]
    assert toxic_tokens(masked[:1], concept).tolist() == [True]  # no others: as in the authors' code


def test_safrees_projection_leaves_the_concept_but_not_the_prompts_own_space(backbone):
    (entry,) = backbone.encode(["a knife and a cat"])
    tokenizer, encoder = backbone.model.tokenizer, backbone.model.text_encoder

    def ends(texts):
        return [encoder(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in texts]

    with torch.no_grad():
        concept = torch.stack(ends([tokenizer("knife").input_ids]))
        ids = tokenizer("a knife and a cat").input_ids
        masked = torch.stack(ends([[*ids[:i], 0, *ids[i + 1 :]] for i in range(1, len(ids) - 1)]))
    ((states, options),) = project(backbone, "a knife and a cat", entry, subspace_projection(concept), 0.01, False)
    changed = [i for i in range(77) if not torch.equal(states[0, i], entry[0][0, i])]
    away = masked - masked @ concept.T @ concept / concept.square().sum()
    expected = [1 + i for i, d in enumerate(away.norm(dim=-1))
                if d >= 1.01 * torch.cat([away[:i], away[i + 1 :]]).norm(dim=-1).mean()]  # fmt: skip
    assert changed == expected and 2 in changed and options == {}  # token 2 is "knife"
    moved = states[0, changed]
    assert float((moved @ concept.T).abs().max()) < 1e-3 * float((entry[0][0, changed] @ concept.T).abs().max())
    # (1 - P_C) P_I e by least squares: the part of e that the masked prompts span, less its part along the concept
    inside = masked.T @ torch.linalg.lstsq(masked.T.double(), entry[0][0, changed].T.double()).solution.float()
    assert torch.allclose(moved, (inside - concept.T @ (concept @ inside) / concept.square().sum()).T, atol=1e-3)


def test_safree_leaves_a_prompt_without_toxic_tokens_as_it_is(backbone):
    (entry,) = backbone.encode(["a cat"])
    assert project(backbone, "a cat", entry, torch.zeros(192, 192).double(), 0.5, True) == [entry]
    (nothing,) = backbone.encode([""])
    assert project(backbone, "", nothing, torch.zeros(192, 192).double(), 0.01, True) == [nothing]


def test_safrees_filter_ends_the_projection_earlier_the_less_it_changed(backbone):
    one = torch.eye(2)[:1]
    turned = torch.tensor([[0.4667, math.sqrt(1 - 0.4667**2)]])  # beta = .5333: the middle, round(10 / 2) = step 5
    assert filter_end(one, one) == pytest.approx(0.5 / 49)
    assert filter_end(one, turned) == pytest.approx(5.5 / 49)
    assert filter_end(one, torch.eye(2)[1:]) == pytest.approx(10.5 / 49)
    sigmas = backbone.sigmas(50)[:-1]
    parts = [["safe", {"end_percent": 5.5 / 49}], ["as it was", {"start_percent": 5.5 / 49}]]
    assert [in_force(parts, float(s), backbone.levels)[0] for s in sigmas].count("safe") == 6  # steps 0 ... 5


# -- NAG


def test_nag_normalisation_on_numbers_worked_by_hand():
    positive, negative = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    # 5 z+ - 4 z- = (5, -9), L1 norm 14 of 2: grown 7-fold, cut to 2.5-fold: (5, -9) / 2.8; a quarter of it and 3/4 z+
    wanted = torch.tensor([[0.25 * 5 / 2.8 + 0.75, -0.25 * 9 / 2.8 - 0.75], [2.0, 0.0]])
    assert torch.allclose(normalized_guidance(positive, negative, 5.0, 2.5, 0.25), wanted)
    small = normalized_guidance(positive, negative, 1.2, 2.5, 1.0)  # (1.2, -1.4): 1.3-fold, not cut
    assert torch.allclose(small[0], torch.tensor([1.2, -1.4]))


def test_nag_wraps_every_cross_attention_and_shares_the_weights(backbone):
    negative, same = backbone.encode(["a gun", PROMPTS[0]])
    unet = backbone.model.unet
    wrapped = guided_unet(unet, negative[0], 5.0, 2.5, 0.25)
    ours = {p.data_ptr() for p in unet.parameters()}
    assert {p.data_ptr() for p in wrapped.parameters()} == ours
    assert sum(type(m).__name__ == "GuidedAttention" for m in wrapped.modules()) == len(cross_attentions(unet)) == 6
    x, t = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    plain = unet(x, t, same[0])
    assert not torch.allclose(wrapped(x, t, same[0]), plain, atol=1e-3)
    # away from itself is nowhere, and alpha 0 keeps what was there
    for idle in (guided_unet(unet, same[0], 5.0, 2.5, 0.25), guided_unet(unet, negative[0], 5.0, 2.5, 0.0)):
        assert torch.allclose(idle(x, t, same[0]), plain, atol=1e-4)


def test_nag_leaves_the_empty_prompts_prediction_alone(backbone, methods):
    method = next(m for m in methods if m.name == "NAG")
    entries, empty = backbone.encode(PROMPTS[:1]), method.negative
    x, sigma = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0])
    at = [method.guide(1)(method.backbone, x, sigma, entries, empty, g) for g in (1.0, 4.0)]
    assert torch.allclose(at[1], at[0] + 3 * (at[0] - backbone.denoise(x, sigma, [empty])), atol=1e-3)


# -- fine-tuned and edited weights


def test_esd_trains_the_cross_attentions_towards_its_target(backbone, weights):
    quick = {"steps": 12, "sampling_steps": 2, "learning_rate": 1e-3, "negative_guidance": 1.0}
    edited = baselines.esd_method(backbone, ["a knife"], **quick).backbone
    changed = {n for n, t in edited.model.unet.state_dict().items() if not torch.equal(t, weights[n])}
    assert changed and all(".cross_attention." in name and ".norm." not in name for name in changed)
    assert {name.split(".cross_attention.")[1].split(".")[0] for name in changed} == {"query", "key_value", "out"}
    (knife,), (empty,) = backbone.encode(["a knife"]), backbone.encode([""])
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(5)) * backbone.levels[-1]
    sigma = backbone.levels[-1].expand(4)
    of_knife, of_empty = (backbone.denoise(x, sigma, [e] * 4) for e in (knife, empty))
    target = of_empty - (of_knife - of_empty)
    left = (edited.denoise(x, sigma, [knife] * 4) - target).square().mean()
    assert float(left) < 0.7 * float((of_knife - target).square().mean())


def test_uce_is_the_minimum_of_its_loss():
    draw = torch.Generator().manual_seed(0)
    weight, concept, guide, kept = (
        torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (5, 3, 3, 4)
    )
    e, p, lamb = 2.0, 0.3, 0.7
    rows = [e**0.5 * concept, p**0.5 * kept, lamb**0.5 * torch.eye(6).double()]
    targets = [e**0.5 * guide @ weight.T, p**0.5 * kept @ weight.T, lamb**0.5 * weight.T]
    assert torch.allclose(weight @ closed_form(concept, guide, kept, e, p, lamb), solved(rows, targets).T)


def test_uce_sends_the_concept_to_the_guide_and_keeps_the_rest(backbone):
    method = baselines.uce_method(backbone, ["a knife"], "a tulip", ["a cat", "a red ball"])
    knife, tulip = aligned_states(backbone, "a knife", "a tulip")
    (cat, _), (boat, _) = backbone.encode(["a cat", "a boat"])
    for before, after in zip(*(cross_attentions(b.model.unet) for b in (backbone, method.backbone))):
        def gap(one, other, old=before, new=after):
            """Of what the old layer makes of `other`, the share that the new one misses on `one`."""
            return float((new.key_value(one) - old.key_value(other)).norm() / old.key_value(other).norm())

        assert gap(knife, tulip) < 0.1 < gap(knife, knife)
        assert gap(cat, cat) < 0.05 and gap(boat, boat) > gap(cat, cat)


def test_states_are_aligned_at_the_last_word(backbone):
    (short, _), (long, _) = backbone.encode(["knife", "a red flower"])
    one, other = aligned_states(backbone, "knife", "a red flower")
    assert torch.equal(one, short[0, 1:75]) and torch.equal(other, long[0, 3:])


def test_reces_adversarial_states_are_the_closest_ones(backbone, methods):
    edited = next(m for m in methods if m.name == "UCE").backbone.model.unet
    before, after = (
        torch.cat([a.key_value.weight for a in cross_attentions(unet)]).double()
        for unet in (backbone.model.unet, edited)
    )
    concept = backbone.encode(["a knife"])[0][0][0, 1:4].double()
    rows, targets = [after, 0.1**0.5 * torch.eye(192).double()], [before @ concept.T, torch.zeros(192, 3).double()]
    found = concept @ adversarial_map(backbone.model.unet, edited, 0.1).T
    assert torch.allclose(found, solved(rows, targets).T, atol=1e-5)
    missed = [(after @ c.T - before @ concept.T).norm() for c in (found, concept)]
    assert missed[0] < 0.8 * missed[1]  # it draws the erased concept better than the concept's own words


def test_each_round_of_rece_erases_the_last_ones_loophole(backbone):
    def unet_after(rounds):
        return baselines.rece_method(backbone, ["a knife"], "a tulip", rounds=rounds).backbone.model.unet

    uce, rece = unet_after(0), unet_after(1)
    knife, tulip = (entry[0][0].double() for entry in backbone.encode(["a knife", "a tulip"]))
    loophole = (knife @ adversarial_map(backbone.model.unet, uce, 0.1).T).float()

    def gap(unet):
        pairs = zip(cross_attentions(unet), cross_attentions(uce))
        return sum(float((n.key_value(loophole) - o.key_value(tulip.float())).square().sum()) for n, o in pairs)

    assert gap(rece) < 0.05 * gap(uce)


# -- shifts and words


def test_the_mean_difference_is_added_to_all_tokens_but_the_first(backbone):
    states = [[backbone.encode([text])[0][0][0, 1:] for text in pair] for pair in PAIRS]
    wanted = sum((safe - unsafe).mean(0) for unsafe, safe in states) / len(PAIRS)
    assert torch.allclose(mean_difference(backbone, PAIRS), wanted, atol=1e-5)
    method = baselines.mean_difference_method(backbone, PAIRS)
    for ((states, _),), (before, _) in zip(method.positive(PROMPTS), backbone.encode(PROMPTS)):
        assert torch.equal(states[:, 0], before[:, 0])
        assert torch.allclose(states[:, 1:], before[:, 1:] + wanted, atol=1e-5)


def test_condelta_turns_the_unwanted_prompt_into_the_wanted_one(backbone):
    method = baselines.condelta_method(backbone, "a flower", "a knife")
    (((states, _),), ((nothing, _),)) = method.positive(["a knife", ""])
    (flower, _), (knife, _), (empty, _) = backbone.encode(["a flower", "a knife", ""])
    assert torch.allclose(states, flower, atol=1e-5)
    assert torch.allclose(nothing, empty + flower - knife, atol=1e-5)
    half = baselines.condelta_method(backbone, "a flower", "a knife", strength=0.5).positive(["a knife"])[0][0][0]
    assert torch.allclose(half, (flower + knife) / 2, atol=1e-5)


def test_condelta_adds_nothing_past_its_last_token(backbone, monkeypatch):
    method = baselines.condelta_method(backbone, "a flower", "a knife")
    monkeypatch.setattr(DemoBackbone, "encode", lambda self, prompts: [[torch.zeros(1, n, 192), {}] for n in (100, 40)])
    ((long,), (short,)) = method.positive(["", ""])
    assert not long[0][:, 77:].any() and torch.equal(long[0][:, :40], short[0]) and short[0].any()


def test_words_go_where_they_should(backbone, methods):
    negative = next(m for m in methods if m.name == "negative prompt")
    assert torch.equal(negative.negative[0], backbone.encode(["a knife, a gun"])[0][0])
    words = baselines.sfw_words_method(backbone, ["flower", "calm"]).positive(["a cat", ""])
    for ((states, _),), (wanted, _) in zip(words, backbone.encode(["a cat, flower, calm", "flower, calm"])):
        assert torch.equal(states, wanted)
    empty = backbone.encode([""])[0][0]
    safree = [baselines.safree_method(backbone, CONCEPTS, negative_prompt=given).negative[0] for given in (True, False)]
    assert torch.equal(safree[0], negative.negative[0]) and torch.equal(safree[1], empty)
