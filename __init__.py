"""Safe Region: what ComfyUI reads when it loads this folder. As an installed package it does nothing."""
from __future__ import annotations

import sys
from typing import Any

WEB_DIRECTORY = "./web"

if "folder_paths" in sys.modules:  # ComfyUI's own module: ComfyUI is what imports us
    from .nodes.folders import register_folders

    register_folders()


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI for the list of nodes."""
    from .nodes.extension import SafeRegionExtension

    return SafeRegionExtension()
