"""What a region is said to do to a prompt, against what it does; and tokens back to the prompt's words."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from comfyui_safe_region.evaluation.heat import INSIDE, heat_strip, report
from comfyui_safe_region.evaluation.strip import strip_picture
from comfyui_safe_region.region import Gate, Part, Region, RegionError, apply_to_conditioning
from comfyui_safe_region.region.inspection import inspect_entry
from comfyui_safe_region.region.words import Token, decoder, fitted, locate, tokens_of, without_weights, words
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
    assert fitted(tokens, 5) is None, "part of the prompt cannot have been cut off"
    assert fitted(tokens, 10) is None


def test_a_prompt_that_brings_the_templates_words_keeps_them():
    tokens = read_tokens([2, 3, 6, 7], "user : a end", [2, 3, 7])
    assert [token.span for token in tokens] == [(0, 4), (5, 6), (7, 8), (9, 12)]


def test_an_embedding_stands_where_it_is_named():
    tokens = read_tokens([0, 6, torch.ones(4), torch.ones(4), 6, 1], "a embedding:bad a", [])
    assert [token.kind for token in tokens[1:5]] == ["text", "embedding", "embedding", "text"]
    assert tokens[2].span == tokens[3].span == (2, 15)


# --- the strip ---


def strip_of(prompt: str, numbers: list[float], spelled: list[tuple[int, int] | None], **options):
    (one,), _ = inspect_entry(entry(*numbers), WALL, **options)
    tokens = [Token("text", b"x", span) if span else None for span in spelled]
    return heat_strip(one, {"cross_attn": tokens}, prompt, "walls", options.get("strength", 1.0))


def test_a_word_has_the_worst_of_its_tokens():
    strip = strip_of("a knife <b>", [0.5, 1.2, 3.0, 0.7], [(0, 1), (2, 4), (4, 7), None])
    assert [(item.text, item.kind) for item in strip.items] == [
        ("a", "word"), ("knife", "word"), ("<b>", "word"), ("token 4", "token")]  # fmt: skip
    assert strip.items[1].depth == pytest.approx(2.0) and strip.items[1].heat > 0 == strip.items[0].heat
    assert strip.items[2].depth is None, "no encoder has read it"
    assert strip.verdict.startswith('Outside of "wall" at “knife”. Moved; still outside')
    assert json.loads(json.dumps(strip.plain()))["items"][1]["text"] == "knife"
    assert "knife" in report(strip) and "+2.0" in report(strip)


def test_what_is_said_of_prompts_that_stay():
    assert strip_of("a", [0.5], [(0, 1)]).verdict == INSIDE
    assert "strength 0" in strip_of("a", [1.5], [(0, 1)], strength=0.0).verdict
    assert "always" in strip_of("a", [0.5], [(0, 1)], mode="always").verdict


def test_the_picture_of_a_long_prompt_has_all_of_it():
    short = strip_picture(strip_of("a", [0.5], [(0, 1)]))
    prompt = "knife " * 200
    many = strip_of(prompt, [2.0] * 200, [(6 * i, 6 * i + 5) for i in range(200)])
    long = strip_picture(many, [("without", Image.new("RGB", (8, 8)))])
    assert len(many.items) == 200 and long.width == short.width and long.height > 3 * short.height
    reds = (np.asarray(long)[..., 0] > 180) & (np.asarray(long)[..., 1] < 120)
    assert reds.sum() > 10_000
