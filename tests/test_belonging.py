"""Which regions the guard takes for a model: by what they were learned on, not by widths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from comfyui_safe_region.nodes.belonging import belonging, check_encoder
from comfyui_safe_region.region import Region, RegionError, combine
from region_examples import example_region


class WanT5Model:
    pass


class PixArtT5XXL:
    pass


def model(name: str, encoder: type | None, file: str = "") -> tuple[Any, Any, str]:
    """A stand-in for a MODEL whose text encoder ComfyUI names, and a prompt in which a file is loaded for it."""

    def clip_target(self: Any, state_dict: dict[str, Any]) -> Any:
        class Made(encoder or object):  # as ComfyUI makes them, within functions
            pass

        return SimpleNamespace(clip=Made) if encoder else None

    config = type(f"{name}Config", (), {"clip_target": clip_target})()
    found = SimpleNamespace(model=type(name, (), {"model_config": config})())
    prompt = {"1": {"inputs": {"unet_name": file}}, "2": {"inputs": {"model": ["1", 0]}}} if file else {}
    return found, prompt, "2"


def learned(name: str, encoder: str, checkpoint: str = "") -> Region:
    about = {"name": "weapons", "base_model": name, "family": name.lower(), "checkpoint": checkpoint,
             "encoder": {"name": encoder}}  # fmt: skip
    return Region(example_region().parts, {key: value for key, value in about.items() if value})


WAN, CHROMA = learned("WAN21", "WanT5Model"), learned("Chroma", "PixArtT5XXL")


def test_the_model_that_a_region_was_learned_on():
    assert belonging(WAN, *model("WAN21", WanT5Model)) == []
    assert belonging(learned("WAN21", "WanT5Model", "a.gguf"), *model("WAN21", WanT5Model, "a.gguf")) == []
    assert belonging(WAN, *model("WAN21", None)) == [], "it is the same class, whatever ComfyUI says of encoders"
    assert belonging(example_region(), *model("WAN21", WanT5Model)) == [], "a region that says nothing"


def test_another_text_encoder_of_the_same_width_is_refused_with_both_names():
    with pytest.raises(RegionError, match=r"chroma with the text encoder PixArtT5XXL.*wan21.*another one, WanT5Model"):
        belonging(CHROMA, *model("WAN21", WanT5Model))
    both = combine(WAN, learned("PixArt", "PixArtT5XXL"))
    with pytest.raises(RegionError):
        belonging(both, *model("WAN21", WanT5Model))


@pytest.mark.parametrize("encoder", [PixArtT5XXL, None])
def test_another_model_that_may_read_the_same_text_gets_a_warning(encoder):
    ((line, tone),) = belonging(CHROMA, *model("PixArt", encoder))
    assert tone == "warn" and "chroma" in line and "pixart" in line


def test_another_checkpoint_of_the_same_kind_is_told():
    ((line, tone),) = belonging(learned("WAN21", "WanT5Model", "a.safetensors"),
                                *model("WAN21", WanT5Model, "sub/b.safetensors"))  # fmt: skip
    assert tone == "neutral" and "a.safetensors" in line and "b.safetensors" in line


def test_an_encoder_that_comfyui_does_not_know_is_only_warned_of():
    ((_, tone),) = belonging(learned("Other", "BertModel"), *model("WAN21", WanT5Model))
    assert tone == "warn"


def test_models_that_share_a_class_are_told_apart_by_their_settings():
    found, prompt, node = model("BaseModel", None)
    found.model.model_config = type("SD15", (), {"clip_target": lambda self, state: None})()
    assert belonging(learned("BaseModel", "SD1ClipModel"), found, prompt, node)[0][1] == "warn"
    alike = Region(WAN.parts, {"base_model": "BaseModel", "family": "sd15"})
    assert belonging(alike, found, prompt, node) == []


def test_inspect_refuses_a_text_encoder_of_another_family():
    class Loaded(WanT5Model):
        pass

    clip = SimpleNamespace(cond_stage_model=Loaded())
    check_encoder(WAN, clip)
    check_encoder(example_region(), clip)
    check_encoder(learned("Other", "BertModel"), clip)
    with pytest.raises(RegionError, match="PixArtT5XXL, and this CLIP is WanT5Model"):
        check_encoder(combine(WAN, CHROMA), clip)
