"""For the host environment only: lets PyPI's torchvision 0.28 import beside torch's CPU wheel.

torchvision's compiled operators do not load there, and its import then fails while it registers fake kernels for two
operators that nobody defined. They are defined here, just before torchvision is first imported (not at start-up, since
ComfyUI warns when torch is imported before its main.py asks for it). Python runs this file when its folder is on
PYTHONPATH; where torchvision's own operators load, nothing is changed.
"""
from __future__ import annotations

import importlib.abc
import sys


class _DefineOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from importlib.metadata import version

            import torch

            if "+cpu" in torch.__version__ and "+" not in version("torchvision"):  # the pair that does not match
                library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                torch._operators_for_torchvision = library  # they live as long as this object
        return None


sys.meta_path.insert(0, _DefineOperators())
