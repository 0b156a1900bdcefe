"""What a guard saw, after the sampler: a guard itself has run by then, and cannot put it out."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..backbones.comfy import GUARD
from ..region import RegionError
from ..region.inspection import Judgement, together
from .common import gate_outputs, gate_ui, gate_values, schema, status
from .guard import TITLE, Guard, running_prompt


def guards_of(model: Any) -> list[Guard]:
    return [wrapper.__self__ for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, GUARD)]


def seen(guards: list[Guard]) -> list[Judgement]:
    """What these guards say of what was drawn in the running prompt; where its latent comes from the cache, in the
    last prompt that they acted in.

    Raises:
        RegionError: there is no guard, or none of them ever acted.
    """
    if not guards:
        raise RegionError(f'This model has no guard: connect the one that comes from "{TITLE}".')
    found = [guard.judged.get(running_prompt()) or list(guard.judged.values())[-1] for guard in guards if guard.judged]
    if len(found) < len(guards):
        raise RegionError(
            f'No sampler has used this guarded model: connect "{TITLE}" right before the sampler, and here the latent '
            "that this sampler made."
        )
    return together(found)


class SafeRegionGuardReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionGuardReport",
            display_name="Guard Report",
            description="Says after sampling what a guarded model was asked to draw: whether any prompt lay outside of "
            "the region, how far, and for which concept. Place it behind the sampler, and route on what it says.",
            is_output_node=True,  # behind a sampler it may be the last
            search_aliases=["safe region", "guard", "report", "verdict", "moderation", "route", "block", "detect",
                            "flag"],
            inputs=[
                io.Model.Input("model", tooltip=f"The guarded model, from {TITLE}."),
                io.Latent.Input("latent", tooltip="What a sampler drew with it. It comes out as it is."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The latent as it came in."), *gate_outputs()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any]) -> io.NodeOutput:
        guards = guards_of(model)
        judged = seen(guards)
        found = list(dict.fromkeys(label for row in judged for label in row.concepts))
        looked = dict.fromkeys(part.label for guard in guards for part in guard.region.parts)
        told = ((f"Outside: {', '.join(found)}.", "warn") if any(row.opened for row in judged) else
                (f"Nothing of {', '.join(looked)} was asked for.", "good"))  # fmt: skip
        return io.NodeOutput(latent, *gate_values(judged), ui=status([told]) | gate_ui(judged))
