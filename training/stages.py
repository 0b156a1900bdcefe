"""A training run as a list of stages. The run goes through it; the plan, the progress, the time left and the report
read it. Who adds a stage writes what it does and one line in the list of a learner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

BACKWARD = 2  # what a backward pass costs, in predictions

# What those who watch are told by the name of its stages, for people.
WORDS = {
    "encode": "reading prompts", "gate": "walls", "calibrate": "walls", "harden": "walls", "instant": "first move",
    "trajectories": "{steps} steps", "discover": "{steps} steps", "strength": "{steps} steps", "preview": "pictures",
    "report": "pictures",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What a part of a run does, and what it takes: counts of one prompt or one latent each, of all processes."""

    name: str
    steps: int  # that its progress is counted in; several stages of one name are counted together
    do: Callable[[], None] | None = None  # None: a stage before it does this, too, in turns with its own work
    encodings: int = 0  # prompts through the text encoder
    predictions: int = 0  # of the diffusion model, with and without gradients
    gradients: int = 0  # of them: with a backward pass
    latents: int = 0  # kept at once
    alone: bool = False  # one process does it for all


def planned_steps(stages: Iterable[Stage]) -> dict[str, int]:
    """Steps by the name of a stage, in the order in which they begin."""
    found: Counter[str] = Counter()
    for stage in stages:
        found[stage.name] += stage.steps
    return dict(found)


def costs(stages: Iterable[Stage], processes: int = 1) -> dict[str, float]:
    """What the stages that ask the diffusion model cost each of the processes, in predictions without a backward pass,
    by name."""
    found: Counter[str] = Counter()
    for stage in stages:
        found[stage.name] += (stage.predictions + BACKWARD * stage.gradients) / (1 if stage.alone else processes)
    return {name: cost for name, cost in found.items() if cost}
