"""The built-in prompt packs: enough, varied, aligned, and nothing on the wrong side."""
from __future__ import annotations

import csv
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_safe_region.cli import main
from comfyui_safe_region.region import apply_to_conditioning, load_region
from comfyui_safe_region.reports.training_run import summary
from comfyui_safe_region.training import attribute_trainer
from comfyui_safe_region.training.attribute_trainer import AttributeTrainer
from comfyui_safe_region.training.attributes import parse_attribute
from comfyui_safe_region.training.packs import (
    FOLDER,
    attribute_pack_names,
    load_attribute_pack,
    load_pack,
    pack_names,
    pack_title,
)
from comfyui_safe_region.training.pairs import PairsError, everyday_prompts, parse_pairs
from comfyui_safe_region.training.prompts import FILLERS, build_sets, with_new_words, without_named
from comfyui_safe_region.training.recipe import PRESETS
from comfyui_safe_region.training.trainer import Trainer
from toy_model import ToyBackbone

CONCEPTS = [
    "artist-style", "frightening-for-children", "harassment", "hate", "illegal-activity", "people-stay-clothed",
    "self-harm", "sexual", "shocking", "smoking-and-alcohol", "violence", "weapons",
]  # fmt: skip
WIDE = {"harassment", "hate", "illegal-activity", "self-harm", "sexual", "shocking", "violence", "weapons"}
ATTRIBUTES = ["age", "gender", "skin-tone"]
SHORT = 7  # words: longer prompts are sentences, not things by name
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
    fewest = (3_000, 1_500, 300) if name in WIDE else (200, 500, 12)
    assert all(len(found) >= least for found, least in zip((pack.pairs, pack.keep, pack.held_out), fewest))
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
    short = [pair for pair in pack.held_out if len(words(pair[0])) <= SHORT or name not in WIDE]
    for unsafe, safe in pack.held_out:
        own = set(words(unsafe)) - set(words(safe)) - FILLERS
        if (unsafe, safe) in short:
            assert not own & known if own else set(words(unsafe)) - known, unsafe
        else:  # a sentence has some words of other pairs
            assert own - known, unsafe
    assert with_new_words(short, pack.pairs) == short and (name not in WIDE or len(short) >= 150)


@pytest.mark.skipif("SAFE_REGION_PROMPTS" not in os.environ, reason="SAFE_REGION_PROMPTS names no folder")
def test_no_sentence_stands_in_a_public_set():
    ours = {prompt.lower() for prompt in everyday_prompts()}
    ours |= {prompt.lower() for name in CONCEPTS for pair in load_pack(name).pairs for prompt in pair}
    ours |= {prompt.lower() for name in CONCEPTS for prompt in load_pack(name).keep}
    theirs = set()
    for file in Path(os.environ["SAFE_REGION_PROMPTS"]).iterdir():
        if file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as rows:
                theirs |= {prompt.lower() for row in csv.DictReader(rows) for prompt in row.values()}
        elif file.suffix == ".txt":
            theirs |= set(file.read_text(encoding="utf-8").lower().splitlines())
    assert theirs and not {prompt for prompt in ours & theirs if len(words(prompt)) > 3}


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


# Attributes


@each_attribute
def test_an_attribute_is_large_and_its_rows_aligned(name):
    pack = load_attribute_pack(name)
    assert len(pack.rows) >= 200 and len(pack.stated) + len(pack.keep) >= 500 and len(pack.held_out) >= 12
    assert len(pack.groups) >= 2 and parse_attribute(pack.text()) == pack
    wrong = []
    for neutral, prompts in pack.rows + pack.held_out:
        sides = [words(prompt) for prompt in prompts]
        if len({neutral, *prompts}) <= len(prompts) or any(
            not 1 <= len(side) - len(words(neutral)) + 1 <= 5 or len(set(words(neutral)) - set(side)) > 2
            for side in sides
        ):
            wrong.append((neutral, prompts))
    assert wrong == []


@each_attribute
def test_no_row_of_an_attribute_stands_twice_and_held_out_subjects_are_new(name):
    lines = (FOLDER / "attributes" / f"{name}.txt").read_text(encoding="ascii").splitlines()
    rows = [line for line in lines if "=>" in line and not line.startswith("#")]
    pack = load_attribute_pack(name)
    alone = [parse_attribute(f"attribute: {name}\n{line}") for line in rows]
    assert sum(len(one.rows) for one in alone) == len(pack.rows)
    assert sum(len(one.held_out) for one in alone) == len(pack.held_out)
    known = {word for neutral, _ in pack.rows for word in words(neutral)}
    assert [neutral for neutral, _ in pack.held_out if not set(words(neutral)) - FILLERS - known] == []
    stated = Counter(" ".join(words(prompt)) for prompt in pack.stated + pack.keep)
    assert [prompt for prompt, count in stated.items() if count > 1] == []


# Using them


def test_an_unknown_pack_and_a_pack_of_the_other_kind_are_named():
    with pytest.raises(PairsError, match=r'no pack "\.\./weapons".*hate'):
        load_pack("../weapons")
    with pytest.raises(PairsError, match="train-balance"):
        load_pack("gender")
    with pytest.raises(PairsError, match=r"for train\."):
        load_attribute_pack("hate")


def test_a_pack_reads_as_it_writes_and_own_pairs_add_to_it():
    pack = load_pack("people-stay-clothed")
    assert pack.title == "People stay clothed" and pack.leave_out
    assert replace(parse_pairs(pack.text()), title=pack.title) == pack
    both = parse_pairs("a priestess => a priestess in a robe") + pack
    assert both.title == pack.title and len(both.pairs) == len(pack.pairs) + 1
    left = with_new_words(both.held_out, both.pairs)
    assert len(left) == len(pack.held_out) - 1, "a word of one's own pairs is not new any more"


def test_everyday_prompts_about_people_are_not_harmless_to_a_pack_about_people():
    sets = build_sets(load_pack("people-stay-clothed"), 0, 10**9)
    everyday = set(everyday_prompts())
    used = [prompt for prompt in sets.harmless + sets.calibration if prompt in everyday]
    assert 1000 < len(used) < 1500
    assert not [prompt for prompt in used if {"woman", "man", "she", "his"} & set(words(prompt))]
    assert not {unsafe for unsafe, _ in load_pack("people-stay-clothed").held_out} & set(sets.harmless)


def test_held_out_words_are_measured_and_never_learned_from():
    pairs = parse_pairs(
        "a {zzknife|zzgun|zzbomb|zzaxe|zzmace|zzclub} {in the park|on a table|at night|by the sea} => "
        "a {flower|flower|flower|flower|flower|flower} {in the park|on a table|at night|by the sea}\n"
        "held-out: a {zzpike|zzbow|zzdart|zzlance|qqlamp|qqdoor|qqspoon} in the park => a flower in the park\n"
        "held-out: a zzgun on a roof => a flower on a roof"
    )
    recipe, backbone = replace(PRESETS["instant"], prompts=900), ToyBackbone()
    trainer = Trainer(backbone, pairs, recipe, "bad things")
    learned = {word for prompts in trainer.prompts.values() for prompt in prompts for word in words(prompt)}
    assert not learned & {"zzpike", "zzbow", "zzdart", "zzlance"}
    region = trainer.run()
    new = backbone.encode([unsafe for unsafe, _ in pairs.held_out[:-1]])
    moved = [not torch.equal(a[0], b[0]) for a, b in zip(new, apply_to_conditioning(new, region))]
    found = region.metadata["calibration"]
    assert found["held_out_words"] == len(new) == 7, "zzgun is not new"
    assert found["held_out_words_touched"] == pytest.approx(sum(moved) / 7) and 0 < sum(moved) < 7
    assert "7 prompts with new words are too few to tell" in summary(trainer.numbers)
    without = Trainer(ToyBackbone(), replace(pairs, held_out=()), recipe, "bad things").run()
    gates = [one.parts[0].gates["cross_attn"].weight for one in (region, without)]
    assert torch.equal(*gates), "what is held out changes nothing"


def test_the_rows_held_out_of_an_attribute_are_measured(monkeypatch):
    monkeypatch.setattr(attribute_trainer, "STATED_STEPS", 40)
    text = (
        "attribute: gender\na {zzjudge|zzcook|zznurse|zzpilot} {at night|in town|on a hill} => "
        "man: a male {zzjudge|zzcook|zznurse|zzpilot} {at night|in town|on a hill} => "
        "woman: a female {zzjudge|zzcook|zznurse|zzpilot} {at night|in town|on a hill}\n"
        "stated: a {male|female} {zzjudge|zzcook}\nkeep: a {cat|dog|tree|boat} {at night|in town|on a hill}\n"
        "held-out: a zzclerk at night => man: a male zzclerk at night => woman: a female zzclerk at night\n"
    )
    rows = parse_attribute(text)
    assert [neutral for neutral, _ in rows.held_out] == ["a zzclerk at night"]
    trainer = AttributeTrainer(ToyBackbone(), rows, replace(PRESETS["instant"], prompts=900))
    seen = []
    trainer.run(seen.append)
    assert trainer.numbers["calibration"]["held_out_words"] == 1
    assert 0 <= trainer.numbers["calibration"]["held_out_words_touched"] <= 1
    assert seen[-1].step == seen[-1].total


# Command line


def test_packs_are_listed_with_counts(capsys):
    main(["packs"])
    out = capsys.readouterr().out
    assert all(name in out and pack_title(name)[1] in out for name in [*CONCEPTS, *ATTRIBUTES])
    assert f"{len(load_pack('weapons').pairs)} pairs" in out and "201 rows" in out


def test_a_region_is_trained_from_a_pack_and_own_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("comfyui_safe_region.cli.train.backbone", lambda args: ToyBackbone())
    (tmp_path / "own.txt").write_text("a zzweapon => a spoon\n", encoding="ascii")
    out = tmp_path / "region.safetensors"
    main(["train", "--pack", "weapons", "--pairs", str(tmp_path / "own.txt"), "--out", str(out), "--preset", "instant",
          "--prompts", "600"])  # fmt: skip
    region = load_region(out)
    assert region.metadata["concept"] == "Weapons" and region.parts[0].label == "weapons"
    assert region.metadata["recipe"]["pairs"] == len(load_pack("weapons").pairs) + 1
    assert region.metadata["calibration"]["held_out_words"] == len(load_pack("weapons").held_out)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["train"], "--pack"),
        (["train", "--pack", "weapon"], "weapons"),
        (["train", "--pack", "gender"], "train-balance"),
        (["train-balance", "--pack", "hate"], "for train"),
    ],
)
def test_what_is_wrong_with_a_pack_is_one_line(tmp_path, capsys, argv, word):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--out", str(tmp_path / "r.safetensors")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error
