"""Which of its prompts a sampler leads away from, read from its guider and from all that weighs its predictions.

A prompt whose prediction weighs more than nothing in the result is drawn, as the negative one is at a guidance below 1.
What cannot be read, since it comes from another pack, may draw every prompt.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..backbones.comfy import GUARD
from ..region import RegionError

_ROOT = Path(comfy.samplers.__file__).resolve().parents[1]
_NO_GRAD = torch.no_grad()(lambda: None).__code__
_SAMPLING = ("predict_noise", "outer_predict_noise", "inner_sample", "outer_sample", "sample")  # methods of a guider
_WRAPPERS = (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)
PERP_NEG = "comfy_extras/nodes_perpneg.py"
# ComfyUI's own functions that change a prediction, but never which prompts it leads to
_HARMLESS = {f"comfy_extras/nodes_{name}.py" for name in (
    "cfg", "easycache", "eps", "lt", "lumina2", "mahiro", "model_advanced", "model_patch", "pag", "slg", "tcfg",
    "triposplat",
)} | {"comfy/context_windows.py", "comfy/ldm/wan/model_multitalk.py"}  # fmt: skip
# ComfyUI's own functions that bring a guidance of their own, and its name in them
_GUIDANCE = {"comfy_extras/nodes_custom_sampler.py": "cfg", "comfy_extras/nodes_nag.py": "nag_scale",
             "comfy_extras/nodes_video_model.py": "min_cfg"}  # fmt: skip


def _dual(guider: Any) -> dict[str, float]:
    middle = guider.cfg2 * (1 - guider.cfg1) if guider.nested else guider.cfg2 - guider.cfg1
    return {"middle": middle, "negative": 1 - guider.cfg2}


# Weights of those prompts, of ComfyUI's guiders, that may be led away from; others are always drawn.
_WEIGHTS: dict[str, Callable[[Any], dict[str, float]]] = {
    "CFGGuider": lambda guider: {"negative": 1 - guider.cfg},
    "Guider_DualCFG": _dual,
    "Guider_DualModel": lambda guider: {"negative": 1 - guider.cfg},
    "Guider_LTXAVDualCFG": lambda guider: {"negative": 1 - min(guider.video_cfg, guider.audio_cfg)},
    "Guider_PerpNeg": lambda guider: {"negative": -guider.cfg * guider.neg_scale},
}


def _file(function: Any) -> str:
    """The file of ComfyUI's own that a function was written in, as `comfy/samplers.py`; empty for one of a pack."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if code is not None and code.co_filename == _NO_GRAD.co_filename:  # a sampler below torch.no_grad()
        code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    path = Path(code.co_filename).resolve()
    inside = path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) else ""
    return inside if inside.startswith(("comfy/", "comfy_extras/")) else ""


def _weighing(options: Mapping[str, Any]) -> Iterator[Any]:
    """The functions in a model's options that may weigh the predictions of its prompts."""
    for name, found in options.items():
        if name.startswith("sampler_") or name == "model_function_wrapper":
            yield from found if isinstance(found, (list, tuple)) else [found]
    transformer = options.get("transformer_options", {})
    for kind in _WRAPPERS:
        for key, wrappers in transformer.get("wrappers", {}).get(kind, {}).items():
            yield from wrappers if key != GUARD else []
    for patches in transformer.get("patches", {}).values():
        yield from (patch for patch in patches if _file(patch) in _GUIDANCE)


def _is_harmless(function: Any) -> bool:
    file = _file(function)
    if file not in _GUIDANCE:
        return file in _HARMLESS
    scale = inspect.getclosurevars(function).nonlocals.get(_GUIDANCE[file])
    return isinstance(scale, (int, float)) and scale >= 1


def led_away(guider: Any, sampler: Any) -> set[str]:
    """Names of those of a guider's prompts that what is drawn is led away from, for certain.

    Raises RegionError for a text that is drawn and no guard can reach.
    """
    weighing = list(_weighing(guider.model_options))
    if any(_file(function) == PERP_NEG for function in weighing):
        raise RegionError(
            'The node "Perp-Neg (DEPRECATED)" keeps its empty prompt in the model, where no guard can look at it: use '
            '"Perp-Neg Guider" instead.'
        )
    methods = [*(getattr(guider, name) for name in _SAMPLING), type(guider).__call__]
    steps = [sampler.sample, getattr(sampler, "sampler_function", sampler.sample)]
    known = _WEIGHTS.get(type(guider).predict_noise.__qualname__.partition(".")[0])
    if known is None or not all(map(_file, (*methods, *steps))) or not all(map(_is_harmless, weighing)):
        return set()
    try:
        return {name for name, weight in known(guider).items() if weight <= 0}
    except (AttributeError, TypeError):  # never set, or no number
        return set()
