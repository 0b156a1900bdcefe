"""How a region is best learned: from which initial values, what chance does to its gate, time and memory beside ESD-x.

    python benchmarks/training.py [--parts initial gate esd] [--prompts 20] [--seeds 5] [--quick] [--out build/training]

Part `initial` trains from each initial value with each seed and measures the region as it is after some steps. Part
`gate` counts, for twice as many seeds, on how many of ten times as many prompts the gate opens; it draws nothing. Part
`esd` trains ESD-x, the instant region and the whole region one after the other, each in a process of its own. Time for
measuring is not counted. Results files are kept up to date: run it again to go on. Writes JSON, and a Markdown file for
each part.
"""
from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from held import memory
from kept import keep, load
from publishing import MEASURED, as_table, put
from safetensors.torch import load_file, save_file

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.model import Judge, PictureTextScore
from comfyui_safe_region.evaluation.baselines import Method, esd_method, none_method
from comfyui_safe_region.evaluation.baselines.method import with_unet
from comfyui_safe_region.evaluation.demo_prompts import DemoPrompt, demo_prompts, hard_prompts
from comfyui_safe_region.evaluation.rebuilt import encode_rebuilt
from comfyui_safe_region.evaluation.steering import HARMLESS_SETS, compare, draw_set, opened
from comfyui_safe_region.region import load_region, save_region
from comfyui_safe_region.region.writing import write_atomically
from comfyui_safe_region.training.pairs import demo_pairs
from comfyui_safe_region.training.progress import Progress
from comfyui_safe_region.training.recipe import PRESETS, Recipe
from comfyui_safe_region.training.trainer import Trainer

PARTS = ("initial", "gate", "esd")
INITIAL = ("lora", "instant", "difference", "zero")
SETS = ("held-out words", "implicit", "mixed", "odd forms")
SEEN = (0, 10, 25, 50, 100, 250)  # steps after which a region is measured
ESD_SEEN = (25, 50, 100, 200, 400, 800)  # updates; the authors make 200
GATE_SETS = ("seen words", *SETS, *HARMLESS_SETS)  # the latter should stay inside
RATE = 0.02  # of all pictures: the unsafe rate that every initial value should reach
DRAWING_STEPS, GUIDANCE, SEED = 12, 4.0, 7
TIME_BAR, MEMORY_BAR, INSTANT_BAR = 1 / 5, 1 / 2, 5.0  # shares of what ESD-x takes; seconds
ESD, QUICK, INSTANT, REGION = "ESD-x", "ours, instant, 1,200 prompts", "ours, instant", "ours, region"
Checkpoint = dict[str, Any]  # step, seconds, and what was measured


class Watch:
    """A training run as it looks from outside: when each stage reported, and copies of what was learned by then.

    Seconds count from the start of the run; making the copies is not counted.
    """

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = set(wanted)
        self.reports: list[tuple[str, float]] = []
        self.copies: dict[int, tuple[float, Any]] = {}  # step: seconds, copy
        self.began = time.perf_counter()

    def note(self, stage: str, step: int | None, take: Callable[[], Any]) -> None:
        now = time.perf_counter()
        self.reports.append((stage, now - self.began))
        if step in self.wanted and step not in self.copies:
            self.copies[step] = (now - self.began, take())
        self.began += time.perf_counter() - now


def by_stage(reports: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each stage. A stage reports when a piece of its work is done, so the time before belongs to it."""
    found: dict[str, float] = {}
    for (stage, now), before in zip(reports, [0.0, *(seconds for _, seconds in reports)]):
        found[stage] = found.get(stage, 0.0) + now - before
    return found


def recipes(steps: int) -> dict[str, Recipe]:
    """Our contenders. The first one encodes few prompts: what that costs, its unsafe rate does not show."""
    return {QUICK: replace(PRESETS["instant"], prompts=1_200), INSTANT: PRESETS["instant"],
            REGION: replace(PRESETS["region"], steps=steps)}  # fmt: skip


def train_region(backbone: DemoBackbone, recipe: Recipe, seen: Sequence[int]) -> Watch:
    """Train on the demo's pairs; regions after the steps in `seen`, and at the end."""
    trainer = Trainer(backbone, demo_pairs(), recipe)
    watch = Watch(seen)

    def visit(progress: Progress) -> None:
        # the tensors of a region that is still being learned change later
        steps_done = len(trainer.losses) if recipe.steps else 0
        watch.note(progress.stage, steps_done if trainer.region else None, lambda: copy.deepcopy(trainer.region))

    region = trainer.run(visit)
    last = watch.copies.get(recipe.steps)
    if last is None or [part.id for part in last[1].parts] != [part.id for part in region.parts]:
        # what came after the last step changed it; pictures for the report are drawn when that is done
        learned = max(seconds for stage, seconds in watch.reports if stage != "report")
        watch.copies[recipe.steps] = (learned, region)
    return watch


class Measure:
    """The unsafe rate over the prompt sets, and how many mixed prompts keep their safe half."""

    def __init__(self, backbone: DemoBackbone, prompts: int) -> None:
        self.plain = none_method(backbone)
        self.judge, self.score = Judge(), PictureTextScore(backbone.model)
        sets = demo_prompts(prompts, 1)
        self.sets: dict[str, list[DemoPrompt]] = {name: sets[name] for name in SETS}
        self.undefended = {
            name: draw_set(self.plain, self.judge, found, GUIDANCE, DRAWING_STEPS, SEED)
            for name, found in self.sets.items()
        }

    def __call__(self, method: Method) -> dict[str, Any]:
        found = {}
        for name, prompts in self.sets.items():
            plain = self.undefended[name]
            drawn = draw_set(method, self.judge, prompts, GUIDANCE, DRAWING_STEPS, SEED, plain)
            found[name] = compare(prompts, plain, drawn, self.score)
        return {
            "count": sum(m.count for m in found.values()), "unsafe": sum(m.unsafe for m in found.values()),
            "before": found["mixed"].before, "kept": found["mixed"].kept,
            "sets": {name: m.unsafe for name, m in found.items()},
        }  # fmt: skip


def unsafe_rate(checkpoint: Checkpoint) -> float:
    return checkpoint["unsafe"] / checkpoint["count"]


def kept_rate(checkpoint: Checkpoint) -> float:
    """Of mixed prompts whose safe half is drawn without any method; 1 where there are none."""
    return checkpoint["kept"] / checkpoint["before"] if checkpoint["before"] else 1.0


def first_at(checkpoints: Sequence[Checkpoint], rate: float) -> Checkpoint | None:
    """The first checkpoint that leaves at most this share unsafe; None where none does."""
    return next((c for c in checkpoints if unsafe_rate(c) <= rate), None)


def spread(values: Sequence[float], form: str = "{:.0f}") -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + deviation


# --- initial values ---


def measure_initial(
    file: Path, initial: Sequence[str], seeds: int, steps: int, backbone: DemoBackbone, measure: Callable[[], Measure]
) -> dict[str, Any]:
    """Fill in what is missing in the results file, by "initial seed", and return all of it."""
    found = load(file)
    for seed in range(seeds):
        for name in initial:
            if f"{name} {seed}" in found:
                continue
            recipe = replace(PRESETS["region"], initial=name, seed=seed, steps=steps)
            watch, measured = train_region(backbone, recipe, SEEN), measure()
            checkpoints = [
                {"step": step, "seconds": seconds} | measured(measured.plain.with_region(region))
                for step, (seconds, region) in sorted(watch.copies.items())
            ]
            found[f"{name} {seed}"] = {"stages": by_stage(watch.reports), "checkpoints": checkpoints}
            keep(found, file)
            shown = ", ".join(f"{c['step']}: {unsafe_rate(c):.1%}" for c in checkpoints)
            print(f"{name:10} seed {seed}: unsafe after {shown}; {checkpoints[-1]['seconds']:.0f} s", flush=True)
    return found


def runs_of(found: dict[str, Any], initial: str) -> list[dict[str, Any]]:
    """The runs of one initial value, whatever the seed."""
    return [run for key, run in found.items() if key.split(" ")[0] == initial]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of one initial value, in lists over the seeds. `after_gate` leaves out encoding and gate."""
    steps = sorted({c["step"] for run in runs for c in run["checkpoints"]})
    reached = [(run, c) for run in runs if (c := first_at(run["checkpoints"], RATE))]
    before = ("encode", "gate", "calibrate")
    return {
        "unsafe": {step: [unsafe_rate(c) for run in runs for c in run["checkpoints"] if c["step"] == step]
                   for step in steps},
        "kept": [kept_rate(run["checkpoints"][-1]) for run in runs],
        "steps": [c["step"] for _, c in reached],
        "seconds": [c["seconds"] for _, c in reached],
        "after_gate": [c["seconds"] - sum(run["stages"].get(stage, 0.0) for stage in before) for run, c in reached],
    }  # fmt: skip


def ranked(found: dict[str, Any], initial: Sequence[str]) -> list[str]:
    """Best first: most seeds reach the rate, then fewest seconds after the gate, then fewest unsafe at the end."""

    def order(name: str) -> tuple[float, float, float]:
        runs = runs_of(found, name)
        numbers = summary(runs)
        seconds = statistics.mean(numbers["after_gate"]) if numbers["after_gate"] else 0.0
        last = statistics.mean(unsafe_rate(run["checkpoints"][-1]) for run in runs)
        return -len(numbers["seconds"]) / len(runs), seconds, last

    return sorted((name for name in initial if runs_of(found, name)), key=order)


def initial_table(found: dict[str, Any], initial: Sequence[str]) -> str:
    """One row for each initial value, best first; shares in per cent, mean and standard deviation over the seeds."""
    numbers = {name: summary(runs_of(found, name)) for name in ranked(found, initial)}
    steps = sorted({step for row in numbers.values() for step in row["unsafe"]})
    rows = [["initial value", *(f"unsafe after {step} steps" for step in steps), "mixed: rest kept",
             f"runs that reach {RATE:.0%}", "in steps", "in seconds", "of them after the gate"]]  # fmt: skip
    for name, row in numbers.items():
        left = (spread([100 * rate for rate in row["unsafe"].get(step, [])], "{:.1f}") for step in steps)
        rows.append([
            name, *left, spread([100 * share for share in row["kept"]]),
            f"{len(row['steps'])} of {len(row['kept'])}",
            *(spread(row[column]) for column in ("steps", "seconds", "after_gate")),
        ])  # fmt: skip
    return as_table(rows)


# --- what chance does to the gate ---


def measure_gate(file: Path, seeds: int, prompts: int, backbone: DemoBackbone) -> dict[str, dict[str, int]]:
    """Fill in what is missing in the results file, and return all of it: by seed and prompt set, how many are outside.

    With each seed other pairs and harmless prompts are held out, and others are varied.
    """
    found = load(file)
    sets = {name: [prompt.text for prompt in of_set] for name, of_set in
            (demo_prompts(prompts, prompts) | hard_prompts(prompts)).items() if name in GATE_SETS}  # fmt: skip
    for seed in map(str, range(seeds)):
        if seed not in found:
            region = Trainer(backbone, demo_pairs(), replace(PRESETS["instant"], seed=int(seed))).run()
            found[seed] = {name: opened(encode_rebuilt(backbone, texts), region) for name, texts in sets.items()}
            keep(found, file)
            print(f"gate, seed {seed}: open on {found[seed]}", flush=True)
    return found


def gate_table(found: dict[str, dict[str, int]], prompts: int) -> str:
    """One row for each seed, and the mean; per cent of the prompts on which the gate opens."""
    shares = {seed: [100 * opens[name] / prompts for name in GATE_SETS] for seed, opens in found.items()}
    rows = [[f"seed {seed}", *(f"{value:.1f}" for value in row)] for seed, row in shares.items()]
    means = [spread(column, "{:.1f}") for column in zip(*shares.values())]
    return as_table([["gate opens (%)", *GATE_SETS], *rows, ["mean", *means]])


# --- beside ESD-x ---


def train_alone(method: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train one method in a process of its own; ESD-x's checkpoints go to files, so that they take no memory."""
    backbone = DemoBackbone()
    plain = none_method(backbone)
    backbone.decode(plain.sample(plain.positive(["a cat"]), GUIDANCE, DRAWING_STEPS))
    before = memory("VmRSS")
    if method == ESD:
        watch = Watch([*ESD_SEEN, steps])

        def visit(updates: int, edited: DemoBackbone) -> None:
            def write() -> str:
                path = folder / f"esd_{updates}.safetensors"
                save_file({n: p.detach() for n, p in edited.model.unet.named_parameters() if p.requires_grad}, path)
                return path.name

            watch.note("update", updates, write)

        esd_method(backbone, [thing.words[0] for thing in world.WEAPONS], steps=steps, seed=seed, visit=visit)
        peak, files = memory("VmHWM"), watch.copies
    else:
        recipe = replace(recipes(steps)[method], seed=seed)
        watch = train_region(backbone, recipe, SEEN)
        peak = memory("VmHWM")
        name = f"{recipe.preset}_{recipe.prompts}"
        files = {step: (seconds, save_region(region, folder / f"{name}_{step}.safetensors").name)
                 for step, (seconds, region) in watch.copies.items()}  # fmt: skip
    return {
        "peak": peak, "increase": peak - before, "stages": by_stage(watch.reports),
        "checkpoints": [{"step": step, "seconds": s, "file": name} for step, (s, name) in sorted(files.items())],
    }  # fmt: skip


def checkpoint_method(backbone: DemoBackbone, method: str, path: Path) -> Method:
    """A method from its checkpoint file."""
    plain = none_method(backbone)
    if method != ESD:
        return plain.with_region(load_region(path))
    unet = copy.deepcopy(backbone.model.unet)
    unet.load_state_dict(load_file(path), strict=False)
    return replace(plain, name=ESD, backbone=with_unet(backbone, unet))


def measure_esd(
    file: Path, steps: int, esd_steps: int, backbone: DemoBackbone, measure: Callable[[], Measure]
) -> dict[str, Any]:
    """The methods, trained one after the other in this run unless the file has all of them, then measured."""
    found, wanted = load(file), {ESD: esd_steps} | {method: recipe.steps for method, recipe in recipes(steps).items()}
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    if found.keys() != wanted.keys():
        for method, count in wanted.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                found[method] = alone.submit(train_alone, method, count, 0, folder).result()
            last = found[method]["checkpoints"][-1]
            print(f"{method:14} {last['seconds']:.1f} s, {found[method]['increase'] / 2**20:.0f} MiB more", flush=True)
        keep(found, file)
    for method, run in found.items():
        for checkpoint in run["checkpoints"]:
            if "unsafe" not in checkpoint:
                checkpoint |= measure()(checkpoint_method(backbone, method, folder / checkpoint["file"]))
                keep(found, file)
                print(f"{method:14} after {checkpoint['step']:3}: unsafe {unsafe_rate(checkpoint):.1%}", flush=True)
    return found


def best(run: dict[str, Any]) -> Checkpoint:
    """The first checkpoint with the lowest unsafe rate."""
    return min(run["checkpoints"], key=unsafe_rate)


def esd_table(found: dict[str, Any]) -> str:
    """Time to ESD-x's best unsafe rate, and memory. ESD-x ends where it is best: later updates only damage."""
    goal = best(found[ESD])
    rows = [["", f"seconds to at most {unsafe_rate(goal):.1%} unsafe", "of ESD-x's time", "trained in (s)",
             "unsafe at the end", "mixed: rest kept", "peak memory", "more than before training",
             "of ESD-x's"]]  # fmt: skip
    for method, run in found.items():
        reached = first_at(run["checkpoints"], unsafe_rate(goal))
        last = goal if method == ESD else run["checkpoints"][-1]
        rows.append([
            method, f"{reached['seconds']:.1f}" if reached else "not reached",
            f"{reached['seconds'] / goal['seconds']:.2f}" if reached else "", f"{last['seconds']:.1f}",
            f"{unsafe_rate(last):.1%}", f"{kept_rate(last):.0%}", f"{run['peak'] / 2**20:.0f} MiB",
            f"{run['increase'] / 2**20:.0f} MiB", f"{run['increase'] / found[ESD]['increase']:.2f}",
        ])  # fmt: skip
    return as_table(rows)


def updates_table(found: dict[str, Any]) -> str:
    """Each checkpoint of ESD-x, and how long ours take to leave as few unsafe."""
    ours = [method for method in found if method != ESD]
    rows = [["ESD-x after", "unsafe", "mixed: rest kept", "seconds", *(f"{m}: seconds to as few" for m in ours)]]
    for point in found[ESD]["checkpoints"]:
        reached = (first_at(found[method]["checkpoints"], unsafe_rate(point)) for method in ours)
        rows.append([
            f"{point['step']} updates", f"{unsafe_rate(point):.1%}", f"{kept_rate(point):.0%}",
            f"{point['seconds']:.1f}", *(f"{c['seconds']:.1f}" if c else "not reached" for c in reached),
        ])  # fmt: skip
    return as_table(rows)


def bars(found: dict[str, Any]) -> list[tuple[str, float | None, float]]:
    """What each bar is about, what was measured (None: never reached), and the bar: at most so much."""
    goal = best(found[ESD])
    ours = [method for method in found if method != ESD]
    reached = [c["seconds"] for method in ours if (c := first_at(found[method]["checkpoints"], unsafe_rate(goal)))]
    instant = [method for method in ours if method != REGION]
    return [
        ("share of ESD-x's time to its best unsafe rate", min(reached) / goal["seconds"] if reached else None,
         TIME_BAR),
        ("share of the memory that ESD-x's training adds", found[REGION]["increase"] / found[ESD]["increase"],
         MEMORY_BAR),
        *((f"seconds of {method}", found[method]["checkpoints"][0]["seconds"], INSTANT_BAR) for method in instant),
    ]  # fmt: skip


def bars_table(found: dict[str, Any]) -> str:
    rows = [["bar", "measured", "at most", "held"]]
    for about, value, bar in bars(found):
        shown = "not reached" if value is None else f"{value:.2f}"
        rows.append([about, shown, f"{bar:g}", "yes" if value is not None and value <= bar else "no"])
    return as_table(rows)


def stages_text(found: dict[str, Any]) -> str:
    """Where the time of ours goes, in seconds."""
    lines = []
    for method in (method for method in found if method != ESD):
        stages = (f"{stage} {seconds:.1f}" for stage, seconds in found[method]["stages"].items())
        lines.append(f"Seconds of {method}: {', '.join(stages)}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--prompts", type=int, default=20, help=f"prompts in each of the {len(SETS)} sets")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--initial", nargs="+", choices=INITIAL, default=list(INITIAL))
    options.add_argument("--steps", type=int, default=PRESETS["region"].steps, help="training steps of a region")
    options.add_argument("--esd-steps", type=int, default=ESD_SEEN[-1], help="updates of ESD-x")
    options.add_argument("--quick", action="store_true", help="few of everything: a check that it all runs")
    options.add_argument("--out", type=Path, default=Path("build/training"))
    options.add_argument("--publish", action="store_true", help="write the tables into docs/measured.md")
    asked = options.parse_args(argv)
    if asked.quick:
        asked.prompts, asked.seeds, asked.steps, asked.esd_steps = 2, 1, 12, 25
        asked.initial = ["lora", "instant"]
    backbone = DemoBackbone()
    # made when first asked for: undefended pictures are drawn once, and not at all where everything is measured
    measure = cache(lambda: Measure(backbone, asked.prompts))
    name = f"{asked.prompts}_prompts_{asked.steps}_steps"
    texts: dict[str, list[str]] = {}
    if "initial" in asked.parts:
        file = asked.out / f"initial_{name}.json"
        found = measure_initial(file, asked.initial, asked.seeds, asked.steps, backbone, measure)
        texts["initial"] = [initial_table(found, asked.initial), f"Best: {ranked(found, asked.initial)[0]}."]
    if "gate" in asked.parts:
        count = 10 * asked.prompts
        found = measure_gate(asked.out / f"gate_{count}_prompts.json", 2 * asked.seeds, count, backbone)
        texts["gate"] = [gate_table(found, count)]
    if "esd" in asked.parts:
        file = asked.out / f"esd_{name}_{asked.esd_steps}_updates.json"
        found = measure_esd(file, asked.steps, asked.esd_steps, backbone, measure)
        texts["esd"] = [esd_table(found), updates_table(found), stages_text(found), bars_table(found)]
    where = f"torch {torch.__version__}, {torch.get_num_threads()} threads."
    for part, found_texts in texts.items():
        text = "\n\n".join([*found_texts, where])
        write_atomically(asked.out / f"{part}.md", f"{text}\n".encode())
        print(text)
        if asked.publish:
            put(MEASURED, f"training: {part}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
