"""Several processes that learn one region together, as `accelerate launch` starts them. Alone, everything is as it was.

All draw the same random numbers and hold the same move; prompts, trajectories and a step's batch are divided among
them, and gradients are added up. So two processes learn what one would with the same batch, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@cache
def _state() -> Any:
    """accelerate's state; None for a single process, which does not need accelerate."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # some containers set WORLD_SIZE and mean something else
    if not launched or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def count() -> int:
    return _state().num_processes if _state() else 1


def index() -> int:
    """Of this process; 0 is the one that speaks and writes."""
    return _state().process_index if _state() else 0


def gathered(own: Sequence[T]) -> list[T]:
    """What all processes have, in the order of their indices."""
    if _state() is None:
        return list(own)
    from accelerate.utils import gather_object

    return gather_object(list(own))


def in_order(own: Sequence[tuple[int, T]]) -> list[tuple[int, T]]:
    """What all processes have, each with the number of its batch, in the order of these."""
    return sorted(gathered(own), key=lambda one: one[0])


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    if _state() is None:
        return tensor
    from accelerate.utils import reduce

    return reduce(tensor.contiguous(), "sum")


def agreed(value: T) -> T:
    """What process 0 has; others may differ in the last bits."""
    if _state() is None:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
