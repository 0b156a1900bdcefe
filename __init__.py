"""Safe Region: what ComfyUI reads when it loads this folder. As an installed package it does nothing."""
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

# ComfyUI cannot serve files of a folder whose name must be quoted in a URL, such as one with spaces (aiohttp finds
# nothing below it). There the nodes work without help pages, rather than with errors in the browser.
_SERVED = re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@-]+", Path(__file__).parent.name)
WEB_DIRECTORY = "./web" if _SERVED else None

if "folder_paths" in sys.modules:  # ComfyUI's own module: ComfyUI is what imports us
    from .nodes.folders import register_folders

    register_folders()


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI for the list of nodes."""
    from .nodes.extension import SafeRegionExtension

    return SafeRegionExtension()
