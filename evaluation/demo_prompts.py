"""Prompts for measuring on the demo model. No prompt here is used in any training.

Every set is drawn from a fixed seed; `words` are names from `demo/weapons.txt`, `held-out words` stand in no pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..demo import world
from ..demo.text import everyday_text


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt, and the harmless things that it asks for by name (empty where it leaves them open)."""

    text: str
    asked: tuple[str, ...] = ()


def _weapon_words(held_out: bool) -> list[str]:
    words = [word for thing in world.WEAPONS for word in thing.words]
    return [word for word in words if (word in world.HELD_OUT_WORDS) == held_out]


def _sentences(names: list[str], count: int, rng: Random) -> list[DemoPrompt]:
    return [
        DemoPrompt(world.sentence([names[i % len(names)]], rng.choice(world.BACKGROUNDS), rng)) for i in range(count)
    ]


def _mixed(count: int, rng: Random) -> list[DemoPrompt]:
    prompts = []
    words = _weapon_words(False) + _weapon_words(True)
    for i in range(count):
        other = rng.choice(world.HARMLESS)
        names = [rng.choice(words), rng.choice(other.words)]
        rng.shuffle(names)
        ground = rng.choice(world.BACKGROUNDS) if i % 2 else None
        prompts.append(DemoPrompt(world.sentence(names, ground, rng), (other.name,)))
    return prompts


def _odd(count: int, rng: Random) -> list[DemoPrompt]:
    prompts = []
    for prompt in _sentences(_weapon_words(False) + _weapon_words(True), count, rng):
        words = prompt.text.replace(",", " ").split()
        rng.shuffle(words)
        prompts.append(DemoPrompt(" ".join(words)))
    return prompts


def _harmless(count: int, rng: Random) -> list[DemoPrompt]:
    prompts: dict[str, DemoPrompt] = {}
    while len(prompts) < count:
        if len(prompts) % 4 == 3:
            prompt = DemoPrompt(everyday_text(rng))
        else:
            scene, text = world.sample(rng, everyday_text(rng))
            named = text.strip() and not any(phrase in text for phrase in world.UNSAFE_IMPLICIT)
            if not named or any(thing.kind == world.WEAPON for thing in scene.things):
                continue
            implicit = any(phrase in text for phrase in world.IMPLICIT)
            prompt = DemoPrompt(text, () if implicit else tuple(thing.name for thing in scene.things))
        prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def demo_prompts(count: int, harmless: int, seed: int = 2026) -> dict[str, list[DemoPrompt]]:
    """The sets by name, `count` prompts each and `harmless` harmless ones."""
    implicit = sorted(world.HELD_OUT_IMPLICIT)
    return {
        "seen words": _sentences(_weapon_words(False), count, Random(seed)),
        "held-out words": _sentences(_weapon_words(True), count, Random(seed + 1)),
        "implicit": _sentences(implicit, count, Random(seed + 2)),
        "mixed": _mixed(count, Random(seed + 3)),
        "odd forms": _odd(count, Random(seed + 4)),
        "harmless": _harmless(harmless, Random(seed + 5)),
    }


def model_prompts(per_kind: int = 4, seed: int = 2027) -> list[DemoPrompt]:
    """Prompts that ask for one thing on a background, as many of each of the ten kinds."""
    rng, prompts = Random(seed), []
    for kind in world.KINDS:
        things = [thing for thing in world.THINGS if thing.kind == kind]
        rng.shuffle(things)
        for i in range(per_kind):
            thing = things[i % len(things)]
            word = rng.choice(thing.words)
            word = f"a {thing.name.split()[0]} {word}" if kind == world.PERSON else word
            prompts.append(DemoPrompt(world.sentence([word], rng.choice(world.BACKGROUNDS), rng), (thing.name,)))
    return prompts


def weapon_prompts(seed: int = 2028) -> list[DemoPrompt]:
    """Every weapon word, each with the weapon that it should draw."""
    rng = Random(seed)
    return [DemoPrompt(world.sentence([word], rng.choice(world.BACKGROUNDS), rng), (thing.name,))
            for thing in world.WEAPONS for word in thing.words]  # fmt: skip
