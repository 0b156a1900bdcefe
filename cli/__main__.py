"""`python -m comfyui_safe_region.cli`, which `accelerate launch -m` needs."""

from . import main

if __name__ == "__main__":
    main()
