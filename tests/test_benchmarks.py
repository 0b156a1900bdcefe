"""The benchmarks of training and of several concepts: what they count, how they go on, and the concepts' pairs."""

from __future__ import annotations

import importlib.util
import json
import mmap
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from comfyui_safe_region.demo import world
from comfyui_safe_region.evaluation.demo_prompts import DemoPrompt
from comfyui_safe_region.region import Gate, Move, Part, Region, combine
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.recipe import PRESETS
from toy_model import ToyBackbone

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(SCRIPTS))  # as python does that runs one of them


def benchmark(name):
    """A benchmark as a module: they are scripts, and part of no package."""
    path = SCRIPTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


training, concepts, publishing = benchmark("training"), benchmark("concepts"), benchmark("publishing")
steering = benchmark("steering")


def cells(table):
    """A Markdown table as rows of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# --- training ---


def checkpoint(step, seconds, unsafe, kept=8):
    return {"step": step, "seconds": seconds, "unsafe": unsafe, "count": 100, "before": 10, "kept": kept, "sets": {}}


def run(*checkpoints, gate=10.0, **more):
    return {"stages": {"encode": gate - 2, "gate": 1.5, "calibrate": 0.5, "discover": 5.0},
            "checkpoints": list(checkpoints), **more}  # fmt: skip


FOUND = {
    "zero 0": run(checkpoint(0, 10, 90), checkpoint(10, 20, 40), checkpoint(25, 32, 2)),
    "zero 1": run(checkpoint(0, 12, 80), checkpoint(10, 24, 20), checkpoint(25, 40, 3)),
    "instant 0": run(checkpoint(0, 11, 2), checkpoint(10, 20, 1), checkpoint(25, 30, 0)),
    "instant 1": run(checkpoint(0, 15, 6), checkpoint(10, 24, 0), checkpoint(25, 36, 1, kept=6), gate=14.0),
}


def test_copying_what_was_learned_takes_no_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    watch = training.Watch([2, 4])

    def slow():
        now[0] += 50
        return "copy"

    for step in range(5):
        now[0] += 3
        watch.note("a" if step < 2 else "b", step, slow)
    assert watch.copies == {2: (9.0, "copy"), 4: (15.0, "copy")}
    assert training.by_stage(watch.reports) == {"a": 6.0, "b": 9.0}


def test_a_stage_that_comes_back_goes_on_counting():
    assert training.by_stage([("a", 1.0), ("b", 3.0), ("a", 7.0)]) == {"a": 5.0, "b": 2.0}


@pytest.mark.parametrize("steps", [0, 20])
def test_regions_are_copied_while_they_are_learned(monkeypatch, steps):
    pairs = parse_pairs("a {zzknife|zzgun|zzbomb} {in the park|on a table|at night} => a flower")
    monkeypatch.setattr(training, "demo_pairs", lambda: pairs)
    recipe = replace(PRESETS["region"], steps=steps, trajectories=8, sampling_steps=4, rank=4)
    watch = training.train_region(ToyBackbone(), recipe, (0, 5, 10, 400))
    assert list(watch.copies) == ([0, 5, 10, 20] if steps else [0])
    assert len({region.parts[0].id for _, region in watch.copies.values()}) == len(watch.copies)
    seconds = [seconds for seconds, _ in watch.copies.values()]
    assert seconds == sorted(seconds) and seconds[-1] <= watch.reports[-1][1]
    assert {"encode", "gate", "calibrate", "instant"} <= training.by_stage(watch.reports).keys()


def test_the_rate_is_reached_at_the_first_checkpoint_that_has_it():
    checkpoints = FOUND["instant 1"]["checkpoints"]
    assert training.first_at(checkpoints, 0.02)["step"] == 10
    assert training.first_at(checkpoints, 0.06)["step"] == 0
    assert training.first_at(FOUND["zero 1"]["checkpoints"], 0.02) is None


def test_initial_values_are_summed_up_over_seeds_and_ranked():
    numbers = training.summary(training.runs_of(FOUND, "zero"))
    assert numbers["unsafe"] == {0: [0.9, 0.8], 10: [0.4, 0.2], 25: [0.02, 0.03]}
    assert (numbers["steps"], numbers["seconds"], numbers["after_gate"]) == ([25], [32], [22.0])
    numbers = training.summary(training.runs_of(FOUND, "instant"))
    assert (numbers["steps"], numbers["after_gate"]) == ([0, 10], [1.0, 10.0])
    assert training.ranked(FOUND, ("lora", "zero", "instant")) == ["instant", "zero"]
    head, _, first, second = cells(training.initial_table(FOUND, ("zero", "instant")))
    row = dict(zip(head, first))
    assert row["initial value"] == "instant" and row["unsafe after 0 steps"] == "4.0 ± 2.8"
    assert row["mixed: rest kept"] == "70 ± 14" and row["runs that reach 2%"] == "2 of 2"
    assert dict(zip(head, second))["runs that reach 2%"] == "1 of 2" and dict(zip(head, second))["in seconds"] == "32"


class NoMeasure:
    """Counts instead of drawing."""

    class plain:
        @staticmethod
        def with_region(region):
            return region

    def __call__(self, method):
        return {"count": 100, "unsafe": 1, "before": 10, "kept": 9, "sets": {}}


def test_a_benchmark_of_initial_values_goes_on_where_it_stopped(monkeypatch, tmp_path):
    trained = []

    def train(backbone, recipe, seen):
        trained.append((recipe.initial, recipe.seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        watch = training.Watch([0])
        watch.note("instant", 0, lambda: "region")
        return watch

    monkeypatch.setattr(training, "train_region", train)
    file = tmp_path / "initial.json"
    for expected in (KeyboardInterrupt, None):
        arguments = (file, ("zero", "instant"), 1, 250, None, NoMeasure)
        if expected:
            with pytest.raises(expected):
                training.measure_initial(*arguments)
        else:
            found = training.measure_initial(*arguments)
    assert trained == [("zero", 0), ("instant", 0), ("instant", 0)]
    assert found == json.loads(file.read_text()) and found.keys() == {"zero 0", "instant 0"}
    assert found["zero 0"]["checkpoints"][0]["unsafe"] == 1


def test_what_chance_does_to_the_gate_is_counted_by_seed(tmp_path):
    opens = dict.fromkeys(training.GATE_SETS, 4) | {"harmless": 0}
    file = tmp_path / "gate.json"
    file.write_text(json.dumps({"0": opens, "1": opens | {"implicit": 2}}))
    found = training.measure_gate(file, 2, 4, None)  # nothing is missing, so nothing is trained
    head, _, *seeds, mean = cells(training.gate_table(found, 4))
    assert [dict(zip(head, row))["implicit"] for row in seeds] == ["100.0", "50.0"]
    assert dict(zip(head, mean))["implicit"] == "75.0 ± 35.4" and dict(zip(head, mean))["harmless"] == "0.0 ± 0.0"


def test_the_gate_opens_on_what_its_pairs_are_about():
    pairs = parse_pairs("a {zzknife|zzgun|zzbomb} {in the park|on a table|at night} => a flower")
    region = training.Trainer(ToyBackbone(), pairs, replace(PRESETS["instant"], prompts=300)).run()
    texts = ["a zzknife in the snow", "a cup on a table", "a zzgun", "a tree"]
    assert training.opened(ToyBackbone().encode(texts), region) == 2


BESIDE = {
    training.ESD: run(checkpoint(25, 10, 50), checkpoint(200, 80, 4, kept=5), checkpoint(400, 160, 4, kept=1),
                      peak=500 << 20, increase=100 << 20),
    training.INSTANT: run(checkpoint(0, 6, 9), peak=600 << 20, increase=200 << 20),
    training.REGION: run(checkpoint(0, 6, 9), checkpoint(25, 15, 4), checkpoint(250, 50, 0), peak=440 << 20,
                         increase=40 << 20),
}  # fmt: skip


def test_esd_is_compared_where_it_is_best():
    assert training.best(BESIDE[training.ESD])["step"] == 200
    assert [row[1:] for row in training.bars(BESIDE)] == [(15 / 80, 0.2), (0.4, 0.5), (6, 5.0)]
    assert [row[-1] for row in cells(training.bars_table(BESIDE))[2:]] == ["yes", "yes", "no"]
    head, _, esd, ours, region = cells(training.esd_table(BESIDE))
    assert head[1] == "seconds to at most 4.0% unsafe" and esd[1:4] == ["80.0", "1.00", "80.0"]
    assert esd[5] == "50%" and ours[1:3] == ["not reached", ""] and region[1:3] == ["15.0", "0.19"]
    assert region[6:] == ["440 MiB", "40 MiB", "0.40"]
    points = [row[4:] for row in cells(training.updates_table(BESIDE))[2:]]
    assert points == [["6.0", "6.0"], ["not reached", "15.0"], ["not reached", "15.0"]]
    assert "encode 8.0, gate 1.5, calibrate 0.5" in training.stages_text(BESIDE)


def test_no_bar_is_held_by_what_was_never_reached():
    worse = BESIDE | {training.REGION: run(checkpoint(250, 50, 30), peak=1, increase=1)}
    assert training.bars(worse)[0][1] is None
    assert cells(training.bars_table(worse))[2][1:] == ["not reached", "0.2", "no"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process holds now")
def test_memory_is_what_the_process_holds_and_held_at_most():
    before = training.memory("VmRSS")
    block = mmap.mmap(-1, 64 << 20)  # of the system: an allocator may have some left from earlier
    block.write(b"x" * len(block))
    held = training.memory("VmRSS")
    assert held - before > 0.9 * len(block)
    block.close()
    # the kernel counts the latter less closely
    assert training.memory("VmRSS") < 0.98 * held < training.memory("VmHWM")


# --- several concepts ---


@pytest.mark.parametrize("name", concepts.CONCEPTS)
def test_pairs_of_a_concept_name_it_on_the_unsafe_side_only(name):
    pairs, concept = concepts.pairs_of(name), concepts.CONCEPTS[name]
    assert 150 <= len(pairs.pairs) <= 300 and len(pairs.keep) >= 30
    for unsafe, safe in pairs.pairs:
        assert concepts.names_any(unsafe, concept.words), unsafe
        assert not concepts.names_any(safe, concept.words), safe
    assert not any(concepts.names_any(prompt, concept.words) for prompt in pairs.keep)


@pytest.mark.parametrize("name", concepts.CONCEPTS)
def test_pairs_change_nothing_but_the_concept(name):
    """What stands beside it is the same on both sides: taking out the names leaves the same words."""
    concept = concepts.CONCEPTS[name]
    seen = sorted(set(concept.words) - set(concept.held_out), key=len, reverse=True)
    others = sorted((word for thing in world.HARMLESS if thing.kind != concept.kind for word in thing.words), key=len)
    for unsafe, safe in concepts.pairs_of(name).pairs:
        word = next(word for word in seen if word in unsafe)
        before, after = unsafe.split(word, 1)
        assert safe.startswith(before) and safe.endswith(after), (unsafe, safe)
        assert safe[len(before) : len(safe) - len(after)] in others, (unsafe, safe)


@pytest.mark.parametrize("name", concepts.CONCEPTS)
def test_held_out_words_stand_in_no_pair(name):
    pairs, concept = concepts.pairs_of(name), concepts.CONCEPTS[name]
    assert len(concept.held_out) >= 5 and set(concept.held_out) < set(concept.words)
    trained = [side for pair in (*pairs.pairs, *concepts.joint_pairs().pairs) for side in pair] + list(pairs.keep)
    for word in concept.held_out:
        assert not any(concepts.names_any(text, [word]) for text in trained), word
    # of every thing that the judge is to find at least one name is learned
    for thing in world.THINGS:
        if thing.kind == concept.kind:
            assert set(thing.words) - set(concept.held_out), thing.name


def test_names_are_found_as_whole_words():
    assert concepts.names_any("Two CARS, a car.", ["a car"]) and not concepts.names_any("two cars", ["a car"])
    assert not concepts.names_any("a hamburger", ["a burger"]) and concepts.names_any("slices of food", ["some food"])


def test_joint_pairs_call_nothing_safe_that_is_unsafe_for_another_concept():
    joint = concepts.joint_pairs()
    words = [word for concept in concepts.CONCEPTS.values() for word in concept.words]
    assert not any(concepts.names_any(safe, words) for _, safe in joint.pairs)
    assert not any(concepts.names_any(prompt, words) for prompt in joint.keep)
    every = [pair for name in concepts.CONCEPTS for pair in concepts.pairs_of(name).pairs]
    assert set(joint.pairs) < set(every) and len(joint.pairs) > 0.7 * len(every)


def test_prompt_sets_ask_for_what_their_names_say():
    sets = concepts.prompt_sets(40)
    assert sets == concepts.prompt_sets(40)
    for name, concept in concepts.CONCEPTS.items():
        others = [w for other, c in concepts.CONCEPTS.items() if other != name for w in c.words]
        for prompt in sets[name].prompts:
            assert concepts.names_any(prompt.text, concept.held_out) and not concepts.names_any(prompt.text, others)
        beside = sets[f"{name} + harmless"]
        assert beside.concepts == (name,) and len(beside.prompts) == 40
        for prompt in beside.prompts:
            (asked,) = prompt.asked
            assert world.BY_NAME[asked].kind in concepts.NEUTRAL
            assert concepts.names_any(prompt.text, concept.words)
            assert concepts.names_any(prompt.text, world.BY_NAME[asked].words)
    for pair in combinations(concepts.CONCEPTS, 2):
        chosen = sets[" + ".join(pair)]
        assert chosen.concepts == pair and len(chosen.prompts) == 20
        assert all(concepts.names_any(p.text, concepts.CONCEPTS[c].words) for p in chosen.prompts for c in pair)
    words = [word for concept in concepts.CONCEPTS.values() for word in concept.words]
    assert len(sets["harmless"].prompts) == 40
    assert not any(concepts.names_any(prompt.text, words) for prompt in sets["harmless"].prompts)


class Stored(concepts.Regions):
    """Regions that were trained elsewhere."""

    def __init__(self, regions):
        self.trained = regions.get


class Words:
    """A text encoder in which every word has an axis of its own."""

    def __init__(self):
        self.axes = {}

    def encode(self, prompts):
        states = [[self.axes.setdefault(word, len(self.axes)) for word in prompt.split()] for prompt in prompts]
        return [[torch.eye(12)[axes][None], {}] for axes in states]


def part(label, word, encoder):
    """A part that opens on one word, and moves the whole prompt."""
    gate = Gate(weight=encoder.encode([word])[0][0][0], bias=torch.tensor([0.5]), mean=torch.zeros(12),
                scale=torch.ones(12), ramp=torch.tensor(0.5))  # fmt: skip
    return Part(label, {"cross_attn": Move(offset=torch.ones(12))}, {"cross_attn": gate})


@pytest.fixture
def encoder():
    return Words()


@pytest.fixture
def regions(encoder):
    return {name: Region((part(name, name, encoder),), {"name": name}) for name in [*concepts.CONCEPTS, "joint"]}


def test_configurations_hold_the_concepts_that_they_name(regions):
    stored, names = Stored(regions), list(concepts.CONCEPTS)

    def labels(configuration):
        return [part.label for part in stored.made(configuration).parts]

    assert stored.made("none") is None
    assert labels("alone food") == ["food"] and labels("joint") == ["joint"]
    assert labels("two") == sorted(names[:2]) and labels("four") == sorted(names)
    assert labels("without food") == sorted(set(names) - {"food"})
    assert stored.made("four").parts[0].id == combine(*regions.values()).only(names).parts[0].id


def test_a_prompt_set_is_drawn_with_what_concerns_it():
    assert concepts.configurations(("food",)) == ["none", "alone food", "four", "joint", "without food"]
    first, second, third, _ = concepts.CONCEPTS
    assert "two" in concepts.configurations((first, second)) and "two" not in concepts.configurations((first, third))
    assert not any(name.startswith("without") for name in concepts.configurations((first, second)))
    assert [f"alone {name}" in concepts.configurations(()) for name in concepts.CONCEPTS] == [True] * 4


class Seen(dict):
    def shows(self, *names):
        return any(name in self for name in names)


def test_measuring_goes_on_where_it_stopped_and_counts_what_is_drawn(monkeypatch, encoder, regions, tmp_path):
    drawn = []
    sets = {"food": concepts.PromptSet(("food",), [DemoPrompt("food here", ("hat",)), DemoPrompt("a lamp")])}

    def draw(backbone, entries, guidance, steps, seed, known=None):
        drawn.append(len(entries))
        return torch.stack([entry[0][0, 0] for entry in entries])  # the picture is the first word's state

    def judge(pictures):
        food = encoder.encode(["food"])[0][0][0, 0]
        return [Seen({"pizza": 1.0, "hat": 1.0} if torch.equal(picture, food) else {}) for picture in pictures]

    monkeypatch.setattr(concepts, "draw", draw)
    monkeypatch.setattr(concepts, "Regions", lambda backbone, preset, folder: Stored(regions))
    file = tmp_path / "results.json"
    found = concepts.measure(encoder, ["instant"], sets, file, judge)["instant"]
    assert found == json.loads(file.read_text())["instant"]
    alone, without = found["alone food"]["food"], found["without food"]["food"]
    assert alone == {"count": 2, "before": 1, "kept": 0, "touched": 1, "identical": 1, "untouched_identical": 1,
                     "shown": {"food": 0}, "opens": {"food": 1}}  # fmt: skip
    opens = {name: int(name == "food") for name in concepts.CONCEPTS}
    assert found["four"]["food"] == alone | {"opens": opens}
    assert without["shown"] == {"food": 1} and without["identical"] == without["untouched_identical"] == 2
    assert found["joint"]["food"]["touched"] == 0
    assert len(drawn) == 6
    del (now := json.loads(file.read_text()))["instant"]["joint"]["food"]
    file.write_text(json.dumps(now))
    assert concepts.measure(encoder, ["instant"], sets, file, judge)["instant"] == found
    assert len(drawn) == 8  # once without any region, once joint
    concepts.measure(encoder, ["instant"], sets, file, None)
    assert len(drawn) == 8


def counted(shown, **more):
    return {"count": 20, "before": 10, "kept": 9, "touched": 0, "identical": 20, "untouched_identical": 20,
            "shown": shown, "opens": {name: 5 * (name in shown) for name in concepts.CONCEPTS}, **more}  # fmt: skip


@pytest.fixture
def results():
    """Every concept shown 18 of 20 times without a region, once with its own; food 4 times where four act."""
    found, sets = {}, concepts.prompt_sets(2)
    for name, chosen in sets.items():
        for configuration in concepts.configurations(chosen.concepts):
            left = 18 if configuration.startswith(("none", "without")) else 1
            shown = {c: 4 if configuration == "four" and c == "food" else left for c in chosen.concepts}
            found.setdefault(configuration, {})[name] = counted(shown)
    return found, sets


def test_losses_are_points_against_the_region_alone(results):
    found, _ = results
    assert {name: pytest.approx(lost) for name, lost in concepts.losses(found).items()} == {
        "weapons": (0, 0, 0), "vehicles": (0, 0, 0), "food": (15, 15, 0), "instruments": (0, 0, 0)
    }  # fmt: skip
    found["four"]["food"]["shown"]["food"] = 0
    found["four"]["weapons + food"]["shown"]["food"] = 1
    found["four"]["vehicles + harmless"]["kept"] = 8
    assert concepts.losses(found)["food"] == pytest.approx((-5, 10, 0))
    assert concepts.losses(found)["vehicles"] == pytest.approx((0, 0, 10))
    assert [row[-1] for row in cells(concepts.losses_table(found))[2:]] == ["yes", "no", "no", "yes"]


def test_tables_have_a_row_for_each_concept_asked_for(results):
    found, sets = results
    rows = {row[0]: row[1:] for row in cells(concepts.shown_table(found, sets))}
    assert len(rows) == 2 + 4 * 2 + 6 * 2
    assert rows["food"] == ["90", "5", "", "20", "5", "90", "90", "90"]
    assert rows["weapons in weapons + vehicles"][:5] == ["90", "5", "5", "5", "5"]
    assert rows["food in weapons + food"][:5] == ["90", "5", "", "20", "5"]
    switched = cells(concepts.switched_table(found))
    assert switched[2] == ["weapons", "20", "20", "20", "90", "90"]
    found["four"]["harmless"]["identical"] = 19
    head, _, row = cells(concepts.harmless_table(found))
    assert dict(zip(head, row))["four"] == "95" and dict(zip(head, row))["alone food"] == "100"
    gates = {row[0]: row[1:] for row in cells(concepts.gates_table(found))}
    assert gates["vehicles + food"] == ["0", "25", "25", "0"] and gates["harmless"] == ["0"] * 4
    assert "Preset instant" in concepts.report("instant", found, sets)


# --- publishing ---


def test_a_result_replaces_the_last_one_between_its_marks_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\n\nold\n\n<!-- end of one -->\n<!-- two --><!-- end of two -->\nafter\n")
    publishing.put(page, "one", "new\n")
    publishing.put(page, "one", "newer\n")
    publishing.put(page, "two", "other")
    assert page.read_text() == ("before\n<!-- one -->\n\nnewer\n\n<!-- end of one -->\n"
                                "<!-- two -->\n\nother\n\n<!-- end of two -->\nafter\n")  # fmt: skip
    with pytest.raises(SystemExit, match="end of three"):
        publishing.put(page, "three", "x")


PLACES = [*(f"steering at guidance {guidance}" for guidance in (4, 7, 1)), "apply", "fidelity", "attacks", "balance",
          "concepts", "training: initial", "training: gate", "training: esd", "language", "memory"]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_the_page_of_results_has_a_table_of_each_benchmark(name):
    text = publishing.MEASURED.read_text(encoding="utf-8")
    assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end of {name} -->") == 1
    _, rule, *rows = [line for line in published(publishing.MEASURED, name).splitlines() if line.startswith("|")]
    assert set(rule) <= set("| -") and rows


def published(page, name):
    """What stands between a benchmark's marks."""
    return page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]


def test_the_readme_shows_the_rows_of_the_full_table():
    """What the README quotes stands in docs/measured.md, number for number."""

    def rows(page, mark):
        head, _, *lines = cells(published(page, mark).strip())
        return {line[0].strip("*"): dict(zip(head, line)) for line in lines}

    brief, full = rows(publishing.README, "steering"), rows(publishing.MEASURED, "steering at guidance 4")
    assert tuple(brief) == steering.IN_README
    names = steering.BRIEF | {"mixed: rest kept": "rest of mixed kept", "evaluations": "evaluations a step"}
    names |= {name: name for name in ("harmless: same to the bit", "made in")}
    for method, row in brief.items():
        assert {ours: row[ours] for ours in names.values()} == {ours: full[method][of] for of, ours in names.items()}
