"""The paper's own files: a state dict with `a` [1, 1, D] and `b` [1, T, 1], applied as `c + beta * b a`.

"Responsible Diffusion Models via Constraining Text Embeddings within Safe Regions", WWW 2025.
"""
from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .files import MAX_ROWS, MAX_WIDTH, read_limited, slug
from .region import Move, Part, Region, RegionError


def import_paper(path: Path | str, concept: str = "") -> Region:
    """Read a `.pth` of the paper's release as a region that acts on every prompt (mode `always`).

    Only tensors are read (`weights_only=True`). Raises RegionError when the file is anything else.
    """
    path = Path(path)
    wanted = "a state dict with a [1, 1, D] and b [1, T, 1]"
    try:
        content = io.BytesIO(read_limited(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(content, map_location="cpu", weights_only=True)
    except RegionError as error:
        raise RegionError(f"{path.name}: {error}.") from None
    except Exception:  # whatever a damaged or hostile pickle makes torch's reader raise
        raise RegionError(f"{path.name}: this is not a file of the paper's form ({wanted}).") from None
    a, b = (state.get("a"), state.get("b")) if isinstance(state, dict) else (None, None)
    if not all(isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided and t.ndim == 3
               and t.device.type == "cpu" for t in (a, b)):  # fmt: skip
        raise RegionError(f"{path.name}: this file does not hold {wanted}.")
    if a.shape[:2] != (1, 1) or b.shape[0] != 1 or b.shape[2] != 1 or a.numel() == 0 or b.numel() == 0:
        raise RegionError(f"{path.name}: a is {list(a.shape)} and b {list(b.shape)}; {wanted} is needed.")
    if a.shape[-1] > MAX_WIDTH or b.shape[1] > MAX_ROWS or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise RegionError(f"{path.name}: its numbers are not finite or its shapes are impossible.")
    profile, direction = (t.detach().float().flatten().clone() for t in (b, a))
    move = Move(profile=profile, direction=direction)
    concept = concept or path.stem
    metadata = {
        "name": concept,
        "concept": concept,
        "description": "Imported from the paper's release; shifts every prompt.",
        "encoder": {"name": f"a text encoder of width {a.shape[-1]}", "blocks": {"cross_attn": a.shape[-1]}},
        "recipe": {"preset": "paper", "imported_from": path.name},
    }
    return Region((Part(slug(concept), {"cross_attn": move}),), metadata)
