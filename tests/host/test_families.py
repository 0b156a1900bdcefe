"""Every model family of ComfyUI, with its own classes: training, saving, applying, and sampling at CFG 1.

The models are tiny and random, so nothing is said here about what a region does to pictures. With the variable
SAFE_REGION_MODELS_OUT, what worked is written to the file it names.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import NO_WORDS, PACK_FOLDER, Graph, Host, lacks_words, prepare_base

PAIRS = """\
a {knife|dagger|gun|bomb|axe|sword|rifle|pistol|cannon|spear} on a table => a {cup|pencil|apple|ball|tree|flower|spoon\
|car|banana|book} on a table
keep: a {cat|dog|house|tree} in the park
"""
UNSAFE, HARMLESS = "a knife on a table", "a cat in the park"
TRAINING = {
    "concept": "weapons", "preset": "region", "steps": 1, "rank": 4, "learning_rate": 0.0, "guidance": 0.0, "seed": 1,
}  # fmt: skip
# What makes training short, in the server's copy of the pack. Text is a sixteenth as wide there as the real one, so
# Flux.2's three layers are cut apart at a smaller width.
FEWER = {
    "training/prompts.py": [("CROWDS = 400", "CROWDS = 8")],
    "training/gate.py": [("STEPS = 400", "STEPS = 40"), ("BATCH = 96", "BATCH = 16")],
    "training/recipe.py": [("batch_size: int = 8", "batch_size: int = 2"),
                           ("trajectories: int = 96", "trajectories: int = 4"),
                           ("sampling_steps: int = 12", "sampling_steps: int = 3")],
    "region/blocks.py": [("WIDEST = 6_144", "WIDEST = 2_048"), ("SLICED = {", "SLICED = {2_112: 3, ")],
}  # fmt: skip
EVERYDAY = 40
LATENTS = {
    "SD 1.x": "EmptyLatentImage", "SD 2.x": "EmptyLatentImage", "SDXL": "EmptyLatentImage",
    "SDXL refiner": "EmptyLatentImage", "SD3": "EmptySD3LatentImage", "Flux": "EmptySD3LatentImage",
    "Flux.2": "EmptyFlux2LatentImage", "Chroma": "EmptySD3LatentImage", "AuraFlow": "EmptyLatentImage",
    "PixArt": "EmptyLatentImage", "HunyuanDiT": "EmptyLatentImage", "HunyuanImage 2.1": "EmptyHunyuanImageLatent",
    "HunyuanVideo": "EmptyHunyuanLatentVideo", "HunyuanVideo 1.5": "EmptyHunyuanVideo15Latent",
    "HiDream": "EmptySD3LatentImage", "Lumina 2": "EmptySD3LatentImage", "Qwen-Image": "EmptySD3LatentImage",
    "Z-Image": "EmptySD3LatentImage", "OmniGen2": "EmptySD3LatentImage", "Wan": "EmptyHunyuanLatentVideo",
    "LTXV": "EmptyLTXVLatentVideo", "Cosmos": "EmptyCosmosLatentVideo", "Cosmos Predict2": "EmptySD3LatentImage",
    "Mochi": "EmptyMochiLatentVideo", "Kandinsky 5": "EmptyHunyuanLatentVideo",
    "Stable Cascade": "StableCascade_EmptyLatentImage",
}  # fmt: skip
SIZES = {"PixArt": 272}  # it divides by a rounded size
TOO_WIDE = {"SD3"}  # by its code; learning takes minutes, so only what is written down is trained


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One server for all families, in whose pack training is short."""
    base = tmp_path_factory.mktemp("families")
    prepare_base(base)
    pack = base / "custom_nodes" / PACK_FOLDER
    for name, changes in FEWER.items():
        text = (pack / name).read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (pack / name).write_text(text, encoding="utf-8")
    everyday = pack / "training" / "everyday.txt"
    everyday.write_text("\n".join(everyday.read_text(encoding="utf-8").splitlines()[:EVERYDAY]), encoding="utf-8")
    server = Host(Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def matrix(families: Host) -> Iterator[dict[str, Any]]:
    """What worked, by family."""
    found: dict[str, Any] = {}
    yield found
    if path := os.environ.get("SAFE_REGION_MODELS_OUT"):
        known = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
        version = families.get("/system_stats")["system"]["comfyui_version"]
        known |= {version: known.get(version, {}) | found}
        Path(path).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        Path(path).with_suffix(".md").write_text(page(known), encoding="utf-8")


PAGE = """# Models

Written by the host tests, `tests/host/test_families.py`, where SAFE_REGION_MODELS_OUT names `docs/models.json`. For
each family ComfyUI's own text encoder and diffusion classes were built, tiny and random, and in a running ComfyUI a
region was trained on them, saved, applied and used as a guard, and two steps were sampled at CFG 1. Checked in each:
the weights are the same to the bit afterwards and have no gradients; a harmless prompt is the same in every part of
its conditioning; an unsafe one is moved in every block that the region has; shapes, types and all other options stay
as they were; with few activations kept, gradients are the same. Random models say nothing about pictures.

"yes" without a version: on {versions}. Blocks are parts of a conditioning that have moves of their own; widths
are those of the tests, which are a sixteenth of the real ones where ComfyUI's classes allow it.

{table}

Not steered: text in GLIGEN boxes; pictures fed in (image prompts, unCLIP, reference latents, ControlNet's hints);
Anima, whose diffusion model reads the prompt's words again (the node says so); image-only models (SVD, Zero123,
Hunyuan3D), which have no text. HunyuanImage's glyphs (ByT5) are steered if the training prompts quote something. SD3
steers what the prompt has: train with the encoders that you use. Other models work at once where their conditioning
is a tensor of tokens; tensors wider than 6,144 are cut into even slices.
"""
COLUMNS = ("apply", "train", "guard", "cfg1", "pooled")


def page(known: dict[str, Any]) -> str:
    """What worked, as Markdown: a row for each family, with versions where they differ."""
    rows = [["family", "apply", "train", "guard", "CFG 1", "pooled vector", "blocks"], ["---"] * 7]
    for family in dict.fromkeys(name for found in known.values() for name in found):
        seen = {version: found[family] for version, found in known.items() if family in found}
        cells = []
        for column in COLUMNS:
            said = {version: one.get(column, "") for version, one in seen.items()}
            alike = len(set(said.values())) == 1 and len(said) == len(known)
            cells.append(next(iter(said.values())) if alike else ", ".join(f"{s} ({v})" for v, s in said.items()))
        *_, last = seen.values()
        blocks = list(last.get("blocks", {}).items())
        names = [f"`{name}` {'x'.join(map(str, shape[1:]))}" for name, shape in blocks[:4]]
        more = [f"and {len(blocks) - 4} more"] if len(blocks) > 4 else []
        rows.append([family, *cells, ", ".join(names + more)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return PAGE.format(versions=" and ".join(known), table=table)


class Family(Graph):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.loader = name, self.add("TestFamily", family=name)
        self.inputs = {"model": self.loader(0), "clip": self.loader(1)}
        self.size = SIZES.get(name, 64)

    def text(self, prompt: str) -> list[Any]:
        return self.add("CLIPTextEncode", clip=self.loader(1), text=prompt)(0)

    def train(self) -> list[Any]:
        pairs = self.add("SafeRegionPromptPairs", text=PAIRS, file="none")
        region = self.add("TrainSafeRegion", **self.inputs, pairs=pairs(0), size=self.size, **TRAINING)(0)
        self.add("SaveSafeRegion", region=region, name=self.name, author="", license="", description="", overwrite=True)
        return region

    def steered(self, text: list[Any], region: list[Any], mode: str) -> list[Any]:
        return self.add("SafeRegionConditioning", conditioning=text, region=region, strength=1.0, mode=mode, start=0.0,
                        end=1.0)(0)  # fmt: skip

    def compared(self, before: list[Any], after: list[Any]) -> str:
        return self.add("TestCompare", before=before, after=after)(0)[0]

    def guarded(self, region: list[Any]) -> list[Any]:
        return self.add("SafeRegionGuardModel", model=self.loader(0), region=region, strength=1.0, mode="always",
                        start=0.0, end=1.0)(0)  # fmt: skip

    def sampled(self, text: list[Any], info: dict[str, Any], model: list[Any] | None = None) -> str:
        asked = {"width": self.size, "height": self.size, "length": 1, "batch_size": 1, "compression": 42}
        required = info["input"]["required"]
        asked = {name: max(asked[name], required[name][1].get("min", 1)) for name in required}
        empty = self.add(LATENTS[self.name], **asked)(0)
        latent = self.add(
            "KSampler", model=model or self.loader(0), positive=text, negative=self.text(""), latent_image=empty,
            seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
        )  # fmt: skip
        return self.add("TestLatent", latent=latent(0))(0)[0]


def shown(outputs: dict[str, Any], node: str) -> Any:
    return json.loads(outputs[node]["text"][0])


def saved_blocks(host: Host, family: str) -> tuple[set[str], set[str]]:
    """The blocks that the saved region moves, and those it looks at."""
    content = (host.base / "models" / "safe_regions" / f"{family}.safetensors").read_bytes()
    names = [name.split(".") for name in json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])]
    moves, gates = ({name[1] for name in names if name[2:] == last} for last in (["move", "down"], ["gate", "weight"]))
    return moves, gates


@pytest.mark.parametrize("family", LATENTS)
def test_a_family_learns_and_applies_a_region(families, matrix, family):
    if family not in families.get("/object_info/TestFamily")["TestFamily"]["input"]["required"]["family"][1]["options"]:
        pytest.skip("this ComfyUI does not know the family")
    if lacks_words(family):
        pytest.skip(NO_WORDS)
    result = matrix[family] = {"apply": "no", "train": "no", "guard": "no", "cfg1": "no"}
    trained = family not in TOO_WIDE or "SAFE_REGION_MODELS_OUT" in os.environ
    g = Family(family)
    before = g.add("TestChecksum", **g.inputs)(0)[0]
    weights = families.run(g.prompt)[before]["text"]

    g = Family(family)
    region = g.train() if trained else g.add("TestRandomRegion", clip=g.loader(1))(0)
    after = g.add("TestChecksum", **g.inputs, after=region)(0)[0]
    unsafe, harmless = g.text(UNSAFE), g.text(HARMLESS)
    moved = g.steered(unsafe, region, "always")
    slopes = g.add("TestGradients", **g.inputs, size=g.size)(0)[0]
    looked = [g.compared(unsafe, moved)]
    looked += [g.compared(text, g.steered(text, region, "auto")) for text in (harmless, unsafe)]
    info = families.get(f"/object_info/{LATENTS[family]}")[LATENTS[family]]
    plain, latent = g.sampled(unsafe, info), g.sampled(moved, info)
    guarded = [g.sampled(text, info, g.guarded(region)) for text in (unsafe, moved)]
    outputs = families.run(g.prompt)
    families.request("/free", {"unload_models": True, "free_memory": True})

    assert outputs[after]["text"] == weights, "the weights have changed"
    assert weights[1] == "0", "weights have collected gradients"
    (always,), (kept,), (auto,) = (shown(outputs, node) for node in looked)
    result["blocks"] = {name: block["shape"] for name, block in always["blocks"].items()}
    pooled = always["options"].get("pooled_output", {})
    result["pooled"] = "none" if "shape" not in pooled else "kept" if pooled["same"] else "moved"
    assert all(not block["same"] and block["alike"] and block["finite"] for block in always["blocks"].values())
    text = {name.partition("__")[0] for name in always["blocks"]}
    assert all(option["alike"] if name in text else option["same"] for name, option in always["options"].items())
    assert always["added"] == ["safe_region_ids"]
    assert all(option["same"] for option in kept["options"].values())
    result["apply"] = "yes"
    if trained:
        moves, gates = saved_blocks(families, family)
        assert moves == set(always["blocks"]) and gates == {"cross_attn"}
        assert len({block["same"] for block in auto["blocks"].values()}) == 1, "one gate for all blocks"
        apart, largest = map(float, outputs[slopes]["text"][:2])
        assert largest > 0 and apart < 1e-4
        result["train"] = "yes"
    drawn, *by_guard = (shown(outputs, node) for node in (latent, *guarded))
    assert drawn["finite"] and drawn["hash"] != shown(outputs, plain)["hash"]
    result["cfg1"] = "yes"
    assert all(one == drawn for one in by_guard), "the guard steers once"
    result["guard"] = "yes"
