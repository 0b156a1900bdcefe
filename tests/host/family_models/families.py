"""Model families as ComfyUI itself builds them, from its own configurations, networks, text encoders and tokenizers.

Everything is as small as the constructors allow, and random. Text is a sixteenth as wide as the real one, except where
ComfyUI's code fixes the width.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_vl
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from comfy.supported_models_base import ClipTarget

SHRUNK = 16  # times: text widths
WORDS, PIECES = 12_000, 1500  # in the vocabularies of tokenizers that come with a checkpoint

Size = dict[str, Any]


def clip(width: int) -> Size:
    return {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 3, "num_attention_heads": 4}


def t5(width: int) -> Size:
    return {"d_model": width, "d_ff": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2}


def llama(width: int, layers: int = 4) -> Size:
    return {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip


_SD3_PARTS = [f"text_encoders.{name}" for name in (
    "clip_l.transformer.text_model.final_layer_norm.weight", "clip_g.transformer.text_model.final_layer_norm.weight",
    "t5xxl.transformer.encoder.final_layer_norm.weight",
)]  # fmt: skip
# The parts that several families share.
L, G, H = clip(768 // SHRUNK), clip(1280 // SHRUNK), clip(1024 // SHRUNK)
T5XXL, QWEN = t5(4096 // SHRUNK), llama(3584 // SHRUNK)
BYT5 = t5(1472)  # the network's code says so
MISTRAL = 704  # three layers of it are wider than all text that stays whole


@dataclass(frozen=True)
class Family:
    """How to build one.

    `config` is a class in comfy.supported_models, `network` what it gets besides its own `unet_config`, `encoders` the
    sizes of the parts of the text encoder by name. `target` makes the text encoder where `config` does not.
    """

    config: str
    network: dict[str, Any]
    encoders: dict[str, Size]
    target: Callable[[], ClipTarget] | None = None
    tokenizer: Callable[[], dict[str, Any]] = field(default=dict)  # its data from the checkpoint
    weights: dict[str, Any] = field(default_factory=dict)  # that `config` looks for in a checkpoint

    def available(self) -> bool:
        return hasattr(comfy.supported_models, self.config)


# --- tokenizers whose vocabulary comes with a checkpoint ---


def _words() -> list[str]:
    """Whole words of CLIP's vocabulary, the frequent ones first."""
    path = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer" / "vocab.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))
    words = (token.removesuffix("</w>") for token in sorted(tokens, key=tokens.get) if token.endswith("</w>"))
    return [word for word in words if word.isascii() and word.isalpha()]


def sentencepiece_model() -> torch.Tensor:
    """A small one, with the special tokens of mT5 and Gemma."""
    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_words()[:WORDS]), model_writer=model, vocab_size=PIECES, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


class _Vocabulary:
    """Words, in place of Mistral's tokens."""

    @staticmethod
    def from_pretrained(path: str, **kwargs: Any) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = ["<pad>", "<s>", "<unk>", *_words()[: WORDS - 3]]  # all after a token of padding counts as padding
        made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=made)


class MistralTokenizer(comfy.sd1_clip.SDTokenizer):
    """ComfyUI's Mistral3Tokenizer but for the vocabulary: transformers 5.24 no longer reads it the way ComfyUI asks."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            "", pad_with_end=False, embedding_size=5120, embedding_key="mistral3_24b", tokenizer_class=_Vocabulary,
            has_end_token=False, pad_to_max_length=False, pad_token=11, max_length=99_999_999, min_length=1,
            pad_left=True, tokenizer_data=tokenizer_data,
        )  # fmt: skip


# --- networks ---


def unet(width: int, text: int, **others: Any) -> dict[str, Any]:
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": width, "num_res_blocks": [1],
        "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1, "context_dim": text // SHRUNK, "use_spatial_transformer": True, "legacy": False,
        "use_checkpoint": False, "adm_in_channels": None, **others,
    }  # fmt: skip


def adm(pooled: int, numbers: int) -> dict[str, Any]:
    """The pooled text beside so many numbers about the picture's size."""
    return {"num_classes": "sequential", "adm_in_channels": pooled // SHRUNK + 256 * numbers}


def known(parameters: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those values that this ComfyUI's network takes."""
    return {name: value for name, value in values.items() if name in {field.name for field in fields(parameters)}}


_STREAMS = {"hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "qkv_bias": True,
            "axes_dim": [8, 12, 12], "theta": 10_000}  # fmt: skip
_FLUX = {**_STREAMS, "in_channels": 16, "out_channels": 16, "patch_size": 2, "context_in_dim": 4096 // SHRUNK,
         **known(FluxParams, {"txt_ids_dims": []})}  # fmt: skip
_HUNYUAN = {**_STREAMS, "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "theta": 256, "byt5": False,
            "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "guidance_embed": False,
            **known(HunyuanVideoParams, {"meanflow_sum": False})}  # fmt: skip
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "crossattn_emb_channels": 1024 // SHRUNK,
    "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 1, "num_heads": 2,
}  # fmt: skip
_LUMINA = {"patch_size": 2, "in_channels": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1,
           "multiple_of": 32, "qk_norm": True, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512]}  # fmt: skip

FAMILIES = {
    "SD 1.x": Family("SD15", unet(32, 768), {"clip_l": L}),
    "SD 2.x": Family("SD20", unet(64, 1024), {"clip_h": H}),
    "SDXL": Family("SDXL", unet(64, 2048, **adm(1280, 6)), {"clip_l": L, "clip_g": G}),
    "SDXL refiner": Family("SDXLRefiner", unet(64, 1280, **adm(1280, 5)), {"clip_g": G}),
    "Flux": Family("Flux", {**_FLUX, "vec_in_dim": 768 // SHRUNK}, {"clip_l": L, "t5xxl": T5XXL}),
    "Chroma": Family(
        "Chroma",
        {**_FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 1,
         **known(ChromaParams, {"vec_in_dim": None})},
        {"t5xxl": T5XXL},
    ),
    "AuraFlow": Family(
        "AuraFlow",
        {"dim": 256, "n_layers": 2, "n_double_layers": 1, "n_heads": 1, "global_conddim": 64, "max_seq": 256,
         "cond_seq_dim": 2048 // SHRUNK},
        {"pile_t5xl": t5(2048 // SHRUNK)},
    ),
    "PixArt": Family(
        "PixArtSigma",
        {"num_heads": 2, "patch_size": 2, "hidden_size": 48, "in_channels": 4, "depth": 1, "model_max_length": 300,
         "micro_condition": False, "caption_channels": 4096 // SHRUNK, "input_size": 64, "pe_interpolation": 1},
        {"t5xxl": T5XXL},
    ),
    "Wan": Family(
        "WAN21_T2V",
        {"dim": 64, "out_dim": 16, "num_heads": 2, "ffn_dim": 64, "num_layers": 1, "in_dim": 16,
         "text_dim": 4096 // SHRUNK},
        {"umt5xxl": {**T5XXL, "vocab_size": PIECES}},
        tokenizer=lambda: {"spiece_model": sentencepiece_model()},
    ),
    "LTXV": Family(
        "LTXV",
        {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64,
         "caption_channels": 4096 // SHRUNK},
        {"t5xxl": T5XXL},
    ),
    "Lumina 2": Family(
        "Lumina2", {**_LUMINA, "dim": 64, "cap_feat_dim": 2304 // SHRUNK},
        {"gemma2_2b": {**llama(2304 // SHRUNK), "vocab_size": PIECES}},
        tokenizer=lambda: {"spiece_model": sentencepiece_model()},
    ),
    "Z-Image": Family(
        "ZImage",
        {**_LUMINA, "dim": 256, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560 // SHRUNK, "rope_theta": 256.0,
         "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        {"qwen3_4b": llama(2560 // SHRUNK)},
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {"in_channels": 64, "num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
         "joint_attention_dim": 3584 // SHRUNK, "axes_dims_rope": (8, 12, 12)},
        {"qwen25_7b": QWEN},
    ),
    "OmniGen2": Family(
        "Omnigen2",
        {"axes_dim_rope": [8, 12, 12], "axes_lens": [1024, 1664, 1664], "hidden_size": 64, "in_channels": 16,
         "multiple_of": 32, "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 1, "num_refiner_layers": 1,
         "patch_size": 2, "text_feat_dim": 2048 // SHRUNK, "timestep_scale": 1000.0},
        {"qwen25_3b": llama(2048 // SHRUNK)},
    ),
    "Stable Cascade": Family(
        "Stable_Cascade_C",
        {"c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
         "c_clip_text": 1280 // SHRUNK, "c_clip_text_pooled": 1280 // SHRUNK},
        {"clip_g": G},
    ),
    "HunyuanDiT": Family(
        "HunyuanDiT",
        {"depth": 2, "hidden_size": 64, "num_heads": 2, "text_states_dim": 1024 // SHRUNK,
         "text_states_dim_t5": 2048 // SHRUNK},
        {"hydit_clip": clip(1024 // SHRUNK), "mt5xl": {**t5(2048 // SHRUNK), "vocab_size": PIECES}},
        tokenizer=lambda: {"mt5xl.spiece_model": sentencepiece_model()},
    ),
    "HunyuanImage 2.1": Family(
        "HunyuanImage21",
        {**_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [16, 16], "byt5": True,
         "context_in_dim": 3584 // SHRUNK},
        {"qwen25_7b": QWEN, "": BYT5},
    ),
    "HunyuanVideo": Family(
        "HunyuanVideo",
        {**_HUNYUAN, "vec_in_dim": 768 // SHRUNK, "guidance_embed": True, "context_in_dim": 4096 // SHRUNK},
        {"clip_l": L, "llama": llama(4096 // SHRUNK)},
    ),
    "HunyuanVideo 1.5": Family(
        "HunyuanVideo15",
        {**_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "byt5": True, "vec_in_dim": None,
         "use_cond_type_embedding": True, "vision_in_dim": 1152, "context_in_dim": 3584 // SHRUNK},
        {"qwen25_7b": QWEN, "": BYT5},
    ),
    "HiDream": Family(
        "HiDream",
        {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": [16, 8, 8], "in_channels": 16,
         "caption_channels": [4096 // SHRUNK, 64], "max_resolution": [128, 128], "llama_layers": [0, 15, 31],
         "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 1, "num_single_layers": 2,
         "out_channels": 16, "patch_size": 2, "text_emb_dim": 2048 // SHRUNK},
        {"clip_l": L, "clip_g": G, "t5xxl": T5XXL, "llama": llama(64, 32)},
        lambda: ClipTarget(comfy.text_encoders.hidream.HiDreamTokenizer, comfy.text_encoders.hidream.hidream_clip()),
    ),
    "Flux.2": Family(
        "Flux2",
        {**_FLUX, "in_channels": 128, "out_channels": 128, "patch_size": 1, "context_in_dim": 3 * MISTRAL,
         "axes_dim": [8, 8, 8, 8], "theta": 2000, "vec_in_dim": None, "guidance_embed": True, "global_modulation": True,
         "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "default_ref_method": "index",
         "ref_index_scale": 10.0},
        {"mistral3_24b": {**llama(MISTRAL, 31), "vocab_size": WORDS}},
        lambda: ClipTarget(comfy.text_encoders.flux.Flux2Tokenizer, comfy.text_encoders.flux.flux2_te()),
        lambda: {"mistral3_24b_tokenizer_class": MistralTokenizer},
    ),
    "Cosmos": Family(
        "CosmosT2V",
        {**_COSMOS, "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "pos_emb_learnable": False,
         "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
         "extra_per_block_abs_pos_emb_type": "learnable"},
        {"t5xxl": t5(1024 // SHRUNK)},
    ),
    "Cosmos Predict2": Family(
        "CosmosT2IPredict2",
        {**_COSMOS, "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False,
         "rope_enable_fps_modulation": False},
        {"t5xxl": t5(1024 // SHRUNK)},
    ),
    "Mochi": Family(
        "GenmoMochi",
        {"depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32, "mlp_ratio_x": 192.0,
         "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
         "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
         "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True,
         "t5_feat_dim": 4096 // SHRUNK, "t5_token_length": 256, "rope_theta": 10_000.0},
        {"t5xxl": T5XXL},
    ),
    "Kandinsky 5": Family(
        "Kandinsky5",
        {"model_dim": 64, "ff_dim": 64, "time_dim": 64, "visual_embed_dim": 132, "num_text_blocks": 1,
         "num_visual_blocks": 1, "axes_dims": (8, 12, 12), "in_text_dim": 3584 // SHRUNK,
         "in_text_dim2": 768 // SHRUNK},
        {"qwen25_7b": QWEN, "clip_l": L},
    ),
    "SD3": Family(  # its code says 4096 for text, and a region knows it by its width
        "SD3",
        {"patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 2048,
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
         "num_patches": 1024, "pos_embed_max_size": 32},
        {"clip_l": clip(768), "clip_g": clip(1280), "t5xxl": t5(4096)},
        weights=dict.fromkeys(_SD3_PARTS, torch.zeros(1)),
    ),
}  # fmt: skip


# --- building ---


def _small_llama(config: Callable[..., Any], sizes: Size, **given: Any) -> Any:
    """A language model's configuration, with sizes that its constructor does not take."""
    made = config(**{name: value for name, value in given.items() if name not in sizes})
    for name, value in sizes.items():
        setattr(made, name, value)
    return made


def _small_vision(vision: Callable[..., Any], **given: Any) -> Any:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_layers": 1}
    return vision(**{**given, **small})


@contextmanager
def small_language_models(sizes: Iterable[Size]) -> Iterator[None]:
    """While ComfyUI builds language models: they read sizes from a dataclass, and some have an eye of 600 M weights."""
    module, vision = comfy.text_encoders.llama, comfy.text_encoders.qwen_vl
    with ExitStack() as stack:
        for size in sizes:
            for name, config in list(vars(module).items()):
                if "head_dim" in size and is_dataclass(config):
                    stack.enter_context(patch.object(module, name, partial(_small_llama, config, size)))
        eye = partial(_small_vision, vision.Qwen2VLVisionTransformer)
        stack.enter_context(patch.object(vision, "Qwen2VLVisionTransformer", eye))
        yield


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep the size of what flows through; ComfyUI leaves them as the memory happens to be."""
    generator = torch.Generator().manual_seed(seed)
    learned = [(name, buffer) for name, buffer in module.named_buffers() if name.endswith(("pos_embed", "y_embedding"))]
    weights = [*module.named_parameters(), *learned]
    for name, weight in weights:
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            weight.data.copy_(noise * 0.1 + float(name.endswith((".weight", ".scale"))))  # of a norm
        else:
            weight.data.copy_(noise / weight[0].numel() ** 0.5)


def build(name: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    family = FAMILIES[name]
    kind = getattr(comfy.supported_models, family.config)
    config = kind({**kind.unet_config, **family.network})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    fill(model.diffusion_model, 0)
    patcher = comfy.model_patcher.ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    target = family.target() if family.target else config.clip_target(family.weights)
    options = {f"{name}_model_config": size for name, size in family.encoders.items() if "head_dim" not in size}
    with small_language_models(family.encoders.values()):
        clip = comfy.sd.CLIP(
            target, tokenizer_data=family.tokenizer(), model_options={"dtype": torch.float32, **options}
        )
    fill(clip.cond_stage_model, 1)
    return patcher, clip
