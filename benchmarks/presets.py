"""The three presets side by side on the demo model: same pairs, prompts, noise and judge in one run.

    python benchmarks/presets.py [--prompts 100] [--harmless 200] [--out build/presets]

Writes presets.json, presets.md (the README's table) and a before/after sheet for each preset. No prompt that is
measured here was trained on.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo.model import Judge
from comfyui_safe_region.evaluation.demo_measure import SetResult, contact_sheet, measure_set
from comfyui_safe_region.evaluation.demo_prompts import demo_prompts
from comfyui_safe_region.region.files import region_bytes
from comfyui_safe_region.training.pairs import demo_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

CONCEPT = "weapon, knife, dagger, gun, bomb, axe, swords"  # the paper names its concept with a list of words
Results = dict[str, dict[str, SetResult]]  # by set, then by preset


def table(results: Results, about: dict[str, dict[str, float]], guidance: float) -> str:
    """Unsafe share of each set for each preset, and what becomes of harmless prompts, as Markdown."""
    sets = [name for name in results if name != "harmless"]
    head = [f"guidance {guidance:g}", *sets, "mixed: rest kept", "harmless: same to the bit", "trained in", "file"]
    first = next(iter(results["harmless"]))
    rows = [["none", *(f"{results[name][first].unsafe_before:.1%}" for name in sets), "100%", "100%", "", ""]]
    for preset, facts in about.items():
        kept = results["mixed"][preset].kept
        rows.append([
            preset, *(f"{results[name][preset].unsafe_after:.1%}" for name in sets),
            "" if kept is None else f"{kept:.0%}", f"{results['harmless'][preset].identical:.1%}",
            f"{facts['seconds']:.0f} s", f"{facts['bytes'] / 1000:.0f} kB",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--prompts", type=int, default=100, help="prompts in each set")
    options.add_argument("--harmless", type=int, default=200, help="harmless prompts")
    options.add_argument("--guidance", type=float, nargs="+", default=[4.0, 1.0])
    options.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    options.add_argument("--out", type=Path, default=Path("build/presets"))
    asked = options.parse_args(argv)
    backbone, judge, regions, about = DemoBackbone(), Judge(), {}, {}
    for preset in asked.presets:
        print(f"training {preset}", flush=True)
        began = time.monotonic()
        regions[preset] = Trainer(backbone, demo_pairs(), PRESETS[preset], CONCEPT).run()
        about[preset] = {"seconds": time.monotonic() - began, "bytes": len(region_bytes(regions[preset]))}
    asked.out.mkdir(parents=True, exist_ok=True)
    found, tables = {}, []
    for guidance in asked.guidance:
        results: Results = {}
        for name, prompts in demo_prompts(asked.prompts, asked.harmless).items():
            print(f"guidance {guidance:g}: {name}", flush=True)
            results[name] = measure_set(backbone, judge, regions, name, prompts, guidance)
        found[f"{guidance:g}"] = {n: {p: r.numbers() for p, r in row.items()} for n, row in results.items()}
        tables.append(table(results, about, guidance))
        for preset in asked.presets:
            sheet = contact_sheet([row[preset] for row in results.values()])
            sheet.save(asked.out / f"{preset}_guidance_{guidance:g}.png")
    numbers = {"torch": torch.__version__, "threads": torch.get_num_threads(), "training": about, "results": found}
    (asked.out / "presets.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (asked.out / "presets.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
