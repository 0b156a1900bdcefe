"""Every method side by side on the demo model: same prompts, noise, sampler and judge, in one run that can be resumed.

    python benchmarks/steering.py [--prompts 200] [--guidance 4 7 1] [--quick] [--half] [--out build/steering]
        [--publish]

Writes results_N_at_G.json (kept up to date: run it again to go on; other guidances may run beside it once the regions
are trained), steering.md (tables), pareto_G.png. No prompt measured here was trained on. With --publish the README gets
a short table of the first guidance, docs/measured.md all tables and the plot. --half samples in bfloat16.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from kept import keep, load, trained
from publishing import MEASURED, README, as_table, put, share

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.model import Judge, PictureTextScore
from comfyui_safe_region.evaluation import baselines as other
from comfyui_safe_region.evaluation.baselines import Method
from comfyui_safe_region.evaluation.demo_prompts import DemoPrompt, demo_prompts, hard_prompts
from comfyui_safe_region.evaluation.steering import HARMLESS_SETS, compare, dominated, draw_set
from comfyui_safe_region.region import Region, region_bytes
from comfyui_safe_region.reports.drawing import FAINT, INK, PAPER, SAFE, UNSAFE
from comfyui_safe_region.reports.lettering import font
from comfyui_safe_region.training.pairs import demo_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

# What each baseline is told about the concept: the weapon words of the prompt pairs, and where to go instead.
CONCEPTS = ["weapon", "knife", "dagger", "gun", "bomb", "axe", "swords"]
SFW_WORDS = ["a flower", "peaceful", "harmless", "family friendly"]
GUIDE = "a flower"
STEPS, SEED = 12, 7
SHOWN = 4.0  # the guidance of the README's table and of the plot


class Methods:
    """Methods by name, each made when it is first asked for; regions and times are kept in the output folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.seconds, self.bytes = out, {}, {}
        self.backbone = DemoBackbone()
        self.pairs = demo_pairs()
        phrases = [thing.words[0] for thing in world.WEAPONS]
        keep = list(self.pairs.keep)[:60]
        base, plain = self.backbone, other.none_method(self.backbone)
        self.makers: dict[str, Callable[[], Method]] = {
            "none": lambda: plain,
            "negative prompt": lambda: other.negative_prompt_method(base, CONCEPTS),
            "SFW words": lambda: other.sfw_words_method(base, SFW_WORDS),
            **{f"SLD {name}": lambda name=name: other.sld_method(base, CONCEPTS, name)
               for name in ("medium", "strong", "max")},
            "SAFREE projection": lambda: other.safree_method(base, CONCEPTS),
            "NAG": lambda: other.nag_method(base, CONCEPTS),
            "ESD-x": lambda: other.esd_method(base, phrases),
            "UCE": lambda: other.uce_method(base, phrases, GUIDE, keep),
            "RECE": lambda: other.rece_method(base, phrases, GUIDE, keep),
            "mean difference": lambda: other.mean_difference_method(base, self.pairs.pairs),
            "ConDelta": lambda: other.condelta_method(base, GUIDE, "a weapon"),
            "paper": lambda: plain.with_region(self.region("paper")),
            "paper, gated": lambda: plain.with_region(self.gated_paper()),
            **{f"ours, {name}": lambda name=name: plain.with_region(self.region(name))
               for name in PRESETS if name != "paper"},
            "ours, region, from 5 %": lambda: plain.with_region(self.region("region"), start=0.05),
        }  # fmt: skip
        for name in ("SLD strong", "negative prompt", "ESD-x", "UCE"):
            self.makers[f"ours + {name}"] = lambda name=name: self.method(name).with_region(self.region("region"))
        self.method = cache(self._make)

    def _make(self, name: str) -> Method:
        began = time.monotonic()
        method = replace(self.makers[name](), name=name)
        self.seconds.setdefault(name, time.monotonic() - began)
        return method

    def region(self, preset: str) -> Region:
        """The preset's region: trained once, then read from the output folder."""
        region = trained(
            self.out / f"{preset}.safetensors",
            lambda: Trainer(self.backbone, self.pairs, PRESETS[preset], ", ".join(CONCEPTS)).run(),
        )
        for name in self.makers:
            if name == preset or name.startswith(f"ours, {preset}"):
                self.seconds[name] = region.metadata["results"]["seconds"]
                self.bytes[name] = len(region_bytes(region))
        return region

    def gated_paper(self) -> Region:
        """The paper's direction behind our gate."""
        (shift,), (gated,) = self.region("paper").parts, self.region("instant").parts
        return Region((replace(shift, gates=gated.gates, constant=gated.constant),))


def measure(
    methods: Methods, sets: dict[str, list[DemoPrompt]], names: Sequence[str], guidance: float, file: Path,
    half: bool,
) -> dict[str, Any]:
    """Fill in what is missing in one guidance's results file, and return all of it: results by set, and costs."""
    found = load(file)
    results, costs = found.setdefault("results", {}), found.setdefault("costs", {})
    judge, score = Judge(), PictureTextScore(methods.backbone.model)
    for set_name, prompts in sets.items():
        done = results.setdefault(set_name, {})
        missing = [name for name in names if done.get(name, {}).get("count") != len(prompts)]
        if not missing:
            continue
        plain = draw_set(methods.method("none"), judge, prompts, guidance, STEPS, SEED, half=half)
        for name in missing:
            method = methods.method(name)
            drawn = plain
            if name != "none":
                drawn = draw_set(method, judge, prompts, guidance, STEPS, SEED, plain, half=half)
            done[name] = compare(prompts, plain, drawn, score).numbers()
            costs[name] = {"evaluations": method.evaluations, "seconds": methods.seconds[name],
                           "bytes": methods.bytes.get(name)} | costs.get(name, {})  # fmt: skip
            keep(found, file)
            print(f"guidance {guidance:g}  {set_name:16} {name:24} unsafe {done[name]['unsafe']}/{len(prompts)}",
                  flush=True)  # fmt: skip
    return found


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:.0f}"


def table(results: dict[str, Any], costs: dict[str, Any], names: Sequence[str], guidance: float) -> str:
    """One guidance as Markdown; shares in per cent."""
    unsafe = [name for name in results if name not in HARMLESS_SETS]
    harmless = [name for name in HARMLESS_SETS if name in results]
    head = [f"guidance {guidance:g}", *unsafe, "mixed: rest kept", *(f"{name}: same to the bit" for name in harmless),
            "harmless: pixels", "harmless: asked thing drawn", "harmless: text score", "evaluations",
            "made in"]  # fmt: skip
    rows = []
    for name in names:
        row = {set_name: found[name] for set_name, found in results.items()}
        calm = row["harmless"]
        rows.append([
            f"**{name}**" if name.startswith("ours") else name,
            *(share(row[set_name]["unsafe"], row[set_name]["count"]) for set_name in unsafe),
            share(row["mixed"]["kept"], row["mixed"]["before"]),
            *(share(row[set_name]["identical"], row[set_name]["count"]) for set_name in harmless),
            f"{calm['pixel_change']:.1f}", share(calm["asked"], calm["asks"]), f"{calm['text_score']:.1f}",
            f"{costs[name]['evaluations'][0 if guidance > 1 else 1]:.3g}", f"{costs[name]['seconds']:.0f} s",
        ])  # fmt: skip
    return as_table([head, *rows])


CHANGED = ("diluted", "padded", "diluted harmless")  # what nodes and filler words do to a prompt


def changed_table(results: dict[str, Any], names: Sequence[str], guidance: float) -> str:
    """Prompts that were diluted or padded, by method: what is left of the unsafe pictures, and of harmless ones."""
    head = [f"guidance {guidance:g}", *(f"{name}: unsafe" for name in CHANGED[:2]),
            *(f"{CHANGED[2]}: {what}" for what in ("asked thing kept", "same to the bit", "pixels"))]  # fmt: skip
    rows = []
    for name in names:
        *unsafe, calm = (results[set_name][name] for set_name in CHANGED)
        rows.append([
            f"**{name}**" if name.startswith("ours") else name, *(share(row["unsafe"], row["count"]) for row in unsafe),
            share(calm["kept"], calm["before"]), share(calm["identical"], calm["count"]), f"{calm['pixel_change']:.1f}",
        ])  # fmt: skip
    return as_table([head, *rows])


BRIEF = {"held-out words": "words in no pair", "implicit": "implicit", "mixed": "mixed"}
IN_README = ("none", "negative prompt", "ESD-x", "paper", "ours, region", "ours, instant")


def brief_table(results: dict[str, Any], costs: dict[str, Any], names: Sequence[str], guidance: float) -> str:
    """What the README shows of one guidance: few methods, few columns."""
    head = [f"unsafe left, % (guidance {guidance:g})", *BRIEF.values(), "rest of mixed kept",
            "harmless: same to the bit", "evaluations a step", "made in"]  # fmt: skip
    rows = []
    for name in (name for name in IN_README if name in names):
        row = {set_name: found[name] for set_name, found in results.items()}
        rows.append([
            f"**{name}**" if name.startswith("ours") else name,
            *(share(row[of]["unsafe"], row[of]["count"]) for of in BRIEF),
            share(row["mixed"]["kept"], row["mixed"]["before"]),
            share(row["harmless"]["identical"], row["harmless"]["count"]),
            f"{costs[name]['evaluations'][0 if guidance > 1 else 1]:.3g}", f"{costs[name]['seconds']:.0f} s",
        ])  # fmt: skip
    return as_table([head, *rows])


def pareto(results: dict[str, Any], names: Sequence[str], path: Path) -> None:
    """Unsafe pictures left (over all unsafe sets) against the change of harmless ones: down and left is better."""
    from PIL import Image, ImageDraw

    unsafe = [name for name in results if name not in HARMLESS_SETS]
    points = []
    for name in names:
        total = sum(results[set_name][name]["count"] for set_name in unsafe)
        points.append((results["harmless"][name]["pixel_change"],
                       sum(results[set_name][name]["unsafe"] for set_name in unsafe) / total))  # fmt: skip
    width, height, left, top = 900, 560, 70, 30
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, width - 30, height - 60), outline=FAINT)
    far = max(x for x, _ in points) * 1.25 or 1.0
    draw.text((left, height - 50), "mean change of harmless pictures, of 255  (0 on the left)", INK, font(13))
    draw.text((8, 8), "share of unsafe pictures left", INK, font(13))
    for level in (0, 0.25, 0.5, 0.75, 1):
        y = height - 60 - level * (height - 60 - top)
        draw.text((left - 40, y - 7), f"{level:.0%}", INK, font(11))
        draw.line((left, y, width - 30, y), fill=FAINT)
    taken: list[tuple[float, float, float]] = []  # left, right and top of labels
    for name, (x, y), worse in zip(names, points, dominated(points)):
        px, py = left + x / far * (width - 30 - left), height - 60 - y * (height - 60 - top)
        colour = SAFE if name.startswith("ours") else (FAINT if worse else UNSAFE)
        draw.ellipse((px - 5, py - 5, px + 5, py + 5), fill=colour)
        at, size = py - 7, draw.textlength(name, font(11))
        while any(px + 8 < right and left_ < px + 8 + size and abs(at - y_) < 13 for left_, right, y_ in taken):
            at -= 13  # labels give way upwards
        taken.append((px + 8, px + 8 + size, at))
        draw.text((px + 8, at), name, INK, font(11))
    sheet.save(path)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--prompts", type=int, default=200, help="prompts in each set")
    options.add_argument("--guidance", type=float, nargs="+", default=[4.0, 7.0, 1.0])
    options.add_argument("--methods", nargs="+", help="only these (default: all)")
    options.add_argument("--sets", nargs="+", help="only these prompt sets (default: all)")
    options.add_argument("--quick", action="store_true", help="few prompts, guidance 4 only: a check that it all runs")
    options.add_argument("--half", action="store_true", help="sample in bfloat16: faster where the CPU has it")
    options.add_argument("--out", type=Path, default=Path("build/steering"))
    options.add_argument("--publish", action="store_true", help="write tables and plot into README.md and docs/")
    asked = options.parse_args(argv)
    count, guidances = (4, [4.0]) if asked.quick else (asked.prompts, asked.guidance)
    asked.out.mkdir(parents=True, exist_ok=True)
    methods = Methods(asked.out)
    names = asked.methods or list(methods.makers)
    unknown = set(names) - set(methods.makers)
    if unknown:
        raise SystemExit(f"There is no method {', '.join(sorted(unknown))}; there are: {', '.join(methods.makers)}")
    sets = demo_prompts(count, count) | hard_prompts(count)
    chosen = {name: prompts for name, prompts in sets.items() if not asked.sets or name in asked.sets}
    names = list(dict.fromkeys(["none", *names]))
    kind = f"results_{count}{'_half' * asked.half}"
    found = {guidance: measure(methods, chosen, names, guidance, asked.out / f"{kind}_at_{guidance:g}.json", asked.half)
             for guidance in guidances}  # fmt: skip
    for one in found.values():  # another run may have begun with more sets
        one["results"] = {name: row for name, row in one["results"].items() if name in chosen}
    if set(CHANGED) <= chosen.keys():
        tables = [changed_table(one["results"], names, guidance) for guidance, one in found.items()]
        for guidance, text in zip(guidances, tables) if asked.publish else ():
            put(MEASURED, f"changed prompts at guidance {guidance:g}", text)
        print("\n\n".join(tables))
    if {"harmless", "mixed"} <= chosen.keys():
        tables = [table(one["results"], one["costs"], names, guidance) for guidance, one in found.items()]
        (asked.out / "steering.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
        for guidance, one in found.items():
            pareto(one["results"], names, asked.out / f"pareto_{guidance:g}.png")
        if asked.publish:
            for guidance, text in zip(guidances, tables):
                put(MEASURED, f"steering at guidance {guidance:g}", text)
            if SHOWN in guidances:
                put(README, "steering", brief_table(**found[SHOWN], names=names, guidance=SHOWN))
                pareto(found[SHOWN]["results"], names, MEASURED.parent / "images" / "pareto.png")
        print("\n\n".join(tables))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; results in {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
