"""Whether a request that writes is from our own page. Without ComfyUI.

A browser lets every site send requests to this server, and names the site that sends (Origin). It sends no header of
a site's own before the server has agreed, which ComfyUI does for a few others only. A name that an attacker owns can
be made to lead to this computer (DNS rebinding): to the browser that is its own site.
"""
from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from .names import shown

MARK = "X-Safe-Region"
# Names that nobody can buy: those of home and company networks, and Tailscale's, which it hands out itself.
_NOT_FOR_SALE = (".local", ".localhost", ".localdomain", ".lan", ".home", ".home.arpa", ".internal", ".intranet",
                 ".private", ".corp", ".test", ".ts.net")  # fmt: skip
_PORTS = {"http": 80, "https": 443}


def _place(address: str, scheme: str) -> tuple[str, int | None]:
    """Host and port of what follows `//`. ValueError when it is none."""
    found = urlsplit(f"//{address}")
    return (found.hostname or "").rstrip("."), found.port or _PORTS.get(scheme)


def _for_sale(host: str) -> bool:
    """Whether this is a name that an attacker could own."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." in host and not host.endswith(_NOT_FOR_SALE)
    return False


def refusal(headers: Mapping[str, str], trusted: str = "") -> str:
    """Why a request may not write, in one sentence; empty when it may. `trusted`: an origin that the user named."""
    if MARK not in headers:
        return f"Only ComfyUI's own page may write here; a program of yours sends the header {MARK}: 1 with it."
    origin = headers.get("Origin")
    if origin is None or ("://" in trusted and origin == trusted):
        return ""  # browsers always name one with what is to be written
    name = shown(origin, 120)
    foreign = (f"This was sent by {name}, not by the page of this ComfyUI: nothing was written. If that is your own "
               f"address for it, let its proxy pass on the Host, or start ComfyUI with --enable-cors-header {name}.")
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return foreign
    try:
        scheme, _, address = origin.partition("://")
        host, port = _place(address, scheme)
        if not host or scheme not in _PORTS or (host, port) != _place(headers.get("Host", ""), scheme):
            return foreign
    except ValueError:
        return foreign
    if scheme == "http" and _for_sale(host):  # with https a certificate vouches for the name
        return (f"{name} could be anybody's name for this computer: nothing was written. Open ComfyUI by its number "
                f"(such as http://127.0.0.1:8188) or by https, or start it with --enable-cors-header {name}.")
    return ""
