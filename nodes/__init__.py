"""ComfyUI nodes: thin, one file per family of nodes."""
