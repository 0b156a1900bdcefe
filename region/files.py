"""The file format: one `.safetensors` per region, checked before anything in it is used.

Tensors are named `part.block.gate.weight`, `part.block.move.down`, ... in float32; the metadata holds `format`,
`version` and one JSON text, `region`. See the design, section 3.
"""
from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from .region import Gate, Move, Part, Region, RegionError

FORMAT, VERSION = "safe_region", "1"
MAX_BYTES = 64 * 1024 * 1024  # a region of 32 blocks, width 15,360 and rank 16 stays below
MAX_PARTS, MAX_WIDTH, MAX_ROWS = 64, 65_536, 4_096
_LABEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_BLOCK = re.compile(r"[a-z0-9_]{1,64}")

# Expected shapes: letters are sizes that must agree within a block.
_SHAPES: dict[str, dict[str, str]] = {
    "gate": {"weight": "kD", "bias": "k", "mean": "D", "scale": "D", "ramp": ""},
    "move": {"down": "rD", "up": "Dr", "mean": "D", "scale": "D", "offset": "D", "profile": "P", "direction": "D"},
}
_TOGETHER = ({"down", "up", "mean", "scale"}, {"profile", "direction"})


def slug(text: str) -> str:
    """A label for a part from free text: lower case letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-") or "concept"


def region_bytes(region: Region) -> bytes:
    """The region as the content of a .safetensors file. Raises RegionError for a region that could not be read back."""
    tensors: dict[str, Tensor] = {}
    for part in region.parts:
        if not _LABEL.fullmatch(part.label):
            raise RegionError(f'"{part.label[:80]}" cannot name a concept: use lower case letters, digits and dashes.')
        named = part.named_tensors()
        tensors |= {f"{part.label}.{k}": v.detach().cpu().float().contiguous().clone() for k, v in named.items()}
    if len({part.label for part in region.parts}) != len(region.parts):
        raise RegionError("Two concepts of this region have the same name.")
    try:
        card = json.dumps(region.metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RegionError(f"The region's description cannot be written as JSON: {error}.") from None
    content = _in_order(save_bytes(tensors, {"format": FORMAT, "version": VERSION, "region": card}))
    region_from_bytes(content, f'The region "{region.name}" cannot be saved')
    return content


def _in_order(content: bytes) -> bytes:
    """A .safetensors file with its header's keys in order: safetensors writes those of the metadata in any, and the
    same region must give the same file and hash."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def plain(value: object, limit: int = 200) -> str:
    """A text or number from a file as one line without control characters; anything else is empty."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return ""
    line = "".join(c if c.isprintable() else " " for c in str(value)[: limit * 4])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_region(region: Region, path: Path | str) -> Path:
    """Write the region to `path`, whole or not at all. Returns the path."""
    path = Path(path)
    write_atomically(path, region_bytes(region))
    return path


def load_region(path: Path | str) -> Region:
    """Read a region and check everything about it.

    Raises:
        RegionError: one sentence that names the file and what is wrong with it.
    """
    path = Path(path)
    try:
        return _parse(read_limited(path))
    except RegionError as error:
        raise RegionError(f"{path.name}: {error}.") from None


def read_limited(path: Path) -> bytes:
    """The content of a file, cut where it is larger than any region. RegionError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> RegionError:
    return RegionError(f"the file cannot be read ({getattr(error, 'strerror', None) or error})")


def region_from_bytes(content: bytes, name: str = "region") -> Region:
    """As `load_region`, from bytes; `name` is what errors call it."""
    try:
        return _parse(content)
    except RegionError as error:
        raise RegionError(f"{name}: {error}.") from None


def _metadata(content: bytes) -> dict[str, str]:
    """The header's metadata. safetensors reads it from files only; the header is 8 bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def _parse(content: bytes) -> Region:
    if len(content) > MAX_BYTES:
        raise RegionError(f"the file is larger than {MAX_BYTES // 2**20} MB, no region is")
    try:
        tensors, header = load_bytes(content), _metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        raise RegionError("this is not a readable .safetensors file") from None
    metadata = _card(header)
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        label, _, rest = key.partition(".")
        if not _LABEL.fullmatch(label) or not rest:
            raise RegionError(f"it holds a tensor that no region has: {key[:80]!r}")
        grouped.setdefault(label, {})[rest] = _checked(key, tensor)
    if not 0 < len(grouped) <= MAX_PARTS:
        raise RegionError(f"it holds {len(grouped)} concepts, a region has 1 to {MAX_PARTS}")
    return Region(tuple(_part(label, named) for label, named in sorted(grouped.items())), metadata)


def _card(header: dict[str, str]) -> dict[str, Any]:
    """The region's own metadata from the file's header."""
    if header.get("format") != FORMAT:
        raise RegionError("this .safetensors file holds no safe region (a LoRA or a model, perhaps)")
    if header.get("version") != VERSION:
        version = str(header.get("version"))[:20]
        raise RegionError(f"it has format version {version!r}, this pack reads version {VERSION}: update the pack")
    try:
        card = json.loads(header.get("region", "{}"))
        # what could not be shown or sent on (lone surrogates, NaN, nesting without end) is refused here
        json.dumps(card, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        raise RegionError("its description is damaged (not a JSON object)")
    return card


def _checked(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RegionError(f"{key[:80]!r} holds {str(tensor.dtype).removeprefix('torch.')} numbers, floats are needed")
    if tensor.ndim > 2 or tensor.numel() == 0 or (tensor.ndim and tensor.shape[-1] > MAX_WIDTH):
        raise RegionError(f"{key[:80]!r} has an impossible shape {list(tensor.shape)}")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise RegionError(f"{key[:80]!r} holds numbers that are not finite")
    return tensor


def _part(label: str, named: dict[str, Tensor]) -> Part:
    records: dict[str, dict[str, dict[str, Tensor]]] = {"gate": {}, "move": {}}
    constant: dict[str, Tensor] = {}
    for key, tensor in named.items():
        pieces = key.split(".")
        if not _BLOCK.fullmatch(pieces[0]):
            raise RegionError(f"it holds a tensor that no region has: {key[:80]!r}")
        if pieces[1:] == ["constant"] and tensor.ndim == 2 and len(tensor) <= MAX_ROWS:
            constant[pieces[0]] = tensor
        elif len(pieces) == 3 and pieces[1] in _SHAPES and pieces[2] in _SHAPES[pieces[1]]:
            records[pieces[1]].setdefault(pieces[0], {})[pieces[2]] = tensor
        else:
            raise RegionError(f"it holds a tensor that no region has: {key[:80]!r}")
    widths: dict[str, int] = {}
    for kind, blocks in records.items():
        for block, found in blocks.items():
            _check_record(f"{label}.{block}.{kind}", kind, found, widths.setdefault(block, 0), widths, block)
    for block, tensor in constant.items():
        if widths.get(block) != tensor.shape[-1]:
            raise RegionError(f"'{label}.{block}.constant' does not fit the rest of the region")
    if not records["move"]:
        raise RegionError(f"the concept {label!r} has no move")
    gates = {block: Gate(**found) for block, found in records["gate"].items()}
    return Part(label, {block: Move(**found) for block, found in records["move"].items()}, gates, constant)


def _check_record(
    where: str, kind: str, found: dict[str, Tensor], width: int, widths: dict[str, int], block: str
) -> None:
    """One gate or move: the right tensors together, sizes that agree, positive scales."""
    if kind == "gate" and set(found) != {f.name for f in fields(Gate)}:
        missing = ", ".join(sorted({f.name for f in fields(Gate)} - set(found)))
        raise RegionError(f"'{where}' lacks {missing}")
    if kind == "move":
        for group in _TOGETHER:
            if found.keys() & group and not group <= found.keys():
                raise RegionError(f"'{where}' lacks {', '.join(sorted(group - found.keys()))}")
        if not found.keys() & {"offset", "direction"}:
            raise RegionError(f"'{where}' lacks offset")
    sizes: dict[str, int] = {"D": width} if width else {}
    for name, tensor in found.items():
        letters = _SHAPES[kind][name]
        if tensor.ndim != len(letters):
            raise RegionError(f"'{where}.{name}' has an impossible shape {list(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape):
            if sizes.setdefault(letter, size) != size or (letter != "D" and size > MAX_ROWS):
                raise RegionError(f"'{where}.{name}' has shape {list(tensor.shape)}, which does not fit the rest")
    widths[block] = sizes["D"]
    for name in ("scale", "ramp"):
        if name in found and not (found[name] > 0).all():
            raise RegionError(f"'{where}.{name}' must be positive")


def read_card(path: Path | str) -> dict[str, Any]:
    """Only the metadata of a region file, for lists. Raises RegionError like `load_region`."""
    path = Path(path)
    try:
        with path.open("rb"), safe_open(str(path), framework="pt") as file:
            return _card(file.metadata() or {})
    except RegionError as error:
        reason = error
    except (OSError, ValueError) as error:
        reason = _unreadable(error)
    except SafetensorError:
        reason = RegionError("this is not a readable .safetensors file")
    raise RegionError(f"{path.name}: {reason}.")
