"""What prompts cost: memory above the text encoder and seconds of an instant region, by how many and how wide they are.

    python benchmarks/prompts.py [--cases demo:7000 wide:7000] [--runs 3] [--before FOLDER] [--publish]

`demo` is the demo model's text encoder (192 features, 77 tokens), `wide` a T5 encoder of one layer that writes 256
tokens of 4,096 features. Each run is a process of its own, with one thread. FOLDER holds the package
`comfyui_safe_region` of another commit, which is measured beside this one.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from held import memory
from publishing import MEASURED, as_table, put
from transformers import T5Config, T5EncoderModel

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.training.pairs import PromptPairs, demo_pairs
from comfyui_safe_region.training.plan import plan
from comfyui_safe_region.training.prompts import everyday_prompts
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

ENDS = ("", " at night", " in the rain", " by the sea", " in the snow", " seen from above", " in black and white",
        " at dawn", " in the fog", " on an old photo", " in a small town", " for a children's book", " in oil",
        " in bright colours", " in soft light", " as a postcard")  # fmt: skip
CASES = ("demo:1200", "demo:7000", "demo:50000", "wide:7000")
TOKENS, WORDS, WIDTH = 256, 2_000, 4_096


class WideBackbone:
    """A text encoder of T5's kind with random weights, and no diffusion model."""

    can_denoise = can_decode = False

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = T5EncoderModel(T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=64, d_ff=64, num_heads=1,
                                             num_layers=1)).eval()  # fmt: skip

    def signature(self) -> dict[str, Any]:
        return {"name": "wide", "parts": [], "blocks": {"cross_attn": WIDTH}}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[list[Any]]:
        words = [[2 + zlib.crc32(word.encode()) % (WORDS - 2) for word in prompt.lower().split()][: TOKENS - 1]
                 for prompt in prompts]  # fmt: skip
        ids = torch.tensor([[*row, 1, *[0] * (TOKENS - 1 - len(row))] for row in words])
        return [[states[None].clone(), {}] for some in ids.split(8) for states in self.model(some).last_hidden_state]


def pairs_for(prompts: int) -> PromptPairs:
    """The demo's pairs; with several endings each where more prompts are asked for than they make."""
    pairs = demo_pairs()
    if prompts <= 7_000:
        return pairs
    return PromptPairs(tuple((unsafe + end, safe + end) for end in ENDS for unsafe, safe in pairs.pairs),
                       tuple(prompt + end for end in ENDS[1:] for prompt in (*pairs.keep, *everyday_prompts())),
                       pairs.held_out, pairs.leave_out, pairs.title)  # fmt: skip


def run_once(kind: str, prompts: int) -> dict[str, float]:
    """One training, in this process."""
    torch.set_num_threads(1)
    backbone = WideBackbone() if kind == "wide" else DemoBackbone()
    trainer = Trainer(backbone, pairs_for(prompts), replace(PRESETS["instant"], prompts=prompts))
    planned = plan(trainer)
    backbone.encode(["a cat"] * 64)
    before, began = memory("VmRSS"), time.perf_counter()
    trainer.run(lambda progress: None)
    return {
        "seconds": time.perf_counter() - began, "memory": memory("VmHWM") - before, "planned": planned.text_bytes,
        "encodings": planned.encodings,
        "opened": trainer.numbers["calibration"]["held_out_unsafe_touched"],
    }  # fmt: skip


def measured(case: str, package: Path | None) -> dict[str, float]:
    """One training in a process of its own, by this package or another one."""
    paths = [str(package)] if package else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    found = subprocess.run([sys.executable, __file__, "--once", case], check=True, stdout=subprocess.PIPE, text=True,  # noqa: S603
                           env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"})  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def table(found: dict[str, list[dict[str, float]]]) -> str:
    rows = [["encoder: prompts at most", "encoded", "seconds", "memory above the encoder (MiB)", "planned / measured",
             "held-out prompts seen"]]  # fmt: skip
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append([name, f"{middle['encodings']:,.0f}", f"{middle['seconds']:.1f}",
                     f"{middle['memory'] / 2**20:.0f}", f"{middle['planned'] / middle['memory']:.2f}",
                     f"{middle['opened']:.0%}"])  # fmt: skip
    return as_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--cases", nargs="+", default=list(CASES), help="an encoder and how many prompts at most")
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--before", type=Path, help="a folder with the package of another commit")
    options.add_argument("--once", metavar="CASE", help=argparse.SUPPRESS)
    options.add_argument("--publish", action="store_true", help="write the table into docs/measured.md")
    asked = options.parse_args(argv)
    if asked.once:
        kind, _, prompts = asked.once.partition(":")
        print(json.dumps(run_once(kind, int(prompts))))
        return 0
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(asked.runs):
        for case in asked.cases:
            for name, package in ((f"{case}, before", asked.before), (case, None)):
                if package or name == case:
                    found.setdefault(name, []).append(measured(case, package))
                    print(name, found[name][-1], flush=True)
    text = f"{table(found)}\n\nMedians of {asked.runs} runs; torch {torch.__version__}, 1 thread."
    print(text)
    if asked.publish:
        put(MEASURED, "prompts", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
