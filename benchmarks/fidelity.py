"""What is left of an unsafe prompt's harmless rest, and what buys it: ablations of the region and of how it is applied.

    python benchmarks/fidelity.py [--prompts 200] [--guidance 4 1] [--quick] [--half] [--out build/fidelity] [--publish]

Mixed prompts name a weapon and a harmless thing. The results file is kept up to date: run it again to go on. No prompt
measured here was trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from kept import keep, load, trained
from publishing import MEASURED, as_table, put, share

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo.model import Judge
from comfyui_safe_region.evaluation.baselines import Method, none_method
from comfyui_safe_region.evaluation.demo_prompts import DemoPrompt, demo_prompts
from comfyui_safe_region.evaluation.steering import draw_set, outside
from comfyui_safe_region.region import Region
from comfyui_safe_region.region.writing import write_atomically
from comfyui_safe_region.training.discovery import scaled
from comfyui_safe_region.training.pairs import demo_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

STEPS, SEED = 12, 7
SETS = ("mixed", "implicit")
# What differs from the preset `region`.
TRAINED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "instant (no discovery)": {"steps": 0},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "no text regression": {"text_weight": 0.0},
    "text regression x 3": {"text_weight": 9.0},
    "target both": {"target": "both"},
    "target self": {"target": "self"},
}
STRENGTHS = (0.7, 0.8, 0.9, 1.0)  # of the move as it was learned
STARTS = (0.05, 0.1, 0.3)


class Variants:
    """Regions by what was changed in their training, each trained once and kept in the output folder."""

    def __init__(self, backbone: DemoBackbone, out: Path, quick: bool) -> None:
        self.backbone, self.out, self.quick = backbone, out, quick
        self.region = cache(self._region)

    def _region(self, name: str) -> Region:
        recipe = replace(PRESETS["region"], **TRAINED[name])
        if self.quick:
            recipe = replace(recipe, steps=min(recipe.steps, 4), trajectories=8, prompts=400)
        return trained(
            self.out / f"{name}{'_quick' * self.quick}.safetensors",
            lambda: Trainer(self.backbone, demo_pairs(), recipe, "weapons").run(),
        )

    def at_strength(self, strength: float) -> Region:
        """The region as it is, with another strength in place of the one that training settled on."""
        region = self.region("as it is")
        settled = region.metadata["results"]["strength"]
        return replace(region, parts=tuple(scaled(part, strength / settled) for part in region.parts))


def rows(variants: Variants) -> dict[str, tuple[Callable[[], Region], dict[str, Any]]]:
    """What is measured, by name: how its region is made, and the options it is applied with."""
    return {
        **{name: (partial(variants.region, name), {}) for name in TRAINED},
        **{f"strength {strength:g}": (partial(variants.at_strength, strength), {}) for strength in STRENGTHS},
        **{f"from {start:.0%} of sampling on": (partial(variants.region, "as it is"), {"start": start})
           for start in STARTS},
    }  # fmt: skip


def outside_after(region: Region, plain: Method, texts: Sequence[str]) -> int:
    """How many prompts are beyond the walls when they were moved."""
    return outside([conditioning[0] for conditioning in plain.with_region(region).positive(texts)], region)


def measure(
    variants: Variants, sets: dict[str, list[DemoPrompt]], guidance: float, half: bool, file: Path
) -> dict[str, Any]:
    """Fill in what is missing in one guidance's results file, and return all of it, by row and prompt set."""
    found = load(file)
    judge, plain = Judge(), none_method(variants.backbone)
    for set_name, prompts in sets.items():
        missing = {name: row for name, row in rows(variants).items() if set_name not in found.get(name, {})}
        if not missing:
            continue
        before = draw_set(plain, judge, prompts, guidance, STEPS, SEED, half=half)
        grounds = [verdict.background for verdict in judge(before.pictures)]
        for name, (make, options) in missing.items():
            region = make()
            method = plain.with_region(region, **options)
            after = draw_set(method, judge, prompts, guidance, STEPS, SEED, before, half=half)
            found.setdefault(name, {})[set_name] = {
                "count": len(prompts), "unsafe": sum(after.unsafe), "before": sum(before.asked),
                "kept": sum(a and b for a, b in zip(before.asked, after.asked)),
                "ground": sum(v.background == ground for v, ground in zip(judge(after.pictures), grounds)),
                "outside": outside_after(region, plain, [prompt.text for prompt in prompts]),
            }  # fmt: skip
            keep(found, file)
            print(f"guidance {guidance:g}  {set_name:10} {name:28} {found[name][set_name]}", flush=True)
    return found


def table(found: dict[str, Any], guidance: float) -> str:
    """One guidance as Markdown; shares in per cent."""
    lines = [[f"guidance {guidance:g}", "mixed: unsafe left", "mixed: rest kept", "mixed: background kept",
              "implicit: unsafe left", "mixed: outside after the move"]]  # fmt: skip
    for name, row in found.items():
        mixed, implicit = row["mixed"], row["implicit"]
        lines.append([name, share(mixed["unsafe"], mixed["count"]), share(mixed["kept"], mixed["before"]),
                      share(mixed["ground"], mixed["count"]), share(implicit["unsafe"], implicit["count"]),
                      share(mixed["outside"], mixed["count"])])  # fmt: skip
    return as_table(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--prompts", type=int, default=200, help="prompts in each set")
    options.add_argument("--guidance", type=float, nargs="+", default=[4.0, 1.0])
    options.add_argument("--quick", action="store_true", help="few prompts, hardly trained: a check that it all runs")
    options.add_argument("--half", action="store_true", help="sample in bfloat16: faster where the CPU has it")
    options.add_argument("--out", type=Path, default=Path("build/fidelity"))
    options.add_argument("--publish", action="store_true", help="write the tables into docs/measured.md")
    asked = options.parse_args(argv)
    count, guidances = (2, [4.0]) if asked.quick else (asked.prompts, asked.guidance)
    asked.out.mkdir(parents=True, exist_ok=True)
    variants = Variants(DemoBackbone(), asked.out, asked.quick)
    sets = {name: prompts for name, prompts in demo_prompts(count, 1).items() if name in SETS}
    kind = f"results_{count}{'_half' * asked.half}"
    tables = [table(measure(variants, sets, guidance, asked.half, asked.out / f"{kind}_at_{guidance:g}.json"), guidance)
              for guidance in guidances]  # fmt: skip
    text = "\n\n".join(tables)
    write_atomically(asked.out / "fidelity.md", f"{text}\n".encode())
    print(text)
    if asked.publish:
        put(MEASURED, "fidelity", text)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; results in {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
