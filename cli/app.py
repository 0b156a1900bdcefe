"""All commands, and the help that comes first."""

from __future__ import annotations

from typing import Annotated

import typer

from .demo import demo
from .files import combine, import_, info
from .look import apply, inspect
from .packs import packs
from .train import train, train_balance

FIRST, MORE = "Start here", "More commands"
EPILOG = (
    "Exit codes: 0 done; 1 it could not be done (something is not installed, memory or disk are full); 2 the command, "
    "or a file that it names, is wrong; 130 interrupted."
)

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"safe-region {version('safe-region')}")
        raise typer.Exit


@app.callback()
def safe_region(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Say which version this is.")] = False,
) -> None:  # fmt: skip
    """Keep text-to-image generation inside a learned safe region."""


for run, name, panel, example in (
    (demo, "demo", FIRST, "safe-region demo"),
    (train, "train", FIRST, "safe-region train --pack weapons --out weapons.safetensors --diffusers path/to/pipeline"),
    (inspect, "inspect", FIRST, 'safe-region inspect weapons.safetensors "a pistol" --out strip.png'),
    (apply, "apply", MORE, 'safe-region apply weapons.safetensors "a pistol"'),
    (info, "info", MORE, "safe-region info weapons.safetensors"),
    (packs, "packs", MORE, "safe-region packs"),
    (combine, "combine", MORE, "safe-region combine weapons.safetensors hate.safetensors --out both.safetensors"),
    (train_balance, "train-balance", MORE, "safe-region train-balance --pack gender --out gender.safetensors"),
    (import_, "import", MORE, "safe-region import nudity.pth"),
):
    said = run.__doc__ or ""
    shown = f"{said}\n[cyan]{example}[/]" if panel == FIRST else said
    app.command(name, help=said, short_help=shown, epilog=f"Example:  {example}", rich_help_panel=panel,
                no_args_is_help=name not in ("demo", "packs"))(run)  # fmt: skip
