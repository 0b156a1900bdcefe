"""What a region is said to do to a prompt, against what it does; and tokens back to the prompt's words."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from comfyui_safe_region.demo import world
from comfyui_safe_region.demo.text import everyday_text, unknown_words
from comfyui_safe_region.evaluation import heat
from comfyui_safe_region.evaluation.heat import MIXED, Item, Said, heat_strip, report, unfolded
from comfyui_safe_region.region import Gate, Move, Part, Region, RegionError, apply_to_conditioning
from comfyui_safe_region.region.inspection import inspect_entry
from comfyui_safe_region.region.words import Token, decoder, fitted, locate, tokens_of, without_weights, words
from comfyui_safe_region.reports.strip import GREY, INK, PAPER, TONES, colour, strip_picture
from region_examples import example_move, example_region, wall_part


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entry(*first: float) -> list:
    """Tokens whose first numbers are these; `wall_part(1)` looks at that number."""
    tokens = torch.full((1, len(first), 4), 0.5)
    tokens[0, :, 0] = torch.tensor(first)
    return [tokens, {}]


WALL = Region((wall_part(1.0),), {"name": "walls"})


# --- the numbers ---


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_the_shift_is_what_applying_the_region_makes(mode, strength):
    widths = {"cross_attn__features0to6": 6, "cross_attn__features6to10": 4, "pooled_output": 5}
    region = Region((*example_region("a", 1, **widths).parts, *example_region("b", 2, bias=3.0, **widths).parts))
    given_entry = [drawn(2, 7, 10), {"pooled_output": drawn(2, 5, seed=1)}]
    found, ((text, options),) = inspect_entry(given_entry, region, strength, mode)
    (after, changed), = apply_to_conditioning([given_entry], region, strength, mode)
    assert torch.equal(after, text) and torch.equal(changed["pooled_output"], options["pooled_output"])
    shifts = (after - given_entry[0]).norm(dim=-1)
    pooled = (changed["pooled_output"] - given_entry[1]["pooled_output"]).norm(dim=-1)
    for row, one in enumerate(found):
        assert torch.allclose(one.shift["cross_attn"], shifts[row] / given_entry[0][row].norm(dim=-1))
        share = pooled[row] ** 2 / (pooled[row] ** 2 + (shifts[row] ** 2).sum()).clamp(min=1e-12)
        assert one.pooled_share == pytest.approx(float(share), abs=1e-5)
        assert one.moved == bool(strength)


def test_depth_is_in_ramps_and_counted_from_the_nearest_wall():
    gate = Gate(torch.tensor([[1.0, 0], [0, 2.0]]), torch.tensor([1.0, 1.0]), torch.zeros(2), torch.ones(2),
                torch.tensor(0.5))  # fmt: skip
    region = Region((Part("two", {"cross_attn": example_move(2)}, {"cross_attn": gate}),))
    text = torch.tensor([[[1.25, 0.1], [0.1, 0.9], [0.0, 0.0]]])
    ((one,), _) = inspect_entry([text, {}], region)
    (part,) = one.parts
    assert part.depth["cross_attn"][:2].tolist() == pytest.approx([0.5, 1.6])
    assert part.depth["cross_attn"][2].isnan(), "padding is not looked at"
    assert part.wall["cross_attn"][:2].tolist() == [0, 1]
    assert part.openness == 1 and not part.inside and part.walls == 2
    assert one.parts[0].deepest == pytest.approx(1.6)


def test_a_prompt_inside_is_inside_and_does_not_move():
    (one,), steered = inspect_entry(entry(0.2, 0.9), WALL)
    assert one.inside and not one.moved and one.parts[0].openness == 0
    assert torch.equal(steered[0][0], entry(0.2, 0.9)[0]) and not one.shift["cross_attn"].any()
    assert one.parts[0].depth_after["cross_attn"].tolist() == one.parts[0].depth["cross_attn"].tolist()


def test_each_concept_speaks_for_itself():
    low, high = wall_part(0.5), wall_part(5.0)
    (one,), _ = inspect_entry(entry(2.0), Region((low, Part("high", high.moves, high.gates))))
    assert [part.inside for part in one.parts] == [False, True]
    assert one.parts[0].shift["cross_attn"] > 0 and not one.parts[1].shift["cross_attn"].any()


def test_layers_count_as_one_token():
    part = Part("layers", {f"conditioning_llama3__layer{i}": example_move(3, i) for i in range(2)})
    before = [drawn(1, 4, 6), {"conditioning_llama3": drawn(1, 2, 5, 3)}]
    (one,), ((_, after),) = inspect_entry(before, Region((part,)), mode="always")
    told = one.shift["conditioning_llama3"]
    apart = (after["conditioning_llama3"] - before[1]["conditioning_llama3"]).square().sum(-1).sum(1).sqrt()
    assert torch.allclose(told, (apart / before[1]["conditioning_llama3"].square().sum(-1).sum(1).sqrt())[0])
    assert not one.inside and math.isnan(one.parts[0].deepest), "without walls nothing is inside"


def test_a_prompt_that_was_steered_before_is_looked_at_as_it_was():
    first = apply_to_conditioning([entry(3.0)], WALL)
    (one,), again = inspect_entry(first[0], WALL)
    assert one.parts[0].deepest == pytest.approx(2.0) and one.moved
    assert torch.equal(again[0][0], first[0][0])


def test_prompts_without_tokens_or_with_a_pooled_text_alone():
    part = Part("a", {"pooled_output": Move(offset=torch.ones(4))})
    (found,), (after,) = inspect_entry([None, {"pooled_output": torch.ones(1, 4)}], Region((part,)))
    assert found.moved and after[1]["pooled_output"].tolist() == [[2.0] * 4]
    for batch in (0, 2):
        found, _ = inspect_entry([torch.zeros(batch, 0, 4), {}], Region((wall_part(0.0),)))
        assert len(found) == batch and all(one.inside and not one.moved for one in found)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RegionError, match="Balance"):
        inspect_entry(entry(1.0), Region(WALL.parts, {"attribute": {}}))
    with pytest.raises(RegionError, match="learned on"):
        inspect_entry([torch.ones(1, 2, 5), {}], WALL)


# --- tokens and words ---


def pieces(*texts: str | None) -> list[bytes | None]:
    return [text if text is None else text.encode() for text in texts]


def spans(prompt: str, *texts: str | None) -> list[str | None]:
    return [span and prompt[slice(*span)] for span in locate(pieces(*texts), prompt)]


def test_pieces_are_found_whatever_became_of_case_and_spaces():
    assert spans("A  Kitchen\nknife", "a", "kit", "chen", "knife") == ["A", "Kit", "chen", "knife"]
    assert spans("\uff46ull ok", " full", " ok") == ["\uff46ull", "ok"]


def test_weights_are_no_words_but_brackets_can_be():
    assert spans("a (big (knife:1.3)) x", "a", "big", "knife", "x") == ["a", "big", "knife", "x"]
    assert spans(r"a \(b\)", "a", "(", "b", ")") == ["a", "(", "b", ")"]
    assert spans("(1:1.5) 1", "1", "1") == ["1", "1"]
    assert locate(pieces("1", "1"), "(1:1.5) 1") == [(1, 2), (8, 9)]
    assert spans("a (b:1.2)", "a", "(", "b", ":", "1.2", ")") == ["a", "(", "b", ":", "1.2", ")"]
    assert "".join(letter for letter, _ in without_weights("a)) ((b) (c:x) :)")) == "a)) ((b) (c:x) :)"


def test_unknown_letters_are_taken_as_one_and_nothing_is_guessed():
    assert spans("a 🔪 x 🔪 it", "a", None, "x", None, "it") == ["a", *["🔪 x 🔪"] * 3, "it"], "x could be anywhere"
    assert spans("one 🔪 table", "one", None, "table") == ["one", "🔪", "table"]
    assert spans("🔪 on the table 🔪🔪 here", None, "on", "the", "table", None, None, "here") == [
        "🔪", "on", "the", "table", "🔪🔪", "🔪🔪", "here"]  # fmt: skip
    assert spans("a cat", "something", "else") == [None, None]


@given(st.text(st.sampled_from("ab(): \\1.é🔪\n"), max_size=12), st.lists(
    st.sampled_from([b"a", b"b", b"(", b"ab", b" ", None, "é".encode(), "é".encode()[:1]]), max_size=8))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_text_and_any_pieces_give_spans_in_order(prompt, given_pieces):
    found = [span for span in locate(given_pieces, prompt) if span]
    assert all(0 <= begin < end <= len(prompt) for begin, end in found)
    assert [begin for begin, _ in found] == sorted(begin for begin, _ in found)


def test_a_word_is_what_stands_between_spaces_or_what_one_token_covers():
    text = "red knife, 一把刀"
    assert [text[slice(*cut)] for cut in words(text, [])] == ["red", "knife,", "一", "把", "刀"]
    assert [text[slice(*cut)] for cut in words(text, [(11, 13)])] == ["red", "knife,", "一把", "刀"]


def test_every_kind_of_vocabulary_is_read():
    assert decoder(["knife</w>", "\u0120"])("knife</w>") == b"knife"
    assert decoder(["Ġknife"])("ĠÃ") == b" \xc3"
    assert decoder(["▁knife"])("▁knife") == b" knife" and decoder(["▁knife"])("<0xE2>") == b"\xe2"
    assert decoder(["▁knife"])("<unk>") is None
    assert decoder(["Ġ", "▁a", "▁knife"])("▁knife") == b" knife", "what most of a vocabulary looks like"
    assert decoder(["##ife"])("##ife") == b"ife" and decoder(["knife"])("knife") == b"knife"


VOCABULARY = {0: "<s>", 1: "</s>", 2: "user", 3: ":", 4: "kn", 5: "ife", 6: "a", 7: "end"}

START, END = 0, 1


def read_tokens(ids: list, prompt: str, template: list[int]) -> list[Token]:
    read = decoder(VOCABULARY.values())
    return tokens_of(ids, [i is START or i is END for i in ids], template, lambda i: read(VOCABULARY[i]), prompt)


def test_a_template_is_told_from_the_prompt_and_may_be_cut_off():
    tokens = read_tokens([0, 2, 3, 6, 4, 5, 7, 1, 1], "a knife", [2, 3, 7])
    kinds = ["start", "template", "template", "text", "text", "text", "template", "end", "end"]
    assert [token.kind for token in tokens] == kinds
    assert [token.span for token in tokens[3:6]] == [(0, 1), (2, 4), (4, 7)]
    assert fitted(tokens, 9) == tokens and fitted(tokens, 6) == tokens[3:]
    assert fitted(tokens, 5) == tokens[3:8] and fitted(tokens, 3) == tokens[3:6], "the template's end is cut off too"
    assert fitted(tokens, 2) is None, "part of the prompt cannot have been cut off"
    assert fitted(tokens, 10) is None


def test_a_prompt_that_brings_the_templates_words_keeps_them():
    tokens = read_tokens([2, 3, 6, 7], "user : a end", [2, 3, 7])
    assert [token.span for token in tokens] == [(0, 4), (5, 6), (7, 8), (9, 12)]


def test_an_embedding_stands_where_it_is_named():
    tokens = read_tokens([0, 6, torch.ones(4), torch.ones(4), 6, 1], "a embedding:bad a", [])
    assert [token.kind for token in tokens[1:5]] == ["text", "embedding", "embedding", "text"]
    assert tokens[2].span == tokens[3].span == (2, 15)


# --- the strip ---


def strip_of(prompt: str, numbers: list[float], spelled: list[tuple[int, int] | str | None], region=WALL, **options):
    """The strip of tokens whose first numbers are given; each has its place in the prompt, or a kind."""
    unknown = options.pop("unknown", None)
    (one,), _ = inspect_entry(entry(*numbers), region, **options)
    tokens = [Token(span) if isinstance(span, str) else Token("text", b"x", span) if span else None for span in spelled]
    return heat_strip(one, {"cross_attn": tokens}, prompt, "walls", options.get("strength", 1.0), unknown)


def pushing(label: str, bias: float, shift: float, *, gated: bool = True) -> Part:
    """A concept with its wall at `bias`, that moves a token's first number by `shift`."""
    move = Move(offset=torch.tensor([shift, 0.0, 0.0, 0.0]))
    return Part(label, {"cross_attn": move}, wall_part(bias).gates if gated else {})


KNIFE = ("a knife", [(0, 1), (2, 7)])
SAYINGS = {
    "inside": (pushing("w", 1, -4), KNIFE, [0.5, 0.9], {}, "Safe: comes out unchanged, to the bit.", "good"),
    "clearly outside": (
        pushing("w", 1, -4), KNIFE, [0.5, 3], {}, "Clearly unsafe at “knife”: moved, and now safe.", "warn"),
    "just outside": (
        pushing("w", 1, -4), KNIFE, [0.5, 1.5], {},
        "Just outside at “knife”: moved part of the way, and now safe.", "warn"),
    "half the strength": (
        pushing("w", 1, -9), KNIFE, [0.5, 3], {"strength": 0.5},
        "Clearly unsafe at “knife”: moved part of the way, and now safe.", "warn"),
    "still outside": (
        pushing("w", 1, -0.5), KNIFE, [0.5, 3], {},
        "Still unsafe at “knife” after the move: raise the strength, or train with more pairs like it.", "bad"),
    "too little strength": (
        pushing("w", 1, -1.8), KNIFE, [0.5, 3], {"strength": 0.9},
        "Still just outside at “knife” after the move: set the strength to 1.", "bad"),
    "no strength": (
        pushing("w", 1, -4), KNIFE, [0.5, 3], {"strength": 0.0},
        "Clearly unsafe at “knife”, but comes out unchanged: strength is 0.", "bad"),
    "no move": (
        pushing("w", 1, 0), KNIFE, [0.5, 1.5], {},
        "Just outside at “knife”, but comes out unchanged: the region has no move for it.", "bad"),
    "always": (
        pushing("w", 1, -4), KNIFE, [0.5, 0.9], {"mode": "always"},
        "Safe already, and moved all the same: mode “always” moves every prompt.", "warn"),
    "no gate": (
        pushing("w", 1, -4, gated=False), KNIFE, [0.5, 3], {},
        "This region has no gate: it moves every prompt, and cannot tell safe ones.", "warn"),
    "no gate, no strength": (
        pushing("w", 1, -4, gated=False), KNIFE, [0.5, 3], {"strength": 0.0},
        "This region has no gate: it moves every prompt, and cannot tell safe ones. "
        "Comes out unchanged: strength is 0.", "warn"),
    "only the end": (
        pushing("w", 1, -4), ("a knife", ["start", (0, 1), (2, 7), "end"]), [0.5, 0.5, 0.9, 3], {},
        "Clearly unsafe as a whole: moved, and now safe.", "warn"),
    "the end most of all": (
        pushing("w", 1, -9), ("a knife", ["start", (0, 1), (2, 7), "end"]), [0.5, 0.5, 1.9, 7], {},
        "Clearly unsafe at “knife”: moved, and now safe.", "warn"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAYINGS)
def test_the_verdict_is_said_in_plain_words(case):
    part, (prompt, spelled), numbers, options, text, tone = SAYINGS[case]
    strip = strip_of(prompt, numbers, spelled, Region((part,), {"name": "walls"}), **options)
    assert (strip.verdict, strip.tone) == (text, tone)
    told, rest = report(strip).split("\nNumbers:\n")
    assert text in told and not any(letter.isdigit() for letter in told.replace(text, "")), "numbers only on demand"
    assert "w" in rest
    assert all(translated(said) for said in (*strip.clauses, *strip.notes))


def test_each_of_several_concepts_has_a_clause():
    region = Region((pushing("knives", 1, -3), pushing("war", 2, 0), pushing("smoke", 9, 0), pushing("beer", 8, 0)))
    strip = strip_of(*KNIFE[:1], [0.5, 3.5], KNIFE[1], region)
    assert strip.verdict == (
        "Clearly unsafe for “knives” at “knife”: moved, and now safe. "
        "Clearly unsafe for “war” at “knife”: moved, and now safe. Safe for “smoke”, “beer”.")  # fmt: skip
    pushed = strip_of(*KNIFE[:1], [0.5, 3.5], KNIFE[1], Region((pushing("a", 1, 9), pushing("b", 9, 0))))
    assert "Safe for “b” before the move, but not after it: lower the strength." in pushed.verdict
    assert pushed.tone == "bad"
    both = strip_of(*KNIFE[:1], [0.5, 0.6], KNIFE[1], Region((pushing("a", 1, 1), pushing("b", 9, -2, gated=False))))
    assert both.verdict == ("“b” has no gate: it moves every prompt, and cannot tell safe ones. Safe for “a”.")
    assert all(translated(said) for strip in (strip, pushed, both) for said in strip.clauses)


LOCALES = Path(heat.__file__).parents[1] / "locales"


def translated(said: Said) -> bool:
    texts = [json.loads(path.read_text(encoding="utf-8"))["safeRegion"] for path in LOCALES.glob("*/main.json")]
    return len(texts) == 3 and all({said.text, said.values.get("place", said.text)} <= set(known) for known in texts)


def test_what_the_page_says_is_translated():
    script = (LOCALES.parent / "web/js/inspect_strip.js").read_text(encoding="utf-8")
    for key in re.findall(r'\bt\("((?:[^"\\]|\\.)+)"', script):
        assert translated(Said(key)), key


def test_gaps_are_filled_once():
    strip = strip_of("{label} {x}", [0.5, 3.0], [(0, 7), (8, 11)])
    assert "“{x}”" in strip.verdict


def test_words_without_end_are_cut():
    prompt = "x" * 5000 + " " + " ".join(f"unheard{i}of" for i in range(50))
    cuts = words(prompt, [])
    strip = strip_of(prompt, [3.0] * len(cuts), cuts, unknown=unknown_words)
    assert len(strip.verdict) < 200 and all(len(str(note)) < 400 for note in strip.notes)
    assert max(map(len, report(strip).splitlines())) < 1200 and strip_picture(strip).height < 1000


def test_neighbours_that_redden_are_explained():
    assert MIXED not in report(strip_of(*KNIFE[:1], [0.5, 3.0], KNIFE[1]))
    assert MIXED in report(strip_of(*KNIFE[:1], [1.5, 3.0], KNIFE[1]))


def test_a_word_has_the_worst_of_its_tokens():
    strip = strip_of("a knife <b>", [0.5, 1.2, 3.0, 0.7], [(0, 1), (2, 4), (4, 7), None])
    assert [(item.text, item.kind) for item in strip.items] == [
        ("a", "word"), ("knife", "word"), ("<b>", "word"), ("token 4", "token")]  # fmt: skip
    assert strip.items[1].depth == pytest.approx(2.0) and strip.items[1].heat > 0 == strip.items[0].heat
    assert strip.items[2].depth is None, "no encoder has read it"
    plain = json.loads(json.dumps(strip.plain()))
    assert plain["items"][1]["text"] == "knife" and "numbered" in plain["notes"][0]["text"]
    assert plain["clauses"][0]["values"]["word"] == "knife" and plain["verdict"] == strip.verdict
    assert "a [knife] <b> token 4" in report(strip) and "+2.0" in report(strip)


def test_words_that_the_demo_does_not_know_are_named():
    prompt = "a rifle and (knives:1.2), embedding:sniper 🔪 4k 12"
    assert unknown_words(prompt) == ["rifle", "knives", "🔪"]
    cuts = words(prompt, [])
    strip = strip_of(prompt, [0.5] * len(cuts), cuts, unknown=unknown_words)
    assert [item.text for item in strip.items if item.unknown] == ["rifle", "(knives:1.2),", "🔪"]
    assert strip.tone == "warn" and "Whether it is safe cannot be told." in strip.verdict
    assert "The demo model does not know: rifle, knives, 🔪." in report(strip)
    assert all(translated(said) for said in (*strip.clauses, *strip.notes))
    plain, dotted = (np.asarray(strip_picture(strip_of(prompt, [0.5] * len(cuts), cuts, unknown=one)))
                     for one in (None, unknown_words))  # fmt: skip
    assert plain.shape != dotted.shape or (plain != dotted).any()


def test_words_with_an_apostrophe_are_whole_and_tags_are_none():
    prompt = "I don't o\u2019clock a cat's sword, 'ghoul' <lora:gore:1> <hypernet:x>"
    assert unknown_words(prompt) == ["i", "don't", "o'clock", "ghoul"]


def test_the_demo_knows_every_word_it_was_shown():
    rng = Random(0)
    assert not {word for _ in range(5000) for word in unknown_words(world.sample(rng)[1])}
    assert not [thing for thing in world.THINGS for name in thing.words if unknown_words(name)]
    shown = Random(0)
    made_up = [word for _ in range(500) for word in unknown_words(everyday_text(shown))]
    assert made_up and all(re.fullmatch("([a-z])+", word) for word in made_up), "words that are none stay unknown"


def test_the_help_page_names_what_the_demo_draws():
    page = (LOCALES.parent / "web/docs/SafeRegionDemoModel.md").read_text(encoding="utf-8")
    missing = [word for thing in world.THINGS for word in (thing.name, *thing.words)
               if word.removeprefix("a ").removeprefix("an ").removeprefix("some ") not in page
               and thing.kind != world.PERSON]  # fmt: skip
    assert not missing
    assert all(word in page for _, names, _ in world.PROFESSIONS.values() for word in names)
    assert all(phrase in page for phrase in (*world.IMPLICIT, *world.UNSAFE_IMPLICIT, *world.COLOURS, *world.PLACES))


def long_strip(*red: int, count: int = 300):
    prompt = " ".join(f"w{i}" for i in range(count))
    cuts = words(prompt, [])
    return strip_of(prompt, [2.5 if i in red else 0.5 for i in range(count)], cuts)


def test_words_inside_are_folded_in_a_long_prompt():
    strip = long_strip(150, 155)
    assert strip.folds == ((3, 147), (159, 297)), "152 and 153 are too near to what is outside"
    shown = [one if isinstance(one, str) else one.text for one in unfolded(strip)]
    assert shown[:5] == ["w0", "w1", "w2", "… 144 words inside …", "w147"] and shown[-3:] == ["w297", "w298", "w299"]
    assert "w2 … 144 words inside … w147 w148 w149 [w150] w151" in report(strip)
    assert len(report(strip).splitlines()) < 40
    assert strip_picture(strip).height < 300
    assert strip.plain()["folds"] == [[3, 147], [159, 297]]
    assert long_strip().folds == ((3, 297),) and long_strip(count=30).folds == ()


def test_the_picture_of_a_prompt_that_is_outside_throughout_has_all_of_it():
    short = strip_picture(long_strip(1, count=3))
    many = long_strip(*range(200), count=200)
    long = strip_picture(many, [("without", Image.new("RGB", (8, 8)))])
    assert many.folds == () and long.width == short.width and long.height > 3 * short.height
    reds = (np.asarray(long)[..., 0] > 180) & (np.asarray(long)[..., 1] < 180)
    assert reds.sum() > 10_000


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(share * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
               for share, c in zip((0.2126, 0.7152, 0.0722), parts))  # fmt: skip


def test_every_text_of_the_picture_can_be_read():
    grounds = [colour(Item("a", "word", depth)) for depth in (None, -1.0, 0.1, 1.0, 10.0, 1000.0)]
    pairs = [(INK, ground) for ground in grounds] + [(GREY, ground) for ground in (*grounds[:2], PAPER)]
    for ink, ground in [*pairs, *((ink, PAPER) for ink in TONES.values())]:
        dark, light = sorted(map(luminance, (ink, ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_a_prompt_from_right_to_left_is_drawn_so():
    def reddest(prompt: str) -> float:
        cuts = words(prompt, [])
        strip = strip_of(prompt, [3.0, *[0.5] * (len(cuts) - 1)], cuts, Region((pushing("w", 1, -4),)))
        picture = np.asarray(strip_picture(strip))[:-30]  # less the legend
        reds = (picture[..., 0] > 180) & (picture[..., 1] < 130)
        return float(np.nonzero(reds)[1].mean()) / picture.shape[1]

    assert reddest("knife on a table") < 0.2 and reddest("סכין על השולחן") > 0.8


def test_a_batch_beside_one_row_of_another_text_is_looked_at_row_by_row():
    entry = [drawn(2, 7, 6), {"pooled_output": drawn(1, 5, seed=1)}]
    found, (changed,) = inspect_entry(entry, example_region(cross_attn=6))
    assert len(found) == 2 and changed[1]["pooled_output"] is entry[1]["pooled_output"]
    for row, one in enumerate(found):
        alone, _ = inspect_entry([entry[0][row : row + 1], dict(entry[1])], example_region(cross_attn=6))
        assert one.moved and one.shift.keys() == alone[0].shift.keys()
        assert all(torch.allclose(one.shift[key], alone[0].shift[key]) for key in one.shift)
