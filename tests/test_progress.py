"""What those who watch a run are told: counts that end at 100 %, an honest time left, curves of bounded size."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from comfyui_safe_region.training import previews, processes
from comfyui_safe_region.training.attribute_trainer import AttributeTrainer
from comfyui_safe_region.training.attributes import parse_attribute
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.progress import (
    BINS,
    UNSAFE_LEFT,
    Ledger,
    Progress,
    TimeLeft,
    View,
    duration,
    separation,
    smooth,
    thinned,
)
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.stages import costs
from comfyui_safe_region.training.stream import BATCH, read
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

PAIRS = parse_pairs(
    "a {zzknife|zzgun|zzbomb|zzaxe} {in the park|on a table|at night|by the sea} => "
    "a {flower|flower|flower|flower} {in the park|on a table|at night|by the sea}"
)
ROWS = parse_attribute(
    "attribute: kind\n"
    "a {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|at night|by the sea} => "
    "left: a leftish {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|at night|by the sea} => "
    "right: a rightish {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|at night|by the sea}"
)
SHORT = {"trajectories": 20, "sampling_steps": 4, "prompts": 400}
RUNS = {
    "region": lambda: Trainer(ToyBackbone(), PAIRS, replace(PRESETS["region"], steps=52, **SHORT)),
    "hardened": lambda: Trainer(ToyBackbone(), PAIRS, replace(PRESETS["hardened"], steps=2, **SHORT)),
    "paper": lambda: Trainer(ToyBackbone(), PAIRS, replace(PRESETS["paper"], steps=2, sampling_steps=5)),
    "attribute": lambda: AttributeTrainer(ToyBackbone(), ROWS, replace(PRESETS["region"], steps=51, **SHORT)),
    "attribute, paper": lambda: AttributeTrainer(
        ToyBackbone(), ROWS, replace(PRESETS["paper"], steps=2, sampling_steps=5)
    ),
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", params=RUNS)
def watched(request):
    """A finished run, and what was told along the way."""
    trainer, seen = RUNS[request.param](), []
    trainer.run(seen.append)
    return trainer, seen


def test_counts_reach_their_total_with_the_last_report_and_not_before(watched):
    _, seen = watched
    steps = [progress.step for progress in seen]
    assert steps == sorted(steps)
    assert [progress for progress in seen if progress.step >= progress.total] == [seen[-1]]
    assert seen[-1].step == seen[-1].total and seen[-1].seconds_left == 0


def test_before_the_end_it_says_how_long_it_will_take(watched):
    _, seen = watched
    for progress in seen:
        if progress.stage in ("discover", "preview", "strength"):
            assert progress.seconds_left is not None and progress.seconds_left > 0


def test_walls_losses_and_pictures_are_shown_as_they_come(watched):
    trainer, seen = watched
    losses = [progress.loss for progress in seen if progress.stage == "discover"]
    assert losses == trainer.losses and len({p.measure for p in seen if p.stage == "discover"}) == 1
    found = [progress.separation for progress in seen if progress.separation]
    gated = bool(trainer.region.parts[0].gates)
    assert bool(found) == gated
    if gated:
        assert found[-1].outside[1] == pytest.approx(trainer.numbers["calibration"]["held_out_unsafe_touched"])
        assert len(found) > 10  # while the walls are sought, too
    previews = [progress.preview for progress in seen if progress.preview]
    assert len(previews) == costs(trainer.stages).get("preview", 0) // (4 * 12 * 2)
    assert all(picture.size == (4 * 132 - 4, 2 * 132 - 4) for picture in previews)


def test_the_region_carries_a_small_picture(watched):
    trainer, _ = watched
    text = trainer.region.metadata["preview"]
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    assert picture.format == "JPEG" and picture.height <= 256 and len(text) <= 20_000
    rows = [(before, after) for _, before, after in trainer.before_after[:2]]
    assert text == previews.jpeg_text(previews.mosaic(rows, 126), 20_000)


def test_the_picture_in_a_region_is_small_whatever_it_shows():
    noise = Image.effect_noise((256, 256), 200)
    assert 5_000 < len(previews.jpeg_text(noise, 20_000)) <= 20_000


def test_an_existing_region_keeps_its_part(watched):
    trainer, _ = watched
    without = replace(trainer.region, metadata={})
    assert [part.id for part in without.parts] == [part.id for part in trainer.region.parts]


# --- time left ---


def advance(left: TimeLeft, clock: Clock, stage: str, times: int, seconds: float, steps: int = 1) -> None:
    for _ in range(times):
        clock.now += seconds
        left.advance(stage, steps)


def test_time_left_is_unknown_until_the_model_was_asked_and_then_right():
    clock = Clock()
    left = TimeLeft({"encode": 10, "walk": 4, "learn": 100, "end": 1}, {"walk": 400, "learn": 2000, "end": 100}, clock)
    advance(left, clock, "encode", 10, 3.0)
    assert left.seconds() is None
    advance(left, clock, "walk", 1, 10.0)  # 100 predictions in 10 s
    assert left.seconds() == pytest.approx(30 + 200 + 10)
    advance(left, clock, "walk", 3, 10.0)
    advance(left, clock, "learn", 1, 2.0)
    assert left.seconds() == pytest.approx(198 + 10)
    advance(left, clock, "learn", 50, 1.0)  # it goes faster now
    assert left.seconds() == pytest.approx(49 + 10, rel=0.15)
    advance(left, clock, "learn", 49, 1.0)
    advance(left, clock, "end", 1, 5.0)
    assert left.seconds() == 0


def test_a_stage_without_the_model_is_known_by_its_own_pace():
    clock = Clock()
    left = TimeLeft({"encode": 4, "gate": 20, "instant": 1}, {}, clock)
    advance(left, clock, "encode", 4, 2.0)
    assert left.seconds() is None
    advance(left, clock, "gate", 5, 0.5)
    assert left.seconds() == pytest.approx(7.5)


def test_time_without_a_step_belongs_to_the_stage():
    clock = Clock()
    left = TimeLeft({"harden": 2}, {}, clock)
    advance(left, clock, "harden", 1, 6.0, steps=0)
    assert left.seconds() is None
    advance(left, clock, "harden", 1, 4.0)
    assert left.seconds() == pytest.approx(10)


# Stages of a real `safe-region demo`: steps, what they cost in predictions, and seconds of each report
REAL = {
    "encode": (114, 0, [0.31] * 114), "gate": (20, 0, [0.21] * 20), "calibrate": (1, 0, [0.27]),
    "instant": (1, 0, [2.3]), "trajectories": (24, 4032, [5.5, 3.6, 5.5, 3.6, 4.9, 3.8]),
    "discover": (250, 6000, [0.121] * 250), "strength": (1, 1152, [8.2]), "report": (1, 288, [1.1]),
    "measure": (600, 14400, [6.4] * 15),
}  # fmt: skip


def told(slower: Callable[[float], float]) -> list[tuple[float, float]]:
    """When the run was going to end, by what was shown, and when that was said; `slower`: how much, at a time."""
    clock, ends = Clock(), []
    left = TimeLeft({stage: steps for stage, (steps, _, _) in REAL.items()},
                    {stage: cost for stage, (_, cost, _) in REAL.items() if cost}, clock)  # fmt: skip
    for stage, (steps, _, reports) in REAL.items():
        for seconds in reports:
            clock.now += seconds * slower(clock.now)
            left.advance(stage, steps // len(reports))
            if shown := left.shown():
                ends.append((clock.now, clock.now + shown))
    assert left.shown() == 0
    return [*ends, (clock.now, clock.now)]


def test_on_an_idle_machine_a_real_run_is_foretold():
    ends = told(lambda now: 1.0)
    finish = ends[-1][1]
    assert ends[0][0] < 0.3 * finish
    assert all(abs(end - finish) < 0.25 * finish for _, end in ends)
    assert all(abs(end - finish) < 0.1 * finish for now, end in ends if now > 0.4 * finish)


@pytest.mark.parametrize("busy", [2.0, 4.0])
def test_a_busy_machine_does_not_make_the_time_left_swing(busy):
    """Ten seconds of every half minute something else is running."""
    ends = told(lambda now: busy if now % 30 < 10 else 1.0)
    finish = ends[-1][1]
    foretold = [end for _, end in ends[2:]]  # the first ones are averaged
    changes = [abs(after - before) for before, after in pairwise(foretold)]
    assert max(changes) < 0.15 * finish
    assert 0.6 * finish < min(foretold) and max(foretold) < 1.2 * finish


def test_a_stage_that_ends_early_is_not_waited_for():
    seen: list[Progress] = []
    ledger = Ledger({"gate": 10, "harden": 8, "instant": 1}, {}, seen.append, Clock())
    ledger.report("gate", 10)
    ledger.report("harden", 4)
    ledger.close("harden")
    ledger.report("instant")
    assert [(p.step, p.total) for p in seen] == [(10, 19), (14, 19), (15, 15)]


@pytest.mark.parametrize(("seconds", "words"), [
    (3, "a few seconds"), (12, "about 10 s"), (54, "about 55 s"), (56, "about 1 min"), (200, "about 3 min"),
    (1900, "about 30 min"), (3600, "about 1 h"), (5400, "about 1 h 30 min"),
])  # fmt: skip
def test_durations_are_as_a_person_would_say_them(seconds, words):
    assert duration(seconds) == words


# --- several processes ---


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prompts", [1, 31, 32, 33, 70, 1000])
def test_batches_of_all_processes_are_counted(monkeypatch, count, prompts):
    monkeypatch.setattr(processes, "count", lambda: count)
    told: list[tuple[int, int]] = []
    deque(read(ToyBackbone(), ["a"] * prompts, tell=lambda batches, done: told.append((batches, done))), maxlen=0)
    assert [sum(one[i] for one in told) for i in (0, 1)] == [-(-prompts // BATCH), prompts]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_processes_together_read_each_prompt_once_and_in_order(monkeypatch, count):
    prompts, backbone, found = [f"word{i}" for i in range(200)], ToyBackbone(), []
    for index in range(count):
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        found += [(batch.number, list(batch.rows), batch.sides) for batch in read(backbone, prompts, prompts[::-1])]
    found.sort(key=lambda one: one[0])
    assert [row for _, rows, _ in found for row in rows] == list(range(200))
    for side, texts in enumerate((prompts, prompts[::-1])):
        states = torch.cat([sides[side]["cross_attn"] for _, _, sides in found])
        assert torch.equal(states, torch.cat([entry[0] for entry in backbone.encode(texts)]))


# --- what is shown ---


def test_a_long_curve_is_thinned_to_its_means():
    values = [float(i) for i in range(1000)]
    few = thinned(values, 100)
    assert len(few) == 100 and few[0] == 4.5 and few[-1] == 994.5
    assert sum(few) / len(few) == pytest.approx(sum(values) / len(values))
    assert thinned(values[:7], 100) == values[:7] and thinned([], 100) == []


def test_separation_counts_every_finite_depth():
    found = separation(torch.tensor([-2.0, -1.0, 0.5, -torch.inf]), torch.tensor([1.0, 3.0]))
    assert found.low == -2 and found.high == 3
    assert sum(found.counts[0]) == 3 and sum(found.counts[1]) == 2 and len(found.counts[0]) == BINS
    assert found.outside == (pytest.approx(1 / 3), 1.0)
    assert "33.3% of harmless prompts, 100.0% of unsafe prompts" in found.words()
    assert separation(torch.tensor([-torch.inf]), torch.zeros(0)) is None


def test_a_view_of_a_long_run_stays_small_and_speaks():
    view = View()
    view.see(Progress("gate", 1, 5002, 0.5, measure="walls", separation=separation(torch.zeros(9), torch.ones(9))))
    for i in range(5000):
        view.see(Progress("discover", i + 2, 5002, 1 / (i + 1), None, f"step {i + 1}", UNSAFE_LEFT, seconds_left=90))
    assert len(json.dumps(view.numbers())) < 6_000
    assert view.numbers()["count"] == 5000 and len(view.numbers()["losses"]) <= 300
    assert view.line() == "discover, step 5000, about 2 min left"
    assert f"{UNSAFE_LEFT}: 0.000203 after 5000; outside of the walls: 0.0% of harmless" in view.words()


def test_a_loss_is_said_as_the_chart_draws_it():
    view, losses = View(), [1 / (step + 1) for step in range(200)]
    for loss in losses:
        view.see(Progress("discover", 1, 1, loss, measure="share left"))
    assert view.loss == smooth(losses)[-1] == pytest.approx(sum(losses[-6:]) / 6) and math.isnan(View().loss)
