"""The move, learned through the diffusion model: the steered unsafe prompt should be denoised as its safe counterpart.

The model is its own teacher ("self-discovery", WWW 2025): no images, no labels. Noisy latents come from the model's
own trajectories; what it predicts there for the safe and the unsafe prompt is computed once and kept. The loss is
the share of the gap between those two predictions that is still left: 1 does nothing, 0 is the safe picture. It
needs no scale, so it is the same for epsilon, v and flow models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backbones.protocol import Backbone
from ..backbones.sampling import trajectory
from ..region.conditioning import Entry, text_blocks, text_masks, with_blocks
from ..region.region import Move, Part
from ..region.steering import as_tokens, displacement, judged
from . import processes
from .instant import TokenStatistics
from .recipe import Recipe

TRAJECTORY_BATCH = 16
TOLD = 4  # steps of progress that a batch of trajectories counts for
SHARE_STEPS, SHARE_BATCH = 4, 32  # of the trajectories on which candidates are compared
BISECTIONS = 2  # between LEAST and 1
LEAST, SURE = 0.85, 0.9  # strength, share of prompts
LEARNED = ("down", "up", "offset", "profile", "direction")


@dataclass(frozen=True)
class Moment:
    """One noisy latent with what the model predicts for it. `pair` is the index of the prompt pair."""

    pair: int
    x: Tensor
    sigma: Tensor  # []
    target: Tensor
    weight: float  # one over the mean squared gap at this noise level


def steer_entry(entry: Entry, moves: Mapping[str, Move], constant: Mapping[str, Tensor]) -> Entry:
    """The entry moved with the gate wide open: what training differentiates."""
    masks, changed = text_masks(entry, moves), {}
    for block, tensor in text_blocks(entry, moves).items():
        tokens = as_tokens(tensor)
        counts = judged(tokens, constant.get(block), masks.get(block))[..., None]
        shift = torch.where(counts, displacement(tokens, moves[block]), torch.zeros(()))
        changed[block] = (tokens + shift.to(tokens.dtype)).reshape(tensor.shape)
    return with_blocks(entry, changed)


def _mine(number: int, backbone: Backbone, count: int, steps: int, generator: torch.Generator) -> bool:
    """Whether this process walks that round of trajectories. If not, its random numbers are drawn all the same."""
    if number % processes.count() == processes.index():
        return True
    backbone.start(count, backbone.sigmas(steps)[0], generator)
    return False


def trajectory_steps(count: int) -> int:
    """In how many steps the progress of so many trajectories is counted."""
    return TOLD * -(-count // TRAJECTORY_BATCH)


def trajectory_predictions(recipe: Recipe, count: int) -> int:
    """Predictions of `collect_moments` for so many pairs."""
    others, total = 2 if recipe.target == "pair" else 3, 0
    for number, begin in enumerate(range(0, count, TRAJECTORY_BATCH)):
        walk = 2 if recipe.guidance != 1 and number % 2 == 0 else 1
        total += recipe.sampling_steps * min(TRAJECTORY_BATCH, count - begin) * (walk + others)
    return total


def share_predictions(count: int) -> int:
    """Predictions of `unsafe_shares` for so many candidates."""
    return 3 * SHARE_STEPS * count


def collect_moments(
    backbone: Backbone,
    pairs: Sequence[tuple[Entry, Entry]],
    empty: Entry,
    part: Part,
    guidance: float,
    steps: int,
    target: str,
    generator: torch.Generator,
    visit: Callable[[int, int], None] = lambda done, total: None,
    batch: int = TRAJECTORY_BATCH,
) -> list[Moment]:
    """Noisy latents on trajectories of safe, unsafe and already moved prompts, with their targets.

    Every other batch runs without guidance, so that the region also holds at guidance 1.

    Args:
        pairs: (unsafe, safe) entries.
        visit: called with rounds done, by all processes together, and their number.
        target: `pair` the safe prompt's prediction; `self` the paper's e_s + g (e_0 - e_s); `both` their mean.
    """
    found: list[tuple[int, list[Moment]]] = []  # by round
    rounds = range(0, len(pairs), batch)
    with torch.no_grad():
        for number, begin in enumerate(rounds):
            chunk = pairs[begin : begin + batch]
            if not _mine(number, backbone, len(chunk), steps, generator):
                continue
            moments: list[Moment] = []
            unsafe, safe = [a for a, _ in chunk], [b for _, b in chunk]
            moved = [steer_entry(entry, part.moves, part.constant) for entry in unsafe]
            walked = [(safe, moved, unsafe)[i % 3][i] for i in range(len(chunk))]
            scale = guidance if number % 2 == 0 else 1.0
            for x, sigma, _ in trajectory(backbone, walked, empty, scale, steps, generator):
                sigmas = sigma.expand(len(x))
                of_safe = backbone.denoise(x, sigmas, safe)
                of_unsafe = backbone.denoise(x, sigmas, unsafe)
                gap = (of_unsafe - of_safe).square().mean().clamp(min=1e-12)
                wanted = of_safe
                if target != "pair":
                    of_empty = backbone.denoise(x, sigmas, [empty] * len(chunk))
                    away = of_unsafe + guidance * (of_empty - of_unsafe)
                    wanted = away if target == "self" else (of_safe + away) / 2
                weight, kept, wanted = float(1 / gap), x.cpu(), wanted.cpu()  # thousands of them: not on the GPU
                moments += [Moment(begin + i, kept[i], sigma.cpu(), wanted[i], weight) for i in range(len(chunk))]
            found.append((number, moments))
            visit(min(number + processes.count(), len(rounds)), len(rounds))
    return [moment for _, some in processes.in_order(found) for moment in some]


def gap_left(backbone: Backbone, moments: Sequence[Moment], entries: Sequence[Entry]) -> Tensor:
    """The loss: mean share of the gap between unsafe and target prediction that the entries, one a moment, leave."""
    sigma = torch.stack([m.sigma for m in moments])
    denoised = backbone.denoise(torch.stack([m.x for m in moments]), sigma, entries)
    weights = torch.tensor([m.weight for m in moments], device=denoised.device)
    target = torch.stack([m.target for m in moments]).to(denoised.device)
    return ((denoised - target).square().flatten(1).mean(1) * weights).mean()


@torch.no_grad()
def unsafe_shares(
    backbone: Backbone, candidates: Sequence[Entry], pairs: Sequence[tuple[Entry, Entry]], generator: torch.Generator
) -> Tensor:
    """How unsafe each candidate's picture becomes, [N]: 0 as that of its safe prompt, 1 as that of its unsafe one.

    At the noisy latents of the candidate's own trajectory: the share of the gap between the predictions for the
    (unsafe, safe) pair that its prediction has, on the line between them; the mean over the noise levels. Above a half
    it is nearer to the unsafe one.
    """
    found: list[tuple[int, Tensor]] = []  # by round
    for number, begin in enumerate(range(0, len(candidates), SHARE_BATCH)):
        chosen, chunk = candidates[begin : begin + SHARE_BATCH], pairs[begin : begin + SHARE_BATCH]
        if not _mine(number, backbone, len(chosen), SHARE_STEPS, generator):
            continue
        total = torch.zeros(len(chosen))
        for x, sigma, denoised in trajectory(backbone, chosen, None, 1.0, SHARE_STEPS, generator):
            unsafe, safe = (backbone.denoise(x, sigma.expand(len(x)), [pair[i] for pair in chunk]) for i in (0, 1))
            gap = (unsafe - safe).flatten(1)
            along = ((denoised - safe).flatten(1) * gap).sum(1) / gap.square().sum(1).clamp(min=1e-12)
            total += along.float().cpu()
        found.append((number, total / SHARE_STEPS))
    return torch.cat([shares for _, shares in processes.in_order(found)])


def scaled(part: Part, strength: float) -> Part:
    """The part with moves of that strength built in."""
    moves = {}
    for block, move in part.moves.items():
        found = {name: getattr(move, name) for name in ("up", "offset", "direction")}
        moves[block] = replace(move, **{name: strength * t for name, t in found.items() if t is not None})
    return replace(part, moves=moves)


def safe_share(
    backbone: Backbone, pairs: Sequence[tuple[Entry, Entry]], part: Part, generator: torch.Generator
) -> float:
    """The share of the pairs' unsafe prompts that draw safely once they are moved: their prediction is nearer to the
    safe counterpart's than to their own."""
    moved = [steer_entry(unsafe, part.moves, part.constant) for unsafe, _ in pairs]
    return int((unsafe_shares(backbone, moved, pairs, generator) < 0.5).sum()) / len(pairs)


def settle_strength(
    backbone: Backbone, pairs: Sequence[tuple[Entry, Entry]], part: Part, generator: torch.Generator
) -> float:
    """The smallest strength, between LEAST and 1, at which nearly all of the pairs' unsafe prompts draw safely.

    What is moved no further than needed keeps more of what was harmless in it. Nearly all: a share SURE of the prompts
    draws safely. Found by bisection.

    Args:
        pairs: (unsafe, safe) entries that the move was not learned from.
    """
    low, high, state = LEAST, 1.0, generator.get_state()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        generator.set_state(state)  # the same noise for every strength
        enough = safe_share(backbone, pairs, scaled(part, middle), generator) >= SURE
        low, high = (low, middle) if enough else (middle, high)
    return high


def discover(
    backbone: Backbone,
    pairs: Sequence[tuple[Entry, Entry]],
    moments: Sequence[Moment],
    part: Part,
    steps: int,
    learning_rate: float,
    batch: int,
    generator: torch.Generator,
    visit: Callable[[int, float, Part], None],
    text: Mapping[str, TokenStatistics] | None = None,
    text_weight: float = 0.0,
) -> Part:
    """Train the part's moves for some steps; walls stay as they are. Returns the part with averaged weights.

    The trajectories show few prompts. So that the move does not forget the others, the error of the instant move's
    regression, on all prompts, is added to the loss, `text_weight` times its mean over the blocks of `text`.

    `visit(step, loss, part)` sees the loss without that and the current part; what it raises ends the training.
    """
    scales = {block: move.scale if move.scale is not None else None for block, move in part.moves.items()}

    def build(values: Mapping[str, Mapping[str, Tensor]]) -> Part:
        # `up` and `offset` are learned in units of the tokens' own spread, so one learning rate fits every encoder
        moves = {}
        for block, move in part.moves.items():
            found, scale = dict(values[block]), scales[block]
            if scale is not None:
                found = {k: v * (scale[:, None] if k == "up" else scale) if k in ("up", "offset") else v
                         for k, v in found.items()}  # fmt: skip
            moves[block] = replace(move, **found)
        return replace(part, moves=moves)

    values: dict[str, dict[str, Tensor]] = {}
    for block, move in part.moves.items():
        values[block] = {}
        for name in LEARNED:
            tensor = getattr(move, name)
            if tensor is not None:
                if scales[block] is not None and name in ("up", "offset"):
                    tensor = tensor / (scales[block][:, None] if name == "up" else scales[block])
                values[block][name] = tensor.clone().requires_grad_(True)
    parameters = [tensor for found in values.values() for tensor in found.values()]
    average = {block: {k: v.detach().clone() for k, v in found.items()} for block, found in values.items()}
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    rising = max(0.1, 2 / max(steps, 4))  # with one step of rise OneCycleLR would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 4), pct_start=rising
    )
    text = {block: known.to(torch.float32) for block, known in (text or {}).items()}
    for step in range(steps):
        rows = torch.randint(len(moments), (batch,), generator=generator).tolist()
        chosen = [moments[row] for row in rows[processes.index() :: processes.count()]]
        optimizer.zero_grad()
        loss, at_once = torch.zeros(()), backbone.fits(max(len(chosen), 1))
        for begin in range(0, len(chosen), at_once):
            few = chosen[begin : begin + at_once]
            current = build(values)
            entries = [steer_entry(pairs[m.pair][0], current.moves, part.constant) for m in few]
            share = len(few) / batch * gap_left(backbone, few, entries)
            loss, total = loss + share.detach().cpu(), share
            for block, known in text.items() if begin == 0 and processes.index() == 0 else ():
                error = known.error(*(values[block][name] for name in ("down", "up", "offset")))
                total = total + text_weight / len(text) * error.to(total.device)
            total.backward()
        for tensor in parameters if processes.count() > 1 else ():
            tensor.grad = processes.summed(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.98, (step + 1) / (step + 5))
            for block, found in values.items():
                for name, tensor in found.items():
                    average[block][name].lerp_(tensor, 1 - decay)
        visit(step, float(processes.summed(loss)), build(average))
    return build(average)
