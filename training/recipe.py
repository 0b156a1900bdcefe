"""Recipes: every number that training uses, and presets of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PREVIEW_EVERY = 50  # steps
PREVIEW_PROMPTS = 4
REPORT_STEPS = 12  # of sampling, for pictures
STRENGTH_PROMPTS = 48  # held-out pairs that settle the move's strength


@dataclass(frozen=True)
class Recipe:
    """How a region is learned. The defaults are the preset `region`."""

    preset: str = "region"
    steps: int = 250  # training steps through the diffusion model; 0 stops at the instant region
    rank: int = 16  # of the move's linear map
    learning_rate: float = 3e-3
    batch_size: int = 8
    guidance: float = 4.0  # of the trajectories; every other one runs at 1
    sampling_steps: int = 12  # of a trajectory
    trajectories: int = 96
    text_weight: float = 3.0  # of the regression on text tokens, beside the loss of the diffusion model
    seed: int = 0
    initial: str = "instant"  # where the move starts: instant | difference | zero | lora
    target: str = "pair"  # what the steered prompt should draw: pair | self | both
    budget: float = 0.0125  # share of harmless prompts that the gate may touch, but for one training of twenty
    prompts: int = 0  # that are encoded at most, variations and harmless ones included; 0: more for long lists of pairs
    harden: int = 0  # rounds of a search for unsafe prompts that the gate does not see

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 0.1:
            raise ValueError(f"The budget must be a share of harmless prompts up to 0.1, not {self.budget}.")

    def previews_after(self, step: int) -> bool:
        """Whether pictures are drawn after that training step; the last one has the report's."""
        return step % PREVIEW_EVERY == PREVIEW_EVERY - 1 and step < self.steps - 1

    def previews(self) -> int:
        """How often that is."""
        return max(self.steps - 1, 0) // PREVIEW_EVERY

    def describe(self) -> dict[str, Any]:
        """All numbers, for a region's metadata."""
        return asdict(self)


PRESETS: dict[str, Recipe] = {
    "region": Recipe(),
    "instant": Recipe(preset="instant", steps=0),
    "hardened": Recipe(preset="hardened", harden=2),
    # The WWW 2025 paper's own numbers: rank 1, Adam at 0.06, guidance 7.5, 50 steps, about 60 trajectories.
    "paper": Recipe(
        preset="paper", steps=60, rank=1, learning_rate=0.06, batch_size=1, guidance=7.5, sampling_steps=50,
        trajectories=60, initial="zero", target="self",
    ),
}  # fmt: skip
INITIAL = ("instant", "difference", "zero", "lora")
TARGETS = ("pair", "self", "both")
