"""The built-in prompt packs: enough, varied, aligned, and nothing on the wrong side."""
from __future__ import annotations

import re
from collections import Counter

import pytest

from comfyui_safe_region.region import load_region
from comfyui_safe_region.training.cli import main
from comfyui_safe_region.training.packs import (
    FOLDER,
    attribute_pack_names,
    load_attribute_pack,
    load_pack,
    pack_names,
    pack_title,
)
from comfyui_safe_region.training.pairs import PairsError, everyday_prompts, parse_pairs
from comfyui_safe_region.training.plan import plan
from comfyui_safe_region.training.prompts import FILLERS, build_sets, with_new_words, without_named
from comfyui_safe_region.training.recipe import PRESETS, Recipe
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

CONCEPTS = [
    "artist-style", "frightening-for-children", "harassment", "hate", "illegal-activity", "people-stay-clothed",
    "self-harm", "sexual", "shocking", "smoking-and-alcohol", "violence", "weapons",
]  # fmt: skip
ATTRIBUTES = ["age", "gender", "skin-tone"]
NO_CHILDREN = re.compile(
    r"\b(child\w*|kids?|boys?|girls?|teen\w*|minors?|bab(y|ies)|toddlers?|infants?|pupils?|school\w*|young\w*|"
    r"adolescen\w*|daughters?|sons?|juvenile\w*|petite)\b"
)
each_concept = pytest.mark.parametrize("name", CONCEPTS)
each_attribute = pytest.mark.parametrize("name", ATTRIBUTES)


def prompts_of(name: str) -> list[str]:
    """All prompts of a pack, over again where they stand there again."""
    path = FOLDER / f"{name}.txt" if name in CONCEPTS else FOLDER / "attributes" / f"{name}.txt"
    lines = [line for line in path.read_text(encoding="ascii").splitlines() if line and not line.startswith("#")]
    if name in ATTRIBUTES:
        rows = load_attribute_pack(name)
        return [p for neutral, groups in [*rows.rows, *rows.held_out] for p in (neutral, *groups)] + [
            *rows.stated, *rows.keep]  # fmt: skip
    found = [parse_pairs(line) for line in lines if not line.startswith("leave-out:")]
    return [prompt for one in found for prompt in (*(a for a, _ in one.pairs + one.held_out), *one.keep)]


def words(prompt: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", prompt.lower())


def test_the_packs_are_these():
    assert pack_names() == CONCEPTS and attribute_pack_names() == ATTRIBUTES


@pytest.mark.parametrize("name", [*CONCEPTS, *ATTRIBUTES])
def test_each_pack_says_what_it_is(name):
    title, description = pack_title(name)
    assert 2 < len(title) <= 40 and 20 < len(description) <= 120 and title[0].isupper() and description[-1] == "."
    assert all(len(prompt) <= 300 and prompt.isascii() for prompt in prompts_of(name))


@each_concept
def test_a_pack_is_large_and_varied(name):
    pack = load_pack(name)
    assert len(pack.pairs) >= 200 and len(pack.keep) >= 500 and len(pack.held_out) >= 12
    lengths = [len(words(unsafe)) for unsafe, _ in pack.pairs]
    tags = sum(unsafe.count(",") >= 2 for unsafe, _ in pack.pairs)
    assert tags >= 0.1 * len(pack.pairs), "tag-style"
    assert sum(n <= 5 for n in lengths) >= 0.1 * len(lengths) and sum(n >= 15 for n in lengths) >= 0.1 * len(lengths)
    for prompts in (pack.keep, [unsafe for unsafe, _ in pack.pairs]):
        starts = Counter(" ".join(prompt.split()[:3]) for prompt in prompts)
        assert max(starts.values()) <= 0.08 * len(prompts), starts.most_common(3)


@each_concept
def test_nothing_stands_twice(name):
    found = Counter(" ".join(words(prompt)) for prompt in prompts_of(name))
    assert [prompt for prompt, count in found.items() if count > 1] == []


@each_concept
def test_the_sides_differ_in_the_concept_only(name):
    pack = load_pack(name)
    wrong = []
    for unsafe, safe in pack.pairs + pack.held_out:
        a, b = words(unsafe), words(safe)
        shared = len(set(a) & set(b)) / len(set(b))
        if not a or a == b or abs(len(a) - len(b)) > 4 or (len(b) > 5 and shared < 0.4):
            wrong.append((unsafe, safe))
    assert wrong == []


@each_concept
def test_held_out_words_stand_in_no_other_pair(name):
    pack = load_pack(name)
    known = {word for unsafe, _ in pack.pairs for word in words(unsafe)}
    for unsafe, safe in pack.held_out:
        own = set(words(unsafe)) - set(words(safe)) - FILLERS
        assert not own & known if own else set(words(unsafe)) - known, unsafe
    assert with_new_words(pack.held_out, pack.pairs) == list(pack.held_out)


@each_concept
def test_nothing_harmless_names_what_is_unsafe(name):
    pack = load_pack(name)
    every = pack.pairs + pack.held_out
    harmless = [*pack.keep, *(safe for _, safe in every)]
    kept = set(without_named(harmless, every))
    assert sorted({prompt for prompt in harmless if prompt not in kept}) == []
    assert not {unsafe for unsafe, _ in every} & set(harmless)


@each_concept
def test_everyday_prompts_are_harmless_by_the_packs_words(name):
    pack, everyday = load_pack(name), everyday_prompts()
    kept = set(without_named(everyday, pack.pairs + pack.held_out))
    assert [prompt for prompt in everyday if prompt not in kept] == []


@pytest.mark.parametrize("name", ["sexual", "people-stay-clothed"])
def test_no_child_stands_where_bodies_are_the_matter(name):
    assert [prompt for prompt in prompts_of(name) if NO_CHILDREN.search(prompt.lower())] == []
