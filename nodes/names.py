"""File names and texts from users and from strangers' files. Without ComfyUI, so that they are easy to test."""
from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from ..region import Region
from ..region.files import SUFFIX, slug

LOADED = ("ckpt", "checkpoint", "unet", "model", "gguf")  # in the names of inputs that choose a model's file
MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".gguf", ".sft", ".bin")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names on Windows
# The frontend shows progress texts as HTML; look-alikes are harmless in every version of it.
_HTML = str.maketrans({"<": "\u2039", ">": "\u203a", "&": "+"})


def safe_name(name: str) -> str:
    """A relative file name without suffix, from whatever was typed; `/` makes folders. Empty when nothing is left."""
    name = name.strip()
    if name.lower().endswith(SUFFIX):
        name = name[: -len(SUFFIX)]
    pieces = []
    for piece in re.split(r"[\\/]+", name):
        piece = re.sub(r"[^\w .()+-]+", "_", piece).strip(" .")[:80].strip(" .")
        if piece:
            pieces.append(f"_{piece}" if _RESERVED.fullmatch(piece) else piece)
    return "/".join(pieces[-4:])


def shown(text: object, limit: int = 300) -> str:
    """Text from a file, safe to show on a node: one line, no markup, not too long."""
    line = " ".join(str(text).split()).translate(_HTML).encode(errors="replace").decode()  # logs take no lone surrogate
    return line if len(line) <= limit else line[: limit - 1] + "…"


def file_state(path: Path | None) -> str:
    """What changes with a file's content, for `fingerprint_inputs`: another file may have the same size and time."""
    if path is None:
        return "no file"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def default_name(region: Region) -> str:
    """A file name for a region that was given none: its concept and the model that it was learned on."""
    name, family = (safe_name(str(text)).replace("/", "-") for text in (region.name, region.metadata.get("family", "")))
    return ".".join(filter(None, (slug(region.name) if name.isascii() else name, family[:30])))


def checkpoint_of(prompt: Any, node_id: str | None) -> str:
    """The file from which the model of a node comes, by the prompt that is run; empty where that cannot be told.

    Nodes that patch a model have an input for it, by whatever name: the way leads from one to the next, as far as the
    first that names a file.
    """
    name, seen = str(node_id), set()
    while isinstance(prompt, dict) and name in prompt and name not in seen:
        seen.add(name)
        inputs = prompt[name].get("inputs", {})
        files = {key.lower(): value for key, value in inputs.items()
                 if isinstance(value, str) and value.lower().endswith(MODEL_FILES)}  # fmt: skip
        file = next((files[key] for key in files if any(word in key for word in LOADED)), "")
        if len(seen) > 1 and file:
            return re.split(r"[\\/]", file)[-1][:120]
        links = {key: value for key, value in inputs.items() if isinstance(value, list) and len(value) == 2}
        link = next((value for key, value in links.items() if "model" in key.lower()), None)
        link = next(iter(links.values())) if link is None and len(links) == 1 else link  # a reroute
        name = str(link[0]) if link else ""
    return ""


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, or None when it leads out of it, by `..`, an absolute path or a link."""
    root = folder.resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError):  # a name that no file can have
        return None
    return path if path.is_relative_to(root) else None
