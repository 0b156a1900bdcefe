"""Prompt pairs: what a region is learned from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..training.packs import load_pack, pack_names
from ..training.pairs import PairsError, load_pairs, parse_pairs
from .common import PromptPairsType, schema, status
from .names import file_state, inside, shown

NO_FILE = "none"
PAIR_FILES = (".txt", ".csv", ".jsonl")
EXAMPLE = """\
# One pair a line: unsafe prompt => safe prompt. {a|b} writes several pairs at once, in step on both sides.
a {kitchen knife|dagger|pistol|revolver|bomb|axe|sword} => a {spoon|pencil|banana|umbrella|ball|broom|flower}
a photo of a {knife|gun|hand grenade} on a {red|blue|green} background => a photo of a {cup|book|apple} on a \
{red|blue|green} background
a {cat|dog|child} with a {knife|gun|bomb} => a {cat|dog|child} with a {flower|balloon|ball}
a weapon => a toy
# Harmless prompts that must stay as they are:
keep: a {cat|dog|tree|house} in the park
keep: a cook cutting bread on a wooden board
"""


def pair_files() -> list[str]:
    """Files in ComfyUI's input folder that may hold prompt pairs."""
    folder = Path(folder_paths.get_input_directory())
    found = [p.name for p in folder.iterdir() if p.suffix.lower() in PAIR_FILES] if folder.is_dir() else []
    return sorted(found, key=str.lower)


def pair_path(name: object) -> Path | None:
    """The file of that name in the input folder, or None. Over the API anything can stand where a name should."""
    path = inside(Path(folder_paths.get_input_directory()), str(name))
    return path if path is not None and path.suffix.lower() in PAIR_FILES and os.path.isfile(path) else None


def no_file(name: object, kinds: str = ".txt, .csv or .jsonl") -> str:
    """One sentence for a file that is not there."""
    return f'"{shown(name, 120)}" is no {kinds} file in ComfyUI\'s input folder.'


class SafeRegionPromptPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionPromptPairs",
            display_name="Safe Region Prompt Pairs",
            description="What a safe region is learned from: unsafe prompts, each with a safe counterpart, and "
            "harmless prompts to keep. Choose a built-in pack or write your own in the text box; a file adds to it.",
            search_aliases=[
                "safe region", "prompt pairs", "training data", "training prompts", "prompt pack", "word list",
                "block words", "forbidden words", "banned words", "blacklist", "blocklist", *pack_names(),
            ],
            inputs=[
                io.String.Input(
                    "text", multiline=True, default=EXAMPLE,
                    tooltip="One pair a line: unsafe prompt => safe prompt. Lines that begin with keep: are harmless "
                    "prompts, # begins a comment; braces hold alternatives with bars between them, in step on both "
                    "sides.",
                ),
                io.Combo.Input(
                    "file", options=[NO_FILE, *pair_files()], default=NO_FILE, optional=True,
                    tooltip="A .txt, .csv or .jsonl file in ComfyUI's input folder with more pairs (columns or keys: "
                    "unsafe, safe, keep): a pack of your own.",
                ),
                io.Combo.Input(
                    "pack", options=[NO_FILE, *pack_names()], default=NO_FILE, optional=True,
                    tooltip="A built-in pack of prompt pairs, read instead of the text box. A file that you choose "
                    "still adds to it.",
                ),
            ],
            outputs=[
                PromptPairsType.Output(display_name="pairs", tooltip="The prompt pairs, for Train Safe Region."),
                io.String.Output(display_name="expansion", tooltip="All pairs with their alternatives written out."),
            ],
            has_intermediate_output=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str | None = NO_FILE) -> bool | str:
        return True if file in (None, NO_FILE) or pair_path(file) else no_file(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = NO_FILE, **others: Any) -> str:
        return file_state(pair_path(file or NO_FILE))

    @classmethod
    def execute(cls, text: str, file: str = NO_FILE, pack: str = NO_FILE) -> io.NodeOutput:
        pairs = parse_pairs(text) if pack == NO_FILE else load_pack(pack)
        if file not in (None, NO_FILE):
            path = pair_path(file)
            if path is None:
                raise PairsError(no_file(file))
            pairs = pairs + load_pairs(path)
        if not pairs.pairs:
            raise PairsError("There is no prompt pair: write one a line, unsafe prompt => safe prompt.")
        title = f"{pairs.title}: " if pairs.title else ""
        summary = f"{title}{len(pairs.pairs)} pairs, {len(pairs.keep)} prompts to keep"
        return io.NodeOutput(pairs, pairs.text(), ui=status([(summary, "neutral")]))
