"""Everything that ComfyUI's own nodes make of a conditioning, with Apply Safe Region and with Guard Model."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drawing import Drawing
from host import PACK
from safetensors.torch import save_file

from comfyui_safe_region.region import load_region, save_region

pytestmark = pytest.mark.skipif(
    not (PACK / "demo" / "regions" / "demo-weapons.safetensors").exists(), reason="the example region is not made yet"
)
UNSAFE, HARMLESS, OTHER = "a kitchen knife on a red background", "a cat in the park", "a tree at night"
# weights of the demo model that the test's LoRA changes
WEIGHTS = {"diffusion_model.time.2": (256, 256),
           "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2": (192, 768)}  # fmt: skip


# --- ways in which nodes change or combine prompts: (graph, prompts) -> conditioning ---


def combined(g: Drawing, one: list, other: list) -> list:
    return g.add("ConditioningCombine", conditioning_1=one, conditioning_2=other)(0)


def area(g: Drawing, one: list, other: list) -> list:
    placed = g.add("ConditioningSetArea", conditioning=one, width=64, height=128, x=0, y=0, strength=0.8)(0)
    return combined(g, placed, other)


def masked(g: Drawing, one: list, other: list) -> list:
    mask = g.add("SolidMask", value=0.5, width=128, height=128)(0)
    return combined(g, g.add("ConditioningSetMask", conditioning=one, mask=mask, strength=1.0,
                             set_cond_area="default")(0), other)  # fmt: skip


def in_turn(g: Drawing, one: list, other: list) -> list:
    first = g.add("ConditioningSetTimestepRange", conditioning=one, start=0.0, end=0.5)(0)
    return combined(g, first, g.add("ConditioningSetTimestepRange", conditioning=other, start=0.5, end=1.0)(0))


def with_reference(g: Drawing, one: list, other: list) -> list:
    return combined(g, g.add("ReferenceLatent", conditioning=one, latent=g.latent())(0), other)


def with_properties(g: Drawing, one: list, other: list) -> list:
    times = g.add("ConditioningTimestepsRange", start_percent=0.1, end_percent=0.9)
    set_one = g.add("ConditioningSetProperties", cond_NEW=one, strength=0.7, set_cond_area="default",
                    timesteps=times(0))(0)  # fmt: skip
    return combined(g, set_one, other)


def joined(g: Drawing, one: list, other: list) -> list:
    return g.add("ConditioningConcat", conditioning_to=one, conditioning_from=other)(0)


def averaged(g: Drawing, one: list, other: list) -> list:
    return g.add("ConditioningAverage", conditioning_to=one, conditioning_from=other, conditioning_to_strength=0.8)(0)


def zeroed(g: Drawing, one: list, other: list) -> list:
    return combined(g, one, g.add("ConditioningZeroOut", conditioning=other)(0))


APART = [combined, area, masked, in_turn, with_reference, with_properties, zeroed]  # every prompt stays an entry
MIXED = [joined, averaged]
Way = Callable[[Drawing, list, list], list]


@pytest.mark.parametrize("way", APART, ids=lambda way: way.__name__)
def test_steering_before_or_after_is_the_same_and_the_guard_does_it_too(comfy, way: Way):
    g = Drawing()
    unsafe, harmless = g.text(UNSAFE), g.text(HARMLESS)
    plain = way(g, unsafe, harmless)
    g.draw(plain)
    g.draw(g.steered(plain))
    g.draw(way(g, g.steered(unsafe), g.steered(harmless)))
    g.draw(plain, model=g.guarded())
    g.draw(g.steered(plain), model=g.guarded())
    before, after, *others = g.run(comfy)
    assert before != after and all(other == after for other in others)


@pytest.mark.parametrize("way", [*APART, joined], ids=lambda way: way.__name__)
def test_harmless_prompts_draw_the_same_to_the_bit(comfy, way: Way):
    g = Drawing()
    plain = way(g, g.text(HARMLESS), g.text(OTHER))
    g.draw(plain)
    g.draw(g.steered(plain))
    g.draw(plain, model=g.guarded())
    before, *others = g.run(comfy)
    assert all(other == before for other in others)


@pytest.mark.parametrize("way", MIXED, ids=lambda way: way.__name__)
def test_text_that_was_mixed_after_steering_counts_as_new(comfy, way: Way):
    g = Drawing()
    mixed = way(g, g.text(UNSAFE), g.text(HARMLESS))
    g.draw(mixed)
    g.draw(g.steered(mixed))
    g.draw(mixed, model=g.guarded())
    g.draw(way(g, g.text(UNSAFE), g.steered(g.text(HARMLESS))), model=g.guarded())
    before, after, guarded, late = g.run(comfy)
    assert before != after and guarded == after and late == after


def test_a_later_start_meets_a_range_that_is_already_there(comfy):
    g = Drawing()
    plain = in_turn(g, g.text(UNSAFE), g.text(HARMLESS))
    g.draw(plain)
    g.draw(g.steered(plain, start=0.6))  # the unsafe prompt ends before
    g.draw(plain, model=g.guarded(start=0.6))
    g.draw(g.steered(plain, start=0.3))
    g.draw(plain, model=g.guarded(start=0.3))
    g.draw(g.steered(plain))
    plain, after, guarded_after, within, guarded_within, all_of_it = g.run(comfy)
    assert after == plain == guarded_after
    assert within == guarded_within and within not in (plain, all_of_it)


def test_nothing_before_disarms_a_later_node_or_guard(comfy):
    g = Drawing()
    unsafe = g.text(UNSAFE)
    g.draw(unsafe)
    g.draw(g.steered(unsafe))
    for weaker in ({"strength": 0.01}, {"strength": 0.5}, {"start": 0.3, "end": 0.6}, {"end": 0.5}):
        g.draw(g.steered(unsafe, **weaker), model=g.guarded())
        g.draw(unsafe, model=g.guarded(g.guarded(**weaker)))
        g.draw(unsafe, model=g.guarded(g.guarded(), **weaker))
        g.draw(g.steered(g.steered(unsafe, **weaker)))
    plain, steered, *others = g.run(comfy)
    assert plain != steered and all(other == steered for other in others)


@pytest.mark.parametrize("way", ["steered", "guarded"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"strength": -1.0}, "must be a number from 0 to 4"), ({"strength": 1e30}, "must be a number from 0 to 4"),
        ({"start": -1.0}, "must lie between 0 and 1"), ({"end": 7.0}, "must lie between 0 and 1"),
        ({"start": 0.5, "end": 0.5}, "start before end"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_a_link_brings_past_the_widgets_are_refused(comfy, way, how, said):
    g = Drawing()
    linked = {name: g.add("TestNumber", value=value)(0) for name, value in how.items()}
    if way == "steered":
        g.draw(g.steered(g.text(UNSAFE), **linked))
    else:
        g.draw(g.text(UNSAFE), model=g.guarded(**linked))
    with pytest.raises(RuntimeError, match=said):
        g.run(comfy)


@pytest.fixture(scope="module")
def extras(comfy):
    """A LoRA for both networks and a textual inversion, in ComfyUI's folders."""
    draw = torch.Generator().manual_seed(0)
    lora = {}
    for name, shape in WEIGHTS.items():
        lora[f"{name}.diff"] = 0.05 * torch.randn(shape, generator=draw)
    for folder in ("loras", "embeddings"):
        (comfy.base / "models" / folder).mkdir(exist_ok=True)
    save_file(lora, comfy.base / "models" / "loras" / "test.safetensors")
    save_file({"emb_params": torch.randn(2, 192, generator=draw)},
              comfy.base / "models" / "embeddings" / "odd.safetensors")  # fmt: skip


def test_scheduled_loras_hooks_and_embeddings(comfy, extras):
    g = Drawing()
    hook = g.add("CreateHookLora", lora_name="test.safetensors", strength_model=1.0, strength_clip=1.0)(0)
    frames = g.add("CreateHookKeyframe", strength_mult=0.2, start_percent=0.0)(0)
    frames = g.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=frames)(0)
    hooks = g.add("SetHookKeyframes", hooks=hook, hook_kf=frames)(0)
    clip = g.add("SetClipHooks", clip=g.demo(1), hooks=hooks, apply_to_conds=True, schedule_clip=True)(0)
    unsafe, harmless = (g.text(f"{text}, embedding:odd (very:1.2)", clip) for text in (UNSAFE, HARMLESS))
    g.draw(g.text(HARMLESS))
    for prompt in (unsafe, harmless):
        g.draw(prompt)
        g.draw(g.steered(prompt))
        g.draw(prompt, model=g.guarded())
    without, unsafe, steered, guarded, harmless, kept, kept_by_guard = g.run(comfy)
    assert harmless != without, "the hooks do something"
    assert steered == guarded != unsafe
    assert harmless == kept == kept_by_guard


def test_text_for_a_controlnet_alone_is_steered_too(comfy):
    g = Drawing()
    both = g.add("CLIPTextEncodeControlnet", clip=g.demo(1), conditioning=g.text(HARMLESS), text=UNSAFE)(0)
    seen = g.add("TestCompare", before=both, after=g.steered(both))()[0]
    ((found,),) = [json.loads(comfy.run(g.prompt)[seen]["text"][0])]
    assert found["options"]["cross_attn"]["same"]
    changed = found["options"]["cross_attn_controlnet"]
    assert changed["alike"] and not changed["same"]


# --- the guard ---


def _sampled(g: Drawing, kind: str, positive: list, model: list) -> list:
    """A latent, drawn by one of ComfyUI's ways to sample."""
    empty, latent = g.text(""), g.latent()
    if kind == "advanced":
        return g.add("KSamplerAdvanced", model=model, add_noise="enable", noise_seed=5, steps=Drawing.STEPS, cfg=4.0,
                     sampler_name="euler", scheduler="normal", positive=positive, negative=empty, latent_image=latent,
                     start_at_step=0, end_at_step=10, return_with_leftover_noise="disable")(0)  # fmt: skip
    sampler = g.add("KSamplerSelect", sampler_name="euler")(0)
    sigmas = g.add("BasicScheduler", model=model, scheduler="normal", steps=Drawing.STEPS, denoise=1.0)(0)
    if kind == "custom":
        return g.add("SamplerCustom", model=model, add_noise=True, noise_seed=5, cfg=4.0, positive=positive,
                     negative=empty, sampler=sampler, sigmas=sigmas, latent_image=latent)(0)  # fmt: skip
    guider = {
        "BasicGuider": {"conditioning": positive},
        "CFGGuider": {"positive": positive, "negative": empty, "cfg": 4.0},
        "DualCFGGuider": {"cond1": g.text(HARMLESS), "cond2": positive, "negative": empty, "cfg_conds": 2.0,
                          "cfg_cond2_negative": 4.0, "style": "regular"},
        "PerpNegGuider": {"positive": positive, "negative": g.text("red"), "empty_conditioning": empty, "cfg": 4.0,
                          "neg_scale": 1.0},
    }[kind]  # fmt: skip
    noise = g.add("RandomNoise", noise_seed=5)(0)
    return g.add("SamplerCustomAdvanced", noise=noise, guider=g.add(kind, model=model, **guider)(0), sampler=sampler,
                 sigmas=sigmas, latent_image=latent)(0)  # fmt: skip


KINDS = ["advanced", "custom", "BasicGuider", "CFGGuider", "DualCFGGuider", "PerpNegGuider"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_acts_in_every_sampler_and_guider(comfy, kind):
    g = Drawing()
    unsafe = g.text(UNSAFE)
    g.decode(_sampled(g, kind, unsafe, g.demo(0)))
    g.decode(_sampled(g, kind, g.steered(unsafe), g.demo(0)))
    g.decode(_sampled(g, kind, unsafe, g.guarded()))
    g.decode(_sampled(g, kind, g.steered(unsafe), g.guarded(g.guarded())))
    plain, steered, guarded, twice = g.run(comfy)
    assert plain != steered and guarded == steered and twice == steered


def test_the_guard_survives_clones_and_patches_in_either_order_and_can_be_taken_out(comfy, extras):
    g = Drawing()

    def patched(model: list) -> list:
        lora = g.add("LoraLoaderModelOnly", model=model, lora_name="test.safetensors", strength_model=1.0)(0)
        return g.add("RescaleCFG", model=lora, multiplier=0.7)(0)

    unsafe, harmless = g.text(UNSAFE), g.text(HARMLESS)
    g.draw(g.steered(unsafe), model=patched(g.demo(0)))
    g.draw(unsafe, model=g.guarded(patched(g.demo(0))))
    g.draw(unsafe, model=patched(g.guarded()))
    g.draw(unsafe, model=patched(g.demo(0)))
    g.draw(harmless, model=patched(g.demo(0)))
    g.draw(harmless, model=g.guarded(patched(g.demo(0))))
    steered, after, before, without, calm, calm_guarded = g.run(comfy)
    assert after == before == steered != without
    assert calm == calm_guarded


def test_negative_prompts_are_never_touched(comfy):
    g = Drawing()
    unsafe, harmless = g.text(UNSAFE), g.text(HARMLESS)
    g.draw(harmless, negative=unsafe)
    g.draw(harmless, negative=unsafe, model=g.guarded())
    g.draw(harmless, negative=g.steered(unsafe))
    plain, guarded, wired_in = g.run(comfy)
    assert guarded == plain != wired_in


def test_a_guard_of_another_encoder_stops_before_the_first_step(comfy):
    g = Drawing()
    other = g.add("TestOtherModel", prediction="epsilon")
    g.draw(g.text(UNSAFE, other(1)), model=g.guarded(other(0)), negative=g.text("", other(1)))
    with pytest.raises(RuntimeError, match=r"was learned on .*but this conditioning has cross_attn 96"):
        g.run(comfy)


def test_an_attribute_region_is_no_guard(comfy):
    g = Drawing()
    gender = g.add("SafeRegionLoader", region_name="demo-gender.safetensors")
    model = g.add("SafeRegionGuardModel", model=g.demo(0), region=gender(0), strength=1.0, mode="auto", start=0.0,
                  end=1.0)(0)  # fmt: skip
    g.draw(g.text(HARMLESS), model=model)
    with pytest.raises(RuntimeError, match="Balance Safe Region"):
        g.run(comfy)


@pytest.mark.parametrize(
    ("text", "options", "said", "tone"),
    [
        (UNSAFE, {}, "Sees weapons here: moved.", "warn"),
        (HARMLESS, {}, "Sees nothing of weapons here: comes out unchanged.", "good"),
        (UNSAFE, {"strength": 0.0}, "Switched off", "warn"),
        (HARMLESS, {"mode": "always"}, "Moved: mode always", "neutral"),
    ],
)
def test_apply_says_what_it_found(comfy, text, options, said, tone):
    g = Drawing()
    steered = g.steered(g.text(f"{text} "), **options)
    g.add("PreviewAny", source=steered)
    found = comfy.run(g.prompt)[steered[0]]
    assert found["text"][0].startswith(said) and found["safe_region_tone"] == [tone]


def test_what_no_text_encoder_writes_is_moved_and_says_so(comfy):
    g = Drawing()
    scaled = g.add("ConditioningAverage", conditioning_to=g.text(HARMLESS), conditioning_from=g.text(OTHER),
                   conditioning_to_strength=0.5)(0)  # fmt: skip
    steered = g.steered(scaled)
    g.draw(scaled)
    g.draw(steered)
    g.draw(scaled, model=g.guarded())
    outputs = comfy.run(g.prompt)
    (plain,), (after,), (guarded,) = g.pixels(comfy, outputs)
    assert plain != after == guarded
    assert outputs[steered[0]]["text"][0].startswith("Averaged, scaled or changed after the text encoder")


def test_a_weak_region_says_so_on_every_node_that_uses_it(comfy):
    region = load_region(PACK / "demo" / "regions" / "demo-weapons.safetensors")
    weak = region.metadata["calibration"] | {"held_out_unsafe_touched": 0.3}
    save_region(replace(region, metadata=region.metadata | {"calibration": weak}),
                comfy.base / "models" / "safe_regions" / "weak.safetensors")  # fmt: skip
    g = Drawing()
    g.region = g.add("SafeRegionLoader", region_name="weak.safetensors")
    steered, model = g.steered(g.text(UNSAFE)), g.guarded()
    g.draw(steered, model)
    saved = g.add("SaveSafeRegion", region=g.region(0), name="still-weak")()
    seen = g.add("SafeRegionInspect", clip=g.demo(1), text=UNSAFE, region=g.region(0))()
    outputs = comfy.run(g.prompt)
    for name in (steered[0], model[0], saved[0], seen[0]):
        assert "This region is weak" in "\n".join(outputs[name]["text"]), g.prompt[name]["class_type"]
    (record,) = outputs[model[0]]["safe_region_guard"]
    assert "This region is weak" in "\n".join(record["text"])


def test_a_guard_says_that_it_waits(comfy):
    g = Drawing()
    model = g.guarded(strength=0.95)
    g.draw(g.text(HARMLESS), model)
    assert comfy.run(g.prompt)[model[0]]["text"][0].startswith("On guard")
