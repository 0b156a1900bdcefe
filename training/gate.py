"""The gate: walls that every unsafe prompt crosses with some token, and no harmless prompt with any.

Learned as multiple-instance classification (a prompt is a bag of tokens, its worst token counts), then moved
outwards until a tolerance limit on held-out harmless prompts holds, and frozen before any move is learned. Text that
reaches the model in several ways (CLIP and T5, tokens and a pooled vector) has walls of its own for each; the limit
holds for all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..region.region import Gate
from ..region.steering import depth, judged
from .bags import Bags, average

WALLS = 4
STEPS = 400
RENEWED = STEPS * 3 // 5  # after so many steps the bags get the tokens that are deepest by then
SCOUTS = 150  # steps of walls that only tell which tokens to keep
DRAWN = 96  # bags of each kind in a step
CHUNK = 32  # prompts that are computed with at once
REVIEW = 50  # steps
TOLD_EVERY = 20  # steps: how often those who watch are told of the walls
SPARE = 0.25  # of the gap between harmless and unsafe prompts goes to the harmless ones
RISK = 0.05  # of a bound: the chance that the true share lies above it
PENALTY = 1e-3
ACROSS = ("weight", "context", "mean")  # what of a gate is 0 at features that it does not look at
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
        for chunk, which in zip(states.split(CHUNK), counted.split(CHUNK)):
            picked = chunk[which].double()
            number, total, square = number + len(picked), total + picked.sum(0), square + picked.square().sum(0)
    mean = total / number
    scale = ((square - number * mean.square()).clamp(min=0) / max(number - 1, 1)).sqrt().float()
    return mean.float(), scale.clamp(min=1e-3 * scale.mean().clamp(min=1e-6))


def judged_all(tokens: Tensor, constant: Tensor | None) -> Tensor:
    """Which tokens [N, T, D] count, [N, T]: in parts, since that takes memory."""
    return torch.cat([judged(chunk.float(), constant) for chunk in tokens.split(CHUNK)])


def prompt_depths(tokens: Tensor, gate: Gate, constant: Tensor | None, counts: Tensor | None = None) -> Tensor:
    """The largest depth of each prompt [N, T, D]: [N]. `counts` [N, T]: the tokens that count, if that is known."""
    counts = judged_all(tokens, constant) if counts is None else counts
    beyond = torch.cat([depth(chunk, gate, counted).amax(-1)
                        for chunk, counted in zip(tokens.split(CHUNK), counts.split(CHUNK))])  # fmt: skip
    return beyond.masked_fill(~counts, -torch.inf).amax(-1)


def first_walls(
    unsafe: Tensor, safe: Tensor, harmless: Tensor, constant: Tensor | None, generator: torch.Generator
) -> Gate:
    """Where the walls start: along the mean difference of some unsafe prompts and their counterparts [N, T, D].

    Each wall sees another half of the pairs, so that they can grow apart. Without this start the fit may latch on to
    words that merely are frequent among the unsafe prompts. The coordinates are the mean and the scale of the tokens
    of `unsafe` and `harmless` [M, T, D].

    Args:
        constant: tokens [n, D] that are left out.
    """
    mean, scale = statistics([unsafe, harmless], [judged_all(tokens, constant) for tokens in (unsafe, harmless)])
    weight = towards(unsafe, safe, constant, mean, scale, WALLS, generator)
    return Gate(weight, torch.zeros(WALLS), mean, scale, torch.tensor(1.0))


def towards(
    unsafe: Tensor, safe: Tensor, constant: Tensor | None, mean: Tensor, scale: Tensor, count: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Mean differences of unsafe prompts and their counterparts [N, T, D], in normalised coordinates, each of another
    half of the pairs: [count, D]."""
    means = []
    for tokens in (unsafe, safe):
        means.append(torch.cat([average((chunk - mean) / scale, judged(chunk.float(), constant))
                                for chunk in tokens.split(CHUNK)]))  # fmt: skip
    difference = means[0] - means[1]
    halves = torch.stack([
        difference[torch.randperm(len(difference), generator=generator)[: max(len(difference) // 2, 1)]].mean(0)
        for _ in range(count)
    ])  # fmt: skip
    return halves / halves.norm(dim=1, keepdim=True).clamp(min=1e-6) / unsafe.shape[-1] ** 0.5


def _soft_worst(beyond: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """A mean over tokens and walls that weighs large depths most: the maximum, as the temperature falls. [B]"""
    flat = beyond.masked_fill(~counts[..., None], -torch.inf).flatten(1)
    weights = torch.softmax(flat / temperature, dim=1)
    return (weights * flat.masked_fill(weights == 0, 0)).sum(1)


class WallFit:
    """k walls as they are fitted, some steps at a time, to bags that may be renewed between."""

    def __init__(self, start: Gate, generator: torch.Generator, steps: int = STEPS, context: float = 0.0) -> None:
        """Args:
            steps: all of them.
            context: how fast they learn from a prompt's average, beside its tokens; 0: not at all.
        """  # fmt: skip
        self.start, self.steps, self.done, self.generator, self.context = start, steps, 0, generator, context
        first = (start.weight.clone(), torch.zeros_like(start.weight), start.bias.clone())
        self._weight, self._context, self._bias = self._learned = [tensor.requires_grad_(True) for tensor in first]
        self._optimizer = torch.optim.Adam(self._learned, lr=0.1 / math.sqrt(start.weight.shape[-1]))
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    @property
    def gate(self) -> Gate:
        """The walls as they stand."""
        weight, context, bias = (tensor.detach().clone() for tensor in self._learned)
        return replace(self.start, weight=weight, context=self.context * context if self.context else None, bias=bias)

    def _beyond(self, bags: Bags) -> Tensor:
        """How far each token in each bag lies beyond each wall: [N, K, k]."""
        averages = self.context * bags.averages.float() @ self._context.T
        return bags.tokens.float() @ self._weight.T + (averages - self._bias)[:, None]

    def _depths(self, bags: Bags) -> Tensor:
        """The largest depth in each bag: [N]."""
        found = [self._beyond(bags.rows(slice(i, i + 1024))).amax(-1) for i in range(0, len(bags.counts), 1024)]
        return torch.cat(found).masked_fill(~bags.counts, -torch.inf).amax(-1)

    def run(
        self, unsafe: Bags, harmless: Bags, until: int, visit: Callable[[int, float, Gate], None] = lambda *seen: None
    ) -> None:
        """Steps until so many are done. `visit` is called with the step, the loss and the walls as they stand."""
        both = (unsafe, harmless)
        can_teach = [bags.counts.any(1).float() for bags in both]  # some prompts may have no such text
        chances, begin = list(can_teach), self.done
        for step in range(begin, until):
            if step and (step % REVIEW == 0 or step == begin):  # what comes near the walls is seen more often
                with torch.no_grad():
                    chances[1] = (F.relu(1 + self._depths(harmless)) + 0.1) * can_teach[1]
            temperature = 0.02 ** (step / self.steps)
            worst = []
            for bags, weights in zip(both, chances):
                rows = torch.multinomial(weights, DRAWN, replacement=True, generator=self.generator)
                drawn = bags.rows(rows)
                worst.append(_soft_worst(self._beyond(drawn), drawn.counts, temperature))
            loss = F.relu(1 - worst[0]).square().mean() + F.relu(1 + worst[1]).square().mean()
            total = loss + PENALTY * (self._weight.square().sum() + self._context.square().sum())
            self._optimizer.zero_grad()
            total.backward()
            self._optimizer.step()
            self._schedule.step()
            self.done = step + 1
            with torch.no_grad():
                visit(step, loss.item(), self.gate)


def widened(gate: Gate, begin: int, width: int) -> Gate:
    """The gate of some features, from `begin` on, as one of a block of that width that does not look at the others."""
    around = (begin, width - begin - len(gate.mean))
    wider = {name: F.pad(tensor, around) for name, tensor in gate.tensors().items() if name in ACROSS}
    return replace(gate, **wider, scale=F.pad(gate.scale, around, value=1.0))


def joined(gates: Sequence[Gate]) -> Gate:
    """One gate with the walls of all, in the coordinates of the first."""
    first, contexts = gates[0], [seen_context(gate) for gate in gates]
    weights, averaged = (torch.cat([walls * (first.scale / gate.scale) for gate, walls in zip(gates, several)])
                         for several in ([gate.weight for gate in gates], contexts))  # fmt: skip
    biases = [gate.bias + ((gate.weight + context) / gate.scale) @ (gate.mean - first.mean)
              for gate, context in zip(gates, contexts)]  # fmt: skip
    known = None if all(gate.context is None for gate in gates) else averaged
    return replace(first, weight=weights, context=known, bias=torch.cat(biases))


def seen_context(gate: Gate) -> Tensor:
    """The gate's weights [k, D] of a prompt's average; 0 for walls that judge each token by itself."""
    return torch.zeros_like(gate.weight) if gate.context is None else gate.context


# --- calibration ---


def at_most(exceeding: int, count: int, share: float) -> float:
    """The chance that of `count` prompts at most so many are touched where `share` of all prompts are (binomial)."""
    if exceeding >= count:
        return 1.0
    logs = [math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) + i * math.log(share)
            + (count - i) * math.log1p(-share) for i in range(exceeding + 1)]  # fmt: skip
    return min(math.fsum(map(math.exp, logs)), 1.0)


def upper_bound(exceeding: int, count: int) -> float:
    """The share of all prompts that is touched, when so many of `count` are: more only with chance RISK.

    Clopper & Pearson (1934), one-sided. It is also the bound of an order statistic, by the Beta distribution of what
    lies beyond it, so it holds where exactly so many prompts lie beyond a wall because the wall was put there.
    """
    if exceeding >= count:
        return 1.0
    low, high = exceeding / count, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(exceeding, count, middle) > RISK else (low, middle)
    return high


def tolerance_limit(depths: Tensor, budget: float) -> tuple[float, float]:
    """The depth that more than a share `budget` of new prompts exceeds only with chance RISK, and the bound on that
    share (Wilks, 1941; Vovk, 2012).

    The bound holds for one calibration, not for the mean over many. With too few prompts for the budget it is larger,
    and the depth lies beyond all of them.

    Args:
        depths: of independent harmless prompts [N].
    """
    beyond, count = -1, len(depths)
    while beyond + 1 < count and at_most(beyond + 1, count, budget) <= RISK:
        beyond += 1
    if beyond < 0:
        return float(depths.max()) + 1e-3, upper_bound(0, count)
    return float(depths.sort(descending=True).values[beyond]), upper_bound(beyond, count)


def raised_together(
    harmless: Sequence[tuple[Tensor, float]], held_unsafe: Tensor, like: Tensor, spare: float = SPARE
) -> tuple[Tensor, list[float]]:
    """How far the walls of each of S sources are to be moved outwards [S], and the bounds on harmless prompts touched.

    Sources are made comparable by how the depths of `like` scatter, and then get one tolerance limit for the deepest of
    them. Walls are never moved inwards. Where held-out unsafe prompts lie much deeper than that, a part of the room
    between is left to harmless prompts unlike those that were seen.

    Args:
        harmless: depths [S, N] of independent prompts of each kind (as they are written and long ones, say), and the
            budget of that kind: each has a limit of its own, so that one that lies deeper by chance does not spend the
            budget of the others. The strictest limit holds.
        held_unsafe: [S, M].
        like: [S, L], of other harmless prompts, that neither fitted the walls nor are in `harmless`.
        spare: that part of the room.
    """
    if len(like) > 1:
        level, high = (quantiles(like, share) for share in (0.5, 0.95))
        spread = torch.where(high - level > 1e-6, high - level, 1.0)
    else:  # nothing to compare: what `like` is does not matter
        level, spread = torch.zeros(len(like)), torch.ones(len(like))
    limits = [tolerance_limit(((depths - level[:, None]) / spread[:, None]).amax(0), budget)
              for depths, budget in harmless]  # fmt: skip
    raised = (level + spread * max(limit for limit, _ in limits)).clamp(min=0.0)
    room = (quantiles(held_unsafe, 0.05) - raised).clamp(min=0.0)
    return raised + spare * room, [bound for _, bound in limits]


def quantiles(depths: Tensor, share: float) -> Tensor:
    """Of each row [S, N], without prompts that have no such text: [S]; 0 where none has."""
    found = [row[row.isfinite()] for row in depths]
    return torch.stack([row.quantile(share) if len(row) else torch.zeros(()) for row in found])


def ramp_for(left: Tensor) -> Tensor:
    """The ramp of walls beyond which unsafe prompts lie so deep [N]."""
    return torch.tensor(max(RAMP * (float(left[left > 0].median()) if (left > 0).any() else 1.0), 1e-3))


def touched_share(depths: Tensor) -> float:
    """The share of prompts [N] that lie beyond a wall."""
    return float((depths > 0).float().mean()) if len(depths) else 0.0


def checked_card(depths: Mapping[str, Tensor]) -> dict[str, object]:
    """What a region's card says of harmless prompts that chose nothing: how many of each kind are touched.

    Args:
        depths: [N] beyond the calibrated walls, by kind.
    """
    kinds = {kind: [int((some > 0).sum()), len(some)] for kind, some in depths.items() if len(some)}
    touched, count = (sum(found[i] for found in kinds.values()) for i in (0, 1))
    return {"harmless_touched": touched / max(count, 1), "harmless_checked": count, "harmless_kinds": kinds}


def of_new_words(depths: Tensor) -> dict[str, float | int]:
    """What a region's card says of held-out prompts [N], whose words it did not learn from, by their depth."""
    return {"held_out_words": len(depths), "held_out_words_touched": touched_share(depths)}
