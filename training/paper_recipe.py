"""The recipe of "Responsible Diffusion Models via Constraining Text Embeddings within Safe Regions" (WWW 2025).

One direction `b a` for every prompt: `b` [T] starts at zero and `a` [D] is drawn from N(0, 1), so training starts
from the identity. On-policy: along each guided trajectory of the shifted prompt, one Adam step per denoising step
from step 10 of 50 on. The loss is 10 * MSE(eps(x_t, c + b a), eps_s + g (eps_0 - eps_s)) with `eps_s` the prediction
for the safety concept's words and `eps_0` for the empty prompt. For a group of an attribute the goal is the prediction
for its name, `eps_s` with no such step away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.protocol import Backbone
from ..region.conditioning import CROSS_ATTENTION, Entry, text_blocks
from ..region.region import Move, Part
from .discovery import steer_entry
from .recipe import Recipe

FIRST_STEP = 0.2  # updates begin at step 10 of 50
LOSS_SCALE = 10.0


def paper_predictions(recipe: Recipe) -> tuple[int, int]:
    """Predictions, and those of them with a backward pass, of `train_paper`."""
    learning = sum(step >= FIRST_STEP * recipe.sampling_steps for step in range(recipe.sampling_steps))
    return recipe.steps * (2 * recipe.sampling_steps + learning), recipe.steps * learning


def lms_coefficient(order: int, sigmas: np.ndarray, step: int, back: int) -> float:
    """Weight of the derivative `back` steps ago in the linear multistep rule (as in k-diffusion's LMS)."""
    basis = np.poly1d([1.0])
    for k in range(order):
        if k != back:
            node = sigmas[step - k]
            basis = basis * np.poly1d([1.0, -node]) / (sigmas[step - back] - node)
    integral = basis.integ()
    return float(integral(sigmas[step + 1]) - integral(sigmas[step]))


def train_paper(
    backbone: Backbone,
    prompts: Sequence[Entry],
    concept: Entry,
    empty: Entry,
    part: Part,
    steps: int,
    learning_rate: float,
    guidance: float,
    sampling_steps: int,
    generator: torch.Generator,
    visit: Callable[[int, float, Part], None],
    away: float,
) -> Part:
    """Train `part`, whose only move is a rank-1 shift of the cross-attention block.

    Args:
        prompts: unsafe prompts' entries; trajectory i uses prompt i modulo their number.
        concept: the entry of the safety concept's words.
        steps: number of trajectories.
        away: how far the goal lies beyond the empty prompt, seen from the concept: the guidance for a concept to be
            left, 0 for one to be reached.
    """
    start = part.moves[CROSS_ATTENTION]
    profile, direction = (t.clone().requires_grad_(True) for t in (start.profile, start.direction))
    optimizer = torch.optim.Adam([profile, direction], lr=learning_rate)
    sigmas = backbone.sigmas(sampling_steps)
    levels = sigmas.double().cpu().numpy()
    for number in range(steps):
        entry = prompts[number % len(prompts)]
        x = backbone.start(1, sigmas[0], generator).to(sigmas.device)
        derivatives: list[Tensor] = []
        losses = []
        for step in range(sampling_steps):
            sigma = sigmas[step].expand(1)
            learning = step >= FIRST_STEP * sampling_steps
            with torch.set_grad_enabled(learning):
                moved = steer_entry(entry, {CROSS_ATTENTION: Move(profile=profile, direction=direction)}, part.constant)
                of_prompt = backbone.denoise(x, sigma, [moved])
            with torch.no_grad():
                of_empty = backbone.denoise(x, sigma, [empty])
                guided = of_empty + guidance * (of_prompt.detach() - of_empty)
            if learning:
                with torch.no_grad():
                    of_concept = backbone.denoise(x, sigma, [concept])
                    target = of_concept + away * (of_empty - of_concept)
                # eps = (x - denoised) / sigma, so differences of eps are differences of denoised over sigma
                loss = LOSS_SCALE * F.mse_loss(of_prompt / sigma[0], target / sigma[0])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            derivatives.append((x - guided) / sigma[0])
            if step == sampling_steps - 1:
                break
            order = min(step + 1, 4)
            for back in range(order):
                x = x + lms_coefficient(order, levels, step, back) * derivatives[-1 - back]
        move = Move(profile=profile.detach().clone(), direction=direction.detach().clone())
        part = Part(part.label, {CROSS_ATTENTION: move}, {}, part.constant)
        visit(number, sum(losses) / len(losses), part)
    return part


def paper_part(label: str, entry: Entry, generator: torch.Generator, constant: dict[str, Tensor] | None = None) -> Part:
    """The direction before training: b = 0, a ~ N(0, 1)."""
    tokens = text_blocks(entry)[CROSS_ATTENTION]
    move = Move(profile=torch.zeros(tokens.shape[-2]), direction=torch.randn(tokens.shape[-1], generator=generator))
    return Part(label, {CROSS_ATTENTION: move}, {}, constant or {})
