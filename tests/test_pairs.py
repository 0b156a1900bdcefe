"""Reading prompt pairs: forms, templates in step, and errors that name the line."""

from __future__ import annotations

import tracemalloc

import pytest

from comfyui_safe_region.training.attributes import parse_attribute
from comfyui_safe_region.training.pairs import (
    PairsError,
    PromptPairs,
    everyday_prompts,
    expand,
    load_pairs,
    parse_pairs,
)
from comfyui_safe_region.training.prompts import CROWD_WORDS, USUAL, build_sets, enough
from region_examples import no_hang


def test_text_with_pairs_keeps_and_comments():
    pairs = parse_pairs("# weapons\n\na knife => a cup\n keep: a fork \nKEEP: {a|one} spoon")
    assert pairs == PromptPairs((("a knife", "a cup"),), ("a fork", "a spoon", "one spoon"))


def test_templates_run_in_step_on_both_sides():
    pairs = parse_pairs("a {knife|gun} in the {park|kitchen} => a {cup|book} in the {park|kitchen}").pairs
    assert pairs == (
        ("a knife in the park", "a cup in the park"), ("a knife in the kitchen", "a cup in the kitchen"),
        ("a gun in the park", "a book in the park"), ("a gun in the kitchen", "a book in the kitchen"),
    )  # fmt: skip


def test_one_safe_side_serves_all_alternatives():
    assert parse_pairs("{a|b} x => y").pairs == (("a x", "y"), ("b x", "y"))


def test_expand_keeps_text_without_groups():
    assert expand("plain  text") == [((), "plain text")]


def test_pairs_round_trip_through_text():
    pairs = parse_pairs("a => b\nkeep: c\nHeld-Out: {d|e} => f\nleave-out: {g|h}")
    assert pairs.held_out == (("d", "f"), ("e", "f")) and pairs.leave_out == ("g", "h")
    assert parse_pairs(pairs.text()) == pairs
    assert pairs + pairs == pairs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ok => fine\na knife", ["line 2", "write: unsafe prompt => safe prompt"]),
        ("a => b => c", ["line 1"]),
        ("{a|b} => {c|d|e}", ["line 1", "[2]", "[3]"]),
        ("{a|b => c", ["line 1", "brace"]),
        ("a =>", ["line 1", "empty"]),
        ("same => same", ["line 1", "keep: same"]),
        ("a => b\nheld-out: c", ["line 2", "no pair"]),
        ("{" + "|".join("abcdefghij") + "}" * 1 + " {0|1|2|3|4|5|6|7|8|9}" * 5 + " => x", ["line 1", "more than"]),
    ],
)
def test_errors_name_the_line_and_the_remedy(text, words):
    with pytest.raises(PairsError) as error:
        parse_pairs(text, "weapons.txt")
    assert all(word in str(error.value) for word in ["weapons.txt", *words])
    assert "\n" not in str(error.value)


def test_files_of_all_forms_give_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("a => b\nkeep: c\nheld-out: d => e\nleave-out: f", encoding="utf-8")
    table = "keep,safe,unsafe,held_out,leave_out\n,b,a,d => e,\nc,,,,f\n"
    (tmp_path / "a.csv").write_text(table, encoding="utf-8-sig")
    rows = '{"unsafe": "a", "safe": "b", "held_out": "d => e"}\n\n{"keep": "c", "leave_out": "f"}\n'
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    read = [load_pairs(tmp_path / f"a.{ending}") for ending in ("txt", "csv", "jsonl")]
    assert read[0] == read[1] == read[2] == PromptPairs((("a", "b"),), ("c",), (("d", "e"),), ("f",))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.csv", b"good,bad\n1,2\n", "columns"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b'{"unsafe": 1}\n', "line 1"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.yaml", b"", ".txt"),
        ("a.csv", b"unsafe,safe\na gun, big,a cup\n", "line 2: it has more cells"),  # a comma without quotes
        ("a.csv", b"unsafe,safe,Unsafe\na,b,c\n", "two columns named unsafe"),
        ("a.csv", b'keep\n"a cup\na gun\n', "no CSV"),  # all that follows would be one harmless prompt
        ("a.csv", b'unsafe,safe\n"a" gun,b\n', "line 2: this is no CSV"),
        ("a.csv", b",unsafe\n0,a gun\n", "columns"), ("a.csv", b",\n0,a gun\n", "columns"),
        ("a.csv", b"unsafe,keep\na gun,\n", "line 2: one side"),
        ("a.csv", b"unsafe,safe,keep\n,,a gun => a cup\n", "line 2: .*must be one prompt"),
        ("a.txt", b"keep: a gun => a cup", "line 1: .*must be one prompt"),
        ("a.jsonl", b'{"prompt": "a gun"}\n', "line 1"), ("a.jsonl", b"{}\n", "line 1"),
        ("a.jsonl", b'{"unsafe": "a gun"}\n', "line 1: one side"),
        ("a.txt", b"\xc3" * 9_000_000, "more than 8 MB"),
        ("a.csv", b"unsafe,safe\n" + b"\n" * 1_000_000, "200000 lines"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unreadable_files_say_what_is_wrong(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairsError, match=word) as error:
        load_pairs(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "table",
    [
        ",unsafe,safe\n0,a gun,a cup\n1,a {bomb|mine},a ball\n",  # as pandas writes its index
        "unsafe,,safe\na gun,a bomb,a cup\na {bomb|mine},a knife,a ball\n",
        "Unsafe , SAFE,\na gun,a cup,\na {bomb|mine},a ball,,\n",
        "unsafe,safe,note\na gun,a cup,keep this\n,,\na {bomb|mine},a ball\n",
    ],
)  # fmt: skip
def test_a_column_without_a_name_stands_for_nothing(table):
    found = parse_pairs(table, form="csv")
    assert found == PromptPairs((("a gun", "a cup"), ("a bomb", "a ball"), ("a mine", "a ball")))


def test_keys_are_read_as_columns_are_and_null_is_nothing():
    rows = '{"Unsafe": "a", " safe": "b", "keep": null}\n{"leave-out": "c", "keep": ""}'
    assert parse_pairs(rows, form="jsonl") == PromptPairs((("a", "b"),), leave_out=("c",))


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_only_line_ends_part_lines(odd):
    as_json = f'{{"unsafe": "a{odd}gun", "safe": "a cup"}}\r\n{{"keep": "a{odd}b"}}'
    if odd >= " ":  # JSON has no control characters in texts
        assert parse_pairs(as_json, form="jsonl") == PromptPairs((("a gun", "a cup"),), ("a b",))
    assert parse_pairs(f"a{odd}gun => a cup\rkeep: a{odd}b") == PromptPairs((("a gun", "a cup"),), ("a b",))
    assert parse_pairs(f"unsafe,safe\na{odd}gun,a cup\n", form="csv") == PromptPairs((("a gun", "a cup"),))


def test_what_is_no_text_becomes_text():
    found = parse_pairs('{"unsafe": "a \\ud800 gun", "safe": "a cup"}', form="jsonl") + parse_pairs("b \udfff => c")
    assert found.text().encode() == b"a ? gun => a cup\nb ? => c"


LIST = "{" + "|".join(f"w{number}" for number in range(19_000)) + "}"


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("{a|b}" * 30 + " => x", "more than 20000 prompts"), ("{a|b}" * 200_000 + " => x", "prompts"),
        ("{a|b}" * 14 + "x" * 1_000_000 + " => y", "4000000 letters"),
        ("{a|b}" * 14 + "{}" * 180 + "x" * 300 + " => y", "letters"),
        ("{a}" * 1_000_000 + " => x", "200 lists"), ("{" + "|" * 4_000_000 + "} => x", "prompts"),
        (f"{LIST} => " + "y" * 1000, "4000000 letters"),
        ("\n".join(["{a|b|c|d}" * 6 + " => x"] * 9), "line 5: .*20000 prompts"),
        ("keep: " + "x" * 3_000_000 + "\nkeep: " + "y" * 3_000_000, "line 2: .*letters"), ("x" * 9_000_000, "8 MB"),
        ("#\n" * 1_000_000, "200000 lines"), ("{" * 4_000_000, "letters|no pair"),
        ("{a|b}" * 199 + " => {a|b}", "prompts"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_would_fill_the_memory_is_refused_before_it_is_written_out(text, limit):
    tracemalloc.start()
    with no_hang(), pytest.raises(PairsError, match=limit) as error:
        parse_pairs(text)
    assert len(str(error.value)) < 400 and tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_rows_of_an_attribute_have_the_same_limits():
    rows = "attribute: x\n" + f"{LIST} man" + "".join(f" => g{number}: x" for number in range(5000))
    for text, words in (
        (rows, "20000 prompts"), ("#\n" * 1_000_000, "200000 lines"), ("keep: " + "{a|b}" * 30, "prompts"),
        ("\n".join(["keep: " + "{a|b|c|d}" * 6] * 9), "prompts"),
    ):  # fmt: skip
        with pytest.raises(PairsError, match=words):
            parse_attribute(text)


def test_missing_file(tmp_path):
    with pytest.raises(PairsError, match="cannot be read"):
        load_pairs(tmp_path / "none.txt")


def test_everyday_prompts_are_many_and_without_doubles():
    prompts = everyday_prompts()
    assert len(prompts) >= 2000
    assert len({prompt.lower().removeprefix("a ").removeprefix("an ") for prompt in prompts}) == len(prompts)
    assert not any("=>" in p or "{" in p or "|" in p for p in prompts)


def test_who_asks_for_more_prompts_gets_more_of_long_lists():
    pairs = PromptPairs(tuple((f"a gun {i}", f"a cup {i}") for i in range(4_000)),
                        tuple(f"a tree {i}" for i in range(9_000)))  # fmt: skip
    usual, more = (build_sets(pairs, 0, most) for most in (7_000, 50_000))
    assert sum(map(len, vars(usual).values())) <= 7_000 < 25_000 < sum(map(len, vars(more).values())) <= 50_000
    assert len({a for a, _ in more.pairs} & {a for a, _ in pairs.pairs}) > 2_000


def test_long_lists_of_pairs_get_more_prompts_where_nobody_says_how_many():
    assert enough(45) == enough(1_000) == USUAL < enough(1_500) < enough(4_000) == enough(20_000)
    pairs = PromptPairs(tuple((f"a gun {i}", f"a cup {i}") for i in range(3_000)))
    assert len({a for a, _ in build_sets(pairs, 0).pairs} & {a for a, _ in pairs.pairs}) > 0.3 * 3_000


def test_everyday_prompts_that_are_all_kept_by_the_user_are_no_reason_to_stop():
    pairs = PromptPairs(tuple((f"a gun {i}", f"a cup {i}") for i in range(40)), tuple(everyday_prompts()))
    assert build_sets(pairs, 0, 2_000).pairs


def test_prompts_are_cut_to_what_fits_and_every_list_keeps_some():
    pairs = parse_pairs("a {b|c|d|e|f|g|h|i|j|k} {1|2|3|4|5} => an {l|m|n|o|p|q|r|s|t|u} {1|2|3|4|5}\nkeep: v")
    everything, few = build_sets(pairs, 0, USUAL), build_sets(pairs, 0, 400)

    def total(sets):
        return sum(map(len, vars(sets).values())) + sum(map(len, (sets.pairs, sets.held_out, sets.crowds)))

    assert total(everything) > 3000 and 250 < total(few) <= 400
    assert few.harmless[0] == "" and all(len(items) >= 10 for items in vars(few).values())
    assert set(few.pairs) <= set(everything.pairs)
    half = build_sets(pairs, 0, total(everything) // 2)
    shares = [len(items) / len(vars(everything)[name]) for name, items in vars(half).items()]
    assert sorted(shares)[:4] == pytest.approx([0.5] * 4, abs=0.02), "short lists may keep more"
    assert len(few.checked_varied) == len(few.checked)


def test_crowds_hold_both_sides_of_a_pair_in_the_same_company():
    pairs = parse_pairs("a {b|c|d|e|f|g|h|i|j|k} {1|2|3|4|5} => an {l|m|n|o|p|q|r|s|t|u} {1|2|3|4|5}")
    sets = build_sets(pairs, 0, 10**9)
    sides, lengths = dict(pairs.pairs), set()
    for unsafe, safe in sets.crowds:
        (name,) = sides.keys() & set(unsafe.split(", "))
        assert safe.split(", ") == [sides[name] if one == name else one for one in unsafe.split(", ")]
        lengths.add(len(unsafe.split()))
    assert min(lengths) < 12 < max(lengths) <= CROWD_WORDS + 3
    assert len(sets.calm) == len(sets.crowds) and sum(", " in prompt for prompt in sets.calm) > 0.9 * len(sets.calm)
