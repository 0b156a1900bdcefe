"""Every model family of ComfyUI, with its own classes: training, saving, applying, inspecting, sampling at CFG 1.

The models are tiny and random, so nothing is said here about what a region does to pictures. With the variable
SAFE_REGION_MODELS_OUT, what worked is written to the file it names.
"""
from __future__ import annotations

import ast
import json
import os
import re
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
# What makes training short, in the server's copy of the pack. Text is a sixteenth as wide there as the real one, and so
# are the tensors that hold several layers: those of Flux.2, Klein 4B and 9B, Lens, Krea 2 and Ideogram 4.
FEWER = {
    "training/prompts.py": [("CROWDS = 400", "CROWDS = 8")],
    "training/gate.py": [("STEPS = 400", "STEPS = 40"), ("DRAWN = 96", "DRAWN = 16")],
    "training/recipe.py": [("batch_size: int = 8", "batch_size: int = 2"),
                           ("trajectories: int = 96", "trajectories: int = 4"),
                           ("sampling_steps: int = 12", "sampling_steps: int = 3")],
    "region/blocks.py": [("WIDEST = 6_144", "WIDEST = 2_048"), ("INTERLEAVED = {", "INTERLEAVED = {832: 13, "),
                         ("SLICED = {", "SLICED = {960: 3, 480: 3, 768: 3, 720: 4, 384: 12, ")],
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
    "Stable Cascade": "StableCascade_EmptyLatentImage", "Chroma Radiance": "EmptyChromaRadianceLatentImage",
    "Wan 2.2 5B": "EmptyHunyuanLatentVideo", "Wan Animate 2": "EmptyHunyuanLatentVideo",
    "NewBie": "EmptySD3LatentImage", "Z-Image pixel": "EmptyChromaRadianceLatentImage",
    "PixelDiT": "EmptyChromaRadianceLatentImage", "CogVideoX": "EmptyHunyuanLatentVideo",
    "Boogu": "EmptySD3LatentImage", "Mage-Flow": "EmptyFlux2LatentImage", "JoyImage": "EmptySD3LatentImage",
    "Ernie-Image": "EmptyFlux2LatentImage", "Ideogram 4": "EmptyFlux2LatentImage", "Krea 2": "EmptySD3LatentImage",
    "Lens": "EmptyFlux2LatentImage", "Flux.2 Klein 4B": "EmptyFlux2LatentImage",
    "Flux.2 Klein 9B": "EmptyFlux2LatentImage", "Ovis": "EmptySD3LatentImage", "LongCat": "EmptySD3LatentImage",
    "LTX-2": "EmptyLTXVLatentVideo", "MiniMax H3": "EmptyMiniMaxH3LatentAV", "Anima": "EmptySD3LatentImage",
    "HiDream-O1": "EmptyHiDreamO1LatentImage", "ACE-Step": "EmptyAceStepLatentAudio",
}  # fmt: skip
SIZES = {"PixArt": 272}  # it divides by a rounded size
LENGTHS = {"Wan Animate 2": 5, "MiniMax H3": 5}  # frames: the first is a picture to go on from, or fewer are too few
LAYERS = {"Flux.2": 3, "Flux.2 Klein 4B": 3, "Flux.2 Klein 9B": 3, "Lens": 4, "Krea 2": 12, "Ideogram 4": 13}
TOO_WIDE = {"SD3"}  # by its code; learning takes minutes, so only what is written down is trained
# Families whose text no region reaches, with words of what is said of it everywhere; and those that cannot train.
REFUSED = {
    "HiDream-O1": "reads the prompt's words again inside the diffusion model",
    "ACE-Step": "has lyrics beside the prompt",
}
MADE_LATER = {"Anima": "reads the prompt's words again when the sampler runs"}  # a guard on the model steers it
UNTRAINED = {"MiniMax H3": "sound"}


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


# The model classes that have no row, and why.
OTHERS = {
    "as SD 1.x": "SD15_instructpix2pix",
    "as SD 2.x": "SD21UnclipL SD21UnclipH SD_X4Upscaler",
    "as SDXL": "SDXL_instructpix2pix SSD1B KOALA_700M KOALA_1B Segmind_Vega",
    "as Stable Cascade, whose second stage gets the same prompt": "Stable_Cascade_B",
    "as PixArt": "PixArtAlpha",
    "as HunyuanDiT": "HunyuanDiT1",
    "as Flux": "FluxInpaint FluxSchnell",
    "as HunyuanVideo": "HunyuanVideoI2V HunyuanVideoSkyreelsI2V HunyuanImage21Refiner",
    "as HunyuanVideo 1.5": "HunyuanVideo15_SR_Distilled",
    "as Cosmos": "CosmosI2V",
    "as Cosmos Predict2": "CosmosI2VPredict2",
    "as Kandinsky 5": "Kandinsky5Image",
    "as CogVideoX": "CogVideoX_I2V CogVideoX_Inpaint",
    "as PixelDiT, from a picture": "PiD",
    "as Wan, with pictures, films, poses or sound": "WAN21_CausalAR_T2V WAN21_I2V WAN21_FunControl2V WAN21_Vace "
    "WAN21_Camera WAN22_Camera WAN22_S2V WAN21_HuMo WAN22_Animate WAN21_FlowRVS WAN21_SCAIL WAN21_SCAIL2 "
    "WAN22_WanDancer",
    "no words, only a picture or a film": "Stable_Zero123 SV3D_u SV3D_p SVD_img2vid LotusD Hunyuan3Dv2 Hunyuan3Dv2_1 "
    "Hunyuan3Dv2mini TripoSplat Trellis2 SeedVR2 RT_DETR_v4 DepthAnything3",
    "words that say what to find in a picture, and draw nothing": "SAM3 SAM31",
    "sound": "StableAudio StableAudio3 ACEStep15 MiniMaxMusic3",
}
PAGE = """# Models

Written by the host tests, `tests/host/test_families.py`, where SAFE_REGION_MODELS_OUT names `docs/models.json`. For
each family ComfyUI's own text encoder and diffusion classes were built, tiny and random, and in a running ComfyUI a
region was trained on them, saved, applied and used as a guard, and two steps were sampled at CFG 1. Checked in each:
the weights are the same to the bit afterwards and have no gradients; a harmless prompt and the empty one are the same
in every part of their conditioning; Inspect says of each of the prompt's words what the walls say; an unsafe prompt
is moved in every block that the region has; shapes, types and all other options stay as they were; with few
activations kept, gradients are the same. Random models say nothing about pictures. All of this
ran on the CPU: no card was at hand, where kernels are other code.

"yes" without a version: on {versions}, or on those beside the family's name. Blocks are parts of a conditioning that
have moves of their own; widths are those of the tests, which are a sixteenth of the real ones or less where ComfyUI's
classes allow it.

{table}

Refused: text in GLIGEN boxes. Anima's words are read again as sampling begins, so the nodes that look at prompts
before refuse them and the guard steers them then. Not steered: pictures fed in (image prompts, unCLIP, reference
latents, ControlNet's hints), and the words of chat templates around them. HunyuanImage's glyphs (ByT5) are steered if
the training prompts quote something, and refused otherwise. SD3 steers what the prompt has: train with the encoders
that you use. Other models work at once where their conditioning is a tensor of tokens. Tensors that hold several
layers are cut into them, also where the layers take turns within each token (Ideogram 4), and others wider than 6,144
into even slices. The empty prompt of Lens has no tokens: there is nothing to judge and nothing to move.

LTX-2 was not built on 0.8.0, where the sizes of its text encoder are in the code. Z-Image Omni is Z-Image with
pictures.

Other models of ComfyUI, by their names in `comfy/supported_models.py`:

{others}
"""
COLUMNS = ("apply", "train", "guard", "inspect", "cfg1", "pooled")


def briefly(found: dict[str, Any]) -> dict[str, str]:
    """What was found of a family, by column; a sentence that stands in several only once."""
    told: list[str] = []
    said = {column: found.get(column, "") for column in COLUMNS}
    for column, words in said.items():
        said[column] = "refused so, too" if " " in words and words in told else words
        told.append(words)
    return said


def page(known: dict[str, Any]) -> str:
    """What worked, as Markdown: a row for each family, with versions where they differ."""
    rows = [["family", "apply", "train", "guard", "inspect", "CFG 1", "pooled vector", "blocks"], ["---"] * 8]
    for family in (name for name in LATENTS if any(name in found for found in known.values())):
        seen = {version: found[family] for version, found in known.items() if family in found}
        cells = []
        for column in COLUMNS:
            said = {version: briefly(one)[column] for version, one in seen.items()}
            alike = len(set(said.values())) == 1
            cells.append(next(iter(said.values())) if alike else ", ".join(f"{s} ({v})" for v, s in said.items()))
        *_, last = seen.values()
        blocks = list(last.get("blocks", {}).items())
        names = [f"`{name}` {'x'.join(map(str, shape[1:]))}" for name, shape in blocks[:4]]
        more = [f"and {len(blocks) - 4} more"] if len(blocks) > 4 else []
        where = f" ({', '.join(seen)})" if len(seen) < len(known) else ""
        rows.append([family + where, *cells, ", ".join(names + more)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    others = "\n".join(f"- {what}: {', '.join(names.split())}." for what, names in OTHERS.items())
    return PAGE.format(versions=" and ".join(", ".join(known).rsplit(", ", 1)), table=table, others=others)


class Family(Graph):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.loader = name, self.add("TestFamily", family=name)
        self.inputs = {"model": self.loader(0), "clip": self.loader(1)}
        self.size = SIZES.get(name, 64)

    def text(self, prompt: str) -> list[Any]:
        text = self.add("CLIPTextEncode", clip=self.loader(1), text=prompt)(0)
        return self.add("TestPose", conditioning=text)(0) if self.name == "Wan Animate 2" else text

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

    def inspected(self, region: list[Any]) -> str:
        return self.add("SafeRegionInspect", clip=self.loader(1), text=UNSAFE, region=region)(0)[0]

    def guarded(self, region: list[Any], mode: str = "always") -> list[Any]:
        return self.add("SafeRegionGuardModel", model=self.loader(0), region=region, strength=1.0, mode=mode,
                        start=0.0, end=1.0)(0)  # fmt: skip

    def sampled(self, text: list[Any], info: dict[str, Any], model: list[Any] | None = None) -> str:
        asked = {"width": self.size, "height": self.size, "length": LENGTHS.get(self.name, 1), "batch_size": 1,
                 "compression": 42, "seconds": 1.0}  # fmt: skip
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


def test_every_model_of_comfyui_has_a_row_or_a_reason_for_none():
    tree = ast.parse(Path(os.environ["COMFYUI_PATH"], "comfy", "supported_models.py").read_text(encoding="utf-8"))
    (listed,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "models")
    families = (Path(__file__).parent / "family_models" / "families.py").read_text(encoding="utf-8")
    rows = set(re.findall(r'": Family\((?:\s*#.*)?\s*"(\w+)"', families))
    reasons = [name for names in OTHERS.values() for name in names.split()]
    assert {node.id for node in listed.elts} <= rows | set(reasons)
    assert not rows & set(reasons) and len(reasons) == len(set(reasons))


def look_for(host: Host, family: str) -> dict[str, Any]:
    """What ComfyUI says of the node that makes the family's latents. Skips the test where it does not know either."""
    if family not in host.get("/object_info/TestFamily")["TestFamily"]["input"]["required"]["family"][1]["options"]:
        pytest.skip("this ComfyUI does not know the family")
    if lacks_words(family):
        pytest.skip(NO_WORDS)
    return host.get(f"/object_info/{LATENTS[family]}")[LATENTS[family]]


def refused(host: Host, graph: Graph, words: str) -> str:
    """The sentence that a prompt stops with, and that has these words."""
    with pytest.raises(RuntimeError) as raised:
        host.run(graph.prompt)
    _, _, sentence = str(raised.value).partition(": ")
    assert words in sentence and "\n" not in sentence.strip(), sentence
    return sentence.strip()


def read(strip: dict[str, Any]) -> str:
    """Whether a strip shows what the walls say of the prompt's words, and of nothing that they might be mistaken for;
    why not, where it does not. A token may hold two words: the Llama tokenizer's do with some versions of transformers.
    """
    words = [item["text"] for item in strip["items"] if item["kind"] == "word" and item["depth"] is not None]
    others = [item["text"] for item in strip["items"] if item["kind"] in ("piece", "token")]
    notes = [note["text"] for note in strip["notes"]]
    return "yes" if " ".join(words) == UNSAFE and not others else " ".join([*notes, f"Beside {words}: {others[:9]}"])


@pytest.mark.parametrize("family", [name for name in LATENTS if name not in {**REFUSED, **MADE_LATER}])
def test_a_family_learns_and_applies_a_region(families, matrix, family):
    info = look_for(families, family)
    result = matrix[family] = dict.fromkeys(("apply", "train", "guard", "inspect", "cfg1"), "no")
    trained = family not in UNTRAINED and (family not in TOO_WIDE or "SAFE_REGION_MODELS_OUT" in os.environ)
    g = Family(family)
    before = g.add("TestChecksum", **g.inputs)(0)[0]
    weights = families.run(g.prompt)[before]["text"]
    if family in UNTRAINED:
        g = Family(family)
        g.train()
        result["train"] = refused(families, g, UNTRAINED[family])

    g = Family(family)
    region = g.train() if trained else g.add("TestRandomRegion", clip=g.loader(1))(0)
    after = g.add("TestChecksum", **g.inputs, after=region)(0)[0]
    unsafe, harmless = g.text(UNSAFE), g.text(HARMLESS)
    moved = g.steered(unsafe, region, "always")
    slopes = "" if family in UNTRAINED else g.add("TestGradients", **g.inputs, size=g.size)(0)[0]
    looked = [g.compared(unsafe, moved)]
    looked += [g.compared(text, g.steered(text, region, "auto")) for text in (harmless, unsafe, g.text(""))]
    strip = g.inspected(region)
    plain, latent = g.sampled(unsafe, info), g.sampled(moved, info)
    guarded = [g.sampled(text, info, g.guarded(region)) for text in (unsafe, moved)]
    outputs = families.run(g.prompt)
    families.request("/free", {"unload_models": True, "free_memory": True})

    assert outputs[after]["text"] == weights, "the weights have changed"
    assert weights[1] == "0", "weights have collected gradients"
    (always,), (kept,), (auto,), (empty,) = (shown(outputs, node) for node in looked)
    result["blocks"] = {name: block["shape"] for name, block in always["blocks"].items()}
    pooled = always["options"].get("pooled_output", {})
    result["pooled"] = "none" if "shape" not in pooled else "kept" if pooled["same"] else "moved"
    assert all(not block["same"] and block["alike"] and block["finite"] for block in always["blocks"].values())
    text = {name.partition("__")[0] for name in always["blocks"]}
    layers = [name for name in always["blocks"] if "__features" in name or "__every" in name]
    assert len(layers) == LAYERS.get(family, 0)
    text |= {"cross_attn_pose"} if family == "Wan Animate 2" else set()
    assert not any(always["options"][name]["same"] for name in text)
    assert all(option["alike"] if name in text else option["same"] for name, option in always["options"].items())
    assert always["added"] == ["safe_region_ids"]
    assert all(option["same"] for found in (kept, empty) for option in found["options"].values())
    result["apply"] = "yes"
    if trained:
        moves, gates = saved_blocks(families, family)
        assert moves == set(always["blocks"])
        assert gates and {name.partition("__")[0] for name in gates} <= text
        assert len({block["same"] for block in auto["blocks"].values()}) == 1, "one gate for all blocks"
    if slopes:
        apart, largest = map(float, outputs[slopes]["text"][:2])
        assert largest > 0 and apart < 1e-4
        result["train"] = "yes" if trained else result["train"]
    (seen,) = outputs[strip]["safe_region_strip"]
    result["inspect"] = read(seen)
    assert result["inspect"] == "yes", result["inspect"]
    drawn, *by_guard = (shown(outputs, node) for node in (latent, *guarded))
    assert drawn["finite"] and drawn["hash"] != shown(outputs, plain)["hash"]
    result["cfg1"] = "yes"
    assert all(one == drawn for one in by_guard), "the guard steers once"
    result["guard"] = "yes"


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_text_no_region_reaches_says_so(families, matrix, family):
    info = look_for(families, family)
    result = matrix[family] = {"pooled": "none", "cfg1": "no"}
    g = Family(family)
    plain = g.sampled(g.text(UNSAFE), info)
    assert shown(families.run(g.prompt), plain)["finite"], "it draws, so that a refusal is what stops it"
    result["cfg1"] = "unsteered"
    for column in ("apply", "train", "guard", "inspect"):
        g = Family(family)
        if column == "train":
            g.train()
        else:
            region = g.add("TestRandomRegion", clip=g.loader(1))(0)
        if column == "apply":
            text = g.text(UNSAFE)
            g.compared(text, g.steered(text, region, "auto"))
        elif column == "guard":
            g.sampled(g.text(UNSAFE), info, g.guarded(region))
        elif column == "inspect":
            g.inspected(region)
        result[column] = refused(families, g, REFUSED[family])


@pytest.mark.parametrize("family", MADE_LATER)
def test_a_family_whose_text_is_made_as_sampling_begins_is_guarded(families, matrix, family):
    info = look_for(families, family)
    result = matrix[family] = dict.fromkeys(("train", "guard", "cfg1"), "no") | {"pooled": "none"}
    g = Family(family)
    before = g.add("TestChecksum", **g.inputs)(0)[0]
    weights = families.run(g.prompt)[before]["text"]
    g = Family(family)
    region = g.train()
    after = g.add("TestChecksum", **g.inputs, after=region)(0)[0]
    drawn = {}
    for prompt in (UNSAFE, HARMLESS):
        text = g.text(prompt)
        drawn[prompt] = [g.sampled(text, info, model)
                         for model in (None, g.guarded(region), g.guarded(region, mode="auto"))]  # fmt: skip
    outputs = families.run(g.prompt)
    assert outputs[after]["text"] == weights and weights[1] == "0"
    result["train"] = "yes"
    plain, always, auto = (shown(outputs, node) for node in drawn[HARMLESS])
    assert plain == auto and plain["finite"], "a harmless prompt comes out as it was"
    unsafe, moved, _ = (shown(outputs, node) for node in drawn[UNSAFE])
    assert plain != always and unsafe != moved and moved["finite"]
    result["guard"] = result["cfg1"] = "yes"
    g = Family(family)
    region = g.add("TestRandomRegion", clip=g.loader(1))(0)
    text = g.text(UNSAFE)
    g.compared(text, g.steered(text, region, "auto"))
    result["apply"] = refused(families, g, MADE_LATER[family])
    g = Family(family)
    g.inspected(g.add("TestRandomRegion", clip=g.loader(1))(0))
    result["inspect"] = refused(families, g, MADE_LATER[family])


@pytest.mark.parametrize("kind", ["resident", "streamed", "wrapped", "fp8", "nvfp4", "int8"])
def test_training_right_after_a_sampler_where_weights_are_managed(families, kind):
    """As dynamic VRAM, --lowvram, GGUF files and quantised checkpoints have them; see weight_kinds."""
    known = families.get("/object_info/TestWeightKind")["TestWeightKind"]["input"]["required"]["kind"]
    if kind not in known[1]["options"]:
        pytest.skip(f"this ComfyUI has no {kind} weights")
    g = Family("Z-Image")
    g.prompt[g.loader(0)[0]]["inputs"]["copy"] = 100 + ord(kind[0])  # models are changed in their places
    model = g.add("TestWeightKind", model=g.loader(0), kind=kind)(0)
    info = families.get(f"/object_info/{LATENTS[g.name]}")[LATENTS[g.name]]
    before = g.add("TestChecksum", model=model, clip=g.loader(1))(0)[0]
    g.sampled(g.text(UNSAFE), info, model)
    weights = families.run(g.prompt)[before]["text"]
    g.inputs["model"] = model
    g.name = f"{g.name} {kind}"
    after = g.add("TestChecksum", **g.inputs, after=g.train())(0)[0]
    assert families.run(g.prompt)[after]["text"] == weights and weights[1] == "0"
    moves, gates = saved_blocks(families, g.name)
    assert moves == gates == {"cross_attn"}
