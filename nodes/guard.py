"""Guarding a model: every prompt that it is asked to draw is steered, however it was wired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io

from ..region import Region, apply_to_conditioning
from ..region.blocks import CROSS_ATTENTION
from .common import SafeRegionType, schema, steering_inputs

KEY = "safe_region"
UNWANTED = ("neg", "uncond")  # in the names that guiders give to prompts which lead away


def guarded(conds: list[dict[str, Any]], steer: Callable[[list[Any]], list[Any]]) -> list[dict[str, Any]]:
    """A sampler's conditions steered; there an entry is one dict that holds its text too."""
    steered = steer([[cond.get(CROSS_ATTENTION), cond] for cond in conds])
    return [{**options, CROSS_ATTENTION: text} for text, options in steered]


class SafeRegionGuardModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionGuardModel",
            display_name="Guard Model with Safe Region",
            description="Steers every positive prompt that reaches a sampler through this model, whichever nodes made "
            "it. Place it between the model's loader and the sampler. Prompts that Apply Safe Region already steered "
            "with the same region are not moved again; negative prompts are left alone.",
            search_aliases=["safe region", "safety", "guard", "nsfw", "block", "moderation"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed: its weights stay as they are."),
                SafeRegionType.Input("region", tooltip="The safe region, learned with this model's text encoder."),
                *steering_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guarded model, for the sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, region: Region, strength: float = 1.0, mode: str = "auto", start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        def steer(conditioning: list[Any]) -> list[Any]:
            return apply_to_conditioning(conditioning, region, strength, mode, start, end)

        def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
            conds = executor.class_obj.conds
            for name in conds:
                if not any(piece in name for piece in UNWANTED):
                    conds[name] = guarded(conds[name], steer)
            return executor(*args, **kwargs)

        steer([])  # says now what would be wrong with the region or the numbers
        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, sample)
        return io.NodeOutput(model)


NODES = [SafeRegionGuardModel]
