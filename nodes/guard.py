"""Guarding a model: every prompt that it is asked to draw is steered, however it was wired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
from comfy_api.latest import io

from ..region import Region, apply_to_conditioning
from ..region.blocks import CROSS_ATTENTION
from .common import KEEP_OUT, SafeRegionType, schema, send_event, status, steering_inputs
from .steering_status import steering_status

KEY = "safe_region"
STATUS = "safe_region.status"
UNWANTED = ("neg", "uncond")  # in the names that guiders give to prompts which lead away


def as_entries(conds: list[dict[str, Any]]) -> list[list[Any]]:
    """A sampler's conditions as entries of a conditioning; there an entry is one dict that holds its text too."""
    return [[cond.get(CROSS_ATTENTION), cond] for cond in conds]


def guarded(conds: list[dict[str, Any]], steer: Callable[[list[Any]], list[Any]]) -> list[dict[str, Any]]:
    """A sampler's conditions steered."""
    return [{**options, CROSS_ATTENTION: text} for text, options in steer(as_entries(conds))]


class SafeRegionGuardModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionGuardModel",
            display_name="Guard Model with Safe Region (Moderation)",
            description="Steers every positive prompt that reaches a sampler through this model, whichever nodes made "
            "it. Place it between the model's loader and the sampler. Prompts that Apply Safe Region already steered "
            "with the same region are not moved again; negative prompts are left alone.",
            search_aliases=[*KEEP_OUT, "guard", "guardrail", "safeguard", "protect", "parental controls"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed: its weights stay as they are."),
                SafeRegionType.Input("region", tooltip="The safe region, learned with this model's text encoder."),
                *steering_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guarded model, for the sampler.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, region: Region, strength: float = 1.0, mode: str = "auto", start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        def steer(conditioning: list[Any]) -> list[Any]:
            return apply_to_conditioning(conditioning, region, strength, mode, start, end)

        node_id, seen = cls.hidden.unique_id, 0

        def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            conds = executor.class_obj.conds
            wanted = [name for name in conds if not any(piece in name for piece in UNWANTED)]
            entries = [entry for name in wanted for entry in as_entries(conds[name])]
            for name in wanted:
                conds[name] = guarded(conds[name], steer)
            seen += 1
            told = status(steering_status(entries, region, strength, mode, start, end))
            heading = f"Acted in {seen} sampling{'s' * (seen > 1)}, last:"
            send_event(STATUS, {"node": node_id, "heading": heading, **told})
            return executor(*args, **kwargs)

        steer([])  # says now what would be wrong with the region or the numbers
        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, sample)
        return io.NodeOutput(model, ui=status([("On guard; no sampler has used this model yet.", "neutral")]))
