"""The theorem: inside means untouched to the bit; outside the whole prompt moves as the formula says."""
from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_safe_region.region import Gate, Move, Part, RegionError, steer
from comfyui_safe_region.region.steering import check_judgeable, openness, worst_depth
from region_examples import DTYPES, bits, example_gate, example_move, example_part, same_bits, wall_part

TOKENS, WIDTH = 3, 4
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)


def any_bits(dtype: torch.dtype, content: bytes) -> torch.Tensor:
    """A prompt [1, TOKENS, WIDTH] of arbitrary bits: NaNs, infinities, denormals, negative zeros."""
    return torch.frombuffer(bytearray(content), dtype=dtype)[: TOKENS * WIDTH].reshape(1, TOKENS, WIDTH)


def cross(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"cross_attn": tokens}


def one_block(gate: Gate, move: Move) -> Part:
    return Part("a", {"cross_attn": move}, {"cross_attn": gate})


def expected(tokens: torch.Tensor, part: Part, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3 of the design, slowly and in float64, for one prompt [T, D] without padding: (result, deepest)."""
    gate, move = part.gates["cross_attn"], part.moves["cross_attn"]
    e = tokens.double()
    g = {name: tensor.double() for name, tensor in gate.tensors().items()}
    m = {name: tensor.double() for name, tensor in move.tensors().items()}
    averaged = torch.stack([(g["context"] * (token - g["mean"]) / g["scale"]).sum(-1) for token in e]).mean(0)
    depths = torch.stack([(g["weight"] * (token - g["mean"]) / g["scale"]).sum(-1) + averaged - g["bias"]
                          for token in e])  # fmt: skip
    opened = (depths.max() / g["ramp"]).clamp(0, 1)
    rows = []
    for position, token in enumerate(e):
        moved = m["up"] @ (m["down"] @ ((token - m["mean"]) / m["scale"])) + m["offset"]
        rows.append(token + strength * opened * (moved + m["profile"][position % len(m["profile"])] * m["direction"]))
    return torch.stack(rows), depths.max()


# Inside


@given(dtypes, st.binary(min_size=48, max_size=48))
@settings(max_examples=300, deadline=None)
def test_inside_is_untouched_to_the_bit_whatever_the_bits(dtype, content):
    tokens = any_bits(dtype, content)
    part = example_part(bias=0.0, cross_attn=WIDTH)
    part = replace(part, gates={"cross_attn": replace(part.gates["cross_attn"], bias=torch.full((3,), 1e3))})
    tokens = torch.where(tokens.abs() > 30, torch.copysign(torch.full_like(tokens, 0.3), tokens), tokens)  # NaN stays
    outside = torch.full_like(tokens, 300.0) * torch.sign(part.gates["cross_attn"].weight[0]).to(dtype)
    batch = torch.cat([tokens, outside, tokens])
    steered = steer(cross(batch), [part])["cross_attn"]
    assert same_bits(steered[0], tokens[0]) and same_bits(steered[2], tokens[0])
    assert (bits(steered[1]) != bits(outside[0])).any(-1).all(), "the prompt beside it is outside: all of it moves"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [float("nan"), -0.0, 1e-7])
def test_special_numbers_inside_keep_their_bits(dtype, special):
    tokens = torch.tensor([[[0.5, special, 1.0, -1.0], [special] * 4]], dtype=dtype)
    assert same_bits(steer(cross(tokens), [wall_part(2.0)])["cross_attn"], tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_wall_itself_belongs_to_the_region(dtype):
    on, beyond = torch.ones(1, 2, 4, dtype=dtype), torch.full((1, 2, 4), 1.25, dtype=dtype)
    assert same_bits(steer(cross(on), [wall_part(1.0)])["cross_attn"], on)
    assert not same_bits(steer(cross(beyond), [wall_part(1.0)])["cross_attn"], beyond)


@given(seeds, dtypes, st.floats(-3, 3), st.floats(0.1, 5))
@settings(max_examples=200, deadline=None)
def test_untouched_exactly_where_every_depth_is_negative(seed, dtype, bias, ramp):
    tokens = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    part = one_block(example_gate(WIDTH, seed, 3, bias, ramp), example_move(WIDTH, seed))
    wanted, deepest = expected(tokens[0], part, 1.0)
    assume(abs(deepest) > 1e-4)
    steered = steer(cross(tokens), [part])["cross_attn"]
    assert same_bits(steered, tokens) == (deepest < 0) or torch.equal(wanted.to(dtype), tokens[0])
    assert openness(cross(tokens), part).item() == pytest.approx(float((deepest / ramp).clamp(0, 1)), abs=1e-4)


# Outside


@given(seeds, st.floats(-2, 2), st.floats(-3, 3))
@settings(max_examples=200, deadline=None)
def test_outside_follows_the_formula(seed, bias, strength):
    tokens = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(seed))
    part = one_block(example_gate(WIDTH, seed, 3, bias, 2.0), example_move(WIDTH, seed))
    steered = steer(cross(tokens), [part], strength)["cross_attn"]
    for prompt, result in zip(tokens, steered):
        torch.testing.assert_close(result.double(), expected(prompt, part, strength)[0], atol=2e-4, rtol=1e-4)


def test_the_whole_prompt_moves_when_one_token_is_outside():
    tokens = torch.zeros(2, 5, 4) - 1
    tokens[1, 3, 0] = 9
    steered = steer(cross(tokens), [wall_part(0.0)])["cross_attn"]
    assert torch.equal(steered[0], tokens[0])
    torch.testing.assert_close(steered[1], tokens[1] + 0.25)


@pytest.mark.parametrize(("beyond", "share"), [(-1.0, 0), (0.0, 0), (0.25, 0.25), (0.5, 0.5), (1.0, 1), (7.0, 1)])
def test_the_gate_opens_along_its_ramp(beyond, share):
    tokens = torch.full((1, 2, 4), beyond)
    assert openness(cross(tokens), wall_part(0.0)).tolist() == [share]


def test_each_gate_has_its_own_ramp_in_any_order():
    tokens = {"cross_attn": torch.full((1, 2, 4), 1.0), "pooled_output": torch.full((1, 4), 1.0)}
    gate = wall_part(0.0).gates["cross_attn"]
    gates = {block: replace(gate, ramp=torch.tensor(r)) for block, r in (("pooled_output", 2.0), ("cross_attn", 10.0))}
    for order in (list(gates), list(reversed(gates))):
        part = Part("a", wall_part(0.0).moves, {block: gates[block] for block in order})
        assert openness(tokens, part).tolist() == [0.5]
        assert worst_depth(tokens, part).tolist() == [1.0]


def test_a_gate_on_one_block_moves_another():
    part = Part("a", {"cross_attn": Move(offset=torch.ones(4))}, {"pooled_output": wall_part(0.0).gates["cross_attn"]})
    blocks = {"cross_attn": torch.ones(2, 3, 4), "pooled_output": torch.tensor([[5.0, 1, 1, 1], [-5.0, 1, 1, 1]])}
    steered = steer(blocks, [part])
    assert torch.equal(steered["cross_attn"][0], torch.full((3, 4), 2.0))
    assert torch.equal(steered["cross_attn"][1], blocks["cross_attn"][1])
    assert steered["pooled_output"] is blocks["pooled_output"]


def test_always_ignores_the_gate():
    tokens = torch.full((1, 2, 4), -1.0)
    assert torch.equal(steer(cross(tokens), [wall_part(0.0)], always=True)["cross_attn"], tokens + 0.25)


def test_a_part_without_gates_acts_on_every_prompt():
    tokens = torch.randn(3, 2, 4)
    part = Part("a", {"cross_attn": Move(offset=torch.ones(4))})
    assert torch.equal(steer(cross(tokens), [part])["cross_attn"], tokens + 1)


def test_the_profile_starts_anew_with_each_chunk():
    move = Move(profile=torch.arange(77.0), direction=torch.tensor([1.0, 0, 0, 0]))
    tokens = torch.full((1, 154, 4), 0.5)
    shift = steer(cross(tokens), [Part("a", {"cross_attn": move})])["cross_attn"] - tokens
    assert torch.equal(shift[0, :, 0], torch.arange(77.0).repeat(2)) and not shift[..., 1:].any()


# What never changes


@given(seeds, dtypes, st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_strength_zero_is_the_identity(seed, dtype, bias):
    tokens = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tokens[:, :, 0] = torch.tensor([-0.0, torch.inf, torch.nan], dtype=dtype)
    part = example_part(seed=seed % 1000, bias=bias, cross_attn=WIDTH)
    for always in (False, True):
        assert same_bits(steer(cross(tokens), [part, part], [0.0, 0], always)["cross_attn"], tokens)


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), dtypes, st.sampled_from(["tokens", "pooled", "layers"]),
    st.sampled_from([-100.0, 0.0, 100.0]), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_shape_and_dtype_stay_and_nothing_is_mutated(batch, tokens, layers, dtype, kind, bias, masked):
    shape = {"tokens": (batch, tokens, 6), "pooled": (batch, 6), "layers": (batch, layers, tokens, 6)}[kind]
    blocks = {"cross_attn": torch.randn(shape).to(dtype), "pooled_output": torch.randn(batch, 8).to(dtype)}
    masks = {"cross_attn": torch.randint(0, 2, (batch, tokens))} if masked and kind == "tokens" else {}
    part = example_part(bias=bias, cross_attn=6, pooled_output=8)
    numbers = {name: tensor.clone() for name, tensor in part.named_tensors().items()}
    copies = {name: tensor.clone() for name, tensor in blocks.items()}
    masks_copy = {name: tensor.clone() for name, tensor in masks.items()}
    steered = steer(blocks, [part, example_part(seed=7, bias=bias)], 1.0, masks=masks)
    assert list(steered) == list(blocks)
    for name, tensor in steered.items():
        assert (tensor.shape, tensor.dtype, tensor.device) == (blocks[name].shape, dtype, blocks[name].device)
        assert same_bits(blocks[name], copies[name])
        assert tensor is not blocks[name], "a result never shares memory that a later node could write to"
    assert all(torch.equal(masks[name], masks_copy[name]) for name in masks)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in part.named_tensors().items())


def test_blocks_that_no_part_moves_come_back_as_they_came():
    blocks = {"cross_attn": torch.randn(1, 2, 6), "pooled_output": torch.randn(1, 8)}
    assert steer(blocks, [example_part()])["pooled_output"] is blocks["pooled_output"]
    assert steer(blocks, []) == blocks


# Padding, masks and constant tokens


@given(dtypes, st.integers(0, 4), st.sampled_from(["zero", "masked", "constant", "masked nan"]))
@settings(max_examples=100, deadline=None)
def test_tokens_that_do_not_count_neither_open_the_gate_nor_move(dtype, position, kind):
    # on the far side of the wall at 0, except zero rows: there the wall stands at -1
    silent = {"zero": 0.0, "masked": 90.0, "constant": 50.0, "masked nan": float("nan")}[kind]
    tokens = torch.full((2, 5, 4), -3.0, dtype=dtype)
    tokens[:, position] = silent
    other = (position + 1) % 5
    tokens[1, other, 0] = 5.0
    masks = {"cross_attn": torch.arange(5)[None] != position} if "masked" in kind else {}
    part = wall_part(-1.0, constant=torch.full((1, 4), 50.0) if kind == "constant" else None)
    steered = steer(cross(tokens), [part], masks=masks)["cross_attn"]
    assert same_bits(steered[0], tokens[0]), "it must not open the gate"
    assert same_bits(steered[1, position], tokens[1, position]), "it must not move"
    assert (bits(steered[1]) != bits(tokens[1])).any(-1).sum() == 4, "all others move"
    if kind != "zero":  # the same token opens the gate where it counts
        counted = steer(cross(tokens.nan_to_num(9.0)), [wall_part(-1.0)])["cross_attn"]
        assert not same_bits(counted[0], tokens.nan_to_num(9.0)[0])


def test_padding_and_constant_tokens_are_in_no_average():
    gate = replace(example_gate(4, walls=2), context=torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    constant = torch.full((1, 4), 3.0)
    part = Part("a", {"cross_attn": example_move(4)}, {"cross_attn": gate}, {"cross_attn": constant})
    padded = torch.cat([constant.expand(2, 1, 4), tokens, torch.zeros(2, 3, 4), torch.full((2, 1, 4), 8.0)], 1)
    mask = torch.tensor([[1] * 9 + [0]] * 2)
    torch.testing.assert_close(worst_depth(cross(padded), part, cross(mask)), worst_depth(cross(tokens), part))
    alone = replace(part, gates={"cross_attn": replace(gate, context=None)})
    assert not torch.allclose(worst_depth(cross(tokens), part), worst_depth(cross(tokens), alone))


def test_a_prompt_of_padding_only_stays():
    tokens = torch.zeros(1, 3, 4)
    assert same_bits(steer(cross(tokens), [wall_part(-5.0)])["cross_attn"], tokens)
    assert same_bits(steer(cross(tokens), [wall_part(-5.0)], always=True)["cross_attn"], tokens)


# Numbers that are none


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_hides_no_other(dtype, broken):
    tokens = torch.full((1, 6, 4), -3.0, dtype=dtype)
    tokens[0, 2, 0], tokens[0, 4, 3] = 5.0, broken
    steered = steer(cross(tokens), [wall_part(0.0)])["cross_attn"]
    assert openness(cross(tokens), wall_part(0.0)).tolist() == [1.0]
    assert same_bits(steered[0, 4], tokens[0, 4]), "nothing is known of it: it stays"
    assert (bits(steered[0]) != bits(tokens[0])).any(-1).sum() == 5


def test_what_cannot_be_judged_at_all_is_refused():
    part = wall_part(0.0, constant=torch.full((1, 4), 50.0))
    tokens = torch.full((2, 3, 4), -3.0)
    tokens[1, 1:] = torch.nan
    check_judgeable(cross(tokens), [part])
    tokens[1, 0] = 50.0  # the start token alone says nothing
    with pytest.raises(RegionError, match="NaN"):
        check_judgeable(cross(tokens), [part])
    masks = {"cross_attn": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    check_judgeable(cross(tokens), [part], masks)  # the broken ones are padding
    both = replace(part, gates=part.gates | {"pooled_output": part.gates["cross_attn"]})
    check_judgeable(cross(tokens) | {"pooled_output": torch.ones(2, 4)}, [both])


def test_finite_tokens_beyond_all_bounds_open_the_gate():
    tokens = torch.full((1, 2, 4), 3e38)
    gate = Gate(torch.tensor([[2.0, -2.0, 0, 0]]), torch.zeros(1), torch.zeros(4), torch.ones(4), torch.tensor(1.0))
    assert openness(cross(tokens), one_block(gate, Move(offset=torch.ones(4)))).tolist() == [1.0]


def test_a_prompt_without_tokens_is_inside():
    for tokens in (torch.zeros(1, 0, 4), torch.zeros(2, 3, 0, 4)):
        part = wall_part(-1.0, constant=torch.ones(1, 4))
        assert steer(cross(tokens), [part, wall_part(-2.0)])["cross_attn"].shape == tokens.shape
        assert not openness(cross(tokens), part).any()


def test_text_that_only_some_prompts_have_is_judged_where_it_is():
    gates = {"cross_attn": wall_part(0.0).gates["cross_attn"], "other": wall_part(5.0).gates["cross_attn"]}
    part = replace(wall_part(0.0), gates=gates)
    tokens = torch.full((1, 2, 4), -1.0)
    assert openness(cross(tokens), part).tolist() == [0.0]
    assert openness(cross(tokens) | {"other": tokens + 9}, part).tolist() == [1.0]
    assert openness({"third": tokens}, part).tolist() == [1.0], "nothing that it could judge: it acts"


# One against another


def leading_in(block: float = 0.0) -> Part:
    """As `wall_part`, with a move that leads every prompt to -1, inside."""
    down = torch.tensor([[1.0, 0, 0, 0]])
    move = Move(down=down, up=-down.T, mean=torch.zeros(4), scale=torch.ones(4), offset=torch.tensor([-1.0, 0, 0, 0]))
    return replace(wall_part(block), moves={"cross_attn": move})


def negated(part: Part, by: float = 1.0) -> Part:
    """The same gate, and the move turned round."""
    move = part.moves["cross_attn"]
    return replace(part, moves={"cross_attn": replace(move, up=-by * move.up, offset=-by * move.offset)})


@pytest.mark.parametrize("by", [0.5, 1.0, 1.5, 10.0, 1e6])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_region_made_to_undo_another_does_not(by, copies):
    guard = leading_in()
    against = [negated(guard, by + 0.01 * i) for i in range(copies)]
    tokens = torch.tensor([[[5.0, 1, 1, 1], [2.0, 1, 1, 1]], [[-5.0, 1, 1, 1], [-2.0, 1, 1, 1]]])
    steered = steer(cross(tokens), [*against, guard])["cross_attn"]
    assert worst_depth(cross(steered), guard)[0] <= 0, "what comes out is inside of the guard"
    assert same_bits(steered[1], tokens[1])
    assert same_bits(steer(cross(tokens), [guard, *reversed(against)])["cross_attn"], steered)


def test_a_move_without_walls_does_not_undo_a_guard():
    free = Part("free", {"cross_attn": Move(offset=torch.full((4,), 40.0))})
    tokens = torch.full((1, 2, 4), 2.0)
    assert worst_depth(cross(steer(cross(tokens), [leading_in(), free])["cross_attn"]), leading_in())[0] <= 0


def test_parts_that_do_not_disturb_one_another_simply_add():
    other = leading_in()
    other = replace(other, gates={"cross_attn": replace(other.gates["cross_attn"], weight=torch.eye(4)[1:2])},
                    moves={"cross_attn": Move(offset=torch.tensor([0.0, -9, 0, 0]))})  # fmt: skip
    tokens = torch.full((1, 2, 4), 2.0)
    both = steer(cross(tokens), [leading_in(), other])["cross_attn"]
    assert torch.equal(both, torch.tensor([-1.0, -7, 2, 2]).expand(1, 2, 4))


# Composition


@given(seeds, dtypes)
@settings(max_examples=60, deadline=None)
def test_the_order_of_parts_does_not_matter_to_the_bit(seed, dtype):
    tokens = torch.randn(2, TOKENS, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    blocks = {"cross_attn": tokens, "pooled_output": tokens[:, 0]}
    parts = [
        (example_part("a", seed % 97, 0.0, cross_attn=6), 0.7, False),
        (example_part("b", seed % 97 + 1, -1.0, cross_attn=6, pooled_output=6), 1.3, True),
        (example_part("c", seed % 97 + 2, 0.0, pooled_output=6), -0.4, False),
    ]
    results = []
    for order in permutations(parts):
        chosen, strengths, modes = zip(*order)
        results.append(steer(blocks, chosen, strengths, modes))
    for result in results[1:]:
        assert all(same_bits(result[name], results[0][name]) for name in blocks)


def test_every_part_judges_the_original_prompt():
    back = replace(wall_part(0.0), moves={"cross_attn": Move(offset=torch.full((4,), -8.0))})
    tokens = torch.full((1, 2, 4), 1.0)
    both = steer(cross(tokens), [back, wall_part(0.5)])["cross_attn"]
    assert torch.equal(both, tokens - 8 + 0.5 * 0.25), "the first would have led it inside the second"


def test_a_closed_part_takes_nothing_from_an_open_one():
    tokens = torch.full((1, 2, 4), 1.0)
    for limit in range(5, 20):  # other numbers, other ids: the closed part comes before the open one, and after it
        closed = wall_part(float(limit))
        assert torch.equal(steer(cross(tokens), [wall_part(0.0), closed])["cross_attn"], tokens + 0.25)


def test_ids_tell_parts_apart_by_their_numbers_only():
    part = example_part()
    assert part.id == replace(part, label="other").id == example_part().id
    assert part.id != example_part(seed=1).id
    shapes = [Part("a", {"cross_attn": Move(offset=torch.zeros(6), profile=torch.zeros(p), direction=torch.zeros(6))})
              for p in (6, 7)]  # fmt: skip
    assert shapes[0].id != shapes[1].id


# No host synchronisation; devices; gradients


class NoSync(TorchDispatchMode):
    """Raises where an operator would have to wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "_unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} makes the host wait for the device"
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError("indexing with booleans makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def everything() -> tuple[dict[str, torch.Tensor], list[Part], dict[str, torch.Tensor]]:
    part = replace(example_part(cross_attn=6, pooled_output=8), constant={"cross_attn": torch.randn(2, 6)})
    blocks = {"cross_attn": torch.randn(2, 5, 6), "pooled_output": torch.randn(2, 8)}
    return blocks, [part, example_part("b", 3)], {"cross_attn": torch.ones(2, 5)}


def test_steering_never_waits_for_the_device():
    blocks, parts, masks = everything()
    for part in parts:
        _ = part.id  # made once, when a part is first used
    with NoSync():
        steer(blocks, parts, masks=masks)
        with pytest.raises(AssertionError, match="wait"):  # the check itself works
            bool(blocks["cross_attn"].sum() > 0)


def test_steering_runs_on_tensors_without_numbers():
    blocks, parts, masks = everything()
    ghosts, ghost_masks = ({name: t.to("meta") for name, t in named.items()} for named in (blocks, masks))
    on_meta = steer(ghosts, parts, masks=ghost_masks)
    assert all(on_meta[name].shape == tensor.shape and on_meta[name].is_meta for name, tensor in blocks.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steering_on_a_gpu_never_waits_and_agrees_with_the_cpu():
    blocks, parts, masks = everything()
    there = {name: tensor.cuda() for name, tensor in blocks.items()}
    masks_there = {name: mask.cuda() for name, mask in masks.items()}
    steer(there, parts, masks=masks_there)  # copies the parts once
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = steer(there, parts, masks=masks_there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tensor in steer(blocks, parts, masks=masks).items():
        torch.testing.assert_close(result[name].cpu(), tensor, atol=1e-3, rtol=1e-3)


def test_a_part_is_copied_to_a_device_once():
    part = example_part()
    assert part.to(torch.device("meta")) is part.to(torch.device("meta"))


def test_gradients_reach_the_move_but_pass_no_closed_gate():
    down, up = torch.zeros(2, 4, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    move = Move(down=down, up=up, mean=torch.zeros(4), scale=torch.ones(4), offset=torch.zeros(4, requires_grad=True))
    for limit, learns in ((0.0, True), (5.0, False)):
        part = replace(wall_part(limit), moves={"cross_attn": move})
        steer(cross(torch.full((1, 2, 4), 2.0)), [part])["cross_attn"].sum().backward()
        assert bool(down.grad.any()) == bool(move.offset.grad.any()) == learns
        for tensor in (down, up, move.offset):
            tensor.grad = None


def test_walls_are_read_in_normalised_coordinates():
    numbers = [[1.0, -2.0]], [0.5], [1.0, 1.0], [2.0, 4.0], 1.0
    part = one_block(Gate(*map(torch.tensor, numbers)), Move(offset=torch.zeros(2)))
    found = worst_depth(cross(torch.tensor([[[5.0, 3.0]]])), part)
    assert found.item() == pytest.approx((5 - 1) / 2 - 2 * (3 - 1) / 4 - 0.5)
