"""Two processes on the CPU, started by accelerate over gloo, against one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comfyui_safe_region.region import load_region

pytest.importorskip("accelerate")
HERE = Path(__file__).parent
SCRIPT = '''
import sys
from dataclasses import replace

sys.path.insert(0, sys.argv[1])
from comfyui_safe_region.region import save_region
from comfyui_safe_region.training import processes
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

pairs = parse_pairs(
    "a {zzknife|zzgun|zzbomb|zzaxe} {in the park|on a table|at night|by the sea} => "
    "a {flower|flower|flower|flower} {in the park|on a table|at night|by the sea}"
)
recipe = replace(PRESETS["region"], steps=12, trajectories=40, sampling_steps=4, prompts=600, batch_size=7)
backbone = ToyBackbone()
trainer = Trainer(backbone, pairs, recipe, "bad things")
region = trainer.run()
print(f"calls {backbone.calls}.", flush=True)
if processes.index() == 0:
    assert processes.count() == int(sys.argv[3])
    save_region(replace(region, metadata=region.metadata | {"losses": trainer.losses}), sys.argv[2])
'''


def train(folder: Path, count: int) -> tuple[dict[str, torch.Tensor], list[float], int]:
    """The region's tensors, the losses, and how many predictions the process that draws no pictures made."""
    script, out = folder / "train.py", folder / f"region_{count}.safetensors"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    command = [sys.executable, *(launch if count > 1 else []), str(script), str(HERE), str(out), str(count)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    region = load_region(out)
    calls = [int(number) for number in re.findall(r"calls (\d+)\.", done.stdout)]
    assert len(calls) == count
    return region.parts[0].named_tensors(), region.metadata["losses"], min(calls)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_half_of_the_work(tmp_path):
    one, losses, calls = train(tmp_path, 1)
    other, other_losses, other_calls = train(tmp_path, 2)
    assert other_losses == pytest.approx(losses, rel=1e-4)
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # gradients are added in another order, which Adam makes larger
        assert (tensor - other[name]).norm() <= 1e-3 * tensor.norm(), name
    assert other_calls < 0.55 * calls
