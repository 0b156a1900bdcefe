"""The command `safe-region`: demo, train, train-balance, packs, inspect, info, import."""

from __future__ import annotations

import argparse
import html
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..region import Region, RegionError, import_paper, load_region, save_region
from ..region.files import write_atomically
from . import processes
from .packs import attribute_pack_names, load_attribute_pack, load_pack, pack_names, pack_title
from .pairs import PairsError, PromptPairs, demo_pairs, load_pairs
from .plan import plan
from .progress import Ledger
from .recipe import INITIAL, PRESETS, TARGETS, Recipe
from .terminal import watching

DEMO_SAMPLING_STEPS = 12  # enough for the demo's pictures, and it should not take long


class UsageError(ValueError):
    """Something the user can mend; its text is one sentence."""


def _train(trainer: Any, keep_at: Path) -> Region:
    """Train, watched. Ctrl-C keeps what was learned so far in `keep_at` and ends the command."""
    if processes.index() > 0:  # one of several speaks
        return trainer.run()
    try:
        with watching() as visit:
            return trainer.run(visit)
    except KeyboardInterrupt:
        if trainer.region is None:
            raise UsageError("Stopped before anything was learned; nothing was written.") from None
        save_region(trainer.region, keep_at)
        raise UsageError(f"Stopped. What was learned so far is in {keep_at}") from None


def _backbone(args: argparse.Namespace) -> Any:
    """The pipeline that `--diffusers` names, or the demo model."""
    if getattr(args, "diffusers", None):
        return _diffusers(args.diffusers, args.size)
    try:
        from ..backbones.demo import DemoBackbone

        return DemoBackbone()
    except ImportError as error:
        raise UsageError(f'The demo model needs {error.name}: run  python -m pip install ".[train]"') from None


def _diffusers(path: str, size: int) -> Any:
    try:
        from ..backbones.diffusers import DiffusersBackbone, load_pipeline

        return DiffusersBackbone(load_pipeline(path), size)
    except ImportError as error:
        missing = error.name or "more libraries"
        raise UsageError(f'--diffusers needs {missing}: run  python -m pip install ".[train,diffusers]"') from None


def _recipe(args: argparse.Namespace) -> Recipe:
    names = ("steps", "rank", "learning_rate", "seed", "initial", "target", "guidance")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if getattr(args, "encoded", None) is not None:
        chosen["prompts"] = args.encoded
    return replace(PRESETS[args.preset], **chosen)


def run_demo(args: argparse.Namespace) -> None:
    """Train a region on the embedded model, measure it, and show what it did."""
    from ..demo.model import Judge
    from ..evaluation.demo_measure import contact_sheet, measure_set
    from ..evaluation.demo_prompts import demo_prompts
    from .trainer import Trainer

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    backbone = _backbone(args)
    trainer = Trainer(backbone, demo_pairs(), _recipe(args), "weapons")
    region_file = out / "weapons.safetensors"
    region = _train(trainer, region_file)
    sets = demo_prompts(args.prompts, args.harmless)
    judge = Judge()
    results = []
    batches = sum(2 * -(-len(prompts) // 40) for prompts in sets.values())
    with watching() as visit:
        ledger = Ledger({"measure": batches}, {}, visit)
        for name, prompts in sets.items():
            found = measure_set(backbone, judge, {"": region}, name, prompts, steps=DEMO_SAMPLING_STEPS,
                                visit=lambda name=name: ledger.report("measure", message=name))  # fmt: skip
            results.append(found[""])
    measured = {result.name: result.numbers() for result in results}
    region = replace(region, metadata=region.metadata | {"measured": measured})
    save_region(region, region_file)
    contact_sheet(results).save(out / "before_after.png")
    trainer.picture().save(out / "training.png")
    _write(out / "results.json", json.dumps({"results": measured, "training": trainer.numbers}, indent=1))
    _write(out / "report.html", _report_page(region, measured))
    print(_table(measured))
    seconds = trainer.numbers["seconds"]
    print(f"\nTrained in {seconds:.0f} s. Region file: {region_file} ({region_file.stat().st_size / 1000:.0f} kB)")
    print(f"Before and after: {out / 'before_after.png'}\nReport: {out / 'report.html'}")


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8"))


def _cells(row: dict[str, Any]) -> list[str]:
    kept = "" if row["kept"] is None else f"{row['kept']:.0%}"
    return [row["name"], str(row["count"]), f"{row['unsafe_before']:.1%}", f"{row['unsafe_after']:.1%}", kept,
            f"{row['identical']:.1%}"]  # fmt: skip


HEADINGS = ["prompts", "count", "unsafe without", "unsafe with", "rest kept", "identical to the bit"]


def _table(measured: dict[str, dict[str, Any]]) -> str:
    rows = [HEADINGS, *(_cells(row) for row in measured.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _report_page(region: Region, measured: dict[str, dict[str, Any]]) -> str:
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in measured.values()
    )
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Safe region: {html.escape(region.name)}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1150px;margin:2rem auto;padding:0 1rem;color:#22262b}}
table{{border-collapse:collapse}}td,th{{padding:.3rem .9rem;border-bottom:1px solid #c9ced6;text-align:left}}
img{{max-width:100%}}</style>
<h1>Safe region: {html.escape(region.name)}</h1>
<p>The same prompts and the same noise, without and with the region. A judge that reads the
pictures counted weapons.</p>
<table><tr>{head}</tr>{body}</table>
<h2>Before and after</h2><img src="before_after.png" alt="Pairs of pictures, without and with the region">
<h2>Training</h2><img src="training.png" alt="Loss curve and depths of harmless and unsafe prompts">
</html>
"""


def _region_file(name: str) -> Path:
    out = Path(name)
    if out.suffix != ".safetensors":
        raise UsageError(f"The region is written as .safetensors: name it {out.name}.safetensors, for instance.")
    return out


def _train_into(trainer: Any, out: Path, dry_run: bool) -> None:
    """Train, write the region and its report, and say where they are; or only say what it would take."""
    if dry_run:
        print("\n".join(plan(trainer).sentences()))
        return
    region = _train(trainer, out)
    if processes.index() > 0:
        return
    save_region(region, out)
    trainer.picture().save(out.with_suffix(".png"))
    print(f"Region: {out} ({out.stat().st_size / 1000:.0f} kB)\nReport: {out.with_suffix('.png')}")


def run_train(args: argparse.Namespace) -> None:
    """Train a region from a pack or a file of prompt pairs, on the embedded demo model or a diffusers pipeline."""
    from .trainer import Trainer

    out = _region_file(args.out)
    existing = load_region(args.existing) if args.existing else None
    chosen = [load_pack(args.pack)] if args.pack else []
    chosen += [load_pairs(args.pairs)] if args.pairs else []
    if not chosen:
        raise UsageError("Say what to learn from: --pack NAME (safe-region packs lists them), --pairs FILE, or both.")
    pairs = sum(chosen, PromptPairs(()))
    concept = args.concept or pairs.title or Path(args.pairs).stem
    trainer = Trainer(_backbone(args), pairs, _recipe(args), concept, existing)
    _train_into(trainer, out, args.dry_run)


def run_train_balance(args: argparse.Namespace) -> None:
    """Learn the groups of an attribute from a pack, or from a file of rows such as demo/gender.txt."""
    from .attributes import AttributeTrainer, load_attribute

    out = _region_file(args.out)
    pairs = load_attribute_pack(args.pack) if args.pack else load_attribute(args.pairs)
    _train_into(AttributeTrainer(_backbone(args), pairs, _recipe(args)), out, args.dry_run)


def run_inspect(args: argparse.Namespace) -> None:
    """Show what a region does to a prompt of the demo model, word by word."""
    from ..backbones.sampling import sample
    from ..evaluation.heat import heat_strip, report
    from ..evaluation.strip import coloured, strip_picture
    from ..region.blocks import CROSS_ATTENTION
    from ..region.inspection import inspect_entry
    from .report import to_image

    region, backbone = load_region(args.region), _backbone(args)
    (entry,) = backbone.encode([args.prompt])
    (found,), steered = inspect_entry(entry, region, args.strength, args.mode)
    strip = heat_strip(found, {CROSS_ATTENTION: backbone.words(args.prompt)}, args.prompt, region.name, args.strength)
    if sys.stdout.isatty():
        coloured(strip)
    print(report(strip))
    if not args.out:
        return
    rows = [("without", entry), ("with the region", steered[0])] if found.moved else [("with and without", entry)]
    (empty,) = backbone.encode([""])
    drawn = [(caption, to_image(backbone.decode(sample(backbone, [one], empty, steps=DEMO_SAMPLING_STEPS))[0]))
             for caption, one in rows]  # fmt: skip
    strip_picture(strip, drawn).save(args.out, format="PNG")
    print(f"Strip: {args.out}")


def run_packs(args: argparse.Namespace) -> None:
    """List the built-in prompt packs."""
    for name in pack_names():
        pairs = load_pack(name)
        _say_pack(name, f"{len(pairs.pairs)} pairs, {len(pairs.keep)} prompts to keep, {len(pairs.held_out)} held out")
    print("\nFor train-balance:\n")
    for name in attribute_pack_names():
        rows = load_attribute_pack(name)
        kept = len(rows.stated) + len(rows.keep)
        _say_pack(name, f"{len(rows.rows)} rows, {kept} prompts to keep, {len(rows.held_out)} held out")


def _say_pack(name: str, counts: str) -> None:
    title, description = pack_title(name)
    print(f"{name:<26}{title}: {counts}\n{'':<26}{description}")


def run_info(args: argparse.Namespace) -> None:
    """Say what a region file holds."""
    region = load_region(args.region)
    print(f"{region.name}: {len(region.parts)} concept(s)")
    for part in region.parts:
        gate = "gated" if part.gates else "acts on every prompt"
        blocks = ", ".join(f"{block} {width}" for block, width in part.widths().items())
        print(f"  {part.label}: {gate}; blocks: {blocks}; id {part.id}")
    known = {name: value for name, value in region.metadata.items() if name != "preview"}  # a picture
    print(json.dumps(known, indent=2, ensure_ascii=True))


def run_import(args: argparse.Namespace) -> None:
    """Turn a .pth of the paper's release into a region file."""
    out = Path(args.out) if args.out else Path(args.file).with_suffix(".safetensors")
    if out.exists() and not args.overwrite:
        raise UsageError(f"{out} exists already: choose another --out, or add --overwrite.")
    save_region(import_paper(args.file, args.concept or ""), out)
    print(f"Region: {out} (mode always: it shifts every prompt)")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="region", help="which recipe (default: region)")
    parser.add_argument("--steps", type=int, help="training steps through the diffusion model")
    parser.add_argument("--rank", type=int, help="rank of the move")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--guidance", type=float, help="of the trajectories")
    parser.add_argument("--initial", choices=INITIAL, help="where the move starts")
    parser.add_argument("--target", choices=TARGETS, help="what a steered prompt should draw")
    parser.add_argument("--seed", type=int, help="the same seed gives the same region")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--diffusers", metavar="PATH",
                        help="folder of a Stable Diffusion 1.x, SDXL, SD3 or Flux pipeline (default: the demo model)")
    parser.add_argument("--size", type=int, default=0,
                        help="with --diffusers: pixels to learn at, wide and high (default: the model's, 512 at most)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and train nothing")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safe-region", description="Keep text-to-image generation inside a learned safe region."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    demo = add("demo", run_demo)
    demo.add_argument("--out", default="safe-region-demo", help="folder for the results (default: safe-region-demo)")
    demo.add_argument("--prompts", type=int, default=40, help="prompts in each set")
    demo.add_argument("--harmless", type=int, default=200, help="harmless prompts")
    _add_recipe(demo)
    train = add("train", run_train)
    train.add_argument("--pack", metavar="NAME", help="a built-in prompt pack: safe-region packs lists them")
    train.add_argument("--pairs", help="a .txt, .csv or .jsonl file of prompt pairs, your own pack; adds to --pack")
    train.add_argument("--out", required=True, help="the region file to write")
    train.add_argument("--prompts", dest="encoded", type=int,
                       help="prompts to encode at most (default: 7000): fewer take less time, and the gate errs more")
    train.add_argument("--concept", help="what the region is about, in a few words (default: the pack's title)")
    train.add_argument("--existing", help="a region to go on from")
    _add_model(train)
    _add_recipe(train)
    balance = add("train-balance", run_train_balance)
    rows = balance.add_mutually_exclusive_group(required=True)
    rows.add_argument("--pack", metavar="NAME", help="a built-in pack of an attribute: safe-region packs lists them")
    rows.add_argument("--pairs", help="a .txt file, your own pack: open prompt => group: prompt => group: prompt")
    balance.add_argument("--out", required=True, help="the region file to write")
    _add_model(balance)
    balance.add_argument("--preset", choices=("region", "instant", "paper"), default="region",
                         help="which recipe (default: region)")  # fmt: skip
    balance.add_argument("--steps", type=int, help="training steps for each group through the diffusion model")
    balance.add_argument("--rank", type=int, help="rank of the moves")
    balance.add_argument("--seed", type=int, help="the same seed gives the same region")
    add("packs", run_packs)
    inspect = add("inspect", run_inspect)
    inspect.add_argument("region", help="a region file, learned on the demo model")
    inspect.add_argument("prompt")
    inspect.add_argument("--out", metavar="STRIP.png", help="also draw it, with pictures before and after")
    inspect.add_argument("--strength", type=float, default=1.0)
    inspect.add_argument("--mode", choices=("auto", "gated", "always"), default="auto")
    add("info", run_info).add_argument("region", help="a region file")
    importing = add("import", run_import)
    importing.add_argument("file", help="the .pth file")
    importing.add_argument("--out", help="the region file to write (default: beside the .pth)")
    importing.add_argument("--concept", help="what it is about")
    importing.add_argument("--overwrite", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point. What the user can mend is one line on stderr and exit code 2, without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (UsageError, PairsError, RegionError, ValueError, OSError) as error:
        print(f"safe-region: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("safe-region: stopped; nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
