"""What one prediction of a training step keeps for its backward pass, on networks of real size with random weights.

    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/memory.py [--publish]

Runs in ComfyUI's interpreter, on the CPU: its own classes of Stable Diffusion 1.5, SDXL and Flux at 512 x 512 pixels
in bfloat16, counted as the node counts before it trains (`Kept` in backbones/kept.py). Of Flux a few blocks are built:
all blocks of a kind keep the same, so the rest is multiplied.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, os.environ["COMFYUI_PATH"])
from comfy.cli_args import args as comfy_args

comfy_args.cpu = comfy_args.use_pytorch_cross_attention = True  # the attention of most cards
import comfy.ldm.flux.model  # noqa: E402
import comfy.ldm.modules.diffusionmodules.openaimodel as openai  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402

PACK = ModuleType("pack")
PACK.__path__ = [str(Path(__file__).parents[1])]
sys.modules["pack"] = PACK
backbone = import_module("pack.backbones.comfy")

BATCH, SIDE, TYPE = 8, 64, torch.bfloat16  # of a training step; latents to a side; weights
LIKE = {"dtype": TYPE, "device": "cpu", "operations": comfy.ops.disable_weight_init}
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
        "legacy": False, "dropout": 0, "dims": 2, **LIKE}  # fmt: skip
SD15 = UNET | {"num_res_blocks": [2, 2, 2, 2], "channel_mult": (1, 2, 4, 4), "num_heads": 8, "context_dim": 768,
               "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
               "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}  # fmt: skip
SDXL = UNET | {"num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4), "num_head_channels": 64, "context_dim": 2048,
               "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "num_heads": -1,
               "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
               "num_classes": "sequential", "adm_in_channels": 2816}  # fmt: skip


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=TYPE)


def kept(network: torch.nn.Module, *inputs: Any, **named: Any) -> Any:
    """What a prediction of the network keeps."""
    network = network.requires_grad_(False).eval()
    for tensor in network.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    found = backbone.Kept()
    with torch.enable_grad(), backbone.counted(network, found):
        network(*inputs, **named)
    return found


def unet(**config: Any) -> tuple[Any, int]:
    network = openai.UNetModel(**config)
    text = random(1, 77, config["context_dim"]).requires_grad_(True)
    pooled = {"y": random(1, config["adm_in_channels"])} if "adm_in_channels" in config else {}
    found = kept(network, random(1, 4, SIDE, SIDE), torch.ones(1), context=text, transformer_options={}, **pooled)
    return found, sum(tensor.numel() for tensor in network.parameters())


def flux(double: int, single: int) -> tuple[Any, int]:
    network = comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
        num_heads=24, depth=double, depth_single_blocks=single, axes_dim=[16, 56, 56], theta=10_000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **LIKE,
    )  # fmt: skip
    found = kept(network, random(1, 16, SIDE, SIDE), torch.ones(1), random(1, 256, 4096).requires_grad_(True),
                 random(1, 768).requires_grad_(True), torch.ones(1), transformer_options={})  # fmt: skip
    return found, sum(tensor.numel() for tensor in network.parameters())


def whole_flux() -> tuple[Any, int]:
    """19 blocks of one kind and 38 of the other, from networks of two or three."""
    (one, size), (more, larger), (wider, widest) = flux(1, 1), flux(2, 1), flux(1, 2)

    def grown(of: Any) -> int:
        return of(one, size) + 18 * (of(more, larger) - of(one, size)) + 37 * (of(wider, widest) - of(one, size))

    found = backbone.Kept(*(grown(lambda k, _, name=name: getattr(k, name)) for name in ("everything", "in_blocks",
                          "between")), max(more.largest, wider.largest))  # fmt: skip
    return found, grown(lambda _, count: count)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="write the table into docs/measured.md")
    chosen = parser.parse_args(arguments)
    rows = [["model, 512 x 512", "weights, GB (16 bit)", f"step of {BATCH}, GB", "with few activations kept, GB",
             "one at a time, GB"]]  # fmt: skip
    for name, measure in (("SD 1.5", lambda: unet(**SD15)), ("SDXL", lambda: unet(**SDXL)), ("Flux", whole_flux)):
        found, count = measure()
        sizes = (2 * count, BATCH * found.everything, BATCH * found.checkpointed, found.checkpointed)
        rows.append([name, *(f"{size / 2**30:.1f}" for size in sizes)])
        print(json.dumps(dict(zip(rows[0], rows[-1]))), flush=True)
    if chosen.publish:
        lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
        page = Path(__file__).parents[1] / "docs" / "measured.md"
        before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- memory -->")
        _, end, after = rest.partition("<!-- end of memory -->")
        if not end:
            raise SystemExit(f"{page} lacks the marks of memory")
        page.write_text(f"{before}{mark}\n\n" + "\n".join(lines) + f"\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
