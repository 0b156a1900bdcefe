"""The LoRA initialisation: fine-tune a LoRA on the text encoder for a few steps, then keep only what it did on average.

The literal reading of "an offset learned as a LoRA": `peft` adapts the transformers text encoder so that the unsafe
prompts draw their safe counterparts, and the mean shift of their embeddings becomes the move's first offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.conditioning import CROSS_ATTENTION, with_blocks
from .discovery import Moment, gap_left

STEPS = 40


def lora_shift(
    backbone: Backbone,
    prompts: Sequence[str],
    entries: Sequence,
    moments: Sequence[Moment],
    rank: int,
    generator: torch.Generator,
    visit: Callable[[int, float], None] = lambda step, loss: None,
) -> Tensor:
    """Mean shift [D] of the unsafe prompts' token states under a LoRA of a few steps. The encoder is left as it was.

    Raises ValueError where the backbone has no transformers text encoder, or peft is not installed.
    """
    encoder = getattr(backbone, "text_encoder", None)
    if encoder is None:
        raise ValueError(
            "The LoRA initialisation needs a transformers text encoder, which this model does not offer: "
            "choose another initial value (instant, difference or zero)."
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError('The LoRA initialisation needs peft: run  pip install "safe-region[train]"') from None
    import copy

    adapted = copy.deepcopy(encoder)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"]), adapted)
    parameters = [p for name, p in adapted.named_parameters() if "lora_" in name]
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    states = backbone.states_with(adapted)
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for step in range(STEPS):
        rows = torch.randint(len(moments), (8,), generator=generator).tolist()
        chosen = [moments[row] for row in rows]
        context = states([prompts[m.pair] for m in chosen])
        moved = [with_blocks(entries[m.pair], {CROSS_ATTENTION: state[None]}) for m, state in zip(chosen, context)]
        loss = gap_left(backbone, chosen, moved)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        visit(step, loss.item())
    with torch.no_grad():
        before = torch.cat([entry[0] for entry in entries])
        after = torch.cat([states(prompts[i : i + 32]) for i in range(0, len(prompts), 32)])
    return (after - before).flatten(0, 1).mean(0)
