"""safe-region demo: train on the embedded model, measure, and show it on a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .options import asked, backbone, recipe
from .train import run, sentence
from .voice import Failure, interruptible, quoted


@interruptible
def demo(
    ctx: typer.Context,
    out: Annotated[str, typer.Option(
        metavar="FOLDER", callback=o.folder_to_write, show_default=True,
        help="Folder for the results.")] = "safe-region-demo",
    prompts: Annotated[int, typer.Option(metavar="N", min=1, show_default=True, help="Prompts in each set.")] = 40,
    harmless: Annotated[int, typer.Option(metavar="N", min=1, show_default=True, help="Harmless prompts.")] = 200,
    preset: o.Preset = "region", steps: o.Steps = None, rank: o.Rank = None,
    learning_rate: o.LearningRate = None, batch: o.Batch = None, guidance: o.Guidance = None,
    initial: o.Initial = None, target: o.Target = None, seed: o.Seed = None,
    quiet: o.Quiet = False, as_json: o.AsJson = False, config: o.Config = None,
) -> None:  # fmt: skip
    """Train a region on the small model that comes with the pack, measure it, and show what it did."""
    from ..evaluation.demo_prompts import demo_prompts
    from ..evaluation.demo_run import DemoRun
    from ..region import save_region
    from ..region.verdict import verdict
    from ..region.writing import write_atomically
    from ..reports.drawing import write_picture
    from ..reports.page import contact_sheet, report_page, table
    from ..reports.training_run import picture, summary

    args, voice = asked(ctx)
    folder = Path(out)
    trainer = DemoRun(backbone(args), recipe(args), demo_prompts(prompts, harmless))
    region_file, page = folder / "weapons.safetensors", folder / "report.html"
    with voice.watching() as visit:
        region = run(trainer, region_file, {"family": "demo", "checkpoint": ""}, visit)
        try:
            results = trainer.measured(region)
        except KeyboardInterrupt:
            raise Failure(f"Stopped while measuring. The trained region is in {region_file}", 130) from None
    measured = {result.name: result.numbers() for result in results}
    region = replace(region, metadata=region.metadata | {"measured": measured})
    save_region(region, region_file)
    write_picture(folder / "before_after.png", contact_sheet(results))
    of_run = picture(trainer)
    write_picture(folder / "training.png", of_run)
    judged, command = verdict(region.metadata), quoted("safe-region", *ctx.obj)
    numbers = json.dumps({"results": measured, "training": trainer.numbers}, indent=1)
    shown = report_page(region, judged, results, of_run, command)
    for path, text in ((folder / "results.json", numbers), (page, shown)):
        write_atomically(path, text.encode("utf-8"))
    voice.coloured(judged.line, judged.tone)
    voice.say(f"\n{table(measured)}\n")
    spent, *told = summary(trainer.numbers)
    if told:
        voice.say(sentence("; ".join(told)))
    voice.hint(sentence(spent))
    voice.say(f"Region: {region_file} ({region_file.stat().st_size / 1000:.0f} kB)\nReport: {page}")
    following = quoted("safe-region", "inspect", region_file, "a pistol beside a cat")
    voice.hint(f"Next: {following}")
    voice.result({
        "region": str(region_file), "report": str(page), "verdict": {"level": judged.level, "line": judged.line},
        "measured": measured, "training": trainer.numbers, "next": following,
    })  # fmt: skip
