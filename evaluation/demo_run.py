"""The demo: a region learned on the embedded model, and measured there at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from ..backbones.demo import DemoBackbone
from ..demo.model import Judge
from ..region.region import Region
from ..training.pairs import demo_pairs
from ..training.recipe import Recipe
from ..training.stages import Stage
from ..training.trainer import Trainer
from .demo_measure import BATCH, SetResult, measure_set
from .demo_prompts import DemoPrompt

SAMPLING_STEPS = 12  # enough for the demo's pictures, and it should not take long
UNCHANGED = ("harmless",)  # sets whose pictures are drawn once where the region leaves them alone


class DemoRun(Trainer):
    """A run whose steps and time left count the measuring afterwards, too."""

    def __init__(self, backbone: DemoBackbone, recipe: Recipe, measured_on: Mapping[str, Sequence[DemoPrompt]]) -> None:
        super().__init__(backbone, demo_pairs(), recipe, "weapons")
        self.measured_on = measured_on

    def _count(self, name: str) -> int:
        """How many pictures of a set are drawn."""
        return (1 if name in UNCHANGED else 2) * len(self.measured_on[name])

    @cached_property
    def stages(self) -> list[Stage]:
        count = sum(map(self._count, self.measured_on))
        return [*super().stages, Stage("measure", count, predictions=2 * SAMPLING_STEPS * count)]

    def measured(self, region: Region) -> list[SetResult]:
        """Every set, drawn without and with the region."""
        judge, results = Judge(), []
        for name, prompts in self.measured_on.items():
            until = self._ledger.time.done["measure"] + self._count(name)

            def visit(name: str = name, until: int = until) -> None:
                done = min(self._ledger.time.done["measure"] + BATCH, until)
                self._ledger.reach("measure", done, message=name)

            found = measure_set(self.backbone, judge, {"": region}, name, prompts, steps=SAMPLING_STEPS, visit=visit)
            results.append(found[""])
        return results
