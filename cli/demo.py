"""safe-region demo: train on the embedded model, measure, and show it on a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .options import asked, backbone, recipe
from .train import run, sentence
from .voice import Failure, interruptible, quoted

SAMPLING_STEPS = 12  # enough for the demo's pictures, and it should not take long
UNCHANGED = ("harmless",)  # sets whose pictures are drawn once where the region leaves them alone


def _demo_trainer(model: Any, chosen: Any, sets: dict[str, Any]) -> Any:
    """A trainer whose steps and time left count the measuring afterwards, too."""
    from ..training.pairs import demo_pairs
    from ..training.trainer import Trainer

    pictures = {name: (1 if name in UNCHANGED else 2) * len(prompts) for name, prompts in sets.items()}

    class DemoTrainer(Trainer):
        def count_steps(self) -> dict[str, int]:
            return super().count_steps() | {"measure": sum(pictures.values())}

        def work(self) -> Any:
            found, measuring = super().work(), 2 * SAMPLING_STEPS * sum(pictures.values())
            return replace(found, predictions=found.predictions | {"measure": measuring})

        def measured(self, region: Any) -> list[Any]:
            """Every set, drawn without and with the region."""
            from ..demo.model import Judge
            from ..evaluation.demo_measure import BATCH, measure_set

            judge, results = Judge(), []
            for name, prompts in sets.items():
                until = self._ledger.time.done["measure"] + pictures[name]

                def visit(name: str = name, until: int = until) -> None:
                    done = min(self._ledger.time.done["measure"] + BATCH, until)
                    self._ledger.reach("measure", done, message=name)

                found = measure_set(self.backbone, judge, {"": region}, name, prompts, steps=SAMPLING_STEPS,
                                    visit=visit)  # fmt: skip
                results.append(found[""])
            return results

    return DemoTrainer(model, demo_pairs(), chosen, "weapons")


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
    from ..region import save_region
    from ..region.verdict import verdict
    from ..region.writing import write_atomically
    from ..reports.drawing import write_picture
    from ..reports.page import contact_sheet, report_page, table
    from ..reports.training_run import picture, summary

    args, voice = asked(ctx)
    folder = Path(out)
    trainer = _demo_trainer(backbone(args), recipe(args), demo_prompts(prompts, harmless))
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
