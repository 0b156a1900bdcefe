"""Which parts of a conditioning carry text, how they are divided, and what each model family's look like: one table.

A *block* has moves of its own. It is an option of a conditioning entry, or a piece of one where several encoders or
layers share a tensor. Its name says how it is cut, so a region's file needs no table to be read:

    cross_attn                         the whole tensor
    conditioning_llama3__layer3        one of several layers [B, L, T, D]
    cross_attn__features5120to10240    a slice of the last dimension
    cross_attn__every13from3           every 13th feature from the third on, counted from 0: one of 13 layers that take
                                       turns within each token (Ideogram 4)
    cross_attn__narrow2048             tokens that are zero beyond that feature (SD3's CLIP tokens)
    cross_attn__beyond2048             the other tokens (SD3's T5)

Cutting never copies a number to the host, and other tokens are zero rows, which count as padding everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .region import RegionError

CROSS_ATTENTION = "cross_attn"  # the entry's own tensor; the others are options
POOLED, LLAMA, BYT5, MT5 = "pooled_output", "conditioning_llama3", "conditioning_byt5small", "conditioning_mt5xl"
DIRECT = "direct_context"  # Ming-Image's states beside its connector's
TEXT_KEYS = (CROSS_ATTENTION, POOLED, LLAMA, BYT5, MT5, DIRECT)
MASK_OPTIONS = {CROSS_ATTENTION: "attention_mask", MT5: "attention_mask_mt5xl"}
SOMETIMES = (BYT5,)  # only there when the prompt quotes something to be written
# Text that an entry has beside its own, and what it stands for: for a ControlNet alone, and what is drawn on the way of
# a pose (Wan Animate 2, where a negative prompt holds that of the positive one too).
CONTROLNET = {"cross_attn_controlnet": CROSS_ATTENTION, "pooled_output_controlnet": POOLED}
POSE = "cross_attn_pose"
BESIDE = (CONTROLNET, {POSE: CROSS_ATTENTION})
WIDEST = 6_144  # features of one block; wider tensors hold several layers side by side
# Layers in tensors of that width, one after the other in each token, or taking turns; others are cut evenly.
SLICED = {15_360: 3, 12_288: 3, 7_680: 3, 30_720: 12, 11_520: 4}
INTERLEAVED = {53_248: 13}

# --- what options of a conditioning entry hold; tests/host/test_text_keys.py compares this with ComfyUI's source ---

# Text that no region reaches, and what to say of it. What the options above hold is steered.
_WITHIN = ("reads the prompt's words again inside the diffusion model, where a region of the text embedding cannot "
           "reach them: use another model.")  # fmt: skip
UNREACHED = {
    **dict.fromkeys(
        ("t5xxl_ids", "t5xxl_weights"),
        "This model (Anima) reads the prompt's words again when the sampler runs, so that its prompts cannot be looked "
        'at before: put "Guard Model with Safe Region (Moderation)" behind the model instead, which steers them then.',
    ),
    "text_input_ids": f"This model (HiDream-O1 or SenseNova U1.5) {_WITHIN}",
    "conditioning_lyrics": "This model (ACE-Step) has lyrics beside the prompt (conditioning_lyrics), which no region "
    "can steer yet: use another model.",
    "gligen": "The text in GLIGEN boxes goes into the diffusion model on a way of its own, where no region can reach "
    'it: take the node "GLIGENTextBoxApply" out.',
}
LOOKED_INTO = ("model_conds",)  # holds what models read, by names of their own
# No text. `reference_latents_text_embeds` are the words of a chat template around pictures, which nobody writes.
NO_TEXT = frozenset(
    """
    attention_mask attention_mask_img_shape attention_mask_mt5xl num_layers_stacked unprocessed_ltxav_embeds
    minimax_token_tags image_slots reference_latents_text_embeds

    start_percent end_percent clip_start_percent clip_end_percent timestep_start timestep_end area strength mask
    mask_strength set_area_to_bounds default hooks control control_apply_to_uncond additional_models uuid prompt_type
    safe_region_ids safe_region_groups

    width height target_width target_height crop_w crop_h aspect_ratio aesthetic_score guidance seed ofs
    noise_augmentation augmentation_level unclip_noise_augment_merge motion_bucket_id fps frame_rate elevation azimuth
    time_conditioning seconds_start seconds_total lyrics_strength conditioning_scale audio_inject_scale degrade_sigma
    pose_strength reference_strength vace_strength concat_mask_index guiding_frame_index keyframe_idxs latent_shapes
    guide_attention_entries reference_latents_method minimax_audio_cond_noise_aug minimax_visual_cond_noise_aug

    noise noise_concat latent_image denoise_mask concat_latent_image concat_image concat_mask condition control_video
    context_latents reference_latents reference_motion ref_latent ref_mask_flag ref_mask_28ch driving_mask_28ch
    lq_latent generated_keyframes minimax_keyframes minimax_refs time_dim_concat time_dim_replace pose_video_latent
    face_video_pixels vace_frames vace_mask camera_conditions stable_cascade_prior unclip_conditioning
    clip_vision_output clip_vision_output_pose clip_vision_output_ref clip_vision_outputs embeds
    trellis2_coords trellis2_coord_counts trellis2_generation_mode trellis2_model_frame trellis2_proj_feats
    trellis2_shape_slat

    audio_codes audio_embed ref_audio reference_audio_timbre_latents
    """.split()
)

_PIECE = re.compile(r"(?:(layer|narrow|beyond)|features(\d+)to|every([1-9]\d*)from)(\d+)")


@dataclass(frozen=True)
class Family:
    """Models that share a text encoder. `encoders` are class names in ComfyUI, `shapes` those of a short prompt."""

    name: str
    encoders: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]  # by option, without the batch
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)  # options whose pieces shapes alone do not tell
    unread: tuple[str, ...] = ()  # options that the encoder writes and the model does not read

    def widths(self) -> dict[str, int]:
        return {key: shape[-1] for key, shape in self.shapes.items()}


_SD3 = {CROSS_ATTENTION: ("narrow2048", "beyond2048")}
FAMILIES = (
    Family("SD 1.x", ("SD1ClipModel",), {CROSS_ATTENTION: (77, 768), POOLED: (768,)}, unread=(POOLED,)),
    Family("SD 2.x", ("SD2ClipModel",), {CROSS_ATTENTION: (77, 1024), POOLED: (1024,)}, unread=(POOLED,)),
    Family("SDXL", ("SDXLClipModel",), {CROSS_ATTENTION: (77, 2048), POOLED: (1280,)}),
    Family("SDXL refiner and Stable Cascade", ("SDXLRefinerClipModel", "StableCascadeClipModel"),
           {CROSS_ATTENTION: (77, 1280), POOLED: (1280,)}),
    Family("SD3", ("SD3ClipModel",), {CROSS_ATTENTION: (154, 4096), POOLED: (2048,)}, _SD3),
    Family("Flux", ("FluxClipModel",), {CROSS_ATTENTION: (256, 4096), POOLED: (768,)}),
    Family("Flux.2", ("Flux2TEModel",), {CROSS_ATTENTION: (512, 15_360)}),
    Family("Flux.2 Klein 4B", ("Flux2TEModel",), {CROSS_ATTENTION: (512, 7_680)}),
    Family("Flux.2 Klein 9B", ("Flux2TEModel",), {CROSS_ATTENTION: (512, 12_288)}),
    Family("Ernie-Image", ("ErnieTEModel",), {CROSS_ATTENTION: (30, 3072)}),
    Family("Ideogram 4", ("Ideogram4TEModel", "Ideogram4Qwen3VLTEModel"), {CROSS_ATTENTION: (30, 53_248)}),
    Family("Krea 2", ("Krea2TEModel",), {CROSS_ATTENTION: (30, 30_720)}),
    Family("Lens", ("LensTEModel",), {CROSS_ATTENTION: (30, 11_520)}),
    Family("AuraFlow", ("AuraT5Model",), {CROSS_ATTENTION: (256, 2048)}),
    Family("HunyuanDiT", ("HyditModel",), {CROSS_ATTENTION: (77, 1024), MT5: (256, 2048)}),
    Family("HunyuanVideo", ("HunyuanVideoClipModel",), {CROSS_ATTENTION: (30, 4096), POOLED: (768,)}),
    Family("HunyuanImage and HunyuanVideo 1.5", ("HunyuanImageTEModel",),
           {CROSS_ATTENTION: (30, 3584), BYT5: (20, 1472)}),
    Family("HiDream", ("HiDreamTEModel",), {CROSS_ATTENTION: (128, 4096), POOLED: (2048,), LLAMA: (32, 30, 4096)}),
    Family("Lumina 2", ("LuminaModel",), {CROSS_ATTENTION: (30, 2304)}),
    Family("PixelDiT and PiD", ("PixelDiTGemma2TE",), {CROSS_ATTENTION: (300, 2304)}),
    Family("Qwen-Image", ("QwenImageTEModel",), {CROSS_ATTENTION: (30, 3584)}),
    Family("LongCat", ("LongCatImageTEModel",), {CROSS_ATTENTION: (512, 3584)}),
    Family("Z-Image", ("ZImageTEModel",), {CROSS_ATTENTION: (30, 2560)}),
    Family("Mage-Flow", ("MageFlowTEModel",), {CROSS_ATTENTION: (30, 2560)}),
    Family("Boogu and JoyImage", ("BooguTEModel", "JoyImageTEModel"), {CROSS_ATTENTION: (30, 4096)}),
    Family("OmniGen2", ("Omnigen2Model",), {CROSS_ATTENTION: (30, 2048)}),
    Family("Kandinsky 5 and 6", ("Kandinsky5TEModel", "Kandinsky6TEModel"),
           {CROSS_ATTENTION: (30, 3584), POOLED: (768,)}),
    Family("Cosmos", ("CosmosT5XXL",), {CROSS_ATTENTION: (512, 1024)}),
    Family("Anima", ("AnimaTEModel",), {CROSS_ATTENTION: (512, 1024)}),
    Family("Wan", ("WanT5Model",), {CROSS_ATTENTION: (512, 4096)}),
    Family("CogVideoX", ("CogVideoXT5XXL",), {CROSS_ATTENTION: (226, 4096)}),
    Family("LTX-2", ("LTXAVTEModel",), {CROSS_ATTENTION: (30, 3840)}),
    Family("LTX-2.3", ("LTXAVTEModel",), {CROSS_ATTENTION: (30, 6144)}),
    Family("MiniMax H3", ("MiniMaxH3TEModel",), {CROSS_ATTENTION: (30, 5120)}),
    Family("Chroma and PixArt", ("PixArtT5XXL",), {CROSS_ATTENTION: (30, 4096)}),
    Family("LTXV and Mochi", ("MochiT5XXL",), {CROSS_ATTENTION: (256, 4096)}),
    Family("Ovis", ("OvisTEModel",), {CROSS_ATTENTION: (256, 2048)}),
    Family("Ming-Image", ("MingImageTEModel",), {CROSS_ATTENTION: (256, 2560), DIRECT: (30, 3840)}),
    Family("Qwen-Image 2.1", ("QwenImage21TEModel",), {CROSS_ATTENTION: (30, 4096)}),
    Family("NewBie", ("NewBieTEModel",), {CROSS_ATTENTION: (30, 2560), POOLED: (1024,)}),
)  # fmt: skip


def class_names(kind: type) -> list[str]:
    """A text encoder's class and what it is derived from, the narrowest first.

    Without those that ComfyUI makes within functions from a family's own, some of them by another family's name.
    """
    return [one.__name__ for one in kind.__mro__ if "<locals>" not in one.__qualname__]


def families(widths: Mapping[str, int]) -> list[Family]:
    """The known families whose text has these widths; what is only there for some prompts may be missing."""
    return [f for f in FAMILIES if {k: w for k, w in f.widths().items() if k in widths or k not in SOMETIMES} == widths]


def whole_widths(blocks: Mapping[str, int]) -> dict[str, int]:
    """Features by option, of features by block: of layers and kinds of token these are the option's own."""
    whole: dict[str, int] = {}
    for block, width in blocks.items():
        kind, _, last = _piece(block)
        width = {"features": last, "every": last * width}.get(kind, width)
        whole[key_of(block)] = max(width, whole.get(key_of(block), 0))
    return whole


def described(widths: Mapping[str, int], layers: Mapping[str, int], encoder: str = "") -> str:
    """Widths, and whose they are, for a message: "cross_attn 768, pooled_output 768, as SD 1.x has".

    Args:
        widths: by option, or by block.
        layers: how many of them the options have that hold several.
    """
    whole = whole_widths(widths)
    if not whole:
        return "no text"
    alike, own = families(whole), [f for f in FAMILIES if encoder in f.encoders]
    names = [f.name for f in [f for f in own if f in alike] or own or alike]
    known = f", as {' or '.join(names)} has" if names else ""
    pieces = [f"{key} {layers[key]} x {w}" if key in layers else f"{key} {w}" for key, w in whole.items()]
    return ", ".join(pieces) + known


def block_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The blocks of a conditioning's text tensors, by their shapes."""
    found = families({key: tensor.shape[-1] for key, tensor in tensors.items()})
    known = found[0].divided if found else {}
    names = []
    for key, tensor in tensors.items():
        width = tensor.shape[-1]
        if key in known:
            pieces = list(known[key])
        elif tensor.ndim == 4:
            pieces = [f"layer{i}" for i in range(tensor.shape[1])]
        elif count := INTERLEAVED.get(width):
            pieces = [f"every{count}from{i}" for i in range(count)]
        elif width in SLICED or width > WIDEST:
            count = SLICED.get(width) or next(n for n in range(2, width + 1) if width % n == 0 and width // n <= WIDEST)
            step = width // count
            pieces = [f"features{i * step}to{(i + 1) * step}" for i in range(count)]
        else:
            pieces = [""]
        names += [f"{key}__{piece}" if piece else key for piece in pieces]
    return names


def key_of(name: str) -> str:
    """The option that a block is cut from."""
    return name.partition("__")[0]


@lru_cache(1024)
def _piece(name: str) -> tuple[str, int, int]:
    """What a block's name says: kind and numbers, for a piece of the last dimension where it begins, and where it ends
    or in which steps it goes on. Raises RegionError for a name that means nothing."""
    key, _, piece = name.partition("__")
    if not piece:
        return "whole", 0, 0
    found = _PIECE.fullmatch(piece)
    if not found:
        raise RegionError(f"{key[:80]!r} has no piece {piece[:80]!r}.")
    kind, begin, step, number = found.groups()
    if kind:
        return kind, int(number), 0
    return ("features", int(begin), int(number)) if begin else ("every", int(number), int(step))


def block_width(name: str, tensors: Mapping[str, Tensor]) -> int | None:
    """Features of a block in this conditioning, from shapes alone; None where it is not there."""
    kind, first, last = _piece(name)
    tensor = tensors.get(key_of(name))
    if tensor is None:
        return None
    width = tensor.shape[-1]
    if kind == "layer":
        return width if tensor.ndim == 4 and first < tensor.shape[1] else None
    if kind == "features":
        return last - first if first < last <= width else None
    if kind == "every":
        return width // last if first < last and width % last == 0 else None
    return min(first, width) if kind == "narrow" else width


def _is_narrow(tensor: Tensor, width: int) -> Tensor:
    return (tensor[..., width:] == 0).all(-1, keepdim=True)


def read_blocks(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Blocks by name; those whose tensor is not there are left out."""
    blocks = {}
    for name in names:
        kind, first, last = _piece(name)
        tensor = tensors.get(key_of(name))
        if tensor is None:
            continue
        if kind == "layer":
            tensor = tensor[:, first]
        elif kind == "features":
            tensor = tensor[..., first:last]
        elif kind == "every":
            tensor = tensor[..., first::last]
        elif kind != "whole":
            chosen = _is_narrow(tensor, first) == (kind == "narrow")
            tensor = torch.where(chosen, tensor, torch.zeros_like(tensor))[..., : first if kind == "narrow" else None]
        blocks[name] = tensor
    return blocks


def write_blocks(tensors: Mapping[str, Tensor], blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with these blocks in their places; tensors without any are left out.

    Raises RegionError when one tensor is divided in two ways.
    """
    written: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, value in blocks.items():
        key, (kind, first, last) = key_of(name), _piece(name)
        way = {"narrow": "by kind of token", "beyond": "by kind of token", "every": f"every {last}"}.get(kind, kind)
        if kinds.setdefault(key, way) != way:
            raise RegionError(f"Two regions divide {key} in different ways and cannot act together: train one anew.")
        tensor = tensors[key]
        if kind == "whole":
            written[key] = value
        elif kind in ("layer", "features", "every"):
            if key not in written:
                written[key] = tensor.clone()
            place = {"layer": (slice(None), first), "features": (..., slice(first, last)),
                     "every": (..., slice(first, None, last))}[kind]  # fmt: skip
            written[key][place] = value
        else:
            narrow, so_far = _is_narrow(tensor, first), written.get(key, tensor)
            if kind == "narrow":
                written[key] = torch.where(narrow, torch.cat([value, tensor[..., first:]], -1), so_far)
            else:
                written[key] = torch.where(narrow, so_far, value)
    return written
