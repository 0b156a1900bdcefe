"""Small regions and prompts that several tests use."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from comfyui_safe_region.region import Gate, Move, Part, Region

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HANG = 20.0  # seconds of work: many times what it takes, since machines differ


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < HANG


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def example_gate(width: int, seed: int = 0, walls: int = 3, bias: float = 0.0, ramp: float = 1.0) -> Gate:
    draw = torch.Generator().manual_seed(seed)
    return Gate(
        weight=torch.randn(walls, width, generator=draw), bias=torch.full((walls,), bias),
        mean=torch.randn(width, generator=draw), scale=torch.rand(width, generator=draw) + 0.5, ramp=torch.tensor(ramp),
        context=torch.randn(walls, width, generator=draw),
    )  # fmt: skip


def example_move(width: int, seed: int = 0, rank: int = 2, positions: int = 5) -> Move:
    draw = torch.Generator().manual_seed(seed + 1)
    return Move(
        down=torch.randn(rank, width, generator=draw), up=torch.randn(width, rank, generator=draw),
        mean=torch.randn(width, generator=draw), scale=torch.rand(width, generator=draw) + 0.5,
        offset=torch.randn(width, generator=draw),
        profile=torch.randn(positions, generator=draw), direction=torch.randn(width, generator=draw),
    )  # fmt: skip


def example_part(label: str = "a", seed: int = 0, bias: float = -100.0, **widths: int) -> Part:
    """A part with gate and move on every block; the low bias opens the gate for ordinary prompts."""
    widths = widths or {"cross_attn": 6}
    return Part(
        label,
        {block: example_move(width, seed) for block, width in widths.items()},
        {block: example_gate(width, seed, bias=bias) for block, width in widths.items()},
    )


def example_region(label: str = "a", seed: int = 0, bias: float = -100.0, **widths: int) -> Region:
    return Region((example_part(label, seed, bias, **widths),), {"name": f"region {label}", "concept": label})


def wall_part(limit: float, width: int = 4, constant: Tensor | None = None) -> Part:
    """One wall that is easy to see: a prompt is outside when a token's first number is above `limit`."""
    weight = torch.zeros(1, width)
    weight[0, 0] = 1.0
    gate = Gate(weight, torch.tensor([limit]), torch.zeros(width), torch.ones(width), torch.tensor(1.0))
    move = Move(offset=torch.full((width,), 0.25))
    constants = {} if constant is None else {"cross_attn": constant}
    return Part("wall", {"cross_attn": move}, {"cross_attn": gate}, constants)
