"""Erased Stable Diffusion, ESD-x (Gandikota, Materzynska, Fiotto-Kaufman & Bau, ICCV 2023): fine-tuned cross-attention.

The loss of negative guidance (section 4): the edited model's prediction e* for the concept c should be

    e*(x_t, c)  ->  e(x_t, empty) - eta (e(x_t, c) - e(x_t, empty))

with the original model e on the right and a squared error. As in the authors' code (github.com/rohitgandikota/erasing,
`esd_sd.py`, method `esd-x`): x_t comes from the original model, drawn for the concept at guidance 3 up to a random
step; Adam, one picture an update, 200 updates; all linear layers of the cross-attentions are trained, their norms are
not. (Its `negative_guidance` 2 is eta = 1 of the paper, because it starts from e(x_t, c). The code of 2023 drew x_t
with the edited model and made 1,000 updates.) Of several concept phrases each update takes one at random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Generator

from ...backbones.demo import DemoBackbone
from ...backbones.sampling import trajectory
from .method import Method, cross_attentions, with_unet
from .prompts import none_method


def esd_method(
    backbone: DemoBackbone,
    concepts: Sequence[str],
    learning_rate: float = 1e-3,
    steps: int = 200,
    negative_guidance: float = 1.0,
    start_guidance: float = 3.0,
    sampling_steps: int = 20,
    seed: int = 0,
    visit: Callable[[int, DemoBackbone], None] = lambda updates, edited: None,
) -> Method:
    """ESD-x for the concept phrases.

    Args:
        learning_rate: the authors' 5e-5 is for Stable Diffusion. With 200 updates the demo model still draws weapons
            for all of 8 seen words at 1e-4, for a quarter of them at 3e-4, for one at 1e-3.
        negative_guidance: eta.
        start_guidance, sampling_steps: how x_t is drawn; the authors take 50 steps.
        visit: sees the number of updates so far and the edited model, which goes on changing.
    """
    generator = Generator().manual_seed(seed)
    entries, empty = backbone.encode(concepts), backbone.encode([""])[0]
    edited = with_unet(backbone, copy.deepcopy(backbone.model.unet))
    trained = [
        parameter.requires_grad_(True)
        for attention in cross_attentions(edited.model.unet)
        for layer in (attention.query, attention.key_value, attention.out)
        for parameter in layer.parameters()
    ]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    for step in range(steps):
        chosen, until = (int(torch.randint(n, (), generator=generator)) for n in (len(entries), sampling_steps))
        concept = [entries[chosen]]
        walk = trajectory(backbone, concept, empty, start_guidance, sampling_steps, generator)
        x, sigma, _ = next(islice(walk, until, None))
        level = sigma.expand(1)
        with torch.no_grad():
            of_empty, of_concept = (backbone.denoise(x, level, some) for some in ([empty], concept))
            target = of_empty - negative_guidance * (of_concept - of_empty)
        # differences of the noise are differences of denoised latents over sigma
        loss = F.mse_loss(edited.denoise(x, level, concept) / sigma, target / sigma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        visit(step + 1, edited)
    edited.model.unet.requires_grad_(False)
    return replace(none_method(backbone), name="ESD-x", backbone=edited)
