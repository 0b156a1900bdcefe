"""The file format: one `.safetensors` per region, checked before anything in it is used.

Tensors are named `part.block.gate.weight`, `part.block.move.down`, ... in float32; the metadata holds `format`,
`version`, one JSON text, `region`, and `sha256`, a hash over that text and the tensors (older files have none). See the
design, section 3.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from .region import Gate, Move, Part, Region, RegionError, Scope, plain
from .writing import write_atomically

FORMAT, VERSION, SUFFIX = "safe_region", "1", ".safetensors"
MAX_BYTES = 64 * 1024 * 1024  # a region of 32 blocks, width 15,360 and rank 16 stays below
MAX_PARTS, MAX_WIDTH, MAX_ROWS = 64, 65_536, 4_096
MAX_BLOCKS, MAX_TENSORS = 128, 32_768  # 64 concepts in 40 blocks each have 28,160 tensors
# A description: 64 regions combined, each with a preview and the losses of 1,000 steps, stay below.
MAX_CARD, MAX_VALUES, MAX_NESTING = 4 * 1024 * 1024, 200_000, 64
MAX_HEADER = 4 * MAX_CARD
# What tokens may be, for what a region makes of them to be judged before it acts.
LARGEST = 65_504.0  # the largest number that half precision holds
SMALLEST = torch.finfo(torch.float32).tiny
FAR = 1e4  # how many of its own scales a token may lie from the mean, in every feature: no real one comes near
_LABEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_BLOCK = re.compile(r"[a-z0-9_]{1,64}")

# Expected shapes: letters are sizes that must agree within a block.
_SHAPES: dict[str, dict[str, str]] = {
    "gate": {"weight": "kD", "bias": "k", "mean": "D", "scale": "D", "ramp": "", "context": "kD"},
    "move": {"down": "rD", "up": "Dr", "mean": "D", "scale": "D", "offset": "D", "profile": "P", "direction": "D"},
    "scope": {"square": "kD", "linear": "kD", "scale": "D", "low": "bk", "high": "bk"},
}
_WHOLE = {"gate": Gate, "scope": Scope}  # of these, every tensor must be there that has no default
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
    header = {"format": FORMAT, "version": VERSION, "region": card, "sha256": _hash(tensors, card)}
    content = _in_order(save_bytes(tensors, header))
    region_from_bytes(content, f'The region "{region.name}" cannot be saved')
    return content


def _in_order(content: bytes) -> bytes:
    """A .safetensors file with its header's keys in order: safetensors writes those of the metadata in any, and the
    same region must give the same file and hash."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _hash(tensors: Mapping[str, Tensor], card: str) -> str:
    """What a file with these tensors and this description holds beside them, so that damage to either is found."""
    digest = hashlib.sha256(card.encode(errors="surrogatepass"))
    for key, tensor in sorted(tensors.items()):
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_region(region: Region, path: Path | str, overwrite: bool = True) -> Path:
    """Write the region to `path`, as `write_region` does. Returns the path."""
    path = Path(path)
    write_region(path, region_bytes(region), overwrite)
    return path


def write_region(path: Path, content: bytes, overwrite: bool = True) -> None:
    """`write_atomically`, where no model's file is in the place. Raises RegionError, FileExistsError or OSError."""
    if overwrite:
        check_replaceable(path)
    write_atomically(path, content, overwrite)


def write_new(folder: Path, name: str, content: bytes, overwrite: bool = False) -> Path:
    """Write a region's file to `folder/name.safetensors`, or with `_2`, `_3`, ... where that is taken. Returns where.

    Of several writers each gets a name of its own. With `overwrite` a region of that name is replaced. Raises OSError,
    and RegionError where a model's file would be replaced; then nothing has changed.
    """
    for number in count(1):
        path = folder / f"{name}{f'_{number}' if number > 1 else ''}{SUFFIX}"
        if overwrite or not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):  # another writer was first
                write_region(path, content, overwrite)
                return path


def check_replaceable(path: Path) -> None:
    """Raises RegionError for a .safetensors file that is no region: a checkpoint or a LoRA is never written over."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError):  # nothing is there, or nothing that anyone could read
        return
    if header.get("format") != FORMAT:
        raise RegionError(f"{path.name} holds no safe region (a LoRA or a model, perhaps): choose another name.")


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
    """The metadata of a header of reasonable size. safetensors reads it from files only; the header is 8 bytes of
    length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    if MAX_HEADER < length <= len(content):
        raise RegionError(f"what it says about itself is larger than {MAX_HEADER // 2**20} MB, no region's is")
    header = json.loads(content[8 : 8 + length])
    if len(header) > MAX_TENSORS:
        raise RegionError(f"it holds {len(header):,} tensors, a region has {MAX_TENSORS:,} at most")
    found = header.get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def _parse(content: bytes) -> Region:
    if len(content) > MAX_BYTES:
        raise RegionError(f"the file is larger than {MAX_BYTES // 2**20} MB, no region is")
    try:
        header, tensors = _metadata(content), load_bytes(content)
    except RegionError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        raise RegionError("this is not a readable .safetensors file") from None
    metadata = _card(header)
    hashed = "sha256" in header or not header.keys() <= {"format", "version", "region"}  # what else is a damaged key
    if hashed and header.get("sha256") != _hash(tensors, header.get("region", "{}")):
        raise RegionError("it is damaged, its content is not what was saved: get it anew")
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        label, _, rest = key.partition(".")
        if not _LABEL.fullmatch(label) or not rest:
            raise RegionError(f"it holds a tensor that no region has: {key[:80]!r}")
        grouped.setdefault(label, {})[rest] = _checked(key, tensor)
    if not 0 < len(grouped) <= MAX_PARTS:
        raise RegionError(f"it holds {len(grouped)} concepts, a region has 1 to {MAX_PARTS}")
    blocks = {key.partition(".")[0] for named in grouped.values() for key in named}
    if len(blocks) > MAX_BLOCKS:
        raise RegionError(f"it acts on {len(blocks)} kinds of text, a region has {MAX_BLOCKS} at most")
    return Region(tuple(_part(label, named) for label, named in sorted(grouped.items())), metadata)


def _card(header: dict[str, str]) -> dict[str, Any]:
    """The region's own metadata from the file's header."""
    if header.get("format") != FORMAT:
        raise RegionError("this .safetensors file holds no safe region (a LoRA or a model, perhaps)")
    if header.get("version") != VERSION:
        version = plain(header.get("version"), 20)
        raise RegionError(f"it has format version {version!r}, this pack reads version {VERSION}: update the pack")
    text = header.get("region", "{}")
    if len(text) > MAX_CARD:
        raise RegionError(f"its description is larger than {MAX_CARD // 2**20} MB, no region's is")
    try:
        card = json.loads(text)
        # what could not be shown or sent on (lone surrogates, NaN, nesting without end) is refused here
        json.dumps(card, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        raise RegionError("its description is damaged (not a JSON object)")
    if not _is_modest(card):
        raise RegionError("its description is nested too deeply, or lists too much")
    return card


def _is_modest(card: object) -> bool:
    """Whether a description can be looked through in no time, as is done whenever a region acts."""
    level, count = [card], 0
    for _ in range(MAX_NESTING):
        level = [inner for one in level if isinstance(one, dict | list)
                 for inner in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        count += len(level)
        if not level:
            return count <= MAX_VALUES
    return False


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
    records: dict[str, dict[str, dict[str, Tensor]]] = {kind: {} for kind in _SHAPES}
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
    moves = {block: Move(**found) for block, found in records["move"].items()}
    for block, gate in gates.items():
        _check_gate(f"{label}.{block}.gate", gate)
    for block, move in moves.items():
        _check_move(f"{label}.{block}.move", move)
    scopes = {block: Scope(**found) for block, found in records["scope"].items()}
    for block, scope in scopes.items():
        _check_scope(f"{label}.{block}.scope", scope)
    if not scopes.keys() <= gates.keys():
        raise RegionError(f"the concept {label!r} has a scope without a gate")
    return Part(label, moves, gates, constant, scopes)


def _check_scope(where: str, scope: Scope) -> None:
    """That it can be computed for any token that a model takes, and that there is text within it."""
    largest = LARGEST / scope.scale
    if not torch.isfinite(scope.square.abs() @ largest.square() + scope.linear.abs() @ largest).all():
        raise RegionError(f"'{where}' has numbers so large, or scales so small, that nothing can be computed with them")
    if len(scope.low) != 2 or not (scope.low < scope.high).all():
        raise RegionError(f"'{where}' has no text within it")


def _check_gate(where: str, gate: Gate) -> None:
    """That walls can be computed for any token that a model takes, and that some token could open the gate fully."""
    size = gate.weight.abs() if gate.context is None else gate.weight.abs() + gate.context.abs()
    beyond = (size / gate.scale) @ (gate.mean.abs() + LARGEST) + gate.bias.abs()
    if not torch.isfinite(beyond / gate.ramp).all():
        raise RegionError(f"'{where}' has numbers so large, or scales so small, that nothing can be computed with them")
    deepest = size.sum(-1) * FAR - gate.bias
    if (deepest < gate.ramp).all():
        raise RegionError(f"'{where}' can never open: its walls lie beyond everything that a text encoder writes")


def _check_move(where: str, move: Move) -> None:
    """That the shift can be computed for any token that a model takes, and that half precision can hold it."""
    usual, farthest = torch.zeros(()), torch.zeros(())
    if move.down is not None:
        rows = move.down.abs()
        usual = move.up.abs() @ rows.sum(-1)
        farthest = move.up.abs() @ (rows @ ((move.mean.abs() + LARGEST) / move.scale))
    if move.offset is not None:
        usual = usual + move.offset.abs()
    if move.direction is not None:
        usual = usual + move.profile.abs().max() * move.direction.abs()
    if not torch.isfinite(farthest).all() or not (usual <= LARGEST).all():
        raise RegionError(f"'{where}' shifts tokens out of all proportion")


def _check_record(
    where: str, kind: str, found: dict[str, Tensor], width: int, widths: dict[str, int], block: str
) -> None:
    """One gate or move: the right tensors together, sizes that agree, positive scales."""
    if kind in _WHOLE and (missing := {f.name for f in fields(_WHOLE[kind]) if f.default is MISSING} - set(found)):
        missing = ", ".join(sorted(missing))
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
        if name in found and not (found[name] >= SMALLEST).all():  # a GPU takes what is smaller for 0
            raise RegionError(f"'{where}.{name}' must be positive")
