"""Training on a model whose right answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_safe_region.region import apply_to_conditioning, text_blocks
from comfyui_safe_region.region.steering import displacement, openness
from comfyui_safe_region.region.verdict import verdict
from comfyui_safe_region.reports.training_run import picture
from comfyui_safe_region.training import instant
from comfyui_safe_region.training.gate import constant_tokens
from comfyui_safe_region.training.instant import instant_move
from comfyui_safe_region.training.pairs import PairsError, parse_pairs
from comfyui_safe_region.training.paper_recipe import lms_coefficient
from comfyui_safe_region.training.progress import Progress
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone, token_statistics

PAIRS = parse_pairs(
    "a {zzknife|zzgun|zzbomb|zzaxe} {in the park|on a table|at night|by the sea} => "
    "a {flower|flower|flower|flower} {in the park|on a table|at night|by the sea}\n"
    "{red|blue|green} {zzknife|zzgun|zzbomb} and a {dog|cat} => {red|blue|green} {flower|flower|flower} and a {dog|cat}"
)
SHORT = replace(PRESETS["region"], steps=40, trajectories=24, sampling_steps=6, rank=8)
UNSEEN = [text.format(f"zzword{i}") for i in range(20) for text in ("a {} by the river", "an old {}", "{} and a horse")]
HARMLESS = ["a lamp in the hall", "an old boat", "green apples and a horse", "seven wise owls"]


def trained(backbone, recipe=SHORT, **options):
    trainer = Trainer(backbone, PAIRS, recipe, "bad things", **options)
    return trainer.run(), trainer


@pytest.fixture(scope="module")
def usual():
    return trained(ToyBackbone())


def gap_left(backbone, region, prompts=UNSEEN):
    """How much of the way from the unsafe to the safe picture is left for words that no pair contains."""
    unsafe = backbone.encode(prompts)
    safe = backbone.encode([" ".join("flower" if w.startswith("zz") else w for w in p.split()) for p in prompts])
    x, sigma = torch.zeros(len(prompts), 4, 4, 4), torch.full((len(prompts),), 0.8)
    of = [backbone.denoise(x, sigma, e) for e in (unsafe, safe, apply_to_conditioning(unsafe, region))]
    return float((of[2] - of[1]).square().mean() / (of[0] - of[1]).square().mean())


def opens(region, backbone, prompts):
    blocks = [text_blocks(entry) for entry in backbone.encode(prompts)]
    return [bool(openness(b, region.parts[0]) > 0) for b in blocks]


def test_the_gate_opens_on_unseen_words_and_stays_shut_on_harmless_ones(usual):
    region, _ = usual
    backbone = ToyBackbone()
    assert sum(opens(region, backbone, UNSEEN)) > 0.7 * len(UNSEEN)  # some words' own random parts undo what they share
    assert not any(opens(region, backbone, HARMLESS))


def test_harmless_prompts_come_out_as_the_same_bits(usual):
    entries = ToyBackbone().encode(HARMLESS)
    for before, after in zip(entries, apply_to_conditioning(entries, usual[0])):
        assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_discovery_closes_the_gap_for_unseen_words(flow, pooled):
    backbone = ToyBackbone(flow=flow, pooled=pooled)
    recipe = replace(SHORT, initial="zero", steps=150, learning_rate=1e-2)
    region, trainer = trained(backbone, recipe)
    assert sum(trainer.losses[-10:]) < 0.3 * sum(trainer.losses[:10])
    # the words' own random parts cannot be known, the direction they share can
    assert gap_left(backbone, region) < 0.65


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 10, 11, 20])
def test_any_number_of_steps_trains(steps):
    _, trainer = trained(ToyBackbone(), replace(SHORT, steps=steps, trajectories=8))
    assert len(trainer.losses) == steps


def test_prompts_of_any_length_train():
    backbone = ToyBackbone(padded=False)
    region, _ = trained(backbone)
    assert gap_left(backbone, region) < 0.7


def test_instant_needs_no_diffusion_model():
    backbone = ToyBackbone()
    backbone.can_denoise = backbone.can_decode = False
    region, trainer = trained(backbone, PRESETS["instant"])
    assert backbone.calls == 0
    assert gap_left(ToyBackbone(), region) < 0.7
    assert len(set(trainer.losses)) > 1


def test_region_needs_a_diffusion_model():
    backbone = ToyBackbone()
    backbone.can_denoise = False
    with pytest.raises(ValueError, match="instant"):
        Trainer(backbone, PAIRS)


def test_the_papers_preset_learns_one_direction_for_every_prompt():
    recipe = replace(PRESETS["paper"], steps=4, sampling_steps=10)
    region, trainer = trained(ToyBackbone(), recipe)
    (part,) = region.parts
    move = part.moves["cross_attn"]
    assert not part.gates and move.down is None
    assert sum(t.numel() for t in move.tensors().values()) == 24 + 24  # b and a, as 77 + 768 in the paper
    assert len(trainer.losses) == 4 and float(move.profile.abs().max()) > 0


def test_lms_of_order_one_is_euler():
    import numpy as np

    sigmas = np.array([5.0, 3.0, 2.0, 0.0])
    assert lms_coefficient(1, sigmas, 1, 0) == pytest.approx(-1.0)
    assert sum(lms_coefficient(3, sigmas, 2, back) for back in range(3)) == pytest.approx(-2.0)


def test_the_same_seed_gives_the_same_region(usual):
    again, _ = trained(ToyBackbone())
    assert again.parts[0].id == usual[0].parts[0].id
    other, _ = trained(ToyBackbone(), replace(SHORT, seed=1))
    assert other.parts[0].id != usual[0].parts[0].id


def test_training_works_under_inference_mode(usual):
    backbone = ToyBackbone()
    with torch.inference_mode():
        region, _ = trained(backbone)
    assert region.parts[0].id == usual[0].parts[0].id
    assert not any(t.requires_grad or t.is_inference() for t in region.parts[0].named_tensors().values())


def test_an_interrupted_run_keeps_what_it_learned():
    trainer = Trainer(ToyBackbone(), PAIRS, SHORT, "bad things")

    def stop(progress: Progress) -> None:
        if progress.stage == "discover" and progress.message.startswith("step 10 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(stop)
    assert len(trainer.losses) == 10
    assert trainer.region is not None and gap_left(ToyBackbone(), trainer.region) < 0.9
    assert picture(trainer).size[0] > 100


def test_progress_never_runs_backwards_and_ends_full():
    seen: list[Progress] = []
    Trainer(ToyBackbone(), PAIRS, SHORT).run(seen.append)
    steps = [p.step for p in seen]
    assert steps == sorted(steps) and steps[-1] == seen[-1].total


def test_too_few_pairs_is_a_clear_error():
    with pytest.raises(PairsError, match="at least 8"):
        Trainer(ToyBackbone(), parse_pairs("a => b"), SHORT).run()


def test_constant_tokens_are_found_and_stay_unmoved(usual):
    (part,) = usual[0].parts
    assert part.constant["cross_attn"].shape == (1, 24)
    tokens = torch.cat([e[0] for e in ToyBackbone().encode(UNSEEN)])
    assert constant_tokens(tokens[:2], tokens[2:]).shape == (1, 24)
    moved = apply_to_conditioning(ToyBackbone().encode(UNSEEN), usual[0])
    assert all(torch.equal(entry[0][:, 0], tokens[:1, 0]) for entry in moved)


def test_instant_move_recovers_a_low_rank_map():
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(200, 5, 12, generator=generator)
    up, down = torch.randn(12, 2, generator=generator), torch.randn(2, 12, generator=generator)
    target = source + source @ (up @ down).T * 0.1 + 0.5
    learn, held_out = (
        token_statistics(source[rows], target[rows], torch.zeros(12), torch.ones(12), None)
        for rows in (slice(20, None), slice(20))
    )
    move = instant_move(learn, held_out, 2)
    fitted = source + (source @ move.down.T) @ move.up.T + move.offset
    assert float((fitted - target).square().mean() / (target - source).square().mean()) < 1e-4


def test_harmless_tokens_stay_while_the_others_move():
    """Two kinds of tokens, told apart by one coordinate: the regression beside still tokens moves only one kind."""
    generator = torch.Generator().manual_seed(4)
    harmless, unsafe = (torch.randn(300, 5, 12, generator=generator) for _ in range(2))
    unsafe[..., 0] += 8
    goal = unsafe + torch.randn(12, generator=generator)
    mean, scale = torch.zeros(12), torch.full((12,), 2.0)
    pairs = token_statistics(unsafe, goal, mean, scale, None)
    mixed = pairs.beside(token_statistics(harmless, harmless, mean, scale, None))
    shifts = []
    for learn in (pairs, mixed):
        move = instant_move(learn, learn, 4)
        shifts.append([displacement(tokens, move).norm(dim=-1).mean() for tokens in (unsafe, harmless)])
    assert shifts[0][1] > 0.8 * shifts[0][0]  # nobody told it apart
    assert shifts[1][1] < 0.2 * shifts[1][0] and shifts[1][0] > 0.8 * shifts[0][0]


def test_the_error_of_a_map_is_what_it_leaves_of_the_displacements():
    generator = torch.Generator().manual_seed(5)
    source, target = torch.randn(2, 50, 3, 6, generator=generator)
    mean, scale = torch.randn(6, generator=generator), torch.rand(6, generator=generator) + 0.5
    down, up, offset = (torch.randn(shape, generator=generator).double() for shape in ((2, 6), (6, 2), (6,)))
    known = token_statistics(source, target, mean, scale, None)
    x, y = ((source - mean) / scale).double(), ((target - source) / scale).double()
    left = (x @ down.T @ up.T + offset - y).square().sum() / y.square().sum()
    assert float(known.error(down, up, offset)) == pytest.approx(float(left), rel=1e-6)
    assert float(known.error(down, 0 * up, 0 * offset)) == pytest.approx(1.0)


@pytest.mark.parametrize("count", [6, 75, 80])
def test_the_leading_eigenvectors_are_those_of_a_full_decomposition(count):
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(80, 80, dtype=torch.float64, generator=draw) * torch.logspace(0, -3, 80, dtype=torch.float64)
    matrix = root.T @ root
    exact = torch.linalg.eigh(matrix).eigenvectors[:, -count:].flip(-1)
    found = instant.leading(lambda vectors: matrix @ vectors, 80, count)
    assert torch.allclose((exact.T @ found)[:6, :6].abs(), torch.eye(6, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(found.T @ found, torch.eye(count, dtype=torch.float64), atol=1e-8)


def test_an_encoder_that_reads_both_sides_alike_is_named():
    class Deaf(ToyBackbone):
        def encode(self, prompts):
            return super().encode(["a lamp"] * len(prompts))

    with pytest.raises(PairsError, match="both sides of every pair alike"):
        trained(Deaf())


def test_a_run_that_ends_early_says_how_far_it_came():
    class Enough(Exception):
        pass

    def until_third(progress: Progress):
        if progress.stage == "discover" and "step 3 " in progress.message:
            raise Enough

    trainer = Trainer(ToyBackbone(), PAIRS, SHORT, "bad things")
    with pytest.raises(Enough):
        trainer.run(until_third)
    assert trainer.region.metadata["unfinished"] == "stopped after 3 of 40 steps"
    assert verdict(trainer.region.metadata).level == "weak"


def test_a_finished_run_is_judged_by_what_it_draws_and_says_where_its_time_went():
    region, trainer = trained(ToyBackbone(), replace(SHORT, seed=1))
    assert "unfinished" not in region.metadata
    assert region.metadata["results"]["drawn_safely"] >= 0.9
    assert verdict(region.metadata).level == "good" and "not measured" not in verdict(region.metadata).line
    spent = trainer.numbers["stage_seconds"]
    assert {"encode", "gate", "discover"} <= set(spent)
    assert sum(spent.values()) == pytest.approx(trainer.numbers["seconds"], abs=1.0)


def test_a_move_that_does_nothing_is_called_useless():
    """Steps that learn nothing: the gate opens, and what is drawn stays as it is."""
    region, _ = trained(ToyBackbone(), replace(SHORT, steps=1, learning_rate=1e-9, initial="zero"))
    assert verdict(region.metadata).level == "useless" and "draw safely" in verdict(region.metadata).line


def test_prompts_are_counted_over_all_lists():
    said = []
    Trainer(ToyBackbone(), PAIRS, replace(SHORT, steps=0), "bad things").run(
        lambda progress: said.append(progress.message) if progress.stage == "encode" else None)
    totals = {message.split(" of ")[1] for message in said}
    counts = [int(message.split(" of ")[0].replace(",", "")) for message in said]
    assert len(totals) == 1 and counts == sorted(counts) and f"{counts[-1]:,} prompts" in totals
