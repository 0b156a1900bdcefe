"""Whether a region belongs to a model: what it was learned on, beside what is in front of the sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..region import Region, RegionError
from ..region.blocks import FAMILIES, class_names
from ..region.region import combined_from, plain
from ..region.verdict import inner
from .names import checkpoint_of

KNOWN_ENCODERS = frozenset(encoder for family in FAMILIES for encoder in family.encoders)


def learned_on(model: Any, prompt: Any, node_id: str | None) -> dict[str, str]:
    """What a region says about the model it was learned on: its class, its family as file names have it, and the file
    of its checkpoint."""
    base, config = (type(found).__name__ for found in (model.model, model.model.model_config))
    family = config.removesuffix("Config") if base == "BaseModel" else base  # a class that several families share
    return {"base_model": base, "family": family.lower(), "checkpoint": checkpoint_of(prompt, node_id)}


def encoders_of(model: Any) -> list[str]:
    """Class names of the text encoder that ComfyUI has for a model, the narrowest first; none where it does not say."""
    try:
        return class_names(model.model.model_config.clip_target({}).clip)
    except Exception:  # a model of another pack, or one that looks for more in its checkpoint
        return []


def _origins(metadata: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What each of the regions in a region says about itself."""
    combined = combined_from(metadata)
    if not combined:
        yield metadata
    for one in combined:
        yield from _origins(one)


def belonging(region: Region, model: Any, prompt: Any, node_id: str | None) -> list[tuple[str, str]]:
    """Lines with their tones on how a region fits a model: none for the model that it was learned on.

    Raises:
        RegionError: it was learned on another kind of model with another text encoder. Widths do not tell that: a
            dozen encoders write 4,096 numbers a token.
    """
    this, names, lines = learned_on(model, prompt, node_id), encoders_of(model), []
    for data in _origins(region.metadata):
        name, base, family, file = (plain(data.get(key), 80) for key in ("name", "base_model", "family", "checkpoint"))
        encoder = plain(inner(data, "encoder").get("name"), 80)
        learned = f'The region "{name or region.name}" was learned on {family or base or encoder}'
        same_kind = base == this["base_model"] and family in ("", this["family"])
        if not same_kind and encoder in KNOWN_ENCODERS and names and encoder not in names:
            raise RegionError(
                f"{learned} with the text encoder {encoder}, and this model ({this['family']}) reads another one, "
                f"{names[0]}: use a region that was trained on a model of this kind."
            )
        if base and not same_kind:
            lines.append((f"{learned}, and this model is {this['family']}: it may fit, if both read one text encoder. "
                          "Inspect Safe Region, with this model, shows whether it does.", "warn"))  # fmt: skip
        elif same_kind and file and this["checkpoint"] and file != this["checkpoint"]:
            lines.append((f"{learned} ({file}), and this is {this['checkpoint']}, of the same kind: it should fit, if "
                          "both have one origin. Inspect Safe Region shows whether it does.", "neutral"))  # fmt: skip
    return list(dict.fromkeys(lines))


def check_encoder(region: Region, clip: Any) -> None:
    """Raises RegionError where a region was learned with a text encoder of another family than this CLIP's, though it
    may write texts of the same width."""
    names = class_names(type(clip.cond_stage_model))
    here = [family for family in FAMILIES if set(family.encoders) & set(names)]
    for data in _origins(region.metadata):
        encoder = plain(inner(data, "encoder").get("name"), 80)
        if here and encoder in KNOWN_ENCODERS and not any(encoder in family.encoders for family in here):
            name = plain(data.get("name"), 80) or region.name
            raise RegionError(
                f'The region "{name}" was learned with the text encoder {encoder}, and this CLIP is {names[0]}: '
                "connect the text encoder that it was learned with, or train a region with this one."
            )
