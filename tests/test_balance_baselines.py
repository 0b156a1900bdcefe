"""The other ways to balance an attribute: each against its formula, worked by hand or as the minimum of its loss."""
from __future__ import annotations

import copy

import pytest
import torch

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.evaluation.baselines import debias_vl_method, uce_debias_method
from comfyui_safe_region.evaluation.baselines.debias_vl import calibrated_projection
from comfyui_safe_region.evaluation.baselines.method import cross_attentions
from comfyui_safe_region.evaluation.baselines.uce_debias import edit_unet, edited_values, target_values


@pytest.fixture(scope="module")
def backbone() -> DemoBackbone:
    return DemoBackbone()


# debias_vl


def test_the_calibration_shrinks_the_pairs_difference_and_nothing_else():
    # one pair that differs by (2, 0), lambda 3: (I + 3 diag(4, 0))^-1 = diag(1/13, 1)
    found = calibrated_projection(torch.tensor([[2.0, 0.0]]), lamb=3.0)
    torch.testing.assert_close(found, torch.diag(torch.tensor([1 / 13, 1.0], dtype=torch.float64)))
    # two pairs: the mean of the two outer products, 3/2 (diag(4, 0) + diag(0, 4)) = diag(6, 6)
    found = calibrated_projection(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), lamb=3.0)
    torch.testing.assert_close(found, torch.eye(2, dtype=torch.float64) / 7)


def test_the_projection_comes_after_the_calibration():
    # P0 removes (1, 1): [[.5, -.5], [-.5, .5]]; times diag(1/13, 1)
    found = calibrated_projection(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]]), 3.0)
    by_hand = torch.tensor([[0.5 / 13, -0.5], [-0.5 / 13, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(found, by_hand)


def test_debias_vl_is_the_minimum_of_its_loss():
    draw = torch.Generator().manual_seed(0)
    differences = torch.randn(5, 6, generator=draw, dtype=torch.float64)
    spurious = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    first = torch.eye(6, dtype=torch.float64) - spurious.T @ torch.linalg.pinv(spurious.T)
    found = calibrated_projection(differences, spurious, 7.0).requires_grad_(True)
    loss = (found - first).square().sum() + 7.0 / 5 * (differences @ found.T).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-10


def test_debias_vl_moves_every_state_of_the_prompt_and_not_the_empty_one(backbone):
    method = debias_vl_method(backbone, [("A photo of a male judge.", "A photo of a female judge.")])
    (((states, _),),) = method.positive(["a judge"])
    plain = backbone.encode(["a judge"])[0][0]
    assert ((states - plain).norm(dim=-1) > 0).all()
    assert torch.equal(method.negative[0], backbone.encode([""])[0][0])


def test_with_a_large_lambda_the_groups_end_states_become_the_same(backbone):
    pair = ("A photo of a male judge.", "A photo of a female judge.")
    method = debias_vl_method(backbone, [pair], lamb=1e9)
    end = len(backbone.model.tokenizer(pair[0])["input_ids"]) - 1
    plain = [entry[0][0, end] for entry in backbone.encode(pair)]
    moved = [states[0, end] for ((states, _),) in method.positive(pair)]
    # the pairs' states count with length 1
    before, after = ((ends[0] / plain[0].norm() - ends[1] / plain[1].norm()).norm() for ends in (plain, moved))
    assert before > 0.05 and after < 1e-3 * before


# UCE-debias


def test_the_targets_of_uce_debias_by_hand():
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    concept = torch.tensor([[2.0, 3.0]])  # values (4, 3), of norm 5
    man, woman = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 7.0]])  # directions (1, 0) and (0, 1)
    found = target_values(weight, concept, [(man, -0.1), (woman, 0.2)])
    torch.testing.assert_close(found, torch.tensor([[4 - 0.5, 3 + 1.0]]))


def test_uce_debias_is_the_minimum_of_its_loss():
    draw = torch.Generator().manual_seed(0)
    weight, concept, man, woman, kept = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 6), (3, 6), (3, 6), (3, 6), (5, 6))
    )
    groups = [(man, 0.3), (woman, -0.3)]
    found = edited_values(weight, [(concept, groups)], kept, 0.7, 0.2, 0.1).requires_grad_(True)
    wanted = target_values(weight, concept, groups)
    loss = (
        0.7 * (concept @ found.T - wanted).square().sum()
        + 0.2 * (kept @ (found - weight).T).square().sum()
        + 0.1 * (found - weight).square().sum()
    )
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-10


def test_only_values_are_edited(backbone):
    unet = copy.deepcopy(backbone.model.unet)
    states = backbone.encode(["a judge", "a man judge", "a woman judge"])
    concept, *groups = (entry[0][0] for entry in states)
    edit_unet(unet, [(concept, [(groups[0], -0.05), (groups[1], 0.05)])], concept[:0], 0.1, 0.1, 0.1)
    for before, after in zip(cross_attentions(backbone.model.unet), cross_attentions(unet)):
        (keys, values), (keys_now, values_now) = (layer.key_value.weight.chunk(2) for layer in (before, after))
        assert torch.equal(keys, keys_now) and not torch.equal(values, values_now)
        assert torch.equal(before.query.weight, after.query.weight)


def test_uce_debias_counts_until_the_shares_are_right_and_then_keeps(backbone):
    """What it counts again, and which way its weights go: towards the group that is drawn too seldom."""
    asked: list[list[str]] = []
    answers = {"a judge": [[1.0, 0.0], [0.6, 0.4], [0.5, 0.5]], "a cook": [[0.48, 0.52]]}

    def count(edited: DemoBackbone, prompts: list[str]) -> torch.Tensor:
        asked.append(list(prompts))
        return torch.tensor([answers[prompt].pop(0) for prompt in prompts])

    own = cross_attentions(backbone.model.unet)
    weights = [layer.key_value.weight.clone() for layer in own]
    pairs = [("a man judge", "a woman judge"), ("a man cook", "a woman cook")]
    method = uce_debias_method(backbone, ["a judge", "a cook"], pairs, [0.5, 0.5], count)
    assert asked == [["a judge", "a cook"], ["a judge"], ["a judge"]]
    assert all(torch.equal(weight, layer.key_value.weight) for weight, layer in zip(weights, own))
    (judge, _), (cook, _), (woman, _) = backbone.encode(["a judge", "a cook", "a woman judge"])
    for before, after in zip(own, cross_attentions(method.backbone.model.unet)):
        old, new = (layer.key_value.weight.chunk(2)[1] for layer in (before, after))
        shift, direction = judge[0, 2:] @ (new - old).T, woman[0, 2:] @ old.T
        assert (shift * direction).sum() > 0
        assert (cook[0, 2:] @ (new - old).T).norm() < shift.norm()
