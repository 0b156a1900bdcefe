"""What a training step takes beside the weights, planned and measured.

    COMFYUI_PATH=/path/to/ComfyUI /path/to/its/python benchmarks/memory.py [--publish]

Runs in ComfyUI's interpreter, on the CPU, with its own classes of Stable Diffusion 1.5, SDXL and Flux. The first table
is what the node plans (`Needs` in backbones/kept.py) for networks of full size at 512 x 512 pixels in bfloat16, counted
on tensors that have shapes and no numbers. The second one compares that plan with what the system tells: by how much
the memory of a process of its own grows in one step, of networks with random weights in float32; of Flux
a few blocks are built there.
"""
from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, os.environ["COMFYUI_PATH"])
from comfy.cli_args import args as comfy_args

comfy_args.cpu = comfy_args.use_pytorch_cross_attention = True  # the attention of most cards
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

PACK = ModuleType("pack")
PACK.__path__ = [str(Path(__file__).parents[1])]
sys.modules["pack"] = PACK
ComfyBackbone = import_module("pack.backbones.comfy").ComfyBackbone
kept = import_module("pack.backbones.kept")

SIDE = 512  # pixels
BATCH = 8
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
        "legacy": False, "dims": 2}  # fmt: skip
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
        "mlp_ratio": 4.0, "num_heads": 24, "axes_dim": [16, 56, 56], "theta": 10_000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": True, "txt_ids_dims": []}  # fmt: skip
NETWORKS = {  # class in ComfyUI, its configuration, the text's shape, the pooled vector's width
    "SD 1.5": ("SD15", UNET | {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": (1, 2, 4, 4), "num_heads": 8, "context_dim": 768,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "adm_in_channels": None,
    }, (77, 768), 0),
    "SDXL": ("SDXL", UNET | {
        "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4), "num_head_channels": 64, "num_heads": -1,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 2816,
    }, (77, 2048), 1280),
    "Flux": ("Flux", FLUX | {"depth": 19, "depth_single_blocks": 38}, (256, 4096), 768),
    "Flux, 2 + 4 blocks": ("Flux", FLUX | {"depth": 2, "depth_single_blocks": 4}, (256, 4096), 768),
}  # fmt: skip
FULL, SMALL = ("SD 1.5", "SDXL", "Flux"), ("SD 1.5", "SDXL", "Flux, 2 + 4 blocks")
STEPS = [(count, saving) for saving in (False, True) for count in (1, 2)]


class Texts:
    """In place of a CLIP: states of the right shape."""

    def __init__(self, shape: tuple[int, int], pooled: int) -> None:
        self.states = torch.randn(1, *shape)
        self.options = {"pooled_output": torch.randn(1, pooled)} if pooled else {}

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return [[self.states, dict(self.options)]]


def backbone(name: str, dtype: torch.dtype) -> Any:
    kind, config, shape, pooled = NETWORKS[name]
    settings = getattr(comfy.supported_models, kind)
    config = settings({**settings.unet_config, **config})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({})
    for tensor in model.diffusion_model.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    cpu = comfy.model_management.get_torch_device()
    return ComfyBackbone(comfy.model_patcher.ModelPatcher(model, cpu, cpu), Texts(shape, pooled), size=SIDE)


def full_size(name: str) -> tuple[int, Any]:
    """Bytes of a network's weights, and what its steps need, without making it."""
    found: list[Any] = []
    with FakeTensorMode():
        made, (_, config, shape, pooled) = backbone(name, torch.bfloat16), NETWORKS[name]
        network, latent = made.model.model.diffusion_model.requires_grad_(False), made._format
        side = SIDE // 8
        for count in (1, 2):
            like = {"dtype": torch.bfloat16}
            others = {"y": torch.randn(count, config.get("adm_in_channels") or pooled, **like)} if pooled else {}
            others |= {"guidance": torch.ones(count)} if "guidance_embed" in config else {}
            text = torch.randn(count, *shape, **like).requires_grad_(True)
            with torch.enable_grad(), kept.counted(network, found):
                network(torch.randn(count, latent.latent_channels, side, side, **like), torch.ones(count), context=text,
                        transformer_options={}, **others)  # fmt: skip
    return sum(tensor.nbytes for tensor in network.parameters()), kept.Needs(*found)


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def one(name: str, count: int, saving: bool) -> dict[str, int]:
    """Planned and measured bytes of one step, in this process."""
    found = backbone(name, torch.float32)
    planned = found._needs.step(count, saving)
    found._must_save = lambda _: saving
    (entry,), sigma = found.encode([""]), found.sigmas(4)[1]
    x = found.start(count, sigma, torch.Generator().manual_seed(0))
    for _ in range(2):  # the first one also brings what libraries set up once
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark begins anew
        before = resident("VmRSS")
        with torch.enable_grad():
            entries = [[entry[0].clone().requires_grad_(True), entry[1]] for _ in range(count)]
            found.denoise(x, sigma.expand(count), entries).float().square().sum().backward()
        del entries
    return {"weights": found.model.model_size(), "planned": planned, "measured": resident("VmHWM") - before}


def publish(name: str, rows: list[list[str]]) -> None:
    """As benchmarks/publishing.py does, which needs the package installed."""
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    page = Path(__file__).parents[1] / "docs" / "measured.md"
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise SystemExit(f"{page} lacks the marks of {name}")
    page.write_text(f"{before}{mark}\n\n" + "\n".join(lines) + f"\n\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="write the table into docs/measured.md")
    chosen = parser.parse_args(arguments)
    planned = [[f"model, {SIDE} x {SIDE}", "weights, GB (16 bit)", f"step of {BATCH}, GB",
                "with few activations kept, GB", "one at a time, GB"]]  # fmt: skip
    for name in FULL:
        weights, needs = full_size(name)
        sizes = (weights, needs.step(BATCH, False), needs.step(BATCH, True), needs.step(1, True))
        planned.append([name, *(f"{size / 2**30:.1f}" for size in sizes)])
        print(planned[-1], flush=True)
    compared = [[f"model, {SIDE} x {SIDE}", "weights, GB (32 bit)", "prompts in a step", "activations", "planned, GB",
                 "measured, GB", "planned to measured"]]  # fmt: skip
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, and leaves no holes
    for name in SMALL:
        for count, saving in STEPS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                found = alone.submit(one, name, count, saving).result()
            sizes = [f"{found[key] / 2**30:.2f}" for key in ("planned", "measured")]
            compared.append([name, f"{found['weights'] / 2**30:.1f}", str(count), "few" if saving else "all", *sizes,
                             f"{found['planned'] / found['measured']:.2f}"])  # fmt: skip
            print(compared[-1], flush=True)
    if chosen.publish:
        publish("memory", planned)
        publish("memory measured", compared)


if __name__ == "__main__":
    main()
