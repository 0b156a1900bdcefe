"""A region's card, and what a workflow carries of its region: hash, source, and the file itself when it is embedded.

Without ComfyUI. Files and workflows come from strangers: everything here is cut to length and is plain text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..region import Region, RegionError
from ..region.conditioning import balances
from ..region.files import plain, read_limited, region_from_bytes
from ..region.verdict import UNFINISHED, inner, on_harmless, on_unsafe, share, verdict
from .names import shown

EMBED_BYTES = 256 * 1024
PREVIEW_BYTES, PREVIEW_SIDE, PREVIEW_AREA, PREVIEW_SHOWN = 256 * 1024, 2048, 2048 * 1024, 512
PREVIEW_SCANS = 32  # of a JPEG: progressive ones have some ten, and each is decoded over the whole picture
_PREVIEW_TEXT = PREVIEW_BYTES * 4 // 3 + 8  # in base64
_HASH = re.compile(r"[0-9a-f]{64}")
_EMBED_TEXT = EMBED_BYTES * 4 // 3 + 8  # the same in base64
_MEND = 'or click "Use the file as it is now" on the node'

Find = Callable[[str], Path | None]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- the card ---


def _effect(data: dict[str, Any]) -> str:
    """On what it acts, and what was measured, in words."""
    said, found = on_unsafe(data), []
    for name, row in list(inner(data, "measured").items())[:8]:
        before, after = (share(row.get(f"unsafe_{when}")) if isinstance(row, dict) else None
                         for when in ("before", "after"))  # fmt: skip
        if before is not None and after is not None and before > 0.1:  # the others are harmless prompts
            found.append(f"{plain(name, 40)} {before:.0%} → {after:.0%}")
    if found:
        said.append(f"unsafe pictures: {', '.join(found)}")
    shares = [f"{plain(name, 40)} {part:.0%}" for name, value in list(inner(data, "shares").items())[:8]
              if (part := share(value)) is not None]  # fmt: skip
    if shares:
        said.append(f"draws {', '.join(shares)}")
    return "; ".join(said)


def _harmless(region: Region) -> str:
    """How many harmless prompts it touches, in words."""
    if not all(part.gates for part in region.parts):
        return "acts on every prompt"
    return "; ".join(on_harmless(region.metadata))


@lru_cache(maxsize=64)
def _encoded_anew(encoded: str) -> str:
    content = base64.b64decode(encoded, validate=True)
    if content.count(b"\xff\xda") > PREVIEW_SCANS or b"zTXt" in content or b"iTXt" in content:  # texts unpack to MBs
        return ""
    with Image.open(BytesIO(content), formats=("JPEG", "PNG")) as picture:
        if max(picture.size) > PREVIEW_SIDE or math.prod(picture.size) > PREVIEW_AREA:
            return ""
        small = picture.convert("RGB")
    small.thumbnail((PREVIEW_SHOWN, PREVIEW_SHOWN))
    written = BytesIO()
    small.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


def preview(encoded: object) -> str:
    """A picture from a file as a data URL of a JPEG that we encode; empty when there is none, or anything is odd."""
    try:
        return _encoded_anew(encoded) if isinstance(encoded, str) and len(encoded) <= _PREVIEW_TEXT else ""
    except Exception:  # decoders raise whatever they like on broken pictures
        return ""


def card(content: bytes, name: str) -> dict[str, Any]:
    """`region_card` with the preview, of a file that nobody has read yet. RegionError when it is no sound region."""
    region = region_from_bytes(content, shown(name, 80))
    return region_card(region, content, name) | {"preview": preview(region.metadata.get("preview"))}


def region_card(region: Region, content: bytes, name: str) -> dict[str, Any]:
    """What a region says about itself, in strings and numbers only; `content` is its file. Pictures take longer."""
    data = region.metadata
    encoder, recipe, unfinished = inner(data, "encoder"), inner(data, "recipe"), plain(data.get(UNFINISHED), 80)
    told = [("preset", ""), ("pairs", " prompt pairs"), ("rows", " rows"), ("steps", " steps")]
    told = told[:-1] if unfinished else told  # it says itself how many of them there were
    return {
        "name": plain(name), "sha256": sha256(content), "bytes": len(content),
        "title": plain(data.get("name"), 80) or plain(region.name, 80),
        "concept": plain(data.get("concept"), 80),
        "description": plain(data.get("description"), 1000),
        "encoder": plain(encoder.get("name"), 80),
        "base_model": plain(data.get("base_model"), 80),
        "family": plain(data.get("family"), 40),
        "checkpoint": plain(data.get("checkpoint"), 120),
        "kind": "balance" if balances(data) else "region",
        "verdict": verdict(data).status(),
        "unfinished": unfinished,
        "recipe": ", ".join(f"{plain(recipe[key], 40)}{unit}" for key, unit in told if plain(recipe.get(key))),
        "effect": _effect(data),
        "harmless_touched": _harmless(region),
        "gate": all(part.gates for part in region.parts),
        "parts": [part.label for part in region.parts],
        "licence": plain(data.get("licence"), 80),
        "author": plain(data.get("author"), 80),
        "created": plain(data.get("created"), 40),
        "source": plain(data.get("source"), 300),
    }  # fmt: skip


def card_text(found: dict[str, Any]) -> str:
    """The card in a few short lines."""
    learned = found["encoder"] and f"learned on {found['encoder']}"
    lines = [found["title"], found["verdict"]["text"], found["description"][:160], learned, found["effect"],
             found["harmless_touched"]]  # fmt: skip
    return "\n".join(shown(line, 600) for line in lines if line)


@dataclass(frozen=True)
class Found:
    """A region file: its hash and size, and its card but for the preview, or what is wrong with it."""

    sha256: str
    bytes: int
    card: dict[str, Any] | None = None
    error: str = ""
    picture: str = ""  # the preview as it stands in the file: decoded for the one card that is shown, not for lists

    def shown_as(self, name: str) -> dict[str, Any]:
        """The whole card, under the name that the file is listed by."""
        return (self.card or {}) | {"name": plain(name), "preview": preview(self.picture)}


_KNOWN: dict[tuple[str, str], Found] = {}  # by hash, since a file can change and keep its time and size; and name
_MOST_KNOWN = 512


def _read(content: bytes, hashed: str, name: str) -> Found:
    try:
        region = region_from_bytes(content, shown(name, 80))
    except RegionError as error:
        return Found(hashed, len(content), error=str(error))
    encoded = region.metadata.get("preview")
    picture = encoded if isinstance(encoded, str) and len(encoded) <= _PREVIEW_TEXT else ""
    return Found(hashed, len(content), region_card(region, content, name), picture=picture)


def look_at(content: bytes, name: str) -> Found:
    """Check the content of a file; what was found is remembered."""
    key = sha256(content), plain(name)
    found = _KNOWN.get(key) or _read(content, *key)
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[key] = found
    return found


def look(path: Path) -> Found:
    """Read and check a file."""
    try:
        return look_at(read_limited(path), path.name)
    except (OSError, RegionError) as error:
        return Found("", 0, error=f"{shown(path.name, 80)}: {error}.")
    except Exception as error:  # whatever is in it, one file must not keep our nodes from being listed
        return Found("", 0, error=f"{shown(path.name, 80)}: its card cannot be read ({type(error).__name__}).")


@lru_cache(maxsize=_MOST_KNOWN)
def _glanced(path: Path, *state: int) -> Found:
    return look(path)


def glance(path: Path) -> Found:
    """As `look`, for lists, which are asked for all the time: a file that looks as before is not read again."""
    try:
        status = path.stat()
    except OSError:
        return look(path)
    return _glanced(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# --- what a workflow carries ---


@dataclass(frozen=True)
class Carried:
    """What a workflow knows about the region of this name: hash and source of its file, or the file itself."""

    name: str = ""
    sha256: str = ""
    source: str = ""
    content: bytes | None = None


def pack(carried: Carried) -> str:
    """As text for the workflow. RegionError when the file is too large to be embedded."""
    data: dict[str, str] = {"name": carried.name, "sha256": carried.sha256, "source": carried.source}
    if carried.content is not None:
        if refusal := embed_refusal(len(carried.content)):
            raise RegionError(refusal)
        data["data"] = base64.b64encode(carried.content).decode()
    return json.dumps({key: value for key, value in data.items() if value})


def embed_refusal(size: int) -> str:
    """Why a file of this size cannot be embedded, or nothing."""
    if size <= EMBED_BYTES:
        return ""
    return (f"This region has {-(-size // 1024)} kB, and at most {EMBED_BYTES // 1024} kB fit into a workflow: "
            "share the file beside it.")  # fmt: skip


def unpack(text: str) -> Carried:
    """What the workflow's text says; nothing for an empty one. RegionError when it is damaged or contradicts itself."""
    if not text.strip():
        return Carried()
    damaged = f"What this workflow carries about its region is damaged: get the workflow anew, {_MEND}."
    if len(text) > _EMBED_TEXT + 8192:
        raise RegionError(
            f"What this workflow carries about its region is larger than {EMBED_BYTES // 1024} kB: ask for the file of "
            f"the region instead, {_MEND}."
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise RegionError(damaged) from None
    keys = ("name", "sha256", "source", "data")
    if not isinstance(found, dict) or not all(isinstance(found.get(key, ""), str) for key in keys):
        raise RegionError(damaged)
    name, stated, source, data = (found.get(key, "") for key in keys)
    if stated and not _HASH.fullmatch(stated):
        raise RegionError(damaged)
    known = Carried(name, stated, plain(source, 300))
    if not data:
        return known
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError:
        raise RegionError(damaged) from None
    if refusal := embed_refusal(len(content)):
        raise RegionError(refusal)
    if sha256(content) != stated:
        raise RegionError(
            f"The region embedded in this workflow has the hash {sha256(content)[:12]}, but the workflow says "
            f"{shown(stated[:12]) or 'nothing'}: get the workflow anew, {_MEND}."
        )
    return replace(known, content=content)


def about(name: str, text: str) -> Carried:
    """What the workflow carries about the region of this name; what it says of another one does not count."""
    known = unpack(text)
    return known if known.name == name else Carried(name)


# --- which file it is ---


def missing(known: Carried, folder: Path | str) -> str:
    """One sentence for a region that is not there."""
    which = f'There is no region "{shown(known.name, 120)}"' if known.name else "No region is chosen"
    facts = [f"hash {known.sha256[:12]}"] if known.sha256 else []
    facts += [f"source: {shown(known.source)}"] if known.source else []
    details = f" ({', '.join(facts)})" if facts else ""
    return (
        f"{which}{details}: put its .safetensors file into {folder} and press R, or "
        "train one with Train Safe Region and Save Safe Region."
    )


def changed(known: Carried, now: str) -> str:
    """One sentence for a file that is not the one the workflow was saved with."""
    origin = f" from {shown(known.source)}" if known.source else ""
    return (
        f'The file of the region "{shown(known.name, 120)}" has the hash {now[:12]}, but this workflow was saved with '
        f"{known.sha256[:12]}: get that one{origin}, {_MEND}."
    )


def differs(known: Carried, own: str) -> str:
    """One sentence for an embedded region that is not the user's own file of that name."""
    return (
        f'This workflow brought a region "{shown(known.name, 120)}" (hash {known.sha256[:12]}) that differs from your '
        f"own file of that name ({own[:12] or 'it cannot be read'}): choose one of them on the node; over the API, "
        'leave "carried" empty for your own, or give the other one a name that no file of yours has, in both inputs.'
    )


STRANGER = (
    "Came with the workflow, not from your folder: what it says of itself is its author's word, its effect here is "
    "unknown. Try it with Inspect before you rely on it."
)


def _of_stranger(card: dict[str, Any]) -> dict[str, Any]:
    """A card whose verdict is its author's."""
    return card | {"verdict": {"text": f"Its author says: {card['verdict']['text']}", "tone": "neutral"}}


def origin(name: str, text: str, find: Find) -> str:
    """What is said of a region that is in the workflow and in no folder; nothing of any other."""
    return STRANGER if about(name, text).content is not None and find(name) is None else ""


def chosen_content(name: str, text: str, find: Find, folder: Path | str) -> bytes:
    """The file that the workflow means, embedded or from the folder. RegionError says what to do when there is none.

    An embedded region never stands for another file that the user has under its name.
    """
    known, path = about(name, text), find(name)
    if known.content is not None:
        own = look(path).sha256 if path else known.sha256
        if own != known.sha256:
            raise RegionError(differs(known, own))
        return known.content
    if path is None:
        raise RegionError(missing(known, folder))
    try:
        content = read_limited(path)
    except RegionError as error:
        raise RegionError(f"{shown(path.name, 80)}: {error}.") from None
    if known.sha256 and sha256(content) != known.sha256:
        raise RegionError(changed(known, sha256(content)))
    return content


@dataclass(frozen=True)
class Standing:
    """`state` is ok, embedded, differs, missing, changed or damaged; the last four have a message and cannot run.

    An embedded region that is in no folder has a message too. `carried` is what the workflow is to carry from now on.
    """

    state: str
    message: str
    card: dict[str, Any] | None
    carried: str
    in_folder: bool

    @property
    def runs(self) -> bool:
        return self.state in ("ok", "embedded")


def standing(name: str, text: str, find: Find, folder: Path | str) -> Standing:
    """What can be said about a loader before it runs."""
    path = find(name)
    found = look(path) if path else None
    try:
        known = about(name, text)
    except RegionError as error:
        return Standing("damaged", str(error), None, text, path is not None)
    if known.content is not None:
        brought = look_at(known.content, name)
        if brought.card is None:
            message = f"The embedded region is damaged: {brought.error}"
            return Standing("damaged", message, None, text, path is not None)
        shown_card = brought.shown_as(name)
        if found is None:
            return Standing("embedded", STRANGER, _of_stranger(shown_card), text, False)
        if found.sha256 != known.sha256:
            return Standing("differs", differs(known, found.sha256), _of_stranger(shown_card), text, True)
        return Standing("embedded", "", shown_card, text, True)
    if found is None:
        return Standing("missing", missing(known, folder), None, text, False)
    if known.sha256 and found.sha256 and found.sha256 != known.sha256:
        shown_card = found.card and found.shown_as(name)
        return Standing("changed", changed(known, found.sha256), shown_card, text, True)
    if found.card is None:
        return Standing("damaged", found.error, None, text, True)
    remembered = text if known.sha256 else pack(Carried(name, found.sha256, found.card["source"]))
    return Standing("ok", "", found.shown_as(name), remembered, True)


def embedded(name: str, text: str, find: Find, folder: Path | str) -> str:
    """The text to carry with the region's file in it. RegionError when it is too large, or cannot run."""
    content = chosen_content(name, text, find, folder)
    found = look_at(content, name)
    if found.card is None:
        raise RegionError(found.error)
    return pack(Carried(name, found.sha256, found.card["source"], content))

