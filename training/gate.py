"""The gate: walls that every unsafe prompt crosses with some token, and no harmless prompt with any.

Learned as multiple-instance classification (a prompt is a bag of tokens, its worst token counts), then moved
outwards by split-conformal calibration and frozen before any move is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..region.region import Gate
from ..region.steering import depth, judged

WALLS = 4
STEPS = 400
BATCH = 96
REVIEW = 50  # steps
TOLD_EVERY = 20  # steps: how often those who watch are told of the walls
SPARE = 0.25  # of the gap between harmless and unsafe prompts goes to the harmless ones
PENALTY = 1e-3
RAMP = 0.02  # of the typical depth of unsafe prompts: a prompt that is outside at all goes nearly all the way


def constant_tokens(harmless: Tensor, unsafe: Tensor, limit: int = 64) -> Tensor | None:
    """Tokens [n, D] that stand unchanged at the head of every prompt [N, T, D]: the start token, a chat template."""
    length = min(harmless.shape[1], unsafe.shape[1], limit)
    both = torch.cat([harmless[:256, :length], unsafe[:256, :length]]).float()
    spread = (both - both[:1]).norm(dim=-1).amax(0)
    size = both[0].norm(dim=-1)
    same = (spread < 1e-3 * size.clamp(min=1e-6)) & (size > 0)
    count = 0
    while count < len(same) and same[count]:
        count += 1
    return both[0, :count].clone() if count else None


def statistics(tokens: list[Tensor], counts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [D] and scale [D] over the counted tokens of several sets [N, T, D]."""
    number, total, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for states, counted in zip(tokens, counts):
        for chunk, which in zip(states.split(256), counted.split(256)):
            picked = chunk[which].double()
            number, total, square = number + len(picked), total + picked.sum(0), square + picked.square().sum(0)
    mean = total / number
    scale = ((square - number * mean.square()).clamp(min=0) / max(number - 1, 1)).sqrt().float()
    return mean.float(), scale.clamp(min=1e-3 * scale.mean().clamp(min=1e-6))


def judged_all(tokens: Tensor, constant: Tensor | None) -> Tensor:
    """Which tokens [N, T, D] count, [N, T]: in parts, since that takes memory."""
    return torch.cat([judged(chunk.float(), constant) for chunk in tokens.split(256)])


def prompt_depths(tokens: Tensor, gate: Gate, constant: Tensor | None, counts: Tensor | None = None) -> Tensor:
    """The largest depth of each prompt [N, T, D]: [N]. `counts` [N, T]: the tokens that count, if that is known."""
    counts = judged_all(tokens, constant) if counts is None else counts
    beyond = torch.cat([depth(chunk, gate).amax(-1) for chunk in tokens.split(256)])
    return beyond.masked_fill(~counts, -torch.inf).amax(-1)


def _first_walls(unsafe: Tensor, safe: Tensor, constant: Tensor | None, mean: Tensor, scale: Tensor,
                 generator: torch.Generator) -> Tensor:  # fmt: skip
    """Where the walls start [k, D]: along the mean difference of unsafe prompts and their counterparts.

    Each wall sees another half of the pairs, so that they can grow apart. Without this start the fit may latch on to
    words that merely are frequent among the unsafe prompts.
    """
    means = []
    for tokens in (unsafe, safe):
        counts = judged(tokens.float(), constant)[..., None]
        means.append((((tokens - mean) / scale) * counts).sum(1) / counts.sum(1).clamp(min=1))
    difference = means[0] - means[1]
    halves = torch.stack([
        difference[torch.randperm(len(difference), generator=generator)[: max(len(difference) // 2, 1)]].mean(0)
        for _ in range(WALLS)
    ])  # fmt: skip
    return halves / halves.norm(dim=1, keepdim=True).clamp(min=1e-6) / unsafe.shape[-1] ** 0.5


def _soft_worst(beyond: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """A mean over tokens and walls that weighs large depths most: the maximum, as the temperature falls. [B]"""
    flat = beyond.masked_fill(~counts[..., None], -torch.inf).flatten(1)
    weights = torch.softmax(flat / temperature, dim=1)
    return (weights * flat.masked_fill(weights == 0, 0)).sum(1)


def fit_gate(
    unsafe: Tensor,
    safe: Tensor,
    harmless: Tensor,
    constant: Tensor | None,
    generator: torch.Generator,
    visit: Callable[[int, float, Gate], None] = lambda step, loss, gate: None,
    steps: int = STEPS,
) -> Gate:
    """Fit k walls in normalised coordinates.

    Args:
        unsafe, safe: token states [N, T, D] of the pairs; rows of zeros are padding.
        harmless: token states [M, T, D].
        constant: tokens [n, D] that are left out of the statistics (as harmless tokens they still take part).
        visit: called with the step, the loss and the walls as they stand.
    """
    both = [unsafe, harmless]
    of_unsafe = judged_all(unsafe, constant)
    mean, scale = statistics(both, [of_unsafe, judged_all(harmless, constant)])
    # constant tokens count here as harmless, in case one goes unrecognised later
    counted = [of_unsafe, judged_all(harmless, None)]
    weight = _first_walls(unsafe, safe, constant, mean, scale, generator).requires_grad_(True)
    bias = torch.zeros(WALLS, requires_grad=True)
    now = Gate(weight, bias, mean, scale, torch.tensor(1.0))
    optimizer = torch.optim.Adam([weight, bias], lr=0.1 / math.sqrt(unsafe.shape[-1]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    chances = [torch.ones(len(tokens)) for tokens in both]
    for step in range(steps):
        if step % REVIEW == REVIEW - 1:  # harmless prompts that come near the walls are seen more often
            with torch.no_grad():
                chances[1] = F.relu(1 + prompt_depths(harmless, now, None, counted[1])) + 0.1
        temperature = 0.02 ** (step / steps)
        worst = []
        for tokens, counts, weights in zip(both, counted, chances):
            rows = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
            rows = rows[counts[rows].any(1)]
            beyond = depth(tokens[rows], now)
            worst.append(_soft_worst(beyond, counts[rows], temperature))
        loss = F.relu(1 - worst[0]).square().mean() + F.relu(1 + worst[1]).square().mean()
        total = loss + PENALTY * weight.square().sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            visit(step, loss.item(), now)
    return Gate(weight.detach(), bias.detach(), mean, scale, torch.tensor(1.0))


def conformal_threshold(depths: Tensor, budget: float) -> float:
    """The depth that at most a share `budget` of exchangeable new prompts exceeds (split-conformal).

    With n calibration prompts it is the ceil((n + 1)(1 - budget))-th smallest depth; infinite when n is too small
    for the budget (Vovk et al., 2005; Lei et al., 2018).
    """
    rank = math.ceil((len(depths) + 1) * (1 - budget))
    return float(depths.sort().values[rank - 1]) if rank <= len(depths) else math.inf


def calibrate_gate(
    gate: Gate, harmless: Tensor, unsafe: Tensor, held_unsafe: Tensor, constant: Tensor | None, budget: float,
    spare: float = SPARE,
) -> tuple[Gate, dict[str, float | int]]:  # fmt: skip
    """Move the walls outwards until at most `budget` of harmless prompts opens the gate, and set the ramp.

    Walls are never moved inwards. Where n is too small for the budget, they stand beyond the worst harmless prompt.
    Where held-out unsafe prompts lie much deeper than that, a part of the room between is left to harmless prompts
    unlike those that were seen.

    Args:
        harmless: held-out harmless prompts [N, T, D]; unsafe, held_unsafe: the pairs' unsafe sides.
        spare: that part of the room; 0 for walls that have been through this already.
    """
    depths, held = prompt_depths(harmless, gate, constant), prompt_depths(held_unsafe, gate, constant)
    threshold = conformal_threshold(depths, budget)
    reached = math.isfinite(threshold)
    raise_by = max(threshold if reached else float(depths.max()) + 1e-3, 0.0)
    raise_by += spare * max(float(held.quantile(0.05)) - raise_by, 0.0)
    bias = gate.bias + raise_by
    left = prompt_depths(unsafe, gate, constant) - raise_by
    typical = float(left[left > 0].median()) if (left > 0).any() else 1.0
    calibrated = Gate(gate.weight, bias, gate.mean, gate.scale, torch.tensor(max(RAMP * typical, 1e-3)))
    count = len(depths)
    return calibrated, {
        "harmless_prompts": count,
        "budget": budget,
        "bound": math.floor((count + 1) * budget) / (count + 1) if reached else 1 / (count + 1),
        "harmless_touched": float((depths > raise_by).float().mean()),
        "unsafe_touched": float((left > 0).float().mean()),
        "held_out_unsafe": len(held),
        "held_out_unsafe_touched": float((held > raise_by).float().mean()),
        "raised_by": raise_by,
    }
