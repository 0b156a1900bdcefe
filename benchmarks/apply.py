"""What applying a region costs in each model family, against one text encoding and one denoiser step of that family.

    python benchmarks/apply.py [--families SDXL Flux ...] [--device cuda] [--threads 1] [--out build/apply] [--publish]

A region with 8 walls that see the average, a scope and rank 16 in every block is applied, just as the node does it, to
a conditioning of the family's real shapes. Text encoders and denoisers are too large to hold here, and all of their
layers take the same time: one transformer layer of the real widths is timed, and multiplied by their number (for UNets
there is none). Applying and encoding are timed in turn, so that a busy machine slows both; medians count. Exits with
1 when a ratio to the encoding is not below 1 %. On a GPU, applying runs under torch's check for host synchronisation.
"""
from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from kept import keep, load
from publishing import MEASURED, as_table, put
from torch import Tensor, nn

from comfyui_safe_region.region import Gate, Move, Part, Region, Scope, apply_to_conditioning, text_blocks
from comfyui_safe_region.region.blocks import CROSS_ATTENTION, FAMILIES, Family

WALLS, RANK, BAR = 8, 16, 0.01
Layers = tuple[int, int, int, int]  # width, width of the feed-forward part, layers, tokens
CLIP_L, CLIP_H, CLIP_G = (768, 3072, 12, 77), (1024, 4096, 24, 77), (1280, 5120, 32, 77)


def t5(tokens: int, width: int = 4096, inner: int = 15_360) -> Layers:
    """A T5 encoder; its gated feed-forward part of 10,240 has three matrices where a plain one has two."""
    return width, inner, 24, tokens


ENCODERS: dict[str, Sequence[Layers]] = {
    "SD 1.x": [CLIP_L], "SD 2.x": [CLIP_H], "SDXL": [CLIP_L, CLIP_G], "SDXL refiner and Stable Cascade": [CLIP_G],
    "SD3": [CLIP_L, CLIP_G, t5(77)], "Flux": [CLIP_L, t5(256)], "Flux.2": [(5120, 49_152, 30, 512)],
    "AuraFlow": [t5(256, 2048, 7680)], "HunyuanDiT": [(1024, 4096, 24, 77), t5(256, 2048, 7680)],
    "HunyuanVideo": [(4096, 21_504, 32, 125), CLIP_L], "HunyuanImage and HunyuanVideo 1.5": [(3584, 28_416, 28, 64)],
    "HiDream": [CLIP_L, CLIP_G, t5(128), (4096, 21_504, 32, 30)], "Lumina 2": [(2304, 13_824, 26, 30)],
    "Qwen-Image": [(3584, 28_416, 28, 64)], "Z-Image": [(2560, 14_592, 36, 30)], "OmniGen2": [(2048, 16_512, 36, 30)],
    "Kandinsky 5": [(3584, 28_416, 28, 64), CLIP_L], "Cosmos": [(1024, 65_536, 24, 512)], "Wan": [t5(512)],
    "Chroma and PixArt": [t5(30)], "LTXV and Mochi": [t5(256)], "Ovis": [(2048, 12_288, 28, 256)],
    "NewBie": [(2560, 15_360, 34, 30)],
}  # fmt: skip
DENOISERS: dict[str, Layers] = {  # at 1024 x 1024 pixels; video at 17 frames of 480 x 832
    "SD3": (1536, 6144, 24, 4096), "Flux": (3072, 12_288, 57, 4352), "Flux.2": (6144, 18_432, 56, 4608),
    "AuraFlow": (3072, 8192, 36, 4352), "HunyuanDiT": (1408, 6144, 40, 4096),
    "HunyuanVideo": (3072, 12_288, 60, 7800), "HunyuanImage and HunyuanVideo 1.5": (3584, 14_336, 60, 1024),
    "HiDream": (2560, 10_240, 48, 4352),
    "Lumina 2": (2304, 9216, 26, 4126), "Qwen-Image": (3072, 12_288, 60, 4160), "Z-Image": (3840, 15_360, 30, 4126),
    "OmniGen2": (2520, 10_080, 32, 4126), "Kandinsky 5": (1792, 7168, 32, 7800), "Cosmos": (2048, 8192, 28, 4096),
    "Wan": (1536, 8960, 30, 7800), "Chroma and PixArt": (3072, 12_288, 57, 4126),
    "LTXV and Mochi": (2048, 8192, 28, 3510), "Ovis": (3072, 12_288, 33, 4352), "NewBie": (2304, 9216, 36, 4126),
}  # fmt: skip


def conditioning(family: Family, device: str) -> list[list]:
    """One random prompt of the family's shapes."""
    tensors = {key: torch.randn(1, *shape, device=device) for key, shape in family.shapes.items()}
    if family.name == "SD3":
        tensors[CROSS_ATTENTION][:, :77, 2048:] = 0
    return [[tensors.pop(CROSS_ATTENTION), tensors]]


def example_region(entry: list) -> Region:
    """As large as a learned one: 8 walls that see the average, a scope, rank 16 in every block, one constant token."""

    def spread(width: int) -> dict[str, Tensor]:
        return {"mean": torch.randn(width), "scale": torch.rand(width) + 0.5}

    width = entry[0].shape[-1]
    gate = Gate(torch.randn(WALLS, width), torch.zeros(WALLS), ramp=torch.tensor(1.0), **spread(width),
                context=torch.randn(WALLS, width))  # fmt: skip
    moves = {}
    for block, tensor in text_blocks(entry).items():
        size = tensor.shape[-1]
        down, up = torch.randn(RANK, size) / size**0.5, torch.randn(size, RANK)
        moves[block] = Move(down, up, offset=torch.randn(size), **spread(size))
    wide = torch.full((2, 2), 1e9)
    scope = Scope(torch.randn(2, width), torch.randn(2, width), torch.rand(width) + 0.5, -wide, wide)
    constant = {CROSS_ATTENTION: torch.randn(1, width)}
    return Region((Part("example", moves, {CROSS_ATTENTION: gate}, constant, {CROSS_ATTENTION: scope}),))


def layer(shape: Layers, device: str, dtype: torch.dtype) -> Callable[[], object]:
    """One forward pass of one transformer layer."""
    width, inner, _, tokens = shape
    heads = width // 64 if width % 64 == 0 else width // 72 if width % 72 == 0 else 8
    block = nn.TransformerEncoderLayer(
        width, heads, inner, batch_first=True, norm_first=True, device=device, dtype=dtype
    )  # fmt: skip
    x = torch.randn(1, tokens, width, device=device, dtype=dtype)
    block.eval()
    return lambda: block(x)


def timed(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def no_synchronisation(device: str):
    """Raises where the host would wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(family: Family, runs: int, device: str) -> dict[str, float]:
    """Median seconds of applying a region, of one text encoding and of one denoiser step."""
    entry = conditioning(family, device)
    region = example_region(entry[0])
    moved = apply_to_conditioning(entry, region)[0][0]
    assert not torch.equal(moved, entry[0][0]), "the region must be open, or nothing is measured"  # noqa: S101

    def apply() -> None:
        with no_synchronisation(device):
            apply_to_conditioning(entry, region)

    for _ in range(3):
        apply()
    applied, found = [timed(apply, device) for _ in range(40)], {}
    half = torch.bfloat16 if device != "cpu" else torch.float32
    kinds = {"encode": ENCODERS[family.name], "denoise": [DENOISERS[family.name]] if family.name in DENOISERS else []}
    for kind, shapes in kinds.items():
        total = 0.0
        for shape in shapes:
            work = layer(shape, device, half)
            work()
            times = []
            for _ in range(runs if kind == "encode" else 1):
                applied += [timed(apply, device) for _ in range(4)]
                times.append(timed(work, device))
            total += shape[2] * statistics.median(times)
            del work
            gc.collect()
        if shapes:
            found[kind] = total
    return {"apply": statistics.median(applied), **found}


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def table(found: dict[str, dict[str, float]]) -> str:
    rows = [["family", "apply, ms", "one text encoding, ms", "one denoiser step, ms", "of an encoding, %"]]
    for name, one in found.items():
        rows.append([name, milliseconds(one["apply"]), milliseconds(one["encode"]),
                     milliseconds(one["denoise"]) if "denoise" in one else "",
                     f"{100 * one['apply'] / one['encode']:.2g}"])  # fmt: skip
    return as_table(rows)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--families", nargs="+", choices=[f.name for f in FAMILIES], help="only these (default: all)")
    options.add_argument("--runs", type=int, default=7, help="of each layer, with four applications each")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=0, help="torch threads, 0 for torch's own choice")
    options.add_argument("--out", type=Path, default=Path("build/apply"))
    options.add_argument("--publish", action="store_true", help="write the table into docs/measured.md")
    asked = options.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # it keeps whole attention matrices
    torch.manual_seed(0)
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / f"results_{asked.device}.json"
    found = load(file)
    for family in FAMILIES:
        if (asked.families is None or family.name in asked.families) and family.name not in found:
            with torch.inference_mode():
                found[family.name] = measure(family, asked.runs, asked.device)
            keep(found, file)
            print(family.name, json.dumps(found[family.name]), flush=True)
    found = {f.name: found[f.name] for f in FAMILIES if f.name in found}
    worst = max(found, key=lambda name: found[name]["apply"] / found[name]["encode"])
    ratio = found[worst]["apply"] / found[worst]["encode"]
    name = torch.cuda.get_device_name() if asked.device != "cpu" else platform.processor() or platform.machine()
    text = (f"{table(found)}\n\n{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; the dearest is "
            f"{worst} with {100 * ratio:.2g} % (bar: below {100 * BAR:.0f} %).")  # fmt: skip
    print(text)
    if asked.publish:
        put(MEASURED, "apply", text)
    return 0 if ratio < BAR else 1


if __name__ == "__main__":
    sys.exit(main())
