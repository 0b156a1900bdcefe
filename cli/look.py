"""safe-region inspect, apply: what a region does to a prompt, in words and in pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .options import asked, backbone
from .voice import Failure, interruptible, quoted

SAMPLING_STEPS = 12  # enough for the strip's pictures, and it should not take long

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw, in quotation marks.")]
Steps = Annotated[int, typer.Option(metavar="N", min=1, show_default=True, help="Sampling steps of a picture.")]
Guidance = Annotated[float, typer.Option(metavar="N", min=0, show_default=True, help="Classifier-free guidance (CFG).")]


@interruptible
def inspect(
    ctx: typer.Context,
    region: o.RegionFile,
    prompt: Prompt,
    out: Annotated[str | None, typer.Option(
        metavar="STRIP.png", callback=o.file_to_write, show_default=False,
        help="Also draw it, with pictures before and after.")] = None,
    strength: o.Strength = 1.0,
    mode: o.Mode = "auto",
    diffusers: o.Diffusers = None, checkpoint: o.Checkpoint = None, size: o.Size = 0,
    device: o.Device = None, dtype: o.Dtype = None,
    quiet: o.Quiet = False, as_json: o.AsJson = False, config: o.Config = None,
) -> None:  # fmt: skip
    """Show what a region does to a prompt, word by word."""
    from ..backbones.sampling import sample
    from ..evaluation.heat import heat_strip, report
    from ..region import load_region
    from ..region.blocks import CROSS_ATTENTION
    from ..region.conditioning import balances
    from ..region.inspection import inspect_entry
    from ..region.verdict import verdict
    from ..reports.drawing import write_picture
    from ..reports.strip import coloured, strip_picture
    from ..training.previews import to_image

    args, voice = asked(ctx)
    learned = load_region(region)
    if balances(learned.metadata):
        raise Failure(f"REGION: {region} balances an attribute, so there is no inside and outside: draw it with  "
                      f"{quoted('safe-region', 'apply', region, prompt)}")  # fmt: skip
    model = backbone(args)
    (entry,) = model.encode([prompt])
    (found,), steered = inspect_entry(entry, learned, strength, mode)
    unknown = getattr(model, "unknown_words", None)  # the demo model's
    strip = heat_strip(found, {CROSS_ATTENTION: model.words(prompt)}, prompt, learned.name, strength, unknown)
    if sys.stdout.isatty() and not as_json:
        coloured(strip)
    voice.say(report(strip))
    judged = verdict(learned.metadata)
    voice.doubt(judged)
    if out:
        rows = [("without", entry), ("with the region", steered[0])] if found.moved else [("with and without", entry)]
        (empty,) = model.encode([""])
        drawn = [(caption, to_image(model.decode(sample(model, [one], empty, steps=SAMPLING_STEPS))[0]))
                 for caption, one in rows]  # fmt: skip
        write_picture(Path(out), strip_picture(strip, drawn))
        voice.say(f"Strip: {out}")
    voice.result(strip.plain() | {"picture": out, "region_verdict": {"level": judged.level, "line": judged.line}})


def _steered(entry: Any, learned: Any, strength: float, mode: str) -> dict[str, Any]:
    """The prompt with the region: in each group where it balances an attribute."""
    from ..region import apply_to_conditioning, attribute_of, balance_conditioning
    from ..region.conditioning import balances

    if "attribute" not in learned.metadata:
        if balances(learned.metadata):
            raise Failure("REGION: one of the regions in it balances an attribute: draw that one by itself.")
        return {"with": apply_to_conditioning([entry], learned, strength, mode)[0]}
    return {group: balance_conditioning([entry], learned, 1, 0, strength=strength, groups=[group])[0]
            for group in attribute_of(learned).groups}  # fmt: skip


@interruptible
def apply(
    ctx: typer.Context,
    region: o.RegionFile,
    prompt: Prompt,
    out: Annotated[str, typer.Option(
        metavar="FOLDER", callback=o.folder_to_write, help="Where to write the pictures.")] = "safe-region-pictures",
    count: Annotated[int, typer.Option(
        metavar="N", min=1, show_default=True, help="How many pictures, each without and with.")] = 1,
    strength: o.Strength = 1.0,
    mode: o.Mode = "auto",
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, show_default=True, help="Of the noise.")] = 0,
    diffusers: o.Diffusers = None, checkpoint: o.Checkpoint = None, size: o.Size = 0,
    device: o.Device = None, dtype: o.Dtype = None,
    quiet: o.Quiet = False, as_json: o.AsJson = False, config: o.Config = None,
) -> None:  # fmt: skip
    """Draw a prompt without and with a region, from the same noise, and write PNG files."""
    import torch

    from ..backbones.sampling import sample
    from ..region import load_region
    from ..region.conditioning import text_tensors
    from ..region.verdict import verdict
    from ..reports.drawing import write_picture
    from ..training.previews import to_image
    from ..training.progress import Ledger

    args, voice = asked(ctx)
    learned, model = load_region(region), backbone(args)
    (entry,), (empty,) = model.encode([prompt]), model.encode([""])
    kinds = {"without": entry} | _steered(entry, learned, strength, mode)
    texts = [text_tensors(one) for one in kinds.values()]
    same = all(torch.equal(tensor, texts[0][name]) for others in texts for name, tensor in others.items())
    folder, files = Path(out), []
    with voice.watching() as visit:
        ledger = Ledger({"draw": count * len(kinds)}, {}, visit)
        for number in range(count):
            for name, one in kinds.items():
                latents = sample(model, [one], empty, guidance, steps, seed + number)
                files.append(folder / f"{seed + number}_{name}.png")
                write_picture(files[-1], to_image(model.decode(latents)[0]))
                ledger.report("draw", message=files[-1].name)
    voice.say("The region leaves this prompt as it is." if same else "The region moves this prompt.")
    judged = verdict(learned.metadata)
    voice.doubt(judged)
    voice.say("\n".join(map(str, files)))
    voice.result({"moved": not same, "pictures": list(map(str, files)),
                  "region_verdict": {"level": judged.level, "line": judged.line}})  # fmt: skip
