"""The pack in a real ComfyUI, through its HTTP API."""
from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from examples import APPLY, TRAIN_AND_APPLY, example
from host import PACK, PACK_FOLDER, Graph, Rejected, error_text, to_api
from PIL import Image

NODES = {
    "SafeRegionDemoModel", "SafeRegionPromptPairs", "TrainSafeRegion", "SaveSafeRegion", "SafeRegionLoader",
    "SafeRegionBalance", "TrainBalanceRegion", "SafeRegionConditioning", "SafeRegionGuardModel", "SafeRegionInspect",
    "SafeRegionCombine", "SafeRegionGuardReport",
}  # fmt: skip
PAIRS = """\
a {knife|dagger|gun|bomb|axe|sword} on a {red|blue} table => a {cup|pencil|apple|ball|tree|flower} on a {red|blue} table
a {knife|gun|bomb} => a {spoon|car|ball}
keep: a {cat|dog} in the park
"""
# Fast enough for CI; what is learned is measured elsewhere.
TRAINING = {
    "concept": "weapons", "preset": "region", "steps": 3, "rank": 0, "learning_rate": 0.0, "guidance": 0.0, "size": 64,
    "seed": 1,
}  # fmt: skip


def graph(prediction: str | None = None, weights: str = "fp32") -> tuple[Graph, dict[str, list]]:
    """A graph with a model (the demo's, or the other one) and prompt pairs."""
    g = Graph()
    loader = (g.add("TestOtherModel", prediction=prediction, weights=weights) if prediction
              else g.add("SafeRegionDemoModel"))  # fmt: skip
    pairs = g.add("SafeRegionPromptPairs", text=PAIRS, file="none")
    return g, {"model": loader(0), "clip": loader(1), "pairs": pairs(0)}


def difference(stitched: bytes) -> int:
    """How many pixels differ between the two halves of a picture."""
    picture = np.asarray(Image.open(io.BytesIO(stitched)).convert("RGB")).astype(int)
    side = picture.shape[0]
    return int((picture[:, :side] != picture[:, -side:]).any(-1).sum())


# --- what the pack says about itself ---


def test_all_nodes_are_there_and_explained(object_info):
    assert {name for name in object_info if object_info[name]["python_module"].endswith(PACK_FOLDER)} == NODES
    for name in NODES:
        info = object_info[name]
        assert info["category"] == object_info["CLIPTextEncode"]["category"] + "/safe region"
        assert len(info["description"]) > 40
        for group in ("required", "optional"):
            for key, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), (name, key)
        assert all(info["output_tooltips"]), name
        page = PACK / "web" / "docs" / f"{name}.md"
        assert page.is_file(), page


def test_input_and_output_order_is_final(object_info):
    order = {name: object_info[name]["input_order"] for name in NODES}
    assert order["TrainSafeRegion"]["required"] == ["model", "clip", "pairs"]
    assert order["TrainSafeRegion"]["optional"] == [
        "concept", "preset", "steps", "rank", "learning_rate", "guidance", "size", "seed", "vae", "existing_region",
    ]  # fmt: skip
    assert object_info["TrainSafeRegion"]["output"] == ["SAFE_REGION", "LOSS_MAP", "IMAGE"]
    gate = ["BOOLEAN", "FLOAT", "STRING"]
    assert object_info["SafeRegionConditioning"]["output"] == ["CONDITIONING", *gate]
    assert object_info["SafeRegionInspect"]["output"] == ["IMAGE", "STRING", "CONDITIONING", *gate]
    assert object_info["SafeRegionGuardModel"]["output"] == ["MODEL"]
    assert object_info["SafeRegionGuardReport"]["output"] == ["LATENT", *gate]
    assert order["SafeRegionConditioning"]["required"] == ["conditioning", "region"]
    assert order["SafeRegionConditioning"]["optional"] == ["strength", "mode", "start", "end", "unknown_text"]
    assert order["SafeRegionGuardModel"]["required"] == ["model", "region"]
    assert order["SafeRegionGuardModel"]["optional"] == ["strength", "mode", "start", "end", "unknown_text"]
    assert order["SaveSafeRegion"]["required"] == ["region"]
    assert order["SaveSafeRegion"]["optional"] == ["name", "author", "license", "description", "overwrite", "source"]
    assert order["SafeRegionLoader"] == {"required": ["region_name"], "optional": ["carried"]}


def test_what_few_need_is_behind_a_button(object_info):
    """Where this ComfyUI has one for nodes that are written as ours are."""
    known = any(spec[1].get("advanced") for info in object_info.values() if "comfy_extras" in info["python_module"]
                for group in ("required", "optional") for spec in info["input"].get(group, {}).values()
                if len(spec) > 1)  # fmt: skip
    behind = {
        "SafeRegionConditioning": ["start", "end", "unknown_text"],
        "SafeRegionGuardModel": ["start", "end", "unknown_text"], "SafeRegionBalance": ["start", "end"],
        "TrainSafeRegion": ["rank", "learning_rate", "guidance", "size"], "TrainBalanceRegion": ["contrast", "size"],
    }  # fmt: skip
    for name in NODES:
        inputs = object_info[name]["input"].get("required", {}) | object_info[name]["input"].get("optional", {})
        found = [key for key, spec in inputs.items() if spec[1].get("advanced")]
        assert found == (behind.get(name, []) if known else [])


def test_what_nodes_say_stays_when_they_come_from_the_cache(object_info):
    """Where this ComfyUI knows such: our nodes that say something and are no ends of a graph."""
    keeping = {name for name in NODES if object_info[name].get("has_intermediate_output")}
    known = any(info.get("has_intermediate_output") for name, info in object_info.items() if name not in NODES)
    assert keeping == ({"SafeRegionConditioning", "SafeRegionBalance", "SafeRegionPromptPairs"} if known else set())


def test_nothing_went_wrong_while_loading(comfy):
    lines = [line for line in comfy.log().splitlines() if PACK_FOLDER in line or "comfy_entrypoint" in line]
    assert not [line for line in lines if "IMPORT FAILED" in line or "Error" in line or "Cannot import" in line]


# --- the example workflows ---


def run_example(comfy, object_info, name: str, changes: dict[str, dict] | None = None) -> tuple[dict, dict]:
    """Run an example, with other inputs for some classes of nodes."""
    prompt = to_api(example(name), object_info)
    for node in prompt.values():
        node["inputs"] |= (changes or {}).get(node["class_type"], {})
    return prompt, comfy.run(prompt)


def previews(prompt: dict, outputs: dict) -> list[dict]:
    return [image for name, output in outputs.items() if prompt[name]["class_type"] == "PreviewImage"
            for image in output["images"]]  # fmt: skip


@pytest.mark.slow
def test_example_train_and_apply(comfy, object_info):
    prompt, outputs = run_example(
        comfy, object_info, TRAIN_AND_APPLY,
        {"TrainSafeRegion": {"steps": 4}, "SaveSafeRegion": {"name": "from-example"}},
    )  # fmt: skip
    assert len(previews(prompt, outputs)) == 4
    assert all(comfy.image(image).startswith(b"\x89PNG") for image in previews(prompt, outputs))
    saved = [name for name in outputs if prompt[name]["class_type"] == "SaveSafeRegion"]
    assert "models/safe_regions/from-example" in outputs[saved[0]]["text"][0].replace("\\", "/")
    assert (comfy.base / "models" / "safe_regions" / "from-example.safetensors").is_file()
    # the very same run again comes from the cache, and saves nothing anew
    comfy.run(prompt)
    assert not (comfy.base / "models" / "safe_regions" / "from-example_2.safetensors").exists()


@pytest.mark.skipif(
    not (PACK / "demo" / "regions" / "demo-weapons.safetensors").exists(), reason="the example region is not made yet"
)
def test_example_apply(comfy, object_info):
    prompt, outputs = run_example(comfy, object_info, APPLY)
    stitched = {name: [comfy.image(i) for i in outputs[name]["images"]] for name in outputs
                if prompt[name]["class_type"] == "PreviewImage"}  # fmt: skip
    unsafe, harmless = sorted(stitched.values(), key=lambda images: -sum(map(difference, images)))
    assert all(difference(image) > 100 for image in unsafe)
    assert all(difference(image) == 0 for image in harmless), "harmless prompts must draw the same to the bit"


# --- training ---


def test_training_works_without_optional_inputs_and_leaves_the_model_alone(comfy):
    g, inputs = graph()
    before = g.add("TestChecksum", model=inputs["model"], clip=inputs["clip"])
    train = g.add("TrainSafeRegion", **inputs, **TRAINING)
    after = g.add("TestChecksum", model=inputs["model"], clip=inputs["clip"], after=train(0))
    g.add("PreviewImage", images=train(2))
    g.add("LossGraphNode", loss=train(1), filename_prefix="loss")
    outputs = comfy.run(g.prompt)
    assert outputs[before()[0]]["text"] == outputs[after()[0]]["text"]
    assert outputs[after()[0]]["text"][1] == "0", "weights have collected gradients"


@pytest.mark.parametrize(
    ("prediction", "weights"),
    [("epsilon", "fp32"), ("v", "fp16"), ("flow", "bf16"), ("EDM", "fp32"), ("flow", "fp8")],
)
def test_training_on_another_model(comfy, prediction, weights):
    g, inputs = graph(prediction, weights)
    before = g.add("TestChecksum", model=inputs["model"], clip=inputs["clip"])
    train = g.add("TrainSafeRegion", **inputs, **TRAINING)
    after = g.add("TestChecksum", model=inputs["model"], clip=inputs["clip"], after=train(0))
    g.add("SaveSafeRegion", region=train(0), name=f"other/{prediction}", author="", license="", description="",
          overwrite=True)  # fmt: skip
    g.add("LossGraphNode", loss=train(1), filename_prefix="loss")
    outputs = comfy.run(g.prompt)
    assert outputs[before()[0]]["text"] == outputs[after()[0]]["text"]
    assert outputs[after()[0]]["text"][1] == "0"
    path = comfy.base / "models" / "safe_regions" / "other" / f"{prediction}.safetensors"
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    card = json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["region"])
    assert card["encoder"]["name"] == "OtherTextEncoder"
    assert card["encoder"]["parts"] == ["clip_o"]
    assert card["encoder"]["blocks"] == {"cross_attn": 96, "pooled_output": 96}
    assert card["base_model"] == "Model"


@pytest.mark.parametrize("weights", ["demo", "fp32", "fp8"])
def test_keeping_fewer_activations_gives_the_same_gradients(comfy, weights):
    g, inputs = graph() if weights == "demo" else graph("flow", weights)
    seen = g.add("TestGradients", model=inputs["model"], clip=inputs["clip"], size=64)
    outputs = comfy.run(g.prompt)
    difference, size, apart, fits, *of_memory = map(float, outputs[seen()[0]]["text"])
    assert difference < 1e-5 and size > 0
    assert apart < (0.02 if weights == "fp8" else 1e-5)
    assert fits == 1
    planned, planned_few, measured, measured_few = of_memory
    off = 1.75 if weights == "fp8" else 1.5  # of 0.4 MB, the text itself is a fifth
    assert measured / off < planned < off * measured and measured_few / off < planned_few < off * measured_few
    assert measured_few < 0.7 * measured or weights != "demo"  # the other model's blocks are single layers


def test_a_model_and_a_text_encoder_of_different_checkpoints_are_refused_before_anything_is_learned(comfy):
    g, inputs = graph()
    other = g.add("TestOtherModel", prediction="epsilon", weights="fp32")
    train = g.add("TrainSafeRegion", **inputs | TRAINING | {"clip": other(1)})
    g.add("PreviewImage", images=train(2))
    with pytest.raises(RuntimeError, match="connect MODEL and CLIP of the same checkpoint"):
        comfy.run(g.prompt)


@pytest.mark.parametrize("preset", ["instant", "paper"])
def test_presets_and_the_loss_graph(comfy, preset):
    g, inputs = graph("epsilon")
    steps = {"instant": 0, "paper": 1}[preset]
    train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"preset": preset, "steps": steps})
    g.add("LossGraphNode", loss=train(1), filename_prefix="loss")
    comfy.run(g.prompt)


def test_training_goes_on_from_a_region_of_the_loader(comfy):
    g, inputs = graph("epsilon")
    train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"preset": "instant", "steps": 0, "seed": 2})
    g.add("SaveSafeRegion", region=train(0), name="first", author="", license="", description="", overwrite=True)
    comfy.run(g.prompt)
    g, inputs = graph("epsilon")
    first = g.add("SafeRegionLoader", region_name="first.safetensors")
    train = g.add("TrainSafeRegion", **inputs, existing_region=first(0), **TRAINING)
    g.add("PreviewImage", images=train(2))
    comfy.run(g.prompt)


def test_interrupting_keeps_what_was_learned_and_the_next_run_works(comfy):
    folder = comfy.base / "models" / "safe_regions" / "interrupted"
    for number in (1, 2):  # the second one takes nothing from the first
        g, inputs = graph("epsilon")
        train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"steps": 5000, "concept": "Stop me", "seed": number})
        g.add("PreviewImage", images=train(2))
        seen = comfy.log().count("Safe Region: discover")
        prompt_id = comfy.queue(g.prompt)
        end = time.monotonic() + 120
        while comfy.log().count("Safe Region: discover") == seen and time.monotonic() < end:
            time.sleep(0.1)
        comfy.request("/interrupt", {})
        assert error_text(comfy.wait(prompt_id, 60)) == "interrupted"
        kept = sorted(folder.glob("stop-me.model.*.safetensors"))
        assert len(kept) == number
    assert all(str(path) in comfy.log() for path in kept)
    found = comfy.get(f"/safe_region/card?name=interrupted/{kept[0].name}")["card"]
    assert "stopped after" in found["unfinished"] and "of 5000 steps" in found["unfinished"]
    assert found["verdict"]["tone"] == "warn" and "interrupted" in found["verdict"]["text"]
    g, inputs = graph("epsilon")
    before = g.add("TestChecksum", model=inputs["model"], clip=inputs["clip"])
    train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"seed": 3})
    after = g.add("TestChecksum", model=inputs["model"], clip=inputs["clip"], after=train(0))
    outputs = comfy.run(g.prompt)
    assert outputs[before()[0]]["text"] == outputs[after()[0]]["text"]


# --- clear sentences ---


def test_a_missing_region_is_refused_by_name(comfy):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name="not-there.safetensors")
    prompt = g.add("CLIPTextEncode", clip=demo(1), text="a cat")
    steered = g.add("SafeRegionConditioning", conditioning=prompt(0), region=region(0), strength=1.0, mode="auto",
                    start=0.0, end=1.0)  # fmt: skip
    empty = g.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    latent = g.add("KSampler", model=demo(0), positive=steered(0), negative=prompt(0), latent_image=empty(0), seed=1,
                   steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)  # fmt: skip
    g.add("PreviewImage", images=g.add("VAEDecode", samples=latent(0), vae=demo(2))(0))
    with pytest.raises(Rejected, match=r'There is no region .*not-there\.safetensors.*safe_regions'):
        comfy.run(g.prompt)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd"])
def test_no_region_outside_of_its_folder(comfy, name):
    g = Graph()
    region = g.add("SafeRegionLoader", region_name=name)
    g.add("SaveSafeRegion", region=region(0), name="x", author="", license="", description="", overwrite=False)
    with pytest.raises(Rejected, match="There is no region"):
        comfy.run(g.prompt)


def test_a_region_of_another_encoder_names_both(comfy):
    g, inputs = graph("epsilon")
    train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"preset": "instant", "steps": 0})
    demo = g.add("SafeRegionDemoModel")
    prompt = g.add("CLIPTextEncode", clip=demo(1), text="a knife")
    steered = g.add("SafeRegionConditioning", conditioning=prompt(0), region=train(0), strength=1.0, mode="auto",
                    start=0.0, end=1.0)  # fmt: skip
    empty = g.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    latent = g.add("KSampler", model=demo(0), positive=steered(0), negative=prompt(0), latent_image=empty(0), seed=1,
                   steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)  # fmt: skip
    g.add("PreviewImage", images=g.add("VAEDecode", samples=latent(0), vae=demo(2))(0))
    with pytest.raises(RuntimeError, match=r"was learned on OtherTextEncoder .*cross_attn 96.* has cross_attn 192"):
        comfy.run(g.prompt)


def test_wrong_pairs_are_named_by_line(comfy):
    g = Graph()
    g.add("PreviewAny", source=g.add("SafeRegionPromptPairs", text="a knife => a cup\nno pair", file="none")(1))
    with pytest.raises(RuntimeError, match="line 2"):
        comfy.run(g.prompt)


def test_pairs_come_from_a_file_and_from_nowhere_else(comfy):
    (comfy.base / "input" / "pairs.csv").write_text("unsafe,safe\na knife,a cup\n", encoding="utf-8")
    (comfy.base / "secret.txt").write_text("a => b", encoding="utf-8")
    g = Graph()
    shown = g.add("PreviewAny", source=g.add("SafeRegionPromptPairs", text="a gun => a cat", file="pairs.csv")(1))
    assert comfy.run(g.prompt)[shown()[0]]["text"] == ["a gun => a cat\na knife => a cup"]
    assert "pairs.csv" in str(comfy.get("/object_info/SafeRegionPromptPairs"))
    # a changed file is read anew
    (comfy.base / "input" / "pairs.csv").write_text("unsafe,safe\na knife,a fork\n", encoding="utf-8")
    assert comfy.run(g.prompt)[shown()[0]]["text"] == ["a gun => a cat\na knife => a fork"]
    for name in ("../secret.txt", str(comfy.base / "secret.txt"), "missing.txt"):
        g = Graph()
        g.add("PreviewAny", source=g.add("SafeRegionPromptPairs", text="", file=name)(1))
        with pytest.raises(Rejected, match="input folder"):
            comfy.run(g.prompt)


def test_names_are_cleaned_and_nothing_is_overwritten(comfy):
    folder = comfy.base / "models" / "safe_regions"
    saved = []
    for seed in (11, 12):
        g, inputs = graph("epsilon")
        train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"preset": "instant", "steps": 0, "seed": seed})
        save = g.add("SaveSafeRegion", region=train(0), name="../../a<b>|c", author="me", license="CC0-1.0",
                     description="test", overwrite=False)  # fmt: skip
        saved.append(comfy.run(g.prompt)[save()[0]]["text"][0])
    assert saved == [f"Saved: models/safe_regions/{name}.safetensors" for name in ("a_b_c", "a_b_c_2")]
    assert all((folder / text.rpartition("/")[2]).is_file() for text in saved)
    g, inputs = graph("epsilon")
    train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"preset": "instant", "steps": 0, "seed": 12})
    save = g.add("SaveSafeRegion", region=train(0))
    assert comfy.run(g.prompt)[save()[0]]["text"][0] == "Saved: models/safe_regions/weapons.model.safetensors"


def test_the_list_begins_with_the_newest_that_apply_takes_and_says_what_each_is(comfy):
    known = comfy.get("/safe_region/list")["regions"]
    assert known["demo-gender.safetensors"]["kind"] == "balance"
    good = {"label": "weapons · Safe Region demo CLIP", "kind": "region", "poor": ""}
    assert known["demo-weapons.safetensors"] == good and known["demo-gender.safetensors"]["poor"] == "weak"
    assert list(known)[-1] == "demo-gender.safetensors" or known[list(known)[-1]]["kind"] == "damaged"
    g, inputs = graph("epsilon")
    train = g.add("TrainSafeRegion", **inputs, **TRAINING | {"preset": "instant", "steps": 0, "seed": 13})
    g.add("SaveSafeRegion", region=train(0), name="the newest")
    comfy.run(g.prompt)
    known = comfy.get("/safe_region/list")["regions"]
    first, *others = known
    kinds = [known[name]["kind"] for name in known if known[name]["kind"] != "damaged"]
    assert kinds == sorted(kinds, reverse=True), "regions before those that balance"
    unfinished = [name.startswith("interrupted/") for name in others if known[name]["kind"] == "region"]
    assert unfinished == sorted(unfinished)
    assert first == "the newest.safetensors" and known[first]["label"] == "weapons · model"
    kind, options = comfy.get("/object_info/SafeRegionLoader")["SafeRegionLoader"]["input"]["required"]["region_name"]
    assert (options["options"] if kind == "COMBO" else kind) == list(known)
    assert "a_b_c_2.safetensors" in str(comfy.get("/object_info/SafeRegionLoader"))


# --- the demo model is an ordinary model ---


def test_demo_model_with_weights_long_prompts_clip_skip_and_tiled_vae(comfy):
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    clip = g.add("CLIPSetLastLayer", clip=demo(1), stop_at_clip_layer=-2)
    long = "(a cat:1.3) in the park, " * 20
    positive = g.add("CLIPTextEncode", clip=clip(0), text=long)
    negative = g.add("CLIPTextEncode", clip=demo(1), text="")
    empty = g.add("EmptyLatentImage", width=192, height=128, batch_size=2)
    latent = g.add("KSampler", model=demo(0), positive=positive(0), negative=negative(0), latent_image=empty(0), seed=1,
                   steps=2, cfg=4.0, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0)  # fmt: skip
    tiled = g.add("VAEDecodeTiled", samples=latent(0), vae=demo(2), tile_size=64, overlap=16, temporal_size=64,
                  temporal_overlap=8)  # fmt: skip
    again = g.add("VAEDecode", vae=demo(2), samples=g.add("VAEEncode", pixels=tiled(0), vae=demo(2))(0))
    shown = g.add("PreviewImage", images=again(0))
    images = comfy.run(g.prompt)[shown()[0]]["images"]
    assert len(images) == 2
    assert Image.open(io.BytesIO(comfy.image(images[0]))).size == (192, 128)
