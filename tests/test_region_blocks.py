"""Blocks: how a conditioning is divided, that cutting and joining lose nothing, and training on divided text."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_safe_region.region import Region, RegionError, apply_to_conditioning, combine
from comfyui_safe_region.region import blocks as blocks_module
from comfyui_safe_region.region.blocks import (
    BYT5,
    FAMILIES,
    LLAMA,
    POOLED,
    Family,
    block_names,
    block_width,
    described,
    read_blocks,
    write_blocks,
)
from comfyui_safe_region.region.conditioning import CROSS_ATTENTION, text_blocks, text_masks, text_tensors
from comfyui_safe_region.region.files import region_bytes, region_from_bytes
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.text_states import stacked
from comfyui_safe_region.training.trainer import Trainer
from region_examples import example_gate, example_move, example_part, same_bits
from toy_model import WIDTH, ToyBackbone


def text_of(family: Family, seed: int = 0, batch: int = 1) -> list:
    """A random prompt as an entry, laid out as the family's."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(batch, *shape, generator=draw) for key, shape in family.shapes.items()}
    if family.name == "SD3":
        tensors[CROSS_ATTENTION][:, :77, 2048:] = 0
    return [tensors.pop(CROSS_ATTENTION), tensors]


def region_for(entry: list, bias: float) -> Region:
    """A region that moves every block of the entry; its gate looks at the whole of its own tensor."""
    names = block_names(text_tensors(entry))
    moves = {name: example_move(t.shape[-1]) for name, t in text_blocks(entry).items()}
    assert list(moves) == names
    part = replace(example_part("a"), moves=moves, gates={CROSS_ATTENTION: example_gate(entry[0].shape[-1], bias=bias)})
    return Region((part,), {"name": "a"})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_familys_text_is_moved_in_every_block_or_kept_to_the_bit(family):
    if (width := family.shapes[CROSS_ATTENTION][-1]) > blocks_module.WIDEST:
        family = replace(family, shapes={CROSS_ATTENTION: (4, width)})  # no more than is looked at
    entry = text_of(family)
    entry[1] |= {"attention_mask": torch.ones(1, entry[0].shape[1]), "guidance": 3.5}
    ((inside, options),) = apply_to_conditioning([entry], region_for(entry, bias=1e9))
    before, after = text_tensors(entry), text_tensors([inside, options])
    assert all(same_bits(before[key], after[key]) for key in before)
    ((outside, options),) = apply_to_conditioning([entry], region_for(entry, bias=-1e9))
    after = text_tensors([outside, options])
    moved = read_blocks(after, block_names(before))
    for name, block in text_blocks(entry).items():
        assert moved[name].shape == block.shape and not torch.equal(moved[name], block), name
        padding = (block == 0).all(-1)
        assert same_bits(moved[name][padding], block[padding])
    assert options["attention_mask"] is entry[1]["attention_mask"] and options["guidance"] == 3.5
    gateless = Region((replace(region_for(entry, 0).parts[0], gates={}),))
    assert apply_to_conditioning([entry], gateless), "its blocks alone say whose it is"


def test_sd3_clip_tokens_and_t5_tokens_are_told_apart_wherever_they_stand():
    (family,) = (f for f in FAMILIES if f.name == "SD3")
    entry = text_of(family)
    twice = [torch.cat([entry[0], entry[0]], 1), entry[1]]  # as ConditioningConcat makes them: CLIP, T5, CLIP, T5
    found = text_blocks(twice)
    clip, t5 = found["cross_attn__narrow2048"], found["cross_attn__beyond2048"]
    assert clip.shape[-1] == 2048 and t5.shape[-1] == 4096
    is_clip = (clip != 0).any(-1)[0]
    assert is_clip[:77].all() and not is_clip[77:154].any() and is_clip[154:231].all()
    assert torch.equal((t5 != 0).any(-1)[0], ~is_clip)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["layers", "features", "narrow", "whole", "every"]))
def test_blocks_written_back_give_the_same_bits(seed, kind):
    draw = torch.Generator().manual_seed(seed)
    tensor = torch.randn(2, 3, 5, 12, generator=draw)
    tensor.view(-1)[torch.randint(360, (9,), generator=draw)] = float("nan")
    tensor[..., 7:][torch.rand(2, 3, 5, generator=draw) < 0.4] = -0.0
    names = {
        "layers": [f"x__layer{i}" for i in range(3)], "features": ["x__features0to5", "x__features5to12"],
        "narrow": ["x__narrow7", "x__beyond7"], "whole": ["x"], "every": [f"x__every4from{i}" for i in range(4)],
    }[kind]  # fmt: skip
    tensors = {"x": tensor}
    assert same_bits(write_blocks(tensors, read_blocks(tensors, names))["x"], tensor)
    assert same_bits(tensors["x"], tensor)


def test_wide_tensors_are_cut_into_their_layers_and_unknown_ones_evenly():
    def names(width):
        return block_names({CROSS_ATTENTION: torch.empty(1, 2, width)})

    assert names(15_360) == [f"cross_attn__features{i}to{i + 5120}" for i in (0, 5120, 10_240)]
    assert len(names(30_720)) == 12
    assert names(11_520)[1] == "cross_attn__features2880to5760"
    assert names(53_248) == [f"cross_attn__every13from{i}" for i in range(13)]
    assert names(9_000) == ["cross_attn__features0to4500", "cross_attn__features4500to9000"]
    assert names(5_000) == ["cross_attn"]


def test_layers_that_take_turns_are_moved_one_by_one():
    layers = [torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    tensors = {CROSS_ATTENTION: torch.stack(layers, -1).flatten(2)}  # as Ideogram 4's encoder joins them
    names = [f"cross_attn__every3from{i}" for i in range(3)]
    for block, layer in zip(read_blocks(tensors, names).values(), layers):
        assert same_bits(block, layer)
    written = write_blocks(tensors, {names[1]: layers[1] + 1})
    for block, layer, moved in zip(read_blocks(written, names).values(), layers, (0, 1, 0)):
        assert torch.equal(block, layer + moved)


@pytest.mark.parametrize("divided", ["whole", "turns"])
def test_a_file_keeps_divided_blocks(monkeypatch, divided):
    if divided == "turns":
        monkeypatch.setattr(blocks_module, "INTERLEAVED", {6: 3})
    entry = text_of(Family("layers", (), {CROSS_ATTENTION: (4, 6), LLAMA: (3, 5, 8)}))
    region = region_for(entry, bias=-1e9)
    again = region_from_bytes(region_bytes(region))
    one, other = (text_tensors(apply_to_conditioning([entry], r)[0]) for r in (region, again))
    assert all(same_bits(one[key], other[key]) for key in one)


def test_a_region_steers_divided_text_once_in_any_order():
    entry = text_of(Family("layers", (), {CROSS_ATTENTION: (4, 6), LLAMA: (3, 5, 8)}))
    first = region_for(entry, -1e9)
    (part,) = first.parts
    second = Region((replace(part, label="b", moves={n: example_move(m.offset.shape[-1], 7)
                                                     for n, m in part.moves.items()}),))  # fmt: skip
    ways = [
        apply_to_conditioning(apply_to_conditioning([entry], first), second),
        apply_to_conditioning(apply_to_conditioning([entry], second), first),
        apply_to_conditioning(apply_to_conditioning([entry], combine(first, second)), first),
    ]
    results = [text_tensors(way[0]) for way in ways]
    assert all(same_bits(results[0][key], other[key]) for other in results[1:] for key in other)
    assert not torch.equal(results[0][LLAMA], text_tensors(apply_to_conditioning([entry], first)[0])[LLAMA])


# --- what does not fit ---


def test_a_missing_layer_or_block_is_an_error_that_names_both_sides():
    entry = text_of(Family("layers", (), {CROSS_ATTENTION: (4, 6), LLAMA: (3, 5, 8)}))
    region = region_for(entry, -1e9)
    fewer = [entry[0], {LLAMA: entry[1][LLAMA][:, :2]}]
    for other in ([entry[0], {}], fewer, [entry[0], {LLAMA: entry[1][LLAMA][..., :4]}]):
        with pytest.raises(RegionError, match=r"conditioning_llama3 3 x 8.*but this conditioning has cross_attn 6"):
            apply_to_conditioning([other], region)


def test_families_are_named_in_the_message():
    sdxl, flux = (text_of(f) for f in FAMILIES if f.name in ("Flux", "SDXL"))
    region = replace(region_for(sdxl, -1e9), metadata={"name": "r", "encoder": {"name": "SDXLClipModel"}})
    with pytest.raises(RegionError, match=r"SDXLClipModel \(.*as SDXL has\).*pooled_output 768, as .*Flux.* has\."):
        apply_to_conditioning([flux], region)
    assert described({CROSS_ATTENTION: 5}, {}) == "cross_attn 5"
    klein = {f"cross_attn__features{i}to{i + 2560}": 2560 for i in (0, 2560, 5120)}
    assert described(klein, {}, "Flux2TEModel") == "cross_attn 7680, as Flux.2 Klein 4B has"
    assert described({"cross_attn__every13from2": 4096}, {}) == "cross_attn 53248, as Ideogram 4 has"
    assert described({}, {}) == "no text"
    assert described({CROSS_ATTENTION: 5, f"{LLAMA}__layer1": 8}, {LLAMA: 2}) == f"cross_attn 5, {LLAMA} 2 x 8"


def test_a_model_that_reads_the_words_itself_is_refused():
    entry = text_of(FAMILIES[0])
    with pytest.raises(RegionError, match="Anima"):
        apply_to_conditioning([[entry[0], entry[1] | {"t5xxl_ids": torch.ones(1, 3)}]], region_for(entry, -1e9))


def test_two_ways_of_dividing_one_tensor_cannot_act_together():
    entry = text_of(Family("one", (), {CROSS_ATTENTION: (4, 6)}))
    whole = region_for(entry, -1e9)
    (part,) = whole.parts
    ways = {"whole": whole} | {piece: Region((replace(part, moves={f"cross_attn__{piece}": example_move(width)}),))
                               for piece, width in (("features0to3", 3), ("every2from0", 3), ("every3from1", 2))}
    for one, other in permutations(ways.values(), 2):
        with pytest.raises(RegionError, match="different ways"):
            apply_to_conditioning(apply_to_conditioning([entry], one), other)


def test_text_that_only_some_prompts_have_is_steered_where_it_is():
    entry = text_of(Family("glyphs", (), {CROSS_ATTENTION: (4, 6), BYT5: (3, 8)}))
    region = region_for(entry, -1e9)
    without = [entry[0], {}]
    ((moved, options),) = apply_to_conditioning([without], region)
    assert not torch.equal(moved, entry[0]) and BYT5 not in options
    assert not torch.equal(apply_to_conditioning([entry], region)[0][1][BYT5], entry[1][BYT5])


def test_text_that_a_region_learned_nothing_about_is_refused():
    entry = text_of(Family("glyphs", (), {CROSS_ATTENTION: (4, 6), BYT5: (3, 8)}))
    region = region_for([entry[0], {}], -1e9)
    assert set(region.parts[0].moves) == {CROSS_ATTENTION}
    apply_to_conditioning([[entry[0], {}]], region)
    with pytest.raises(RegionError, match="quotes"):
        apply_to_conditioning([entry], region)
    passed = apply_to_conditioning([entry], region, unknown_text=True)[0]
    assert torch.equal(passed[1][BYT5], entry[1][BYT5]) and not torch.equal(passed[0], entry[0])


def test_widths_say_what_a_block_needs():
    tensors = {LLAMA: torch.empty(1, 2, 3, 8), CROSS_ATTENTION: torch.empty(1, 2, 6)}
    assert block_width("conditioning_llama3__layer1", tensors) == 8
    assert block_width("conditioning_llama3__layer2", tensors) is None
    assert block_width("cross_attn__features2to7", tensors) is None
    assert block_width("pooled_output", tensors) is None
    assert block_width("cross_attn__every3from2", tensors) == 2
    assert block_width("cross_attn__every3from3", tensors) is None  # the next layer's second feature
    assert block_width("cross_attn__every4from1", tensors) is None  # six features are no four layers
    assert block_width(f"cross_attn__every{10**40}from0", tensors) is None
    for piece in ("half", "every0from0", "every3", "everyfrom2", "every3from", "every-3from1", "every3from1to2"):
        with pytest.raises(RegionError, match="no piece"):
            block_width(f"cross_attn__{piece}", tensors)


def test_a_file_for_layers_that_the_model_does_not_have_is_refused():
    entry = text_of(Family("one", (), {CROSS_ATTENTION: (4, 6)}))
    (part,) = region_for(entry, -1e9).parts
    for piece in ("every3from3", "every4from0"):
        other = Region((replace(part, moves={f"cross_attn__{piece}": example_move(2)}),))
        with pytest.raises(RegionError, match="but this conditioning has"):
            apply_to_conditioning([entry], region_from_bytes(region_bytes(other)))


# --- training ---

PAIRS = parse_pairs(
    "a {zzknife|zzgun|zzbomb|zzaxe} {in the park|on a table|at night|by the sea} => "
    "a {flower|flower|flower|flower} {in the park|on a table|at night|by the sea}\n"
    "{red|blue|green} {zzknife|zzgun|zzbomb} and a {dog|cat} => {red|blue|green} {flower|flower|flower} and a {dog|cat}"
)


class LayeredToy(ToyBackbone):
    """The model looks at layers of one kind of text only; another kind is there for every other prompt."""

    def encode(self, prompts):
        entries = super().encode(prompts)
        for prompt, entry in zip(prompts, entries):
            entry[1][LLAMA] = torch.stack([entry[0], 3 * entry[0], -entry[0]], 1)
            if len(prompt) % 2:
                entry[1][BYT5] = entry[0][:, :4]
        return entries

    def denoise(self, x, sigma, entries):
        return super().denoise(x, sigma, [[entry[1][LLAMA][:, 1] / 3, {}] for entry in entries])


def test_a_text_that_is_the_same_in_every_prompt_stays():
    class Toy(ToyBackbone):
        def encode(self, prompts):
            return [[tokens, options | {POOLED: torch.ones(1, 8)}] for tokens, options in super().encode(prompts)]

    backbone = Toy(padded=False)
    region = Trainer(backbone, PAIRS, PRESETS["instant"], "bad things").run()
    assert list(region.parts[0].moves) == [CROSS_ATTENTION]
    after = apply_to_conditioning(backbone.encode(["a zzsword by the river"]), region)[0]
    assert torch.equal(after[1][POOLED], torch.ones(1, 8))


def test_every_layer_learns_a_move_of_its_own():
    backbone = LayeredToy(padded=False)
    recipe = replace(PRESETS["region"], steps=6, trajectories=8, sampling_steps=4, rank=4)
    region = Trainer(backbone, PAIRS, recipe, "bad things").run()
    (part,) = region.parts
    assert list(part.moves) == [CROSS_ATTENTION, *(f"{LLAMA}__layer{i}" for i in range(3)), BYT5]
    assert list(part.gates) == list(part.moves), "every text has walls of its own"
    assert set(part.constant) == set(part.moves) - {BYT5}, "the start token is known in every block that all have"
    before = backbone.encode(["a zzsword by the river"])[0]
    after = apply_to_conditioning([before], region)[0]
    way = [(after[1][LLAMA] - before[1][LLAMA])[0, i].flatten() for i in range(3)]
    assert all(w.norm() > 0 for w in way)
    assert torch.cosine_similarity(way[0], -way[2], dim=0) > 0.7, "the same text, turned round"


@pytest.mark.parametrize("divided", ["features", "turns", "narrow"])
def test_training_on_one_tensor_in_pieces(monkeypatch, divided):
    if divided == "features":
        monkeypatch.setattr(blocks_module, "WIDEST", 10)
        pieces = ["features0to8", "features8to16", "features16to24"]
    elif divided == "turns":
        monkeypatch.setattr(blocks_module, "INTERLEAVED", {WIDTH: 3})
        pieces = [f"every3from{i}" for i in range(3)]
    else:
        pieces = ["narrow16", "beyond16"]
        family = Family("toy", (), {CROSS_ATTENTION: (24, WIDTH)}, {CROSS_ATTENTION: tuple(pieces)})
        monkeypatch.setattr(blocks_module, "FAMILIES", (family,))

    class Toy(ToyBackbone):
        def encode(self, prompts):
            entries = super().encode(prompts)
            for entry in entries if divided == "narrow" else []:
                entry[0][:, 1::2, 16:] = 0
            return entries

    recipe = replace(PRESETS["region"], steps=6, trajectories=8, sampling_steps=4, rank=4)
    region = Trainer(Toy(), PAIRS, recipe, "bad things").run()
    (part,) = region.parts
    assert list(part.moves) == [f"cross_attn__{piece}" for piece in pieces]
    walls = {CROSS_ATTENTION: WIDTH}  # one encoder wrote all its features, but two these kinds of token
    if divided == "narrow":
        walls = {"cross_attn__narrow16": 16, "cross_attn__beyond16": WIDTH}
    assert {block: len(gate.mean) for block, gate in part.gates.items()} == walls
    bad, calm = Toy().encode(["a zzsword by the river", "a lamp in the hall"])
    moved, kept = apply_to_conditioning([bad, calm], region)
    assert torch.equal(kept[0], calm[0]) and not torch.equal(moved[0], bad[0])
    if divided == "narrow":
        assert (moved[0][:, 1::2, 16:] == 0).all()


def test_stacking_pads_masks_and_leaves_out_what_a_prompt_lacks():
    one = [torch.ones(1, 3, 6), {POOLED: torch.ones(1, 4), "attention_mask": torch.tensor([[1, 1, 0]])}]
    other = [torch.ones(1, 5, 6), {POOLED: torch.ones(1, 4), LLAMA: torch.ones(1, 2, 3, 8)}]
    found = stacked([one, other])
    assert found[CROSS_ATTENTION].shape == (2, 5, 6) and found[POOLED].shape == (2, 1, 4)
    assert found[LLAMA].shape == (2, 2, 3, 8) and (found[LLAMA][0] == 0).all() and (found[LLAMA][1] == 1).all()
    assert torch.equal(found[CROSS_ATTENTION][0, :, 0], torch.tensor([1.0, 1, 0, 0, 0]))


def test_masks_belong_to_their_tensor():
    options = {"attention_mask": torch.ones(1, 4), "conditioning_mt5xl": torch.ones(1, 7, 8),
               "attention_mask_mt5xl": torch.ones(1, 7), LLAMA: torch.ones(1, 2, 4, 8)}  # fmt: skip
    masks = text_masks([torch.ones(1, 4, 6), options])
    assert {name: mask.shape[-1] for name, mask in masks.items()} == {CROSS_ATTENTION: 4, "conditioning_mt5xl": 7}
