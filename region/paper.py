"""The paper's own files: a state dict with `a` [1, 1, D] and `b` [1, T, 1], applied as `c + beta * b a`.

"Responsible Diffusion Models via Constraining Text Embeddings within Safe Regions", WWW 2025.
"""
from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .files import LARGEST, MAX_ROWS, MAX_WIDTH, read_limited, slug
from .region import Move, Part, Region, RegionError

MAX_UNPACKED = 4 * 1024 * 1024  # the widest direction has a fourth of a megabyte
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _unpacked(content: bytes) -> io.BytesIO:
    """The file as torch is to read it: what is packed is unpacked and counted here, since torch sets no limit.

    Raises RegionError when it is too large; what is no archive (torch's older form) comes back as it is.
    """
    too_large = RegionError(f"the file is larger than {MAX_UNPACKED // 2**20} MB, no direction is")
    if len(content) > MAX_UNPACKED:
        raise too_large
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return io.BytesIO(content)
    plainly = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as packed, zipfile.ZipFile(plainly, "w") as stored:
        left = MAX_UNPACKED
        for entry in packed.infolist():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others have no limit in Python
                raise zipfile.BadZipFile
            with packed.open(entry) as file:
                found = file.read(left + 1)
            left -= len(found) + len(entry.filename)
            if left < 0:
                raise too_large
            stored.writestr(entry.filename, found)
    plainly.seek(0)
    return plainly


def import_paper(path: Path | str, concept: str = "") -> Region:
    """Read a `.pth` of the paper's release as a region that acts on every prompt (mode `always`).

    Only tensors are read (`weights_only=True`). Raises RegionError when the file is anything else.
    """
    path = Path(path)
    wanted = "a state dict with a [1, 1, D] and b [1, T, 1]"
    try:
        content = _unpacked(read_limited(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(content, map_location="cpu", weights_only=True)
    except RegionError as error:
        raise RegionError(f"{path.name}: {error}.") from None
    except Exception:  # whatever a damaged or hostile pickle makes torch's reader raise
        raise RegionError(f"{path.name}: this is not a file of the paper's form ({wanted}).") from None
    a, b = (state.get("a"), state.get("b")) if isinstance(state, dict) else (None, None)
    if not all(isinstance(t, Tensor) and t.dtype in _FLOATS and t.layout == torch.strided and t.ndim == 3
               and t.device.type == "cpu" for t in (a, b)):  # fmt: skip
        raise RegionError(f"{path.name}: this file does not hold {wanted}.")
    if a.shape[:2] != (1, 1) or b.shape[0] != 1 or b.shape[2] != 1 or a.numel() == 0 or b.numel() == 0:
        raise RegionError(f"{path.name}: a is {list(a.shape)} and b {list(b.shape)}; {wanted} is needed.")
    if a.shape[-1] > MAX_WIDTH or b.shape[1] > MAX_ROWS:
        raise RegionError(f"{path.name}: its shapes are impossible.")
    profile, direction = (t.detach().float().flatten().clone() for t in (b, a))
    if not (profile.abs().max() * direction.abs() <= LARGEST).all():  # NaN is not, either
        raise RegionError(f"{path.name}: its numbers are not finite, or out of all proportion.")
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
