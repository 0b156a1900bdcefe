"""What the region card asks the server for: the card of a region, and putting a file into the regions' folder."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from ..region import RegionError
from ..region.files import MAX_BYTES
from .cards import embed_refusal, embedded, standing
from .common import prompt_server
from .folders import region_path, save_folder
from .listing import region_labels
from .origins import refusal
from .uploads import Refused, store

CARD, LIST, UPLOAD = "/safe_region/card", "/safe_region/list", "/safe_region/upload"
_CARRIED = 1024 * 1024  # what a question for a card may take
_FORM = 64 * 1024  # what the rest of an upload may take


def card_answer(name: str, carried: str = "", embed: bool = False) -> dict[str, Any]:
    """How a loader stands; `refusal` is why its region could not be embedded. With `embed` it is."""
    if embed:
        carried = embedded(name, carried, region_path, save_folder())
    found = standing(name, carried, region_path, save_folder())
    return asdict(found) | {"refusal": embed_refusal(found.card["bytes"]) if found.card else ""}


def register_routes() -> None:
    """Add the routes to ComfyUI's server, once; without a server nothing happens."""
    server = prompt_server()
    if server is None:
        return
    from aiohttp import web
    from comfy.cli_args import args

    routes = server.routes
    if any(route.path == CARD for route in routes):  # a second copy of the pack
        return

    def refused(status: int, text: str) -> web.Response:
        return web.json_response({"error": text}, status=status)

    def too_large(request: web.Request, most: int, text: str) -> web.Response | None:
        """The answer to a body that is not read at all: too long, of unknown length, or packed."""
        if request.content_length is None or request.headers.get("Content-Encoding", "identity") != "identity":
            return refused(411, "State the length of what you send, and send it as it is, not compressed.")
        return None if 0 < request.content_length <= most else refused(413, text)

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
        if unread := too_large(request, _CARRIED, "That is more than a workflow can carry."):
            return unread
        try:
            wanted = json.loads(await request.read())  # not by the charset that the request states
        except (ValueError, RecursionError):
            wanted = None
        if not isinstance(wanted, dict) or not all(isinstance(wanted.get(key, ""), str) for key in ("name", "carried")):
            return refused(400, "A name and what the workflow carries are needed, both as text.")
        return await answer(name=wanted.get("name", ""), carried=wanted.get("carried", ""),
                            embed=wanted.get("embed") is True)  # fmt: skip

    @routes.post(UPLOAD)
    async def upload(request: web.Request) -> web.Response:
        """A form with `file`, and `overwrite=true` to replace another file of that name. Other sites may not."""
        if foreign := refusal(request.headers, args.enable_cors_header or ""):
            return refused(403, foreign)
        if unread := too_large(request, MAX_BYTES + _FORM, f"A region has at most {MAX_BYTES // 2**20} MB."):
            return unread
        try:
            form = await request.post()
        except Exception as error:  # no form, or one that ends early, or is written in a way that nobody can read
            return refused(400, f"The form cannot be read ({type(error).__name__}).")
        file = form.get("file")
        if not isinstance(file, web.FileField):
            return refused(400, "The form has no file.")
        try:
            content, overwrite = await asyncio.to_thread(file.file.read), form.get("overwrite") == "true"
            stored = await asyncio.to_thread(store, file.filename, content, overwrite, region_path, save_folder())
            return web.json_response(stored)
        except Refused as error:
            return refused(error.status, str(error))
