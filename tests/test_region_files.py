"""Saving and loading is exact, writing is all or nothing, and whatever is wrong with a file gets one clear sentence."""
from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from comfyui_safe_region.region import (
    Move,
    Part,
    Region,
    RegionError,
    apply_to_conditioning,
    combine,
    files,
    load_region,
    region_bytes,
    region_from_bytes,
    save_region,
    steer,
    writing,
)
from comfyui_safe_region.region.files import slug
from comfyui_safe_region.region.steering import depth
from region_examples import example_gate, example_move, example_part, example_region, no_hang, same_bits

CARD = {"name": "Wéapons ⚔", "calibration": {"n": 200, "alpha": 0.01}, "results": [1.5, None, True], "inner": {"a": {}}}


def full_region() -> Region:
    part = example_part("weapons", cross_attn=6, pooled_output=8)
    gates = {"pooled_output": part.gates["pooled_output"], "cross_attn": example_gate(6, 5, bias=0.1, ramp=3.0)}
    first = replace(part, gates=gates, constant={"cross_attn": torch.randn(2, 6)})
    second = Part("paper-2", {"cross_attn": Move(profile=torch.randn(77), direction=torch.randn(6))})
    return Region((first, second), CARD)


def refused(content: bytes) -> str:
    """The sentence with which a file of this content is refused."""
    with pytest.raises(RegionError) as caught:
        region_from_bytes(content, "file.safetensors")
    text = str(caught.value)
    assert text.startswith("file.safetensors: ") and text.endswith(".") and "\n" not in text and len(text) < 400
    return text


def content(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    return save(tensors, {"format": "safe_region", "version": "1", "region": "{}", **metadata})


def tensors_of(region: Region) -> dict[str, torch.Tensor]:
    return {f"{p.label}.{name}": t.contiguous().clone() for p in region.parts for name, t in p.named_tensors().items()}


def changed(**changes: Any) -> bytes:
    """A good file with some tensors replaced; None takes one away."""
    named = tensors_of(Region((example_part("w", cross_attn=6),)))
    for name, tensor in changes.items():
        key = f"w.cross_attn.{name.replace('__', '.')}"
        named.pop(key, None)
        if tensor is not None:
            named[key] = tensor
    return content(named)


# Exactness


def test_save_then_load_is_exact(tmp_path):
    region = full_region()
    path = save_region(region, tmp_path / "new" / "folder" / "weapons.safetensors")
    loaded = load_region(str(path))
    assert loaded.metadata == CARD
    assert {p.label: p.id for p in loaded.parts} == {p.label: p.id for p in region.parts}
    before, after = tensors_of(region), tensors_of(loaded)
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in before)


@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_a_loaded_region_steers_as_the_saved_one_to_the_bit(seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    blocks = {"cross_attn": torch.randn(3, 5, 6, generator=draw), "pooled_output": torch.randn(3, 8, generator=draw)}
    blocks = {name: tensor.to(dtype) for name, tensor in blocks.items()}
    region = full_region()
    before, after = (steer(blocks, r.parts) for r in (region, region_from_bytes(region_bytes(region))))
    assert all(same_bits(before[name], after[name]) for name in blocks)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), json_values, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_description_comes_back(card):
    card = json.loads(json.dumps(card, ensure_ascii=False))
    try:
        written = region_bytes(Region(example_region().parts, card))
    except RegionError as error:
        assert "cannot be saved" in str(error)  # lone surrogates can hide in keys
        return
    assert region_from_bytes(written).metadata == card


def test_half_precision_files_are_read_as_float32():
    halves = {name: tensor.half() for name, tensor in tensors_of(example_region()).items()}
    assert all(t.dtype == torch.float32 for t in tensors_of(region_from_bytes(content(halves))).values())


def test_a_typical_region_is_small():
    part = Part("weapons", {"cross_attn": example_move(768, rank=16)}, {"cross_attn": example_gate(768, walls=4)})
    assert len(region_bytes(Region((part,)))) < 150_000


# Writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_region(example_region(), tmp_path / "r.safetensors")
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(writing.os, broken, fail)
            with pytest.raises(OSError, match="No space"):
                save_region(full_region(), path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]
    save_region(full_region(), path)
    assert path.read_bytes() != old and os.listdir(tmp_path) == [path.name]


def unwritable() -> list[Any]:
    good = example_part()
    bent = {"cross_attn": replace(good.moves["cross_attn"], offset=torch.full((6,), torch.nan))}
    narrow = {"cross_attn": example_move(5)}
    return [
        (Region((replace(good, label="No Label"),)), "cannot name a concept"),
        (Region((good, example_part(seed=1))), "same name"),
        (Region(()), "0 concepts"),
        (Region((replace(good, moves=bent),)), "not finite"),
        (Region((replace(good, moves=narrow),)), "does not fit"),
        (Region((good,), {"loss": float("nan")}), "JSON"),
        (Region((good,), {"path": Path("x")}), "JSON"),
        (Region((good,), {"name": "\ud800"}), "description is damaged"),
    ]


@pytest.mark.parametrize(("region", "words"), unwritable())
def test_what_could_not_be_read_back_is_never_written(region, words, tmp_path):
    with pytest.raises(RegionError, match=words):
        save_region(region, tmp_path / "r.safetensors")
    assert not os.listdir(tmp_path)


def test_combined_regions_can_be_saved():
    regions = [example_region("a", 1), example_region("a", 2), example_region("a-2", 3)]
    assert len(region_from_bytes(region_bytes(combine(*regions))).parts) == 3


@pytest.mark.parametrize(("text", "label"), [("Sharp Tools!", "sharp-tools"), ("⚔", "concept"), ("a" * 99, "a" * 64)])
def test_labels_from_free_text(text, label):
    assert slug(text) == label
    region_bytes(Region((replace(example_part(), label=label),)))


# Malformed files


GOOD = region_bytes(full_region())


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(noise):
    refused(noise)


@given(st.integers(0, len(GOOD) - 1))
@settings(max_examples=200, deadline=None)
def test_every_truncation_is_refused(length):
    refused(GOOD[:length])


@given(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_flipped_bytes_give_a_sentence_or_a_region(flips):
    damaged = bytearray(GOOD)
    for position, value in flips:
        damaged[position] = value
    try:
        region = region_from_bytes(bytes(damaged), "file")
    except RegionError as error:
        assert str(error).startswith("file: ") and "\n" not in str(error)
    else:
        region_from_bytes(region_bytes(region))


json_headers = st.recursive(
    st.none() | st.integers() | st.floats() | st.sampled_from(["F32", "I64", "F8_E4M3", "BOOL", "__metadata__", "x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w.x.gate.bias"]), inner),
    max_leaves=12,
)


@given(json_headers, st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_any_json_as_header_is_refused(header, size):
    text = json.dumps(header).encode()
    refused(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize("shape", [[0], [0, 2**62], [2**63], [1] * 70, [-1], [2**40, 2**40], [1.5], "x"])
def test_impossible_shapes_in_the_header(shape):
    header = {"w.cross_attn.move.offset": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    header["__metadata__"] = {"format": "safe_region", "version": "1", "region": "{}"}
    for end in (0, 4):
        header["w.cross_attn.move.offset"]["data_offsets"][1] = end
        text = json.dumps(header).encode()
        refused(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.mark.parametrize("card", ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "[]", "null", "{", "", '"text"',
                                  '{"a": NaN}', '{"a": "\\ud800"}', '{"a": 1e999}'])  # fmt: skip
def test_damaged_descriptions(card):
    assert "description is damaged" in refused(content(tensors_of(example_region()), region=card))


def test_headers_that_are_json_bombs():
    for text in (b"[" * 100_000, b'{"a":' * 50_000, b'{"a":1e999}', b'{"__metadata__":' + b"{" * 9000):
        refused(struct.pack("<Q", len(text)) + text)
    refused(struct.pack("<Q", 2**63) + b"{}")


def test_files_of_other_kinds_and_versions():
    named = tensors_of(example_region())
    assert "holds no safe region (a LoRA or a model" in refused(save(named))
    assert "holds no safe region" in refused(save(named, {"format": "pt"}))
    assert "version '2', this pack reads version 1: update" in refused(content(named, version="2"))
    assert "0 concepts" in refused(content({}))
    assert "64" in refused(content({f"p{n}.cross_attn.move.offset": torch.zeros(2) for n in range(65)}))


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down.weight", "w", "w.cross_attn", "w.cross_attn.gate", "w.cross_attn.gate.weight.x",
        "w.cross_attn.other", "w.cross_attn.move.sideways", "w.Cross.move.offset", "W.cross_attn.move.offset",
        ".cross_attn.move.offset", "../x.cross_attn.move.offset", "w.cross_attn.tilt.weight",
        "w.\x1b[31m.move.offset", "x" * 5000,
    ],
)  # fmt: skip
def test_tensors_that_no_region_has(key):
    text = refused(content({**tensors_of(example_region("w")), key: torch.ones(6)}))
    assert "holds a tensor that no region has" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ({"gate__weight": None}, "'w.cross_attn.gate' lacks weight"),
        ({"gate__ramp": None, "gate__bias": None}, "lacks bias, ramp"),
        ({"move__up": None}, "'w.cross_attn.move' lacks up"),
        ({"move__mean": None, "move__scale": None}, "lacks mean, scale"),
        ({"move__direction": None}, "lacks direction"),
        ({"move__offset": None, "move__profile": None, "move__direction": None}, "lacks offset"),
        ({"gate__weight": torch.ones(3, 7)}, "does not fit the rest"),
        ({"gate__bias": torch.ones(2)}, "does not fit the rest"),
        ({"move__offset": torch.ones(7)}, "does not fit the rest"),
        ({"move__down": torch.ones(3, 6)}, "does not fit the rest"),
        ({"move__up": torch.ones(2, 6)}, "does not fit the rest"),
        ({"move__profile": torch.ones(5000)}, "does not fit the rest"),
        ({"constant": torch.ones(2, 7)}, "does not fit the rest"),
        ({"constant": torch.ones(6)}, "constant"),
        ({"gate__ramp": torch.ones(1)}, "impossible shape"),
        ({"gate__weight": torch.ones(1, 3, 6)}, "impossible shape"),
        ({"gate__weight": torch.ones(0, 6)}, "impossible shape"),
        ({"move__offset": torch.tensor(1.0)}, "impossible shape"),
        ({"move__offset": torch.ones(70_000)}, "impossible shape"),
        ({"gate__ramp": torch.tensor(0.0)}, "must be positive"),
        ({"gate__scale": torch.tensor([1.0, 1, 1, 1, 1, -1])}, "must be positive"),
        ({"move__scale": torch.zeros(6)}, "must be positive"),
        ({"move__offset": torch.full((6,), torch.nan)}, "not finite"),
        ({"move__offset": torch.full((6,), torch.inf)}, "not finite"),
        ({"move__offset": torch.ones(6, dtype=torch.int32)}, "int32 numbers, floats are needed"),
        ({"move__offset": torch.ones(6, dtype=torch.float64)}, "float64 numbers"),
        ({"move__offset": torch.ones(6, dtype=torch.bool)}, "bool numbers"),
        ({"move__offset": torch.ones(6).to(torch.float8_e4m3fn)}, "float8_e4m3fn numbers"),
        ({"move__offset": torch.ones(6, dtype=torch.complex64)}, ""),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said(damaged, words):
    assert words in refused(changed(**damaged))


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ({"gate__scale": torch.tensor([1e-45, 1, 1, 1, 1, 1])}, "'w.cross_attn.gate.scale' must be positive"),
        ({"gate__ramp": torch.tensor(1e-40)}, "'w.cross_attn.gate.ramp' must be positive"),
        ({"move__scale": torch.full((6,), 1e-39)}, "'w.cross_attn.move.scale' must be positive"),
        ({"gate__scale": torch.full((6,), 1e-37), "gate__weight": torch.full((3, 6), 100.0)}, "can be computed"),
        ({"gate__scale": torch.full((6,), 1e-35)}, "'w.cross_attn.gate' has numbers so large, or scales so small"),
        ({"gate__weight": torch.full((3, 6), 3e38)}, "nothing can be computed with them"),
        ({"gate__mean": torch.full((6,), 3e38)}, "nothing can be computed with them"),
        ({"gate__bias": torch.full((3,), 3e38), "gate__ramp": torch.tensor(1e-3)}, "nothing can be computed"),
        ({"gate__ramp": torch.tensor(3e38)}, "'w.cross_attn.gate' can never open"),
        ({"gate__ramp": torch.tensor(1e9)}, "can never open"),
        ({"gate__bias": torch.full((3,), 1e9)}, "can never open"),
        ({"gate__weight": torch.zeros(3, 6), "gate__context": torch.zeros(3, 6), "gate__bias": torch.zeros(3)},
         "can never open"),
        ({"gate__context": torch.full((3, 6), 1e38)}, "nothing can be computed"),
        ({"move__scale": torch.full((6,), 1e-37)}, "'w.cross_attn.move' shifts tokens out of all proportion"),
        ({"move__down": torch.full((2, 6), 1e38)}, "out of all proportion"),
        ({"move__up": torch.full((6, 2), 1e30)}, "out of all proportion"),
        ({"move__mean": torch.full((6,), 3e38)}, "out of all proportion"),
        ({"move__offset": torch.full((6,), 1e5)}, "out of all proportion"),
        ({"move__direction": torch.full((6,), 1e4), "move__profile": torch.full((3,), 1e4)}, "out of all proportion"),
    ],
)
def test_numbers_with_which_nothing_can_be_judged_or_moved(damaged, words):
    """Each alone is finite and of the right shape."""
    assert words in refused(changed(**damaged))


def test_walls_at_the_limits_can_be_computed():
    """What the checks let pass gives finite depths for every token that half precision can hold."""
    for scale, ramp in ((1e-27, 1e4), (1e20, 1e-5), (1.0, 5e3)):
        kept = changed(gate__scale=torch.full((6,), scale), gate__ramp=torch.tensor(ramp))
        (part,) = region_from_bytes(kept).parts
        for tokens in (torch.full((1, 2, 6), 65_504.0), torch.full((1, 2, 6), -65_504.0), torch.randn(1, 2, 6)):
            assert depth(tokens, part.gates["cross_attn"], torch.ones(1, 2, dtype=torch.bool)).isfinite().all()


# Damage


SMALL = region_bytes(Region((example_part("w", cross_attn=3),), {"name": "small", "concept": "weapons", "n": 10}))


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_flipped_bit_is_found():
    for bit in range(len(SMALL) * 8):
        with pytest.raises(RegionError, match=r"^file: "):
            region_from_bytes(flipped(SMALL, bit), "file")


def test_a_changed_description_is_damage_too():
    damaged = SMALL.replace(rb'\"n\": 10', rb'\"n\": 99')
    assert damaged != SMALL and "it is damaged" in refused(damaged)


def test_files_without_a_hash_are_read_as_before():
    region = region_from_bytes(content(tensors_of(example_region())))
    assert region.parts[0].id == example_region().parts[0].id
    for path in (Path(files.__file__).parent.parent / "demo" / "regions").glob("*.safetensors"):
        assert load_region(path).parts


# Descriptions that would slow everything down, or fill the page


def test_descriptions_without_measure():
    named = tensors_of(example_region())
    for card, words in (
        ('{"combined":[' + ",".join(["{}"] * 250_000) + "]}", "nested too deeply, or lists too much"),
        ('{"combined":[' * 40 + "{}" + "]}" * 40, "nested too deeply"),
        (json.dumps({"name": "x" * 5_000_000}), "its description is larger than 4 MB"),
        (json.dumps({"name": "x" * 20_000_000}), "larger than 16 MB"),
    ):
        with no_hang():
            assert words in refused(content(named, region=card))


def test_what_is_said_of_a_region_with_an_endless_name_is_short():
    region = region_from_bytes(content(tensors_of(example_region()), region=json.dumps({"name": "x\n" * 1_000_000})))
    assert len(region.name) <= 200 and "\n" not in region.name
    with pytest.raises(RegionError) as caught:
        apply_to_conditioning([[torch.ones(1, 2, 9), {}]], region)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("card", [{"losses": [0.5] * 300_000}, {"text": "x" * 5_000_000}])
def test_too_long_a_description_is_not_saved(card, tmp_path):
    with pytest.raises(RegionError, match=r'^The region "a" cannot be saved: its description'):
        save_region(Region(example_region().parts, card | {"name": "a"}), tmp_path / "r.safetensors")
    assert not os.listdir(tmp_path)


def test_64_regions_with_previews_and_losses_can_be_combined_and_saved():
    cards = {"preview": "x" * 20_000, "results": {"losses": [0.123456789] * 1000}}
    regions = [Region(example_region("a", n).parts, cards | {"name": f"region {n}"}) for n in range(64)]
    assert len(region_from_bytes(region_bytes(combine(*regions))).parts) == 64


def test_tensors_and_blocks_without_number():
    offsets = {f"w.b{n}.move.offset": torch.ones(1) for n in range(200)}
    assert "acts on 200 kinds of text" in refused(content(offsets))
    many = {f"w.b{n}.move.offset": torch.ones(1) for n in range(40_000)}
    with no_hang():
        assert "40,001 tensors" in refused(content(many))


def test_a_concept_without_a_move():
    named = {f"w.cross_attn.gate.{name}": tensor for name, tensor in example_gate(6).tensors().items()}
    assert "the concept 'w' has no move" in refused(content(named))


def test_files_too_large(monkeypatch, tmp_path):
    (tmp_path / "large.safetensors").write_bytes(GOOD)
    monkeypatch.setattr(files, "MAX_BYTES", len(GOOD) - 1)
    assert "larger than" in refused(GOOD)
    with pytest.raises(RegionError, match=r"^large\.safetensors: the file is larger than"):
        load_region(tmp_path / "large.safetensors")


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "noise.safetensors").write_bytes(os.urandom(100))
    (tmp_path / "lora.safetensors").write_bytes(save({"lora_up.weight": torch.ones(2)}))
    for name, words in (
        ("empty", "not a readable .safetensors file"), ("noise", "not a readable .safetensors file"),
        ("folder", "cannot be read"), ("missing", "cannot be read"), ("a\0b", "cannot be read"),
        ("lora", "holds no safe region"),
    ):  # fmt: skip
        with pytest.raises(RegionError) as caught:
            load_region(tmp_path / f"{name}.safetensors")
        assert words in str(caught.value) and str(caught.value).startswith(name)


def test_the_same_region_gives_the_same_file():
    region = full_region()
    assert len({region_bytes(region) for _ in range(8)}) == 1
