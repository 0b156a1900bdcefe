"""Run in ComfyUI's interpreter and tree: what its text encoders and `backbones/diffusers.py` make of the same prompts.

    python diffusers_parity.py REPORT

The encoders are ComfyUI's own classes with few layers and random weights; the very same weights go into those of
transformers, and the tokenizers are ComfyUI's files. REPORT is JSON: for each family both signatures, and for each
prompt the shapes of its blocks and the largest difference. diffusers itself is not needed.
"""
from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path.cwd()))  # ComfyUI's tree
from comfy.cli_args import args

args.cpu = True
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import comfy.text_encoders.sd3_clip  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402

PACK = ModuleType("pack")
PACK.__path__ = [str(Path(__file__).parents[2])]
sys.modules["pack"] = PACK  # its modules, without the nodes that its entry point would want
DiffusersBackbone = import_module("pack.backbones.diffusers").DiffusersBackbone
ComfyBackbone = import_module("pack.backbones.comfy").ComfyBackbone
conditioning = import_module("pack.region.conditioning")
trainer = import_module("pack.training.trainer")

PROMPTS = {
    "short": "a knife on a table",
    "empty": "",
    "odd": "  Two  spaces, CAPITALS, na\u00efve \u65e5\u672c, 3.14 & a-b/c!\n",
    "full": "cat " * 75,
    "one too many": "cat " * 76,
    "long": "a red ball, a kitchen knife and a very old photograph of the sea at night; " * 12,
}
PLACES = "{in the park|at night|by the sea}"
PAIRS = f"a {{knife|gun|bomb|axe}} {PLACES} => a {{cup|flower|cup|flower}} {PLACES}"
LAYERS = 3
SIZES = {"clip_l_model_config": {"num_hidden_layers": LAYERS}, "clip_g_model_config": {"num_hidden_layers": LAYERS}}
TREE = Path(comfy.sd1_clip.__file__).parent


def t5(width: int) -> dict[str, dict[str, int]]:
    return {"t5xxl_model_config": {"num_layers": 2, "d_model": width, "d_ff": 128, "d_kv": 32, "num_heads": 4}}


# ComfyUI's class of encoder and its tokenizer, the class of pipeline, sizes, and where ComfyUI's parts are there
FAMILIES = {
    "SD 1.x": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, "StableDiffusionPipeline", {}, {"clip_l": ""}),
    "SDXL": (SDXLClipModel, SDXLTokenizer, "StableDiffusionXLPipeline", {}, {"clip_l": "", "clip_g": "_2"}),
    "SD3": (
        comfy.text_encoders.sd3_clip.sd3_clip(), comfy.text_encoders.sd3_clip.SD3Tokenizer, "StableDiffusion3Pipeline",
        t5(4096), {"clip_l": "", "clip_g": "_2", "t5xxl": "_3"},  # ComfyUI knows no other width
    ),
    "SD3 without T5": (
        comfy.text_encoders.sd3_clip.sd3_clip(t5=False), comfy.text_encoders.sd3_clip.SD3Tokenizer,
        "StableDiffusion3Pipeline", {}, {"clip_l": "", "clip_g": "_2"},
    ),
    "Flux": (
        comfy.text_encoders.flux.flux_clip(), comfy.text_encoders.flux.FluxTokenizer, "FluxPipeline", t5(512),
        {"clip_l": "", "t5xxl": "_2"},
    ),
}  # fmt: skip


def comfy_clip(encoder: type, tokenizer: type, sizes: dict[str, Any]) -> Any:
    """ComfyUI's CLIP with random weights."""
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, encoder), model_options={**SIZES, **sizes, "dtype": torch.float32})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in clip.cond_stage_model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.normal_(1, 0.1)
            elif weight.ndim == 2 and "embedding" not in name and "shared" not in name:
                weight.normal_(0, weight.shape[1] ** -0.5)
            else:
                weight.normal_()
    return clip


def load(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The model with the weights that it has a name for, and with nothing else of its own."""
    wanted = model.state_dict().keys()
    bare = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}  # as of transformers 5
    known = {**bare, **weights, "encoder.embed_tokens.weight": weights.get("shared.weight")}
    assert not set(wanted) - {name for name, tensor in known.items() if tensor is not None}
    model.load_state_dict({name: known[name] for name in wanted}, assign=True)
    return model


def transformers_clip(part: Any, projected: bool) -> Any:
    core = part.transformer.text_model
    layer, width = core.encoder.layers[0], core.final_layer_norm.weight.shape[0]
    config = transformers.CLIPTextConfig(
        hidden_size=width, projection_dim=width, intermediate_size=layer.mlp.fc1.weight.shape[0],
        num_hidden_layers=LAYERS, num_attention_heads=layer.self_attn.heads, vocab_size=49408, eos_token_id=2,
        hidden_act="quick_gelu" if width == 768 else "gelu",
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return load(kind(config), part.transformer.state_dict())


def transformers_t5(part: Any, sizes: dict[str, int]) -> Any:
    config = transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)
    return load(transformers.T5EncoderModel(config), part.transformer.state_dict())


def pipeline(name: str, clip: Any, sizes: dict[str, Any], parts: dict[str, str]) -> Any:
    """What the backbone looks at in a pipeline of that class, for its text."""
    found: dict[str, Any] = {"tokenizer_3": None, "text_encoder_3": None}
    found["transformer"] = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=4096))  # SD3's
    for part, ending in parts.items():
        own = getattr(clip.cond_stage_model, part)
        if part == "t5xxl":
            found[f"tokenizer{ending}"] = transformers.T5TokenizerFast.from_pretrained(
                TREE / "text_encoders" / "t5_tokenizer"
            )
            found[f"text_encoder{ending}"] = transformers_t5(own, sizes["t5xxl_model_config"])
        else:
            found[f"tokenizer{ending}"] = transformers.CLIPTokenizer.from_pretrained(TREE / "sd1_tokenizer")
            found[f"text_encoder{ending}"] = transformers_clip(own, part == "clip_g" or "3" in name)
    return type(name, (SimpleNamespace,), {})(**found)


def exchanged(learned_on: Any, used_in: Any) -> dict[str, Any]:
    """A region that one side learned, on the other: which prompts it moves, and the difference to its own side."""
    pairs = import_module("pack.training.pairs").parse_pairs(PAIRS)
    recipe = import_module("pack.training.recipe").Recipe(preset="instant", steps=0, prompts=150)
    learned_on.can_denoise = learned_on.can_decode = False
    run = trainer.Trainer(learned_on, pairs, recipe, "weapons")
    region = run.run()
    prompts = [*(unsafe for unsafe, _ in pairs.pairs), *run.sets.calibration[:12]]
    sides = [side.encode(prompts) for side in (learned_on, used_in)]
    steered = [conditioning.apply_to_conditioning(entries, region) for entries in sides]
    moved = [[not torch.equal(a[0], b[0]) for a, b in zip(*pair)] for pair in zip(sides, steered)]
    largest = max(float((a[0] - b[0]).abs().max()) for a, b in zip(*steered))
    return {"moved": moved, "largest": largest, "encoder": region.metadata["encoder"]}


def main(out: Path) -> None:
    report: dict[str, Any] = {}
    for family, (encoder, tokenizer, name, sizes, parts) in FAMILIES.items():
        clip = comfy_clip(encoder, tokenizer, sizes)
        theirs, ours = ComfyBackbone(None, clip), DiffusersBackbone(pipeline(name, clip, sizes, parts))
        prompts = {}
        for (prompt, _), first, second in zip(
            PROMPTS.items(), theirs.encode(list(PROMPTS.values())), ours.encode(list(PROMPTS.values()))
        ):
            one, two = conditioning.text_blocks(first), conditioning.text_blocks(second)
            prompts[prompt] = {
                "shapes": [{block: list(tensor.shape) for block, tensor in found.items()} for found in (one, two)],
                "largest": {b: float((one[b] - two[b]).abs().max()) for b in one if one[b].shape == two[b].shape},
                "size": {block: float(tensor.abs().max()) for block, tensor in one.items()},
            }
        report[family] = {"signatures": [theirs.signature(), ours.signature()], "prompts": prompts}
        if family == "SD 1.x":
            report["exchanged"] = [exchanged(ours, theirs), exchanged(theirs, ours)]
    out.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
