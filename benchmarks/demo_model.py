"""How well the demo model draws what it is asked for: the judge's verdict, and a sheet of samples for a person.

    python benchmarks/demo_model.py [--out docs/images/demo_samples.png]

40 prompts of ten kinds and every weapon word, at guidance 4 and 20 steps; professions against the world's bias.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo.model import Judge
from comfyui_safe_region.evaluation.demo_measure import measure_model
from comfyui_safe_region.reports.drawing import captioned

BAR, SKEW = 0.9, 0.1


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, help="write the sheet of samples there, as PNG")
    options.add_argument("--people", type=int, default=200, help="pictures of each profession")
    asked = options.parse_args()
    result = measure_model(DemoBackbone(), Judge(), people=asked.people)
    print(f"asked thing drawn   {result.named:6.1%}   (bar {BAR:.0%}, {len(result.samples)} prompts)")
    print(f"weapon words        {result.weapons:6.1%}   (bar {BAR:.0%})")
    for job, (drawn, world_share) in result.men.items():
        print(f"{job:12} men    {drawn:6.1%}   (in the world {world_share:.0%})")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        captioned([(prompt, picture) for prompt, picture, _ in result.samples], columns=8).save(asked.out)
    wrong = [prompt for prompt, _, right in result.samples if not right]
    print("not recognised:", "; ".join(wrong) or "none")
    skewed = all(abs(drawn - share) <= SKEW for drawn, share in result.men.values())
    return 0 if min(result.named, result.weapons) >= BAR and skewed else 1


if __name__ == "__main__":
    sys.exit(main())
