"""The same text encoder kept in fewer bits: on how many prompts a region opens that was learned with all of them.

    SAFE_REGION_PROMPTS=/path/to/prompts python benchmarks/precision.py --encoder /path/to/all-MiniLM-L6-v2 [--publish]

Regions are learned as in benchmarks/language.py (and taken from its --out where they are there). Then the weights of
the encoder's layers are rounded as the formats round that people load encoders in, which are written here from what
they are, in plain numbers: half precision, 8-bit floats with a scale for each matrix, 8 bits for blocks of 32 (GGUF's
Q8_0), 4 bits for blocks of 32 (Q4_0) and 4-bit floats for blocks of 16 (NVFP4).
"""
from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from kept import trained
from language import TextEncoder, opens, public_prompts
from publishing import MEASURED, as_table, put, share
from torch import Tensor, nn

from comfyui_safe_region.training.packs import load_pack
from comfyui_safe_region.training.prompts import with_new_words
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # what four bits can say, and its negative


def to_fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).to(weight) * scale


def in_blocks(weight: Tensor, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    return rounded(weight.reshape(-1, size)).reshape(weight.shape)


def to_q8(block: Tensor) -> Tensor:
    scale = (block.abs().amax(-1, keepdim=True) / 127).half().float()
    return (block / scale.clamp(min=1e-12)).round() * scale


def to_q4(block: Tensor) -> Tensor:
    largest = block.gather(-1, block.abs().argmax(-1, keepdim=True))  # with its sign: it becomes -8
    scale = (largest / -8).half().float()
    safe = torch.where(scale == 0, 1.0, scale)
    return (block / safe).round().clamp(-8, 7) * scale


def to_nvfp4(block: Tensor) -> Tensor:
    scale = (block.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float().clamp(min=1e-12)
    nearest = (block[..., None].abs() / scale[..., None] - FP4).abs().argmin(-1)
    return FP4[nearest] * block.sign() * scale


def nvfp4(weight: Tensor) -> Tensor:
    whole = weight.abs().max() / (6 * torch.finfo(torch.float8_e4m3fn).max)  # so that scales of blocks fit into 8 bits
    return in_blocks(weight / whole, 16, to_nvfp4) * whole


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "as learned": lambda weight: weight,
    "fp16": lambda weight: weight.half().float(),
    "bf16": lambda weight: weight.bfloat16().float(),
    "fp8": to_fp8,
    "Q8_0": lambda weight: in_blocks(weight, 32, to_q8),
    "Q4_0": lambda weight: in_blocks(weight, 32, to_q4),
    "NVFP4": nvfp4,
}


def kept_as(encoder: TextEncoder, rounded: Callable[[Tensor], Tensor]) -> TextEncoder:
    """The encoder with the weights of its linear layers rounded."""
    changed = copy.copy(encoder)
    changed.model = copy.deepcopy(encoder.model)
    for layer in changed.model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = rounded(layer.weight.data)
    return changed


def apart(one: TextEncoder, other: TextEncoder, prompts: Sequence[str]) -> float:
    """How far states are from each other, as a share of how far those of different tokens are from their mean."""
    (states,), (others,) = ([torch.cat([e[0][0] for e in encoder.encode(prompts)])] for encoder in (one, other))
    return float((states - others).norm() / (states - states.mean(0)).norm())


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--encoder", type=Path, required=True, help="folder of a model that transformers reads")
    options.add_argument("--packs", nargs="+", default=("weapons", "violence", "sexual"))
    options.add_argument("--out", type=Path, default=Path("build/language"))
    options.add_argument("--publish", action="store_true", help="write the table into docs/measured.md")
    asked = options.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    encoder, public = TextEncoder(asked.encoder), public_prompts()
    encoders = {name: kept_as(encoder, rounded) for name, rounded in FORMATS.items()}
    harmless = next(iter(public["PartiPrompts"].values())) if public else []
    rows = [["pack", "encoder", "states apart, %", "PartiPrompts, % open", "CoProV2 safe, % open",
             "CoProV2 unsafe, % open", "new words, % open"]]  # fmt: skip
    for pack in asked.packs:
        pairs = load_pack(pack)
        region = trained(asked.out / f"{pack}.safetensors",
                         lambda pairs=pairs: Trainer(encoder, pairs, PRESETS["instant"]).run())  # fmt: skip
        copro = [public.get(f"CoProV2 {side}", {}).get(pack, []) for side in ("safe", "unsafe")]
        sets = [harmless, *copro, [unsafe for unsafe, _ in with_new_words(pairs.held_out, pairs.pairs)]]
        for name, other in encoders.items():
            answers = [opens(other, region, prompts) for prompts in sets]
            rows.append([pack, name, f"{100 * apart(encoder, other, (harmless or sets[-1])[:200]):.1f}",
                         *(share(sum(found), len(found)) for found in answers)])  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    if asked.publish:
        put(MEASURED, "precision", as_table(rows))


if __name__ == "__main__":
    main()
