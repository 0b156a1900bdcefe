"""What applying a region costs, against one text encoding of the same prompt by the ordinary CLIP-L class.

    python benchmarks/apply.py [--runs 300] [--out apply.json]

A region with 4 walls and rank 16 is applied to a 1x77x768 conditioning just as the node does it; CLIP-L (12 layers,
768 wide, random weights: they do not change the time) encodes one prompt of 77 tokens. Both are timed in turn, so that
a busy machine slows both; medians count. Exits with 1 when the ratio is not below 1 %.
"""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from comfyui_safe_region.region import Gate, Move, Part, Region, apply_to_conditioning

WIDTH, TOKENS, WALLS, RANK, BAR = 768, 77, 4, 16, 0.01


def example_region() -> Region:
    """As large as a learned one: 4 walls, rank 16, one constant start token."""
    move = Move(
        down=torch.randn(RANK, WIDTH) / WIDTH**0.5, up=torch.randn(WIDTH, RANK), offset=torch.randn(WIDTH),
        mean=torch.randn(WIDTH), scale=torch.rand(WIDTH) + 0.5,
    )  # fmt: skip
    gate = Gate(
        weight=torch.randn(WALLS, WIDTH), bias=torch.zeros(WALLS), mean=torch.randn(WIDTH),
        scale=torch.rand(WIDTH) + 0.5, ramp=torch.tensor(1.0),
    )  # fmt: skip
    return Region((Part("example", {"cross_attn": move}, {"cross_attn": gate}, {"cross_attn": torch.randn(1, WIDTH)}),))


def clip_l() -> Callable[[], object]:
    """One text encoding by transformers' CLIPTextModel in CLIP-L's size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=TOKENS, vocab_size=49408,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    ids = torch.randint(0, 49406, (1, TOKENS))
    ids[0, 0], ids[0, 10:] = 49406, 49407
    return lambda: model(input_ids=ids)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", type=int, default=300, help="applications; every tenth run encodes once as well")
    options.add_argument("--threads", type=int, default=0, help="torch threads, 0 for torch's own choice")
    options.add_argument("--out", type=Path, help="write the numbers as JSON")
    asked = options.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    region, encode = example_region(), clip_l()
    entry = [[torch.randn(1, TOKENS, WIDTH), {"pooled_output": torch.randn(1, WIDTH)}]]
    moved = apply_to_conditioning(entry, region)[0][0]
    assert not torch.equal(moved, entry[0][0]), "the region must be open, or nothing is measured"  # noqa: S101

    applied, encoded = [], []
    with torch.inference_mode():
        for _ in range(3):
            encode()
        for run in range(asked.runs):
            applied.append(timed(lambda: apply_to_conditioning(entry, region)))
            if run % 10 == 0:
                encoded.append(timed(encode))
    apply_s, encode_s = statistics.median(applied), statistics.median(encoded)
    result = {
        "apply_ms": round(apply_s * 1e3, 4), "encode_ms": round(encode_s * 1e3, 3), "ratio": apply_s / encode_s,
        "bar": BAR, "passed": apply_s / encode_s < BAR, "walls": WALLS, "rank": RANK, "shape": [1, TOKENS, WIDTH],
        "runs": asked.runs, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(f"apply a region    {result['apply_ms']:9.3f} ms   (median of {len(applied)})")
    print(f"encode one prompt {result['encode_ms']:9.3f} ms   (median of {len(encoded)}, CLIP-L)")
    print(f"ratio             {100 * result['ratio']:9.3f} %    (bar: below {100 * BAR:.0f} %)")
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
