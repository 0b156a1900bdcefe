"""What a conditioning holds besides the text that regions steer: known, or refused before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import BESIDE, CROSS_ATTENTION, LLAMA, LOOKED_INTO, NO_TEXT, POOLED, TEXT_KEYS, UNREACHED
from .region import RegionError, plain

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FEWEST_FEATURES = 32  # of text states; what is narrower is numbers
DEEPEST = 16  # lists within lists that are looked into; what lies deeper counts as text
MASKED_OUT = -100.0  # an additive mask that low leaves nothing of a token


def could_be_text(value: Any, depth: int = 0) -> bool:
    """Whether an option of unknown name may be text: token states [B, T, D], a pooled vector [B, D] or ids, or a list,
    tuple, dict or ComfyUI's COND of such. Floats of other shapes are pictures, latents and numbers."""
    if depth > DEEPEST:
        return True
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value.ndim in (2, 3) and value.shape[-1] >= FEWEST_FEATURES
        return value.dtype != torch.bool and value.ndim in (1, 2) and value.numel() > 1
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return any(could_be_text(one, depth + 1) for one in value)
    inside = getattr(value, "cond", None)
    return inside is not None and could_be_text(inside, depth + 1)


def _unknown(key: str, value: Any) -> str:
    """The name of what may be text in an option; empty where there is none."""
    if key in LOOKED_INTO and isinstance(value, dict):
        return next(filter(None, (_unknown(str(name), one) for name, one in value.items())), "")
    return "" if key in NO_TEXT or not could_be_text(value) else plain(key, 80) or "?"


def unknown_text(entries: Iterable[Sequence[Any]]) -> list[str]:
    """Names of what may be text in options of entries `[tensor, options]` that we do not know."""
    apart = (UNREACHED, TEXT_KEYS, *BESIDE)
    options = (item for _, options in entries for item in options.items() if not any(item[0] in keys for keys in apart))
    return list(dict.fromkeys(filter(None, (_unknown(str(key), value) for key, value in options))))


def _is_readable(value: Any, key: str) -> bool:
    """Whether this is text of that option in a form that is steered: ordinary floats, as encoders write them."""
    dimensions = {POOLED: (2, 3), LLAMA: (3, 4)}.get(key, (3,))
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided and \
        value.dtype in FLOATS and value.ndim in dimensions


def check_known(entries: Sequence[Sequence[Any]], allow_unknown: bool = False) -> None:
    """Raises RegionError where entries `[tensor, options]` hold text that no region can steer.

    Args:
        allow_unknown: let pass what may be text and has a name that we do not know. Text that is known to be out of
            reach is refused all the same.
    """
    for tensor, options in entries:
        for key, value in ((CROSS_ATTENTION, tensor), *options.items()):
            if value is None:
                continue
            if key in UNREACHED:
                raise RegionError(UNREACHED[key])
            known_text = next((group[key] for group in BESIDE if key in group), key)
            if known_text in TEXT_KEYS and not _is_readable(value, known_text):
                raise RegionError(
                    f'The text "{key}" of this prompt has a form that no region can read: connect a prompt that comes '
                    "from a text encoder."
                )
    if not allow_unknown and (names := unknown_text(entries)):
        raise RegionError(
            f'This prompt carries "{names[0]}", which may be text that Safe Region does not know and the model would '
            'read unguarded: take out the node that adds it, or set unknown_text to "allow".'
        )


def keep_mask(mask: Any, rows: int, tokens: int) -> Tensor | None:
    """Which tokens an attention mask leaves to the model, as ComfyUI's models read it: bool [rows or 1, tokens].

    None where it is for another number of tokens (a node added some, or it spans the picture's tokens too): all count.
    A number in a mask of bools or integers keeps a token unless it is 0. Floats are added to the attention, so that 0
    keeps a token, and so are integers among which are negative ones. A token counts if any query or head may look at
    it, and all of a row count of which nothing is left. Nothing is copied to the host.

    Args:
        mask: [T], [B, T], [B, Q, T] or [B, heads, Q, T]; where B is neither 1 nor `rows` any of its rows may meet any
            prompt, so a token counts if one keeps it.

    Raises:
        RegionError: for anything else.
    """
    if not isinstance(mask, Tensor) or not 1 <= mask.ndim <= 4 or mask.is_complex():
        raise RegionError(
            "This prompt's attention mask has a form that no region can read: take out the node that changes it."
        )
    if mask.shape[-1] != tokens or not len(mask):
        return None
    if mask.is_floating_point():
        keeps = ~(mask.float() <= MASKED_OUT)
    else:
        keeps = torch.where((mask < 0).any(), mask > MASKED_OUT, mask != 0)
    keeps = keeps[None] if keeps.ndim == 1 else keeps.flatten(1, -2).any(1) if keeps.ndim > 2 else keeps
    if len(keeps) != rows:
        keeps = keeps.any(0, keepdim=True)
    return keeps | ~keeps.any(-1, keepdim=True)
