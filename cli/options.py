"""The options that several commands share, and what they are turned into."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from ..training.recipe import INITIAL, PRESETS, TARGETS, Recipe
from .voice import Failure, Voice

RECIPE, MODEL, SAYING = "Recipe", "Model", "Output"  # panels of the help


def is_there(param: typer.CallbackParam, value: Any) -> Any:
    """A file that must be there, refused before anything is loaded."""
    if value and not Path(value).is_file():
        raise Failure(f"{_name(param)}: there is no file {value}")
    return value


def folder_is_there(param: typer.CallbackParam, value: Any) -> Any:
    if value and not Path(value).is_dir():
        raise Failure(f"{_name(param)}: there is no folder {value}")
    return value


def _can_be_made(param: typer.CallbackParam, folder: Path) -> None:
    there = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    if not there.is_dir():
        raise Failure(f"{_name(param)}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise Failure(f"{_name(param)}: {there} cannot be written to")


def file_to_write(param: typer.CallbackParam, value: Any) -> Any:
    """Refused before anything is computed where it cannot be written; its folder need not be there."""
    if value and Path(value).is_dir():
        raise Failure(f"{_name(param)}: {value} is a folder: name a file in it")
    if value:
        _can_be_made(param, Path(value).absolute().parent)
    return value


def folder_to_write(param: typer.CallbackParam, value: Any) -> Any:
    """Refused where it cannot be made, or written to."""
    _can_be_made(param, Path(value).absolute())
    return value


def is_region(param: typer.CallbackParam, value: Any) -> Any:
    """A name for a region file that is to be written."""
    if value and Path(value).suffix != ".safetensors":
        raise Failure(f"{_name(param)}: a region is written as .safetensors: name it {Path(value).stem}.safetensors, "
                      "for instance.")  # fmt: skip
    if value:
        from ..region.files import check_replaceable

        try:  # when it is written, too, but that may be an hour of training later
            check_replaceable(Path(value))
        except ValueError as error:
            raise Failure(f"{_name(param)}: {error}") from None
    return file_to_write(param, value)


def _name(param: typer.CallbackParam) -> str:
    return f"{param.opts[0]} {param.metavar}" if param.opts[0].startswith("-") else str(param.metavar)


def configured(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Take a command's options from a file; those that are typed go first."""
    if not value:
        return value
    try:
        text = Path(is_there(param, value)).read_text(encoding="utf-8-sig")
        if Path(value).suffix == ".toml":
            import tomllib  # Python 3.11

            found = tomllib.loads(text)
        else:
            found = json.loads(text)
    except UnicodeDecodeError:
        raise Failure(f"--config FILE: {value} is no UTF-8 text: save it as UTF-8.") from None
    except ValueError as error:
        raise Failure(f"--config FILE: {value} cannot be read ({error}).") from None
    except ModuleNotFoundError:
        raise Failure("--config FILE: TOML needs Python 3.11; write it as JSON.") from None
    known = {param.name for param in ctx.command.params} - {"config", "help"}
    named = {str(name).replace("-", "_"): one for name, one in found.items()} if isinstance(found, dict) else {"": 0}
    named = {{"json": "as_json"}.get(name, name): one for name, one in named.items()}
    if unknown := sorted(named.keys() - known):
        names = ", ".join(sorted(known)).replace("as_json", "json")
        raise Failure(f'--config FILE: {value} has "{unknown[0][:60]}", which is no option of this command; they are: '
                      f"{names}.")  # fmt: skip
    ctx.default_map = named
    return value


def _option(text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Quiet = Annotated[bool, _option("No progress and no hints, the result only.", "--quiet", "-q", panel=SAYING)]
AsJson = Annotated[bool, _option("The result as JSON, and nothing else on standard output.", "--json", panel=SAYING)]
Config = Annotated[str | None, _option(
    "Take options from this .json or .toml file; its keys are the names of the options.", metavar="FILE",
    callback=configured, is_eager=True, panel=SAYING,
)]  # fmt: skip

Steps = Annotated[int | None, _option("Training steps through the diffusion model.", min=0, metavar="N", panel=RECIPE)]
Rank = Annotated[int | None, _option("Rank of the move.", min=1, metavar="N", panel=RECIPE)]
LearningRate = Annotated[float | None, _option("How far a step goes.", min=0, metavar="N", panel=RECIPE)]
Guidance = Annotated[float | None, _option("Of the trajectories.", min=0, metavar="N", panel=RECIPE)]
Initial = Annotated[Literal[INITIAL] | None, _option("Where the move starts.", panel=RECIPE)]
Target = Annotated[Literal[TARGETS] | None, _option("What a steered prompt should draw.", panel=RECIPE)]
Seed = Annotated[int | None, _option("The same seed gives the same region.", min=0, metavar="N", panel=RECIPE)]
Batch = Annotated[int | None, _option(
    "Noisy latents in one training step (default: 8).", min=1, metavar="N", panel=RECIPE)]  # fmt: skip
Preset = Annotated[Literal[tuple(PRESETS)], _option("Which recipe (default: region).", panel=RECIPE)]

Diffusers = Annotated[str | None, _option(
    "Folder of a Stable Diffusion 1.x, SDXL, SD3 or Flux pipeline (default: the demo model).", metavar="PATH",
    callback=folder_is_there, panel=MODEL,
)]  # fmt: skip
Checkpoint = Annotated[str | None, _option(
    "A single-file checkpoint. With --diffusers PATH, configuration and tokenizer come from there; without it, from "
    "what diffusers has downloaded before.", metavar="FILE", callback=is_there, panel=MODEL,
)]  # fmt: skip
Size = Annotated[int, _option(
    "Pixels, wide and high (default: the model's own, 512 at most).", min=0, metavar="N", panel=MODEL)]  # fmt: skip
Device = Annotated[str | None, _option(
    "cpu, cuda, cuda:1, mps (default: the GPU if there is one).", metavar="NAME", panel=MODEL)]  # fmt: skip
Dtype = Annotated[Literal["float32", "bfloat16", "float16"] | None, _option(
    "Of the diffusion model (default: bfloat16 on a GPU, float32 else).", panel=MODEL)]  # fmt: skip

RegionFile = Annotated[str, typer.Argument(metavar="REGION", callback=is_there, help="A region file.")]
Strength = Annotated[float, _option("How far to move (default: 1).")]
Mode = Annotated[Literal["auto", "gated", "always"], _option("auto: gated where the region has a gate (default).")]


def asked(ctx: typer.Context) -> tuple[SimpleNamespace, Voice]:
    """The command's options by name, and how it speaks."""
    return SimpleNamespace(**ctx.params), Voice(ctx.params["quiet"], ctx.params["as_json"])


def recipe(args: SimpleNamespace) -> Recipe:
    """The preset, with what was chosen besides."""
    fields = {"steps": "steps", "rank": "rank", "learning_rate": "learning_rate", "seed": "seed", "initial": "initial",
              "target": "target", "guidance": "guidance", "batch": "batch_size", "most": "prompts"}  # fmt: skip
    chosen = {field: getattr(args, name) for name, field in fields.items() if getattr(args, name, None) is not None}
    return replace(PRESETS[args.preset], **chosen)


def _hush() -> None:
    """No bars of what the libraries load."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def backbone(args: SimpleNamespace) -> Any:
    """The pipeline or checkpoint that was named, or the demo model."""
    path, file = (getattr(args, name, None) for name in ("diffusers", "checkpoint"))
    if path or file:
        try:
            from ..backbones.diffusers import DiffusersBackbone, load_pipeline

            if args.quiet:
                _hush()
            return DiffusersBackbone(load_pipeline(path, file, args.device, args.dtype), args.size)
        except ImportError as error:
            option, missing = "--diffusers" if path else "--checkpoint", error.name or "more libraries"
            raise Failure(f'{option} needs {missing}: run  python -m pip install ".[train,diffusers]"', 1) from None
        except ValueError as error:
            raise Failure(f"{'--checkpoint FILE' if file else '--diffusers PATH'}: {error}") from None
        except (RuntimeError, AssertionError) as error:  # a device that is not there
            raise Failure(f"--device NAME: {str(error).splitlines()[0]}", 1) from None
    for name in ("size", "device", "dtype"):
        if getattr(args, name, None):
            raise Failure(f"--{name} is for --diffusers or --checkpoint; the demo model has its own.")
    try:
        from ..backbones.demo import DemoBackbone

        return DemoBackbone()
    except ImportError as error:
        raise Failure(f'The demo model needs {error.name}: run  python -m pip install ".[train]"', 1) from None


def learned_on(args: SimpleNamespace, model: Any) -> dict[str, str]:
    """What a region says about the model: its family, and the name of the folder or file that was given."""
    file = args.checkpoint or args.diffusers
    if not file:
        return {"family": "demo", "checkpoint": ""}
    return {"family": model.family.name, "checkpoint": Path(os.path.abspath(file)).name}


def model_words(args: SimpleNamespace) -> list[str]:
    """The options that name the same model in another command."""
    names = ("diffusers", "checkpoint", "size", "device", "dtype")
    return [word for name in names if getattr(args, name, None) for word in (f"--{name}", str(getattr(args, name)))]
