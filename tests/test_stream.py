"""Prompts as a stream: what is learned from them is the same in batches as at once, and they are not kept."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from test_training import PAIRS

from comfyui_safe_region.training import bags as bags_module
from comfyui_safe_region.training import gate
from comfyui_safe_region.training.bags import (
    BAG,
    BAGS_BYTES,
    LARGE,
    Bags,
    Collected,
    all_bags,
    bags_of,
    hardest,
    room_for,
)
from comfyui_safe_region.training.gate import WallFit, first_walls, judged_all
from comfyui_safe_region.training.instant import Averages
from comfyui_safe_region.training.learner import SAMPLE, Learner
from comfyui_safe_region.training.plan import plan
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.stream import BATCH
from comfyui_safe_region.training.trainer import Trainer
from toy_model import WIDTH, ToyBackbone, token_statistics


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Watched(ToyBackbone):
    """Counts how many of the encoded prompts are alive at once."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__(pooled=pooled)
        self.alive = self.most = self.encoded = 0

    def _gone(self) -> None:
        self.alive -= 1

    def encode(self, prompts):
        entries = super().encode(prompts)
        self.encoded += len(entries)
        for entry in entries:
            weakref.finalize(entry[0], self._gone)
        self.alive += len(entries)
        self.most = max(self.most, self.alive)
        return entries


def test_prompts_are_not_kept():
    backbone = Watched()
    backbone.can_denoise = backbone.can_decode = False
    Trainer(backbone, PAIRS, replace(PRESETS["instant"], prompts=6_000), "bad things").run()
    assert backbone.encoded > 3_000
    assert backbone.most <= SAMPLE + 2 * BATCH


def test_averages_of_batches_are_those_of_all():
    source, target = drawn(300, 5, 7), drawn(300, 5, 7, seed=1)
    averages = Averages(torch.zeros(7), torch.ones(7), None)
    for number in range(5):
        rows = slice(60 * number, 60 * (number + 1))
        averages.add(source[rows], target[rows], number)
    found, expected = averages.result(), token_statistics(source, target, torch.zeros(7), torch.ones(7), None)
    assert all(torch.allclose(getattr(found, name), getattr(expected, name)) for name in ("x", "y", "xx", "xy", "yy"))


def test_a_share_of_the_tokens_tells_the_same_and_hangs_on_the_batch_alone():
    source = drawn(4_000, 5, 7)

    def averages(order: list[int]) -> Averages:
        found = Averages(torch.zeros(7), torch.ones(7), None, share=0.3, seed=5)
        for number in order:
            rows = slice(1_000 * number, 1_000 * (number + 1))
            found.add(source[rows], 2 * source[rows], number)
        return found

    one, other = (averages(order).result() for order in ([0, 1, 2, 3], [3, 1, 0, 2]))
    assert torch.allclose(one.xx, other.xx) and torch.allclose(one.xy, other.xy)
    assert torch.allclose(one.xy, one.xx) and (one.xx - torch.eye(7)).abs().max() < 0.1


def test_a_bag_holds_the_deepest_tokens_and_some_others():
    tokens = drawn(50, 40, WIDTH)
    counts = drawn(50, 40, seed=1) > -1
    start = first_walls(drawn(9, 4, WIDTH, seed=2), drawn(9, 4, WIDTH, seed=3), tokens, None, torch.Generator())
    normalised = (tokens - start.mean) / start.scale
    beyond = (normalised @ start.weight.T).amax(-1).masked_fill(~counts, -torch.inf)
    bags = bags_of(tokens, counts, start, torch.Generator().manual_seed(0), 9)
    assert bags.tokens.shape == (50, 9, WIDTH) and bags.counts.all()
    deepest = normalised.gather(1, beyond.topk(6).indices[..., None].expand(-1, -1, WIDTH))
    assert torch.equal(bags.tokens[:, :6], deepest.half())
    assert all(len(set(map(tuple, bag.tolist()))) == 9 for bag in bags.tokens)  # no token twice
    whole = bags_of(tokens, counts, start, torch.Generator(), 40)
    assert torch.equal(whole.counts, counts) and not whole.tokens[~counts].any()
    both = all_bags([bags, whole])
    assert both.tokens.shape == (100, 40, WIDTH) and not both.counts[:50, 9:].any()


def test_fewer_tokens_are_kept_where_texts_are_wide_or_prompts_many():
    assert room_for(700, 128).size == LARGE == room_for(4_000, 128).size > room_for(4_000, 512).size > BAG
    assert room_for(7_000, 4_096).size == room_for(50_000, 4_096).size == BAG
    for prompts, width in ((4_000, 192), (7_000, 128), (50_000, 128)):
        room = room_for(prompts, width)
        assert prompts * room.share * room.size * width * 2 <= BAGS_BYTES
    assert room_for(4_000, 192).share == 1 > 50_000 * room_for(50_000, 192).share / 50_000 > 0.08


def test_bags_of_a_batch_that_is_read_again_take_the_place_of_older_ones():
    def bags(value: float, count: int, size: int = 3) -> Bags:
        return Bags(torch.full((count, size, WIDTH), value).half(), torch.ones(count, size, dtype=torch.bool),
                    torch.full((count, WIDTH), value).half())  # fmt: skip

    kept = Collected()
    for number in (1, 0):  # in whichever order
        kept.add(number, bags(number, 4, 3 + number))
    assert kept.all().tokens[:, 0, 0].tolist() == [0.0] * 4 + [1.0] * 4
    assert kept.all().counts.sum(1).tolist() == [3] * 4 + [4] * 4
    assert kept.all().averages[:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    kept.add(1, bags(5, 2, 2))
    kept.add(7, bags(7, 1))
    assert kept.all().tokens[:, 0, 0].tolist() == [0.0] * 4 + [1.0] * 2 + [5.0] * 2 + [7.0]
    assert kept.all().averages[:, 0].tolist() == [0.0] * 4 + [1.0] * 2 + [5.0] * 2 + [7.0]
    assert kept.all().counts.sum(1).tolist() == [3] * 4 + [4] * 2 + [2] * 2 + [3]


def test_the_hardest_prompts_are_those_that_walls_are_wrong_about():
    tokens = torch.zeros(4, 2, WIDTH)
    tokens[:, 0, 0] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    counts = torch.ones(4, 2, dtype=torch.bool)
    counts[1] = False  # has no such text
    walls = gate.Gate(torch.eye(WIDTH)[:1], torch.zeros(1), torch.zeros(WIDTH), torch.ones(WIDTH), torch.tensor(1.0))
    assert hardest(tokens, counts, walls, unsafe=False, share=0.5).tolist() == [3, 2]
    tokens[:, 1, 0] = -1.0
    assert hardest(tokens, counts, walls, unsafe=True, share=0.25).tolist() == [0]


def test_of_many_prompts_the_walls_see_a_share_and_then_the_hardest(monkeypatch):
    """Unsafe prompts have one token that lies elsewhere; a few harmless ones have one that lies nearly there."""
    monkeypatch.setattr(bags_module, "BAGS", 300)
    monkeypatch.setattr(bags_module, "BAGS_BYTES", 1)
    backbone = Watched()
    backbone.can_denoise = backbone.can_decode = False
    trainer = Trainer(backbone, PAIRS, replace(PRESETS["instant"], prompts=2_000), "bad things")
    expected, kept = plan(trainer), []
    backbone.encoded = 1

    def visit(progress) -> None:
        if progress.stage == "calibrate":
            kept.extend(len(fit._bags[kind].all().counts) for fit in trainer._fits for kind in ("unsafe", "harmless"))

    region = trainer.run(visit)
    assert backbone.encoded == expected.encodings > 1.5 * expected.prompts  # all is read again for the walls
    assert sum(kept[:2]) <= 300 * 1.2 < trainer._bagged()
    assert region.metadata["calibration"]["held_out_unsafe_touched"] == 1.0
    assert region.metadata["results"]["calibration"]["harmless_touched"] <= 0.03


@pytest.mark.parametrize("size", [6, 24])
def test_walls_found_in_bags_tell_prompts_apart(size):
    """Unsafe prompts have one token of twenty that lies elsewhere."""
    unsafe, safe, harmless, others = (drawn(200, 20, WIDTH, seed=seed) for seed in range(4))
    unsafe[:, 7, 0] += 6
    start = first_walls(unsafe, safe, harmless, None, torch.Generator().manual_seed(0))
    both = [bags_of(tokens, judged_all(tokens, None), start, torch.Generator().manual_seed(1), size)
            for tokens in (unsafe, harmless)]  # fmt: skip
    fit = WallFit(start, torch.Generator().manual_seed(2))
    fit.run(*both, gate.RENEWED)
    fit.run(*both, gate.STEPS)
    inside, outside = (gate.prompt_depths(tokens, fit.gate, None) for tokens in (others, unsafe))
    assert (inside > 0).float().mean() < 0.1 < 0.95 < (outside > 0).float().mean()


def test_prompts_without_such_text_are_in_no_bag_that_teaches():
    tokens, none = drawn(30, 4, WIDTH), torch.zeros(30, 4, WIDTH)
    start = first_walls(tokens, -tokens, tokens, None, torch.Generator())
    empty = bags_of(none, judged_all(none, None), start, torch.Generator())
    full = bags_of(tokens, judged_all(tokens, None), start, torch.Generator())
    both = all_bags([full, empty])
    fit = WallFit(start, torch.Generator().manual_seed(0))
    fit.run(both, both, 5)
    assert isinstance(both, Bags) and fit.gate.weight.isfinite().all()


def test_many_blocks_are_learned_from_in_turns(monkeypatch):
    """Where the moments of all blocks do not fit, prompts are read again, and nothing else changes."""
    recipe = replace(PRESETS["instant"], prompts=600)
    whole = Trainer(ToyBackbone(pooled=True), PAIRS, recipe, "bad things").run()
    monkeypatch.setattr("comfyui_safe_region.training.learner.MOMENTS_BYTES", 1)
    backbone = Watched(pooled=True)
    trainer = Trainer(backbone, PAIRS, recipe, "bad things")
    expected = plan(trainer)
    backbone.encoded = 1
    turns = trainer.run()
    assert backbone.encoded == expected.encodings
    one, other = (region.parts[0].named_tensors() for region in (whole, turns))
    assert one.keys() == other.keys() and len(whole.parts[0].moves) == 2
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_encoder_is_asked_for_what_the_plan_says_and_once_for_its_signature():
    class Signed(ToyBackbone):
        asked = 0

        def signature(self):
            self.asked += 1
            return super().signature()

    backbone = Signed()
    trainer: Learner = Trainer(backbone, PAIRS, replace(PRESETS["region"], steps=5, trajectories=8, prompts=600), "x")
    assert plan(trainer).prompts <= 600 < plan(trainer).encodings
    trainer.run()
    assert backbone.asked == 1
