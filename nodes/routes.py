"""What the region card asks the server for: the card of a region, and putting a file into the regions' folder."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..region import RegionError
from ..region.files import MAX_BYTES, region_from_bytes, write_atomically
from .cards import embed_refusal, embedded, look, sha256, standing
from .common import prompt_server
from .folders import region_path, save_folder
from .listing import region_labels
from .names import SUFFIX, safe_name, shown

CARD, LIST, UPLOAD = "/safe_region/card", "/safe_region/list", "/safe_region/upload"
_CARRIED = 1024 * 1024  # what a question for a card may take
_FORM = 64 * 1024  # what the rest of an upload may take


class _Refused(Exception):
    """An upload that is not taken: HTTP status, and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def card_answer(name: str, carried: str = "", embed: bool = False) -> dict[str, Any]:
    """How a loader stands; `refusal` is why its region could not be embedded. With `embed` it is."""
    if embed:
        carried = embedded(name, carried, region_path, save_folder())
    found = standing(name, carried, region_path, save_folder())
    return asdict(found) | {"refusal": embed_refusal(found.card["bytes"]) if found.card else ""}


def store(name: str, content: bytes, overwrite: bool) -> dict[str, str]:
    """Check a file and write it into the regions' folder. Returns its name and hash."""
    clean = safe_name(name)
    if not clean or not name.lower().endswith(SUFFIX):
        raise _Refused(400, f'"{shown(name, 80)}" is no name for a region: it ends with {SUFFIX}.')
    try:
        region_from_bytes(content, shown(name, 80))
    except RegionError as error:
        raise _Refused(400, str(error)) from None
    listed = str(Path(clean + SUFFIX))
    answer = {"name": listed, "sha256": sha256(content)}
    existing = region_path(listed)
    if existing and look(existing).sha256 == answer["sha256"]:
        return answer
    if existing and not overwrite:
        raise _Refused(409, f'There is another region "{clean}" already.')
    try:
        write_atomically(save_folder() / listed, content)
    except OSError as error:
        raise _Refused(500, f"{save_folder() / listed} cannot be written: {error.strerror or error}.") from None
    return answer


def register_routes() -> None:
    """Add the routes to ComfyUI's server, once; without a server nothing happens."""
    server = prompt_server()
    if server is None:
        return
    from aiohttp import web

    routes = server.routes
    if any(route.path == CARD for route in routes):  # a second copy of the pack
        return

    def refused(status: int, text: str) -> web.Response:
        return web.json_response({"error": text}, status=status)

    async def answer(**wanted: Any) -> web.Response:
        try:
            return web.json_response(await asyncio.to_thread(card_answer, **wanted))
        except RegionError as error:
            return refused(400, str(error))

    @routes.get(LIST)
    async def get_list(request: web.Request) -> web.Response:
        return web.json_response({"regions": await asyncio.to_thread(region_labels)})

    @routes.get(CARD)
    async def get_card(request: web.Request) -> web.Response:
        return await answer(name=request.query.get("name", ""))

    @routes.post(CARD)
    async def post_card(request: web.Request) -> web.Response:
        """JSON `{name, carried, embed}`: what the loader's inputs hold, and whether to embed the region."""
        if not 0 < (request.content_length or 0) <= _CARRIED:
            return refused(413, "That is more than a workflow can carry.")
        try:
            wanted = await request.json()
        except (ValueError, RecursionError):
            wanted = None
        if not isinstance(wanted, dict) or not all(isinstance(wanted.get(key, ""), str) for key in ("name", "carried")):
            return refused(400, "A name and what the workflow carries are needed, both as text.")
        return await answer(name=wanted.get("name", ""), carried=wanted.get("carried", ""),
                            embed=wanted.get("embed") is True)  # fmt: skip

    @routes.post(UPLOAD)
    async def upload(request: web.Request) -> web.Response:
        """A form with `file`, and `overwrite=true` to replace another file of that name."""
        if not 0 < (request.content_length or 0) <= MAX_BYTES + _FORM:
            return refused(413, f"A region has at most {MAX_BYTES // 2**20} MB.")
        try:
            form = await request.post()
        except ValueError:  # no form at all, or one that ends early
            form = {}
        file = form.get("file")
        if not isinstance(file, web.FileField):
            return refused(400, "The form has no file.")
        try:
            content = await asyncio.to_thread(file.file.read)
            return web.json_response(
                await asyncio.to_thread(store, file.filename, content, form.get("overwrite") == "true")
            )
        except _Refused as error:
            return refused(error.status, str(error))
