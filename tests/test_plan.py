"""What a run says that it will take, against what it takes; and training in smaller pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_safe_region.training.attribute_trainer import AttributeTrainer
from comfyui_safe_region.training.attributes import parse_attribute
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.plan import plan
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

PAIRS = parse_pairs(
    "a {zzknife|zzgun|zzbomb|zzaxe} {in the park|on a table|at night|by the sea} => "
    "a {flower|flower|flower|flower} {in the park|on a table|at night|by the sea}\n"
    "{red|blue|green} {zzknife|zzgun|zzbomb} and a {dog|cat} => {red|blue|green} {flower|flower|flower} and a {dog|cat}"
    "\nheld-out: a {zzmace|zzknife} in the park => a flower in the park"
)
SHORT = {"trajectories": 20, "sampling_steps": 5, "prompts": 900}


class CountingToy(ToyBackbone):
    def __init__(self, drawing: bool = True) -> None:
        super().__init__()
        self.encoded, self.can_decode, self.with_gradients = 0, drawing, 0

    def encode(self, prompts):
        self.encoded += len(prompts)
        return super().encode(prompts)

    def denoise(self, x, sigma, entries):
        found = super().denoise(x, sigma, entries)
        self.with_gradients += len(entries) * found.requires_grad
        return found


RECIPES = {
    "region": replace(PRESETS["region"], steps=60, **SHORT),
    "region at guidance 1": replace(PRESETS["region"], steps=51, guidance=1.0, **SHORT),
    "both targets": replace(PRESETS["region"], steps=4, target="both", **SHORT),
    "instant": replace(PRESETS["instant"], prompts=900),
    "paper": replace(PRESETS["paper"], steps=3, sampling_steps=10),
}


ROWS = parse_attribute(
    "attribute: kind\n"
    "a {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|at night|by the sea} => "
    "left: a leftish {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|at night|by the sea} => "
    "right: a rightish {zzcook|zzjudge|zzpilot|zzdoctor} {in the park|at night|by the sea}"
)


@pytest.mark.parametrize("drawing", [True, False])
@pytest.mark.parametrize("name", ["region", "instant", "paper"])
def test_the_plan_of_an_attribute_is_what_the_run_takes(name, drawing):
    backbone = CountingToy(drawing)
    trainer = AttributeTrainer(backbone, ROWS, RECIPES[name])
    expected = plan(trainer)
    backbone.encoded, backbone.calls = 1, 0
    trainer.run()
    assert expected.encodings == backbone.encoded
    assert expected.evaluations == backbone.calls
    assert expected.gradients == backbone.with_gradients


@pytest.mark.parametrize("drawing", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_is_what_the_run_takes(name, drawing):
    backbone = CountingToy(drawing)
    trainer = Trainer(backbone, PAIRS, RECIPES[name], "bad things")
    expected = plan(trainer)
    backbone.encoded, backbone.calls = 1, 0  # the plan encoded the one prompt that tells how many fit
    trainer.run()
    assert expected.encodings == backbone.encoded
    assert expected.evaluations == backbone.calls
    assert expected.gradients == backbone.with_gradients
    assert expected.step_bytes == (1000 * RECIPES[name].batch_size if expected.gradients else 0)


def test_a_hardened_run_takes_no_more_than_its_plan_says():
    backbone = CountingToy()
    trainer = Trainer(backbone, PAIRS, replace(PRESETS["hardened"], steps=4, **SHORT), "bad things")
    expected = plan(trainer)
    backbone.encoded, backbone.calls = 0, 0
    trainer.run()
    assert expected.encodings >= backbone.encoded and expected.evaluations >= backbone.calls


def test_the_plan_is_said_in_words():
    trainer = Trainer(CountingToy(), PAIRS, RECIPES["region"], "bad things")
    encode, predict, memory = plan(trainer).sentences()
    assert "prompts to encode" in encode and "480 of them with a backward pass" in predict
    assert "MB for text" in memory and "1 MB for a training step" in memory


def test_a_step_in_smaller_pieces_learns_the_same():
    class Small(ToyBackbone):
        def fits(self, count):
            return 3

    recipe = replace(PRESETS["region"], steps=6, **SHORT)
    one, other = (Trainer(kind(), PAIRS, recipe, "bad things") for kind in (ToyBackbone, Small))
    regions = [trainer.run() for trainer in (one, other)]
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    tensors = [region.parts[0].named_tensors() for region in regions]
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-4, rtol=1e-3) for name in tensors[0])
