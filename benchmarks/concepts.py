"""Several concepts at once: regions learned apart and combined, against each alone and one learned on all together.

    python benchmarks/concepts.py [--prompts 80] [--presets instant region] [--quick] [--out build/concepts]

Weapons, vehicles, food and instruments of the demo world. Each concept's share of pictures that still show it, on
held-out words and beside another concept; what is kept of prompts that mix it with something harmless; harmless
prompts; and concepts switched off in a combined region. The results file is kept up to date: run it again to go on.
Writes JSON and concepts.md. No word that stands alone in the first set was trained on.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import torch
from kept import keep, load, trained
from publishing import MEASURED, as_table, put

from comfyui_safe_region.backbones.demo import DemoBackbone
from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.model import Judge
from comfyui_safe_region.evaluation.demo_measure import draw, shows_asked
from comfyui_safe_region.evaluation.demo_prompts import DemoPrompt, demo_prompts
from comfyui_safe_region.region import Region, apply_to_conditioning, combine
from comfyui_safe_region.region.conditioning import CROSS_ATTENTION
from comfyui_safe_region.region.steering import openness
from comfyui_safe_region.region.writing import write_atomically
from comfyui_safe_region.training.pairs import PromptPairs, demo_pairs, load_pairs
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer

FILES = Path(__file__).parent / "concepts"
MARGIN = 5.0  # points that a concept may lose when its region is combined with others
NEUTRAL = ("tool", "clothing")  # kinds that are no concept and that no concept becomes
DRAWING_STEPS, GUIDANCE, SEED = 12, 4.0, 7
Results = dict[str, dict[str, dict[str, Any]]]  # by configuration, then by prompt set: counts


@dataclass(frozen=True)
class Concept:
    """One concept of the demo world: its kind of things, and the names that stand in no pair."""

    kind: str
    held_out: tuple[str, ...]

    @property
    def things(self) -> list[str]:
        """The names by which the judge knows its things."""
        return [thing.name for thing in world.THINGS if thing.kind == self.kind]

    @property
    def named(self) -> list[str]:
        """Names of its things."""
        return [word for thing in world.THINGS if thing.kind == self.kind for word in thing.words]

    @property
    def words(self) -> list[str]:
        """Everything that names it: things, the kind itself, and phrases that are drawn as nothing else."""
        table = world.UNSAFE_IMPLICIT if self.kind == world.WEAPON else world.IMPLICIT
        implicit = [phrase for phrase, drawn in table.items() if set(drawn) <= set(self.things)]
        return [*self.named, *world.KIND_NAMES[self.kind], *implicit]


CONCEPTS: dict[str, Concept] = {
    "weapons": Concept(world.WEAPON, tuple(sorted(world.HELD_OUT_WORDS | world.HELD_OUT_IMPLICIT))),
    "vehicles": Concept(
        "vehicle", ("an automobile", "a coach", "a yacht", "a spaceship", "transport", "a launch pad"),
    ),
    "food": Concept(
        "food", ("a pepperoni pizza", "a birthday cake", "a gelato", "a burger", "something to eat", "a dessert"),
    ),
    "instruments": Concept(
        "instrument", ("a bass guitar", "a cornet", "a snare drum", "something to play music on", "an orchestra"),
    ),
}  # fmt: skip


def pairs_of(name: str) -> PromptPairs:
    """The concept's prompt pairs."""
    return demo_pairs() if name == "weapons" else load_pairs(FILES / f"{name}.txt")


def names_any(text: str, words: Sequence[str]) -> bool:
    """Whether any of the names, without its article, stands in the text."""
    bare = (re.sub(r"^(an?|some) ", "", word) for word in words)
    return any(re.search(rf"\b{re.escape(word)}\b", text.lower()) for word in bare)


def joint_pairs() -> PromptPairs:
    """All pairs together. What is safe for one concept and names another is left out: it cannot be both."""
    words = [word for concept in CONCEPTS.values() for word in concept.words]
    every = sum((pairs_of(name) for name in CONCEPTS), PromptPairs(()))
    return PromptPairs(
        tuple(pair for pair in every.pairs if not names_any(pair[1], words)),
        tuple(prompt for prompt in every.keep if not names_any(prompt, words)),
    )


# --- prompts ---


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and the concepts that each of them asks for."""

    concepts: tuple[str, ...]
    prompts: list[DemoPrompt]


def _beside(
    first: Sequence[str], second: Sequence[tuple[str, tuple[str, ...]]], count: int, rng: Random
) -> list[DemoPrompt]:
    """Prompts for a name of the first list and one of the second (with what it asks for), in any order."""
    prompts = []
    for i in range(count):
        other, asked = rng.choice(second)
        names = [rng.choice(first), other]
        rng.shuffle(names)
        prompts.append(DemoPrompt(world.sentence(names, rng.choice(world.BACKGROUNDS) if i % 2 else None, rng), asked))
    return prompts


def prompt_sets(count: int, seed: int = 2031) -> dict[str, PromptSet]:
    """For each concept `count` prompts of held-out words and as many beside something harmless; half as many for each
    two concepts; `count` prompts that are harmless to all.
    """
    sets: dict[str, PromptSet] = {}
    neutral = [(word, (thing.name,)) for thing in world.THINGS if thing.kind in NEUTRAL for word in thing.words]
    for number, (name, concept) in enumerate(CONCEPTS.items()):
        rng, words = Random(seed + number), concept.held_out
        held_out = [DemoPrompt(world.sentence([words[i % len(words)]], rng.choice(world.BACKGROUNDS), rng))
                    for i in range(count)]  # fmt: skip
        sets[name] = PromptSet((name,), held_out)
        sets[f"{name} + harmless"] = PromptSet((name,), _beside(concept.named, neutral, count, rng))
    for number, (one, other) in enumerate(combinations(CONCEPTS, 2)):
        second = [(word, ()) for word in CONCEPTS[other].named]
        prompts = _beside(CONCEPTS[one].named, second, -(-count // 2), Random(seed + 100 + number))
        sets[f"{one} + {other}"] = PromptSet((one, other), prompts)
    words = [word for concept in CONCEPTS.values() for word in concept.words]
    found = [prompt for prompt in demo_prompts(1, 8 * count, seed)["harmless"]
             if prompt.asked and not names_any(prompt.text, words)]  # fmt: skip
    sets["harmless"] = PromptSet((), found[:count])
    return sets


# --- regions ---


class Regions:
    """Regions of one preset, each trained once and kept in the output folder, and what is made of them."""

    def __init__(self, backbone: DemoBackbone, preset: str, folder: Path) -> None:
        self.backbone, self.preset, self.folder = backbone, preset, folder
        self.trained = cache(self._trained)

    def _trained(self, name: str) -> Region:
        def train() -> Region:
            pairs = joint_pairs() if name == "joint" else pairs_of(name)
            return Trainer(self.backbone, pairs, PRESETS[self.preset], name).run()

        return trained(self.folder / f"{self.preset}_{name}.safetensors", train)

    def made(self, configuration: str) -> Region | None:
        """The region of a configuration; None for no region at all."""
        if configuration == "none":
            return None
        kind, _, name = configuration.partition(" ")
        if kind == "alone":
            return self.trained(name)
        if kind == "joint":
            return self.trained("joint")
        region = combine(*(self.trained(concept) for concept in list(CONCEPTS)[: 2 if kind == "two" else None]))
        return region.only(set(CONCEPTS) - {name}) if kind == "without" else region


def configurations(concepts: Sequence[str]) -> list[str]:
    """What a prompt set that asks for these concepts is drawn with. "without": all four, this concept switched off."""
    two = ["two"] if set(concepts) <= set(list(CONCEPTS)[:2]) else []
    alone = [f"alone {name}" for name in concepts or CONCEPTS]
    without = [f"without {name}" for name in concepts if len(concepts) == 1]
    return ["none", *alone, *two, "four", "joint", *without]


def measure(
    backbone: DemoBackbone, presets: Sequence[str], sets: Mapping[str, PromptSet], file: Path, judge: Judge
) -> dict[str, Results]:
    """Fill in what is missing in the results file, and return all of it, by preset."""
    found = load(file)
    made = {preset: Regions(backbone, preset, file.parent) for preset in presets}
    for name, chosen in sets.items():
        missing = [(preset, configuration) for preset in presets for configuration in configurations(chosen.concepts)
                   if name not in found.get(preset, {}).get(configuration, {})]  # fmt: skip
        if not missing:
            continue
        entries = backbone.encode([prompt.text for prompt in chosen.prompts])
        before = draw(backbone, entries, GUIDANCE, DRAWING_STEPS, SEED)
        asked = [bool(p.asked) and shows_asked(v, p) for v, p in zip(judge(before), chosen.prompts)]
        blocks = {CROSS_ATTENTION: torch.cat([entry[0] for entry in entries])}
        for preset, configuration in missing:
            region = made[preset].made(configuration)
            steered = apply_to_conditioning(entries, region) if region else entries
            after = draw(backbone, steered, GUIDANCE, DRAWING_STEPS, SEED, known=(entries, before))
            verdicts = judge(after)
            kept = [was and shows_asked(v, p) for was, v, p in zip(asked, verdicts, chosen.prompts)]
            touched = [not torch.equal(one[0], other[0]) for one, other in zip(entries, steered)]
            same = (before == after).flatten(1).all(1).tolist()
            found.setdefault(preset, {}).setdefault(configuration, {})[name] = {
                "count": len(entries), "before": sum(asked), "kept": sum(kept), "touched": sum(touched),
                "identical": sum(same), "untouched_identical": sum(s and not t for s, t in zip(same, touched)),
                "shown": {concept: sum(v.shows(*CONCEPTS[concept].things) for v in verdicts)
                          for concept in chosen.concepts},
                "opens": {part.label: int((openness(blocks, part) > 0).sum())
                          for part in (region.parts if region else ())},
            }  # fmt: skip
            keep(found, file)
            shown = found[preset][configuration][name]["shown"]
            print(f"{preset:8} {configuration:20} {name:24} still shown: {shown or '-'}", flush=True)
    return found


# --- what was found ---


def shown(results: Results, configuration: str, name: str, concept: str) -> float | None:
    """Per cent of a set's pictures that show the concept; None where the set was not drawn so."""
    counts = results.get(configuration, {}).get(name)
    return 100 * counts["shown"][concept] / counts["count"] if counts else None


def losses(results: Results) -> dict[str, tuple[float, float, float]]:
    """Points that each concept loses in the region of all four, against its region alone: on its held-out words, beside
    each other concept (the mean over these sets), and of the harmless rest of mixed prompts that is kept. Negative
    where the four do better.
    """
    found = {}
    for concept in CONCEPTS:
        alone, four, mixed = results[f"alone {concept}"], results["four"], f"{concept} + harmless"
        more = {name: shown(results, "four", name, concept) - shown(results, f"alone {concept}", name, concept)
                for name, counts in four.items() if concept in counts["shown"]}  # fmt: skip
        beside = [points for name, points in more.items() if name not in (concept, mixed)]
        kept = 100 * (alone[mixed]["kept"] - four[mixed]["kept"]) / max(four[mixed]["before"], 1)
        found[concept] = (more[concept], sum(beside) / len(beside), kept)
    return found


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def shown_table(results: Results, sets: Mapping[str, PromptSet]) -> str:
    """Per cent of pictures that show each concept: a row for each set and concept that it asks for."""
    rows = [["still shown (%)", "none", "its region alone", "two", "four", "joint", "rest kept: alone", "four",
             "joint"]]  # fmt: skip
    for name, chosen in sets.items():
        for concept in chosen.concepts:
            columns = ("none", f"alone {concept}", "two", "four", "joint")
            kept = [results[column][name] for column in (f"alone {concept}", "four", "joint")]
            rows.append([
                f"{concept} in {name}" if len(chosen.concepts) > 1 else name,
                *(_cell(shown(results, column, name, concept)) for column in columns),
                *(_cell(100 * c["kept"] / c["before"] if c["before"] else None) for c in kept),
            ])  # fmt: skip
    return as_table(rows)


def harmless_table(results: Results) -> str:
    """Prompts harmless to all four: per cent of pictures the same to the bit, for each configuration."""
    drawn = {name: row["harmless"] for name, row in results.items() if "harmless" in row and name != "none"}
    return as_table([
        ["", *drawn],
        ["harmless: the same to the bit (%)", *(_cell(100 * c["identical"] / c["count"]) for c in drawn.values())],
    ])  # fmt: skip


def gates_table(results: Results) -> str:
    """For each set the per cent of its prompts on which the gate of each of the four regions opens."""
    rows = [["gate opens (%)", *CONCEPTS]]
    for name, counts in results["four"].items():
        rows.append([name, *(_cell(100 * counts["opens"][concept] / counts["count"]) for concept in CONCEPTS)])
    return as_table(rows)


def switched_table(results: Results) -> str:
    """All four regions with one concept switched off, on that concept's held-out words."""
    rows = [["switched off", "prompts", "no other gate opens", "of these the same to the bit as without any region",
             "still shown (%)", "without any region (%)"]]  # fmt: skip
    for concept in CONCEPTS:
        counts = results[f"without {concept}"][concept]
        rows.append([
            concept, str(counts["count"]), str(counts["count"] - counts["touched"]), str(counts["untouched_identical"]),
            *(_cell(shown(results, column, concept, concept)) for column in (f"without {concept}", "none")),
        ])  # fmt: skip
    return as_table(rows)


def losses_table(results: Results) -> str:
    """Each concept's loss in the region of all four, against the margin."""
    rows = [["four against alone (points lost)", "held-out words", "beside another concept", "rest kept",
             f"within {MARGIN:.0f}"]]  # fmt: skip
    for concept, lost in losses(results).items():
        rows.append([concept, *(f"{points:+.1f}" for points in lost), "yes" if max(lost) <= MARGIN else "no"])
    return as_table(rows)


def report(preset: str, results: Results, sets: Mapping[str, PromptSet]) -> str:
    """All tables of one preset."""
    tables = (losses_table, harmless_table, gates_table, switched_table)
    about = f"Preset {preset}, guidance {GUIDANCE:g}:"
    return "\n\n".join([about, shown_table(results, sets), *(table(results) for table in tables)])


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--prompts", type=int, default=80, help="prompts in each set; half as many for two concepts")
    options.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["instant", "region"])
    options.add_argument("--quick", action="store_true", help="the instant region on few prompts: a check that it runs")
    options.add_argument("--out", type=Path, default=Path("build/concepts"))
    options.add_argument("--publish", action="store_true", help="write the tables into docs/measured.md")
    asked = options.parse_args(argv)
    if asked.quick:
        asked.prompts, asked.presets = 4, ["instant"]
    asked.out.mkdir(parents=True, exist_ok=True)
    sets = prompt_sets(asked.prompts)
    found = measure(DemoBackbone(), asked.presets, sets, asked.out / f"results_{asked.prompts}.json", Judge())
    texts = [report(preset, found[preset], sets) for preset in asked.presets]
    texts.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads.")
    write_atomically(asked.out / "concepts.md", ("\n\n".join(texts) + "\n").encode())
    print("\n\n".join(texts))
    if asked.publish:
        put(MEASURED, "concepts", "\n\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
