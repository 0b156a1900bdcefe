"""safe-region train, train-balance"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from . import options as o
from .options import asked, backbone, is_region, is_there, learned_on, model_words, recipe
from .voice import Failure, Voice, interruptible, quoted

PACKS = Path(__file__).parent.parent / "training" / "packs"


def names_in(folder: str) -> Callable[[], list[str]]:
    """Of packs, for the shell: without loading anything."""
    return lambda: sorted(path.stem for path in (PACKS / folder).glob("*.txt"))


def run(trainer: Any, file: Path, about: dict[str, str], visit: Callable[[Any], None]) -> Any:
    """Train, and write the region; Ctrl-C writes what was learned so far and ends the command.

    `about`: metadata about the model.
    """
    from ..region import region_bytes, save_region
    from ..region.files import write_new

    try:
        trainer.run(visit)
    except KeyboardInterrupt:
        if trainer.region is None:
            raise Failure("Stopped before anything was learned; nothing was written.", 130) from None
        kept = write_new(file.parent, file.stem, region_bytes(_with(trainer.region, about)))  # beside a finished one
        raise Failure(f"Stopped. What was learned so far is in {kept}", 130) from None
    region = _with(trainer.region, about)
    save_region(region, file)
    return region


def _with(region: Any, about: dict[str, str]) -> Any:
    return replace(region, metadata=about | region.metadata)


def sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _dry_run(trainer: Any, voice: Voice) -> None:
    from ..training.estimate import run_seconds
    from ..training.plan import plan
    from ..training.progress import duration

    found, seconds = plan(trainer), run_seconds(trainer)
    voice.say("\n".join([*found.sentences(), f"time: {duration(seconds)} on this machine, by a few prompts and steps"]))
    voice.result(asdict(found) | {"seconds": round(seconds)})


def _train_into(trainer: Any, args: SimpleNamespace, voice: Voice, try_it: Callable[[Path], str]) -> None:
    """Train, write the region and its report, and say how it went; or only say what it would take."""
    from ..region.verdict import verdict
    from ..reports.drawing import write_picture
    from ..reports.training_run import picture, summary
    from ..training import processes

    if args.dry_run:
        _dry_run(trainer, voice)
        return
    out = Path(args.out)
    if processes.index() > 0:  # one of several speaks
        trainer.run()
        return
    with voice.watching() as visit:
        region = run(trainer, out, learned_on(args, trainer.backbone), visit)
    write_picture(out.with_suffix(".png"), picture(trainer))
    judged, command = verdict(region.metadata), try_it(out)
    voice.coloured(judged.line, judged.tone)
    spent, *found = summary(trainer.numbers)
    voice.say(sentence("; ".join(found)))
    voice.hint(sentence(spent))
    voice.say(f"Region: {out} ({out.stat().st_size / 1000:.0f} kB)\nReport: {out.with_suffix('.png')}")
    voice.hint(f"Next: {command}")
    voice.result({
        "region": str(out), "report": str(out.with_suffix(".png")), "bytes": out.stat().st_size,
        "verdict": {"level": judged.level, "line": judged.line}, "numbers": trainer.numbers, "next": command,
    })  # fmt: skip


def _needs_out(args: SimpleNamespace) -> None:
    if not args.out and not args.dry_run:
        raise Failure("Say where to write the region: --out FILE.safetensors")


def _pack(load: Callable[[str], Any], name: str) -> Any:
    from ..training.pairs import PairsError

    try:
        return load(name)
    except PairsError as error:
        raise Failure(f"--pack NAME: {error}") from None


OUT = "The region file to write."
Out = Annotated[str | None, typer.Option(metavar="FILE", callback=is_region, help=OUT, show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would take and how long, and train nothing.")]


@interruptible
def train(
    ctx: typer.Context,
    pack: Annotated[str | None, typer.Option(
        metavar="NAME", autocompletion=names_in(""), show_default=False,
        help="A built-in prompt pack: safe-region packs lists them.")] = None,
    pairs: Annotated[str | None, typer.Option(
        metavar="FILE", callback=is_there, show_default=False,
        help="A .txt, .csv or .jsonl file of prompt pairs, your own pack; adds to --pack.")] = None,
    out: Out = None,
    prompts: Annotated[int | None, typer.Option(
        metavar="N", min=1, show_default=False,
        help="Prompts to learn and calibrate from at most (default: 7000, up to 12000 for long lists): fewer take less "
             "time, and the gate errs more. A few hundred are read once more, for trajectories and pictures.")] = None,
    concept: Annotated[str | None, typer.Option(
        show_default=False, help="What the region is about, in a few words (default: the pack's title).")] = None,
    existing: Annotated[str | None, typer.Option(
        metavar="FILE", callback=is_there, show_default=False,
        help="A region to go on from, such as one whose training was stopped.")] = None,
    dry_run: DryRun = False,
    diffusers: o.Diffusers = None, checkpoint: o.Checkpoint = None, size: o.Size = 0,
    device: o.Device = None, dtype: o.Dtype = None,
    preset: o.Preset = "region", steps: o.Steps = None, rank: o.Rank = None,
    learning_rate: o.LearningRate = None, batch: o.Batch = None, guidance: o.Guidance = None,
    initial: o.Initial = None, target: o.Target = None, seed: o.Seed = None,
    quiet: o.Quiet = False, as_json: o.AsJson = False, config: o.Config = None,
) -> None:  # fmt: skip
    """Train a region from a pack or a file of prompt pairs, on the demo model or on yours."""
    from ..region import load_region
    from ..training.packs import load_pack
    from ..training.pairs import PromptPairs, load_pairs
    from ..training.trainer import Trainer

    args, voice = asked(ctx)
    args.most = prompts
    _needs_out(args)
    before = load_region(existing) if existing else None
    chosen = [_pack(load_pack, pack)] if pack else []
    chosen += [load_pairs(pairs)] if pairs else []
    if not chosen:
        raise Failure("Say what to learn from: --pack NAME (safe-region packs lists them), --pairs FILE, or both.")
    learned = sum(chosen, PromptPairs(()))
    title = concept or learned.title or Path(pairs).stem
    trainer = Trainer(backbone(args), learned, recipe(args), title, before)
    _train_into(trainer, args, voice, lambda file: quoted(
        "safe-region", "inspect", file, trainer.preview_prompts()[0], *model_words(args)))  # fmt: skip


@interruptible
def train_balance(
    ctx: typer.Context,
    pack: Annotated[str | None, typer.Option(
        metavar="NAME", autocompletion=names_in("attributes"), show_default=False,
        help="A built-in pack of an attribute: safe-region packs lists them.")] = None,
    pairs: Annotated[str | None, typer.Option(
        metavar="FILE", callback=is_there, show_default=False,
        help="A .txt file, your own pack: open prompt => group: prompt => group: prompt.")] = None,
    out: Out = None,
    dry_run: DryRun = False,
    diffusers: o.Diffusers = None, checkpoint: o.Checkpoint = None, size: o.Size = 0,
    device: o.Device = None, dtype: o.Dtype = None,
    preset: Annotated[Literal["region", "instant", "paper"], typer.Option(
        help="Which recipe (default: region).", show_default=False, rich_help_panel=o.RECIPE)] = "region",
    steps: o.Steps = None, rank: o.Rank = None, batch: o.Batch = None, seed: o.Seed = None,
    quiet: o.Quiet = False, as_json: o.AsJson = False, config: o.Config = None,
) -> None:  # fmt: skip
    """Learn the groups of an attribute, such as gender, from a pack or a file of rows."""
    from ..training.attribute_trainer import AttributeTrainer
    from ..training.attributes import load_attribute
    from ..training.packs import load_attribute_pack

    args, voice = asked(ctx)
    if bool(pack) == bool(pairs):
        raise Failure("Say what to learn from: either --pack NAME (safe-region packs lists them) or --pairs FILE.")
    _needs_out(args)
    rows = _pack(load_attribute_pack, pack) if pack else load_attribute(pairs)
    trainer = AttributeTrainer(backbone(args), rows, recipe(args))
    _train_into(trainer, args, voice, lambda file: quoted(
        "safe-region", "apply", file, trainer.preview_prompts()[0], *model_words(args)))  # fmt: skip
