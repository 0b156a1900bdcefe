"""Which parts of a conditioning carry text, how they are divided, and what each model family's look like: one table.

A *block* has moves of its own. It is an option of a conditioning entry, or a piece of one where several encoders or
layers share a tensor. Its name says how it is cut, so a region's file needs no table to be read:

    cross_attn                         the whole tensor
    conditioning_llama3__layer3        one of several layers [B, L, T, D]
    cross_attn__features5120to10240    a slice of the last dimension
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
TEXT_KEYS = (CROSS_ATTENTION, POOLED, LLAMA, BYT5, MT5)
MASK_OPTIONS = {CROSS_ATTENTION: "attention_mask", MT5: "attention_mask_mt5xl"}
SOMETIMES = (BYT5,)  # only there when the prompt quotes something to be written
# text for a ControlNet alone, and what it stands for
CONTROLNET = {"cross_attn_controlnet": CROSS_ATTENTION, "pooled_output_controlnet": POOLED}
WORD_IDS = "t5xxl_ids"  # the diffusion model embeds these words itself
WIDEST = 6_144  # features of one block; wider tensors hold several layers side by side
SLICED = {15_360: 3, 12_288: 3, 7_680: 3, 30_720: 12}  # layers in tensors of that width; others are cut evenly

_PIECE = re.compile(r"(layer|narrow|beyond)(\d+)|features(\d+)to(\d+)")


@dataclass(frozen=True)
class Family:
    """Models that share a text encoder. `encoders` are class names in ComfyUI, `shapes` those of a short prompt."""

    name: str
    encoders: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]  # by option, without the batch
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)  # options whose pieces shapes alone do not tell

    def widths(self) -> dict[str, int]:
        return {key: shape[-1] for key, shape in self.shapes.items()}


_SD3 = {CROSS_ATTENTION: ("narrow2048", "beyond2048")}
FAMILIES = (
    Family("SD 1.x", ("SD1ClipModel",), {CROSS_ATTENTION: (77, 768), POOLED: (768,)}),
    Family("SD 2.x", ("SD2ClipModel",), {CROSS_ATTENTION: (77, 1024), POOLED: (1024,)}),
    Family("SDXL", ("SDXLClipModel",), {CROSS_ATTENTION: (77, 2048), POOLED: (1280,)}),
    Family("SDXL refiner and Stable Cascade", ("SDXLRefinerClipModel", "StableCascadeClipModel"),
           {CROSS_ATTENTION: (77, 1280), POOLED: (1280,)}),
    Family("SD3", ("SD3ClipModel",), {CROSS_ATTENTION: (154, 4096), POOLED: (2048,)}, _SD3),
    Family("Flux", ("FluxClipModel",), {CROSS_ATTENTION: (256, 4096), POOLED: (768,)}),
    Family("Flux.2", ("Flux2TEModel",), {CROSS_ATTENTION: (512, 15_360)}),
    Family("AuraFlow", ("AuraT5Model",), {CROSS_ATTENTION: (256, 2048)}),
    Family("HunyuanDiT", ("HyditModel",), {CROSS_ATTENTION: (77, 1024), MT5: (256, 2048)}),
    Family("HunyuanVideo", ("HunyuanVideoClipModel",), {CROSS_ATTENTION: (30, 4096), POOLED: (768,)}),
    Family("HunyuanImage and HunyuanVideo 1.5", ("HunyuanImageTEModel",),
           {CROSS_ATTENTION: (30, 3584), BYT5: (20, 1472)}),
    Family("HiDream", ("HiDreamTEModel",), {CROSS_ATTENTION: (128, 4096), POOLED: (2048,), LLAMA: (32, 30, 4096)}),
    Family("Lumina 2", ("LuminaModel",), {CROSS_ATTENTION: (30, 2304)}),
    Family("Qwen-Image", ("QwenImageTEModel",), {CROSS_ATTENTION: (30, 3584)}),
    Family("Z-Image", ("ZImageTEModel",), {CROSS_ATTENTION: (30, 2560)}),
    Family("OmniGen2", ("Omnigen2Model",), {CROSS_ATTENTION: (30, 2048)}),
    Family("Kandinsky 5", ("Kandinsky5TEModel",), {CROSS_ATTENTION: (30, 3584), POOLED: (768,)}),
    Family("Cosmos", ("CosmosT5XXL",), {CROSS_ATTENTION: (512, 1024)}),
    Family("Wan", ("WanT5Model",), {CROSS_ATTENTION: (512, 4096)}),
    Family("Chroma and PixArt", ("PixArtT5XXL",), {CROSS_ATTENTION: (30, 4096)}),
    Family("LTXV and Mochi", ("MochiT5XXL",), {CROSS_ATTENTION: (256, 4096)}),
    Family("Ovis", ("OvisTEModel",), {CROSS_ATTENTION: (256, 2048)}),
    Family("NewBie", ("NewBieTEModel",), {CROSS_ATTENTION: (30, 2560), POOLED: (1024,)}),
)  # fmt: skip


def families(widths: Mapping[str, int]) -> list[Family]:
    """The known families whose text has these widths; what is only there for some prompts may be missing."""
    return [f for f in FAMILIES if {k: w for k, w in f.widths().items() if k in widths or k not in SOMETIMES} == widths]


def described(widths: Mapping[str, int], layers: Mapping[str, int], encoder: str = "") -> str:
    """Widths, and whose they are, for a message: "cross_attn 768, pooled_output 768, as SD 1.x has".

    Args:
        widths: by option, or by block.
        layers: how many of them the options have that hold several.
    """
    whole: dict[str, int] = {}
    for block, width in widths.items():
        whole[key_of(block)] = max(width, whole.get(key_of(block), 0))
    if not whole:
        return "no text"
    names = [f.name for f in FAMILIES if encoder in f.encoders] or [f.name for f in families(whole)]
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
        elif width > WIDEST:
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
    """What a block's name says: kind and numbers. Raises RegionError for a name that means nothing."""
    key, _, piece = name.partition("__")
    if not piece:
        return "whole", 0, 0
    found = _PIECE.fullmatch(piece)
    if not found:
        raise RegionError(f"{key[:80]!r} has no piece {piece[:80]!r}.")
    kind, number, begin, end = found.groups()
    return (kind, int(number), 0) if kind else ("features", int(begin), int(end))


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
        way = "by kind of token" if kind in ("narrow", "beyond") else kind
        if kinds.setdefault(key, way) != way:
            raise RegionError(f"Two regions divide {key} in different ways and cannot act together: train one anew.")
        tensor = tensors[key]
        if kind == "whole":
            written[key] = value
        elif kind in ("layer", "features"):
            if key not in written:
                written[key] = tensor.clone()
            place = written[key][:, first] if kind == "layer" else written[key][..., first:last]
            place.copy_(value)
        else:
            narrow, so_far = _is_narrow(tensor, first), written.get(key, tensor)
            if kind == "narrow":
                written[key] = torch.where(narrow, torch.cat([value, tensor[..., first:]], -1), so_far)
            else:
                written[key] = torch.where(narrow, so_far, value)
    return written
