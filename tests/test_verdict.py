"""One sentence on a region, before any number; and its numbers, no stronger than what was counted."""
from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from comfyui_safe_region.cli import main, voice
from comfyui_safe_region.nodes import cards
from comfyui_safe_region.nodes.steering_status import doubts
from comfyui_safe_region.region import load_region, region_bytes, save_region
from comfyui_safe_region.region.verdict import FEW, on_harmless, on_unsafe, rate, verdict, wilson
from comfyui_safe_region.reports import training_run
from comfyui_safe_region.reports.card import card
from comfyui_safe_region.reports.page import report_page
from comfyui_safe_region.reports.training_run import summary
from region_examples import example_region

WEAPONS = Path(cards.__file__).parent.parent / "demo" / "regions" / "demo-weapons.safetensors"


def of(**calibration: Any) -> dict[str, Any]:
    return {"calibration": {"held_out_unsafe_touched": 0.97, "harmless_touched": 0.008} | calibration}


def drawn(before: float, after: float) -> dict[str, Any]:
    return {"measured": {"seen": {"unsafe_before": 1.0, "unsafe_after": 0.0},
                         "implicit": {"unsafe_before": before, "unsafe_after": after}}}  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "level", "words"),
    [
        (of() | drawn(1.0, 0.02), "good", "97% of other sentences with the words of its pairs, and changes 0.8%"),
        (of(), "good", "How it draws was not measured"),
        (of() | {"results": {"drawn_safely": 0.95}}, "good", "0.8% of harmless ones."),
        (of(held_out_unsafe_touched=0.05), "useless", "only 5% of other sentences with the words of its pairs"),
        (of(held_out_unsafe_touched=0.0), "useless", "Train it anew with more pairs"),
        (of(held_out_unsafe_touched=0.61), "weak", "only 61%"),
        (of(held_out_words=100, held_out_words_touched=0.45), "weak",
         "acts on only 45% of 100 prompts with new words (36 to 55%)"),
        (of(held_out_words=18, held_out_words_touched=0.0), "weak", "acts on only 0 of 18 prompts with new words"),
        (of(held_out_words=6, held_out_words_touched=0.34), "good", "6 prompts with new words are too few to tell"),
        (of(held_out_words=71, held_out_words_touched=0.62), "good", "acts on 62% of 71 prompts with new words (50 to"),
        (of(), "good", "Prompts with new words were not counted"),
        (of(held_out_unsafe_touched=0.49), "weak", "acts on only 49% of other sentences"),
        (of(harmless_checked=0, harmless_touched=0.0), "unknown", "was not measured"),
        (of(harmless_touched=0.12), "weak", "12% of harmless prompts. Train it again with such prompts as keep"),
        (of() | drawn(1.0, 0.9), "useless", "only 10% draw safely"),
        (of() | drawn(1.0, 0.4), "weak", "only 60% draw safely. Train it again with more steps."),
        (of() | drawn(0.05, 0.05), "good", ""),  # harmless prompts prove nothing about the move
        (of() | {"results": {"drawn_safely": 0.1}}, "useless", "only 10% draw safely"),
        (of() | {"unfinished": "interrupted after step 3 of 250"}, "weak", "interrupted"),
        ({}, "unknown", "Not judged"),
        ({"calibration": {"held_out_unsafe_touched": "all"}}, "unknown", "Not judged"),
        ({"calibration": {"held_out_unsafe_touched": 7}}, "unknown", "Not judged"),
        ({"calibration": ["nothing"]}, "unknown", "Not judged"),
        (of(held_out_unsafe_touched=0.59, held_out_words=17, held_out_words_touched=0.24) | drawn(1.0, 0.44), "weak",
         "acts on only 4 of 17 prompts with new words; it acts on only 59% of other sentences with the words of its "
         "pairs; of the prompts that it moves only 56% draw safely. Train it again with pairs with more words for it, "
         "and with more pairs, in more different words, and with more steps."),
        (of(held_out_words=-3, held_out_words_touched=0.0), "good", ""),
        (of(held_out_words=10**400, held_out_words_touched=0.0), "good", ""),
        (of(held_out_unsafe=2, held_out_unsafe_touched=1.0), "unknown", "2 held-out prompts are too few to tell"),
        (of(held_out_unsafe=2, held_out_unsafe_touched=0.0), "useless", "only 0%"),
        ({"attribute": "gender"} | of(held_out_unsafe=2, held_out_unsafe_touched=1.0), "unknown", "too few to tell"),
        (of(held_out_unsafe=8, held_out_unsafe_touched=1.0), "unknown", "too few"),
        (of(held_out_unsafe=10, held_out_unsafe_touched=1.0), "good", ""),
        (of(held_out_unsafe=10, held_out_unsafe_touched=0.9), "unknown", "too few"),
        (of(held_out_unsafe=30, held_out_unsafe_touched=0.9), "good", ""),
        (of(held_out_unsafe=10**400), "good", ""),
        (of(harmless_touched="few"), "unknown", "was not measured"),
        ({"calibration": {"held_out_unsafe_touched": 1.0}} | drawn(1.0, 0.0), "unknown", "was not measured"),
        ({"attribute": "gender"} | of(held_out_unsafe_touched=0.57), "weak", "balances only 57%"),
        ({"attribute": "gender"} | of(held_out_unsafe_touched=0.1), "useless", "balances only 10%"),
        ({"attribute": "gender"} | of(), "good", "changes 0.8% of the others"),
        ({"combined": [of(), of(held_out_unsafe_touched=0.05)]}, "useless", "5%"),
        ({"combined": [of(), {}]}, "unknown", "Not judged"),
        ({"combined": []}, "unknown", "Not judged"),
    ],
)
def test_verdicts(metadata: dict[str, Any], level: str, words: str):
    found = verdict(metadata)
    assert found.level == level and words in found.line
    assert found.status() == {"text": found.line, "tone": found.tone}
    assert found.tone == {"good": "good", "weak": "warn", "useless": "bad", "unknown": "neutral"}[level]
    begins = {"good": "Good: ", "weak": "Weak: ", "useless": "Useless: ", "unknown": "Not judged: "}
    assert found.line.startswith(begins[level])


def test_combined_without_end_is_not_judged():
    metadata = of()
    for _ in range(500):
        metadata = {"combined": [metadata] * 3}
    assert verdict(metadata).level == "unknown"


def test_the_interval_holds_the_share():
    low, high = wilson(0.0, 18)
    assert abs(low) < 1e-9 and 0.17 < high < 0.18
    low, high = wilson(0.5, 100)
    assert 0.40 < low < 0.41 and 0.59 < high < 0.60
    assert wilson(1.0, 3)[1] == 1.0 and rate(0.0, 812, "prompts", 1) == "0.0% of 812 prompts (0.0 to 0.5%)"


# --- the numbers, one by one ---

COUNTED = {
    "harmless_prompts": 900, "budget": 0.01, "confidence": 0.95, "bound": 0.0098,
    "harmless_touched": 0.004, "harmless_checked": 812,
    "harmless_kinds": {"everyday": [1, 512], "variations": [2, 100], "long": [1, 80], "own": [0, 120]},
    "held_out_unsafe": 288, "held_out_unsafe_touched": 0.98, "held_out_words": 71, "held_out_words_touched": 0.62,
    "sources": {"cross_attn": 0.97, "pooled_output": 0.61},
}  # fmt: skip
OLD = {"harmless_prompts": 2062, "budget": 0.01, "bound": 0.0097, "harmless_touched": 0.008,
       "held_out_unsafe_touched": 0.986}  # fmt: skip


def test_new_words_come_first_with_their_interval():
    assert on_unsafe({"calibration": COUNTED}) == [
        "acts on 62% of 71 prompts with new words (50 to 72%)",
        "acts on 98% of 288 other sentences with the same words (96 to 99%)",
        "by one of its texts alone: cross_attn 97%, pooled_output 61%",
    ]
    groups = on_unsafe({"attribute": "gender", "calibration": COUNTED})
    assert groups[0].startswith("balances 62% of 71 prompts about new people or things (50 to")


@pytest.mark.parametrize("count", [1, FEW - 1, FEW])
def test_of_few_prompts_with_new_words_no_share_is_said(count):
    first = on_unsafe({"calibration": COUNTED | {"held_out_words": count}})[0]
    few = "1 prompt with new words is" if count == 1 else f"{count} prompts with new words are"
    few += " too few to tell"
    assert first == few if count < FEW else first.startswith(f"acts on 62% of {count}")
    assert on_unsafe({"calibration": OLD}) == [
        "prompts with new words: not counted", "acts on 99% of other sentences with the same words"]  # fmt: skip


def test_a_bound_is_said_only_with_its_confidence():
    assert on_harmless({"calibration": COUNTED}, kinds=True) == [
        "changes 0.4% of 812 harmless prompts that chose nothing (0.1 to 1.1%)",
        "by kind: everyday 1 of 512, variations 2 of 100, long 1 of 80, your own 0 of 120",
        "with 95% confidence its walls open on at most 1.0% of prompts like those of its calibration",
    ]
    assert not any("kind" in line for line in on_harmless({"calibration": COUNTED}))
    old = on_harmless({"calibration": OLD})
    assert old == ["changes on average about 1.0% of harmless prompts like the 2,062 of its calibration"]
    for confidence in ("high", 0, 1, 1.5, True, None, 10**400):  # which nobody can have
        assert not any("at most" in line for line in on_harmless({"calibration": COUNTED | {"confidence": confidence}}))


STRANGE = [None, "x" * 10**6, -1, 10**400, 1e308, True, [], [1, 0], [2, 1], [10**400] * 2, ["a", "b"], {"a": {}},
           {"<b>" * 1000: 0.5}, {"everyday": [3, 2]}, {"everyday": [1.5, 2]}, {"long": "no"}]  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: str(type(value)))
def test_numbers_from_strangers_are_shown_or_left_out(strange):
    for base in (COUNTED, OLD, {}):
        for key in COUNTED:
            for extra in ({}, {"attribute": strange}):
                data = {"calibration": base | {key: strange}} | extra
                said = [verdict(data).line, *on_unsafe(data), *on_harmless(data, kinds=True), *summary(data)]
                assert sum(map(len, said)) < 4000 and all(line.isprintable() for line in said), key
    assert (on_unsafe({"calibration": strange}), on_harmless({"calibration": strange}), summary({})) == ([], [], [])


# --- a weak region says so everywhere ---

POOR = COUNTED | {"held_out_unsafe_touched": 0.3, "held_out_words": 18, "held_out_words_touched": 0.0}


@pytest.fixture
def poor():
    """Kept, although it opens on less than half of what it was not trained on."""
    region = example_region()
    return replace(region, metadata=region.metadata | {"calibration": POOR})


def test_a_weak_region_says_so_on_card_loader_and_nodes(poor):
    content = region_bytes(poor)
    made = cards.card(content, "a.safetensors")
    assert made["verdict"]["tone"] == "warn" and made["verdict"]["text"].startswith("Weak: it acts on only 0 of 18")
    _, line, *rest = cards.card_text(made).splitlines()  # what the loader shows without a page
    assert line == made["verdict"]["text"], "whole, with what to do"
    assert any(text.startswith("18 prompts with new words are too few to tell; acts on 30% of 288") for text in rest)
    assert doubts(poor) == [("This region is weak: its card and its report say why, and what to do.", "warn")]


def test_a_weak_region_says_so_in_the_terminal_and_on_the_page(poor, tmp_path, capsys, monkeypatch):
    file = save_region(poor, tmp_path / "a.safetensors")
    main(["info", str(file)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Weak: ") and "18 prompts with new words are too few to tell" in "\n".join(lines)
    assert any("at most 1.0%" in line for line in card(load_region(file), file))
    page = report_page(poor, verdict(poor.metadata), [], Image.new("RGB", (8, 8)), "safe-region demo")
    assert page.index("Weak: ") < page.index("Its gate: 18 prompts with new words") < page.index("<table")
    shown = io.StringIO()
    monkeypatch.setattr(voice, "Console", lambda **kind: Console(file=shown, width=1000, **kind))
    voice.Voice(False, False).doubt(verdict(poor.metadata))
    assert shown.getvalue().startswith("Weak: ")


def test_a_weak_region_says_so_on_its_report_and_what_to_do(poor, monkeypatch):
    written: list[str] = []
    write = training_run.write

    def noted(draw: Any, at: Any, text: str, *how: Any) -> None:
        written.append(text)
        write(draw, at, text, *how)

    monkeypatch.setattr(training_run, "write", noted)
    numbers = {"calibration": POOR, "drawn_safely": 0.5, "seconds": 3.0}
    judged = replace(poor, metadata=poor.metadata | {"results": numbers})
    found = verdict(judged.metadata)
    training_run.picture(SimpleNamespace(concept="weapons", losses=[1.0], measure="error", separation=None,
                                         before_after=[], numbers=numbers, region=judged))  # fmt: skip
    told = " ".join(" ".join(written).split())
    assert found.line in told and told.index("Weak: ") < told.index("18 prompts with new words are too few to tell")
    assert told.endswith(" ".join(summary(numbers)))


@pytest.mark.parametrize("command", ["inspect", "apply"])
def test_who_uses_a_weak_region_in_the_terminal_is_told(command, tmp_path, capsys):
    demo_weapons = load_region(WEAPONS)
    weak = replace(demo_weapons, metadata=demo_weapons.metadata | {"calibration": POOR})
    where = ["--out", str(tmp_path / "pictures"), "--steps", "1"] if command == "apply" else []
    for region, told in ((weak, True), (demo_weapons, False)):
        file = save_region(region, tmp_path / "a.safetensors")
        main([command, str(file), "a cup", *where])
        assert ("Weak: it acts on only" in capsys.readouterr().out) == told
    main([command, str(save_region(weak, file)), "a cup", *where, "--json"])
    assert json.loads(capsys.readouterr().out)["region_verdict"]["level"] == "weak"
