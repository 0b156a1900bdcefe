"""Model families as ComfyUI itself builds them, from its own configurations, networks, text encoders and tokenizers.

Everything is as small as the constructors allow, and random, with two blocks of each kind: what one block writes into
another still needs. Text is a sixteenth as wide as the real one, except where ComfyUI's code fixes the width, and where
many layers are joined. OTHERS in test_families.py says what becomes of the model classes that are not here.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
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
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
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
EYE = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
SMALL_EYE = {**EYE, "depth": 2, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
L, G, H = clip(768 // SHRUNK), clip(1280 // SHRUNK), clip(1024 // SHRUNK)
T5XXL, QWEN = t5(4096 // SHRUNK), llama(3584 // SHRUNK)
UMT5 = {"umt5xxl": {**T5XXL, "vocab_size": PIECES}}
BYT5 = t5(1472)  # the network's code says so
MISTRAL = 5120 // SHRUNK


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
    options: Callable[[], dict[str, Any]] = field(default=dict)  # of the text encoder, besides its sizes

    def available(self) -> bool:
        try:
            return bool((self.target or dict)() or True) and hasattr(comfy.supported_models, self.config)
        except (AttributeError, TypeError):  # an encoder that came after the network, or whose sizes are in its code
            return False


# --- tokenizers whose vocabulary comes with a checkpoint ---


def _words() -> list[str]:
    """Whole words of CLIP's vocabulary, the frequent ones first."""
    path = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer" / "vocab.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))
    words = (token.removesuffix("</w>") for token in sorted(tokens, key=tokens.get) if token.endswith("</w>"))
    return [word for word in words if word.isascii() and word.isalpha()]


def sentencepiece_model(pad: int = 0, end: int = 1, start: int = 2) -> torch.Tensor:
    """A small one, with the special tokens of mT5 and Gemma."""
    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_words()[:WORDS]), model_writer=model, vocab_size=PIECES, pad_id=pad, eos_id=end,
        bos_id=start, unk_id=3, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "<unk>", *_words()[: WORDS - 3]]  # all after a token of padding counts as padding
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def pieces() -> dict[str, Any]:
    return {"spiece_model": sentencepiece_model()}


class _Vocabulary:
    """Words, in place of Mistral's tokens."""

    @staticmethod
    def from_pretrained(path: str, **kwargs: Any) -> Any:
        from tokenizers import processors
        from transformers import PreTrainedTokenizerFast

        made = word_tokenizer()
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


def mistral_tokenizer(name: str) -> dict[str, Any]:
    return {f"{name}_tokenizer_class": MistralTokenizer}


def gpt_oss_tokenizer() -> dict[str, Any]:
    return {"tokenizer_json": torch.frombuffer(bytearray(word_tokenizer().to_str().encode()), dtype=torch.uint8)}


def lens_options() -> dict[str, Any]:
    """Sizes of GPT-OSS, and how many tokens of its template stand before the prompt: 97 of its own tokenizer."""
    before, _ = comfy.text_encoders.gpt_oss._lens_render_chat("PROMPT").split("PROMPT")
    sizes = {**llama(2880 // SHRUNK), "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    return {"gpt_oss_config": {**sizes, "vocab_size": WORDS}, "selected_layers": (0, 1, 2, 3),
            "txt_offset": len(word_tokenizer().encode(before, add_special_tokens=False).ids)}  # fmt: skip


# --- networks ---


def unet(width: int, text: int, **others: Any) -> dict[str, Any]:
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": width, "num_res_blocks": [1, 1],
        "channel_mult": [1, 1], "transformer_depth": [2, 2], "transformer_depth_output": [2, 2, 2, 2],
        "transformer_depth_middle": 2, "context_dim": text // SHRUNK, "use_spatial_transformer": True, "legacy": False,
        "use_checkpoint": False, "adm_in_channels": None, **others,
    }  # fmt: skip


def adm(pooled: int, numbers: int) -> dict[str, Any]:
    """The pooled text beside so many numbers about the picture's size."""
    return {"num_classes": "sequential", "adm_in_channels": pooled // SHRUNK + 256 * numbers}


def known(parameters: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those values that this ComfyUI's network takes."""
    return {name: value for name, value in values.items() if name in {field.name for field in fields(parameters)}}


_STREAMS = {"hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True,
            "axes_dim": [8, 12, 12], "theta": 10_000}  # fmt: skip
_FLUX = {**_STREAMS, "in_channels": 16, "out_channels": 16, "patch_size": 2, "context_in_dim": 4096 // SHRUNK,
         **known(FluxParams, {"txt_ids_dims": []})}  # fmt: skip
_FLUX2 = {**_FLUX, "in_channels": 128, "out_channels": 128, "patch_size": 1, "axes_dim": [8, 8, 8, 8], "theta": 2000,
          "vec_in_dim": None, "guidance_embed": False, "global_modulation": True, "mlp_silu_act": True,
          "qkv_bias": False, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
          **known(FluxParams, {"txt_ids_dims": [3]})}  # fmt: skip
_CHROMA = {**_FLUX, "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 2,
           **known(ChromaParams, {"vec_in_dim": None})}  # fmt: skip
_HUNYUAN = {**_STREAMS, "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "theta": 256, "byt5": False,
            "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "guidance_embed": False,
            **known(HunyuanVideoParams, {"meanflow_sum": False})}  # fmt: skip
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "crossattn_emb_channels": 1024 // SHRUNK,
    "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 2, "num_heads": 2,
}  # fmt: skip
_WAN = {"dim": 64, "out_dim": 16, "num_heads": 2, "ffn_dim": 64, "num_layers": 2, "text_dim": 4096 // SHRUNK}
_LUMINA = {"patch_size": 2, "in_channels": 16, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 1,
           "multiple_of": 32, "qk_norm": True, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512]}  # fmt: skip
_ZIMAGE = {**_LUMINA, "dim": 256, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560 // SHRUNK, "rope_theta": 256.0,
           "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}  # fmt: skip

FAMILIES = {
    "SD 1.x": Family("SD15", unet(32, 768), {"clip_l": L}),
    "SD 2.x": Family("SD20", unet(64, 1024), {"clip_h": H}),
    "SDXL": Family("SDXL", unet(64, 2048, **adm(1280, 6)), {"clip_l": L, "clip_g": G}),
    "SDXL refiner": Family("SDXLRefiner", unet(64, 1280, **adm(1280, 5)), {"clip_g": G}),
    "Flux": Family("Flux", {**_FLUX, "vec_in_dim": 768 // SHRUNK}, {"clip_l": L, "t5xxl": T5XXL}),
    "Chroma": Family("Chroma", {**_CHROMA, "in_channels": 64, "out_channels": 64}, {"t5xxl": T5XXL}),
    "Chroma Radiance": Family(
        "ChromaRadiance",
        {**_CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2,
         "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
         "nerf_embedder_dtype": torch.float32,
         **known(ChromaRadianceParams, {"use_x0": False, "use_sequential_txt_ids": False})},
        {"t5xxl": T5XXL},
    ),
    "AuraFlow": Family(
        "AuraFlow",
        {"dim": 256, "n_layers": 4, "n_double_layers": 2, "n_heads": 1, "global_conddim": 64, "max_seq": 256,
         "cond_seq_dim": 2048 // SHRUNK},
        {"pile_t5xl": t5(2048 // SHRUNK)},
    ),
    "PixArt": Family(
        "PixArtSigma",
        {"num_heads": 2, "patch_size": 2, "hidden_size": 48, "in_channels": 4, "depth": 2, "model_max_length": 300,
         "micro_condition": False, "caption_channels": 4096 // SHRUNK, "input_size": 64, "pe_interpolation": 1},
        {"t5xxl": T5XXL},
    ),
    "Wan": Family("WAN21_T2V", {**_WAN, "in_dim": 16}, UMT5, tokenizer=pieces),
    "Wan 2.2 5B": Family("WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}, UMT5, tokenizer=pieces),
    "Wan Animate 2": Family("WAN_Animate2", {**_WAN, "in_dim": 36}, UMT5, tokenizer=pieces),
    "LTXV": Family(
        "LTXV",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64,
         "caption_channels": 4096 // SHRUNK},
        {"t5xxl": T5XXL},
    ),
    "Lumina 2": Family(
        "Lumina2", {**_LUMINA, "dim": 64, "cap_feat_dim": 2304 // SHRUNK},
        {"gemma2_2b": {**llama(2304 // SHRUNK), "vocab_size": PIECES}},
        tokenizer=pieces,
    ),
    "NewBie": Family(
        "Lumina2", {**_LUMINA, "dim": 64, "cap_feat_dim": 2560 // SHRUNK, "clip_text_dim": 1024 // SHRUNK},
        {"gemma3_4b": {**llama(2560 // SHRUNK), "vocab_size": PIECES},
         "jina": {**llama(1024 // SHRUNK), "vocab_size": PIECES}},
        lambda: ClipTarget(comfy.text_encoders.newbie.NewBieTokenizer, comfy.text_encoders.newbie.te()),
        lambda: {"gemma_spiece_model": sentencepiece_model(),
                 "jina_spiece_model": sentencepiece_model(pad=1, end=2, start=0)},
    ),
    "Z-Image": Family("ZImage", _ZIMAGE, {"qwen3_4b": llama(2560 // SHRUNK)}),
    "Z-Image pixel": Family(
        "ZImagePixelSpace",
        {**_ZIMAGE, "patch_size": 16, "in_channels": 3, "decoder_hidden_size": 32, "decoder_num_res_blocks": 2,
         "decoder_max_freqs": 4, "decoder_in_channels": 768},
        {"qwen3_4b": llama(2560 // SHRUNK)},
    ),
    "PixelDiT": Family(
        "PixelDiTT2I",
        {"num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 4, "pixel_attn_hidden_size": 32,
         "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 2, "txt_embed_dim": 2304 // SHRUNK},
        {"gemma2_2b": {**llama(2304 // SHRUNK), "vocab_size": PIECES}}, tokenizer=pieces,
    ),
    "CogVideoX": Family(
        "CogVideoX_T2V",
        {"num_attention_heads": 1, "attention_head_dim": 64, "time_embed_dim": 32, "text_embed_dim": 4096 // SHRUNK,
         "num_layers": 2, "use_rotary_positional_embeddings": True},
        {"t5xxl": T5XXL},
        lambda: ClipTarget(comfy.text_encoders.cogvideo.CogVideoXTokenizer, comfy.text_encoders.cogvideo.cogvideo_te()),
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {"in_channels": 64, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
         "joint_attention_dim": 3584 // SHRUNK, "axes_dims_rope": (8, 12, 12)},
        {"qwen25_7b": QWEN},
    ),
    "OmniGen2": Family(
        "Omnigen2",
        {"axes_dim_rope": [8, 12, 12], "axes_lens": [1024, 1664, 1664], "hidden_size": 64, "in_channels": 16,
         "multiple_of": 32, "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 2, "num_refiner_layers": 2,
         "patch_size": 2, "text_feat_dim": 2048 // SHRUNK, "timestep_scale": 1000.0},
        {"qwen25_3b": llama(2048 // SHRUNK)},
    ),
    "Boogu": Family(
        "Boogu",
        {"hidden_size": 64, "num_layers": 2, "num_double_stream_layers": 2, "num_refiner_layers": 2,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": (8, 12, 12),
         "instruction_feat_dim": 4096 // SHRUNK},
        {"qwen3vl_8b": llama(4096 // SHRUNK)},
    ),
    "Mage-Flow": Family(
        "MageFlow",
        {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 2560 // SHRUNK,
         "axes_dims_rope": (8, 12, 12)},
        {"qwen3vl_4b": llama(2560 // SHRUNK)},
    ),
    "JoyImage": Family(
        "JoyImage",
        {"hidden_size": 64, "num_attention_heads": 2, "text_dim": 4096 // SHRUNK, "mlp_width_ratio": 2.0,
         "num_layers": 2, "rope_dim_list": [8, 12, 12]},
        {"qwen3vl_8b": llama(4096 // SHRUNK)},
    ),
    "Ernie-Image": Family(
        "ErnieImage",
        {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64,
         "text_in_dim": 3072 // SHRUNK, "rope_axes_dim": (8, 12, 12)},
        {"ministral3_3b": {**llama(3072 // SHRUNK), "vocab_size": WORDS}},
        tokenizer=lambda: mistral_tokenizer("ministral3_3b"),
    ),
    "Ideogram 4": Family(
        "Ideogram4",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 64, "adaln_dim": 32,
         "llm_features_dim": 13 * 64, "mrope_section": (6, 5, 5)},
        {"qwen3vl_8b": llama(64, 36)},
    ),
    "Krea 2": Family(
        "Krea2",
        {"features": 64, "tdim": 32, "txtdim": 32, "heads": 2, "kvheads": 1, "multiplier": 2, "layers": 2,
         "txtheads": 2, "txtkvheads": 2},
        {"qwen3vl_4b": llama(32, 36)},
    ),
    "Lens": Family(
        "Lens",
        {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "enc_hidden_dim": 2880 // SHRUNK,
         "axes_dims_rope": (8, 12, 12), "selected_layer_index": (0, 1, 2, 3)},
        {}, lambda: ClipTarget(comfy.text_encoders.gpt_oss.LensTokenizer, comfy.text_encoders.gpt_oss.lens_te()),
        gpt_oss_tokenizer, options=lens_options,
    ),
    "Stable Cascade": Family(
        "Stable_Cascade_C",
        {"c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[2, 2], [2, 2]],
         "c_clip_text": 1280 // SHRUNK, "c_clip_text_pooled": 1280 // SHRUNK},
        {"clip_g": G},
    ),
    "HunyuanDiT": Family(
        "HunyuanDiT",
        {"depth": 4, "hidden_size": 64, "num_heads": 2, "text_states_dim": 1024 // SHRUNK,
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
         "caption_channels": [4096 // SHRUNK, 64], "max_resolution": [128, 128], "llama_layers": [0, 7, 15, 31],
         "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 2, "num_single_layers": 2,
         "out_channels": 16, "patch_size": 2, "text_emb_dim": 2048 // SHRUNK},
        {"clip_l": L, "clip_g": G, "t5xxl": T5XXL, "llama": llama(64, 32)},
        lambda: ClipTarget(comfy.text_encoders.hidream.HiDreamTokenizer, comfy.text_encoders.hidream.hidream_clip()),
    ),
    "Flux.2": Family(
        "Flux2", {**_FLUX2, "context_in_dim": 3 * MISTRAL, "guidance_embed": True},
        {"mistral3_24b": {**llama(MISTRAL, 31), "vocab_size": WORDS}},
        lambda: ClipTarget(comfy.text_encoders.flux.Flux2Tokenizer, comfy.text_encoders.flux.flux2_te()),
        lambda: mistral_tokenizer("mistral3_24b"),
    ),
    "Flux.2 Klein 4B": Family(
        "Flux2", {**_FLUX2, "context_in_dim": 3 * 2560 // SHRUNK}, {"qwen3_4b": llama(2560 // SHRUNK, 28)},
        lambda: ClipTarget(comfy.text_encoders.flux.KleinTokenizer,
                           comfy.text_encoders.flux.klein_te(model_type="qwen3_4b")),
    ),
    "Flux.2 Klein 9B": Family(
        "Flux2", {**_FLUX2, "context_in_dim": 3 * 4096 // SHRUNK}, {"qwen3_8b": llama(4096 // SHRUNK, 28)},
        lambda: ClipTarget(comfy.text_encoders.flux.KleinTokenizer8B,
                           comfy.text_encoders.flux.klein_te(model_type="qwen3_8b")),
    ),
    "Ovis": Family(
        "Flux",
        {**_FLUX, "context_in_dim": 2048 // SHRUNK, "vec_in_dim": None,
         **known(FluxParams, {"yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2]})},
        {"qwen3_2b": llama(2048 // SHRUNK)},
        lambda: ClipTarget(comfy.text_encoders.ovis.OvisTokenizer, comfy.text_encoders.ovis.te()),
    ),
    "LongCat": Family(
        "LongCatImage",
        {**_FLUX, "context_in_dim": 3584 // SHRUNK, "vec_in_dim": None, "guidance_embed": False,
         **known(FluxParams, {"txt_ids_dims": [1, 2]})},
        {"qwen25_7b": QWEN},
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
    "Anima": Family(
        "Anima",
        {**_COSMOS, "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False,
         "rope_enable_fps_modulation": False},
        {"qwen3_06b": llama(1024 // SHRUNK)},
    ),
    "LTX-2": Family(
        "LTXAV",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64,
         "audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32,
         "caption_channels": 240, "connector_attention_head_dim": 24, "connector_num_attention_heads": 10},
        {"gemma3_12b": {**llama(3840 // SHRUNK), "vocab_size": PIECES}},
        lambda: ClipTarget(comfy.text_encoders.lt.LTXAVGemmaTokenizer,
                           comfy.text_encoders.lt.ltxav_te(video_projection_dim=240)),
        pieces,
    ),
    "MiniMax H3": Family(
        "MiniMaxH3",
        {"hidden_size": 64, "num_layers": 2, "token_refiner_num_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 32, "ffn_hidden_size": 64, "text_dim": 5120 // SHRUNK, "time_embed_hidden_size": 64,
         "time_embed_dim": 32, "rope_inv_freq_len": 4},
        {"qwen3vl_32b": llama(5120 // SHRUNK)},
    ),
    "HiDream-O1": Family(
        "HiDreamO1",
        {"text_config_overrides": {**llama(64, 2), "rope_dims": [4, 2, 2]}, "vision_config_overrides": SMALL_EYE},
        {},
    ),
    "ACE-Step": Family(
        "ACEStep",
        {"num_layers": 2, "inner_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2, "mlp_ratio": 2.0,
         "text_embedding_dim": 768 // SHRUNK, "lyric_hidden_size": 64},
        {"": {**t5(768 // SHRUNK), "vocab_size": PIECES}}, tokenizer=pieces,
    ),
    "Mochi": Family(
        "GenmoMochi",
        {"depth": 3, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32, "mlp_ratio_x": 192.0,
         "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
         "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
         "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True,
         "t5_feat_dim": 4096 // SHRUNK, "t5_token_length": 256, "rope_theta": 10_000.0},
        {"t5xxl": T5XXL},
    ),
    "Kandinsky 5": Family(
        "Kandinsky5",
        {"model_dim": 64, "ff_dim": 64, "time_dim": 64, "visual_embed_dim": 132, "num_text_blocks": 2,
         "num_visual_blocks": 2, "axes_dims": (8, 12, 12), "in_text_dim": 3584 // SHRUNK,
         "in_text_dim2": 768 // SHRUNK},
        {"qwen25_7b": QWEN, "clip_l": L},
    ),
    "SD3": Family(  # its code says 4096 for text, and a region knows it by its width
        "SD3",
        {"patch_size": 2, "out_channels": 16, "depth": 3, "input_size": None, "adm_in_channels": 2048,
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 192}},
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
    return vision(**{**given, **EYE, "num_layers": 2})


# Parts of networks whose sizes are in ComfyUI's code, by module.
FIXED = {
    "comfy.ldm.anima.model": ("LLMAdapter", {**dict.fromkeys(("source_dim", "target_dim", "model_dim"), 1024 // SHRUNK),
                                             "num_layers": 2, "num_heads": 2}),
    "comfy.ldm.ace.model": ("LyricEncoder", {"output_size": 64, "attention_heads": 2, "linear_units": 64,
                                             "num_blocks": 2}),
}  # fmt: skip


@contextmanager
def small_parts() -> Iterator[None]:
    """While ComfyUI builds a network."""
    with ExitStack() as stack:
        for name, (part, sizes) in FIXED.items():
            if module := sys.modules.get(name):
                stack.enter_context(patch.object(module, part, partial(getattr(module, part), **sizes)))
        yield


@contextmanager
def small_language_models(encoders: dict[str, Size]) -> Iterator[None]:
    """While ComfyUI builds language models: they read sizes from a dataclass, and some have an eye of 600 M weights."""
    llama_module, vision = comfy.text_encoders.llama, comfy.text_encoders.qwen_vl
    # what came later: NewBie's second encoder, and language models that read pictures too
    jina, qwen3vl = (getattr(comfy.text_encoders, name, None) for name in ("jina_clip_2", "qwen3vl"))
    with ExitStack() as stack:
        for encoder, size in encoders.items():
            module = jina if encoder == "jina" else llama_module
            if "head_dim" not in size:
                continue
            for name, config in list(vars(module).items()):
                if name == "GEMMA3_VISION_CONFIG":
                    small = {**EYE, "num_hidden_layers": 2, "num_attention_heads": 2}
                    stack.enter_context(patch.dict(config, small))
                elif is_dataclass(config) and config.__module__ == module.__name__:
                    stack.enter_context(patch.object(module, name, partial(_small_llama, config, size)))
            for name, config in qwen3vl.QWEN3VL_CONFIGS.items() if qwen3vl else ():
                stack.enter_context(patch.dict(qwen3vl.QWEN3VL_CONFIGS, {name: partial(_small_llama, config, size)}))
                stack.enter_context(patch.dict(qwen3vl.QWEN3VL_VISION, {name: SMALL_EYE}))
        eye = partial(_small_vision, vision.Qwen2VLVisionTransformer)
        stack.enter_context(patch.object(vision, "Qwen2VLVisionTransformer", eye))
        yield


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep the size of what flows through; ComfyUI leaves them as the memory happens to be."""
    generator = torch.Generator().manual_seed(seed)
    from_file = ("pos_embed", "y_embedding", "rope.inv_freq")  # buffers
    learned = [(name, buffer) for name, buffer in module.named_buffers() if name.endswith(from_file)]
    weights = [*module.named_parameters(), *learned]
    for name, weight in weights:
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            weight.data.copy_(noise * 0.1 + float(name.endswith((".weight", ".scale"))))  # of a norm
        else:
            weight.data.copy_(noise / weight[0].numel() ** 0.5)


def with_weights(encoder: torch.nn.Module) -> torch.nn.Module:
    """The encoder, with weights for the layers of ComfyUI that have none until a checkpoint is loaded."""
    for layer in encoder.modules():
        if hasattr(layer, "_orig_shape") and getattr(layer, "weight", None) is None:
            layer.weight = torch.nn.Parameter(torch.empty(layer._orig_shape), requires_grad=False)
    return encoder


def build(name: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    family = FAMILIES[name]
    kind = getattr(comfy.supported_models, family.config)
    config = kind({**kind.unet_config, **family.network})
    config.unet_config |= family.network  # over what the class adds
    config.set_inference_dtype(torch.float32, None)
    with small_parts():
        model = config.get_model({})
    fill(model.diffusion_model, 0)
    patcher = comfy.model_patcher.ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    target = family.target() if family.target else config.clip_target(family.weights)
    make = target.clip
    target.clip = lambda **options: with_weights(make(**options))
    options = {f"{name}_model_config": size for name, size in family.encoders.items() if "head_dim" not in size}
    with small_language_models(family.encoders):
        clip = comfy.sd.CLIP(
            target, tokenizer_data=family.tokenizer(),
            model_options={"dtype": torch.float32, **options, **family.options()},
        )  # fmt: skip
    fill(clip.cond_stage_model, 1)
    return patcher, clip
