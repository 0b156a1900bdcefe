"""The region card, embedding and verdicts: whatever a file or a workflow says, only short plain text comes out."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from comfyui_safe_region.nodes import cards
from comfyui_safe_region.nodes.cards import (
    Carried,
    card,
    card_text,
    chosen_content,
    embedded,
    pack,
    plain,
    preview,
    standing,
    unpack,
)
from comfyui_safe_region.region import Part, Region, RegionError, region_bytes
from region_examples import example_move, example_part, example_region

HTML = '<img src=x onerror="alert(1)"><script>alert(1)</script>'
NESTED: dict[str, Any] = {"a": [{"b": {"c": [None] * 3}}]}
FIELDS = ("name", "concept", "description", "base_model", "family", "checkpoint", "unfinished", "combined",
          "licence", "author", "created", "source", "preview",
          "encoder", "recipe", "calibration", "measured", "shares", "results")  # fmt: skip
NAME = "weapons.safetensors"


def content(**metadata: Any) -> bytes:
    region = example_region()
    return region_bytes(replace(region, metadata=region.metadata | metadata))


def picture(size: tuple[int, int] = (40, 20), kind: str = "JPEG") -> str:
    written = io.BytesIO()
    Image.new("RGB", size, "red").save(written, kind)
    return base64.b64encode(written.getvalue()).decode()


def many_scans(count: int) -> str:
    """A progressive JPEG that is decoded over and over."""
    written = io.BytesIO()
    Image.new("RGB", (1024, 1024), "red").save(written, "JPEG", progressive=True)
    content = written.getvalue()
    last = content[content.rfind(b"\xff\xda") : -2]
    return base64.b64encode(content[:-2] + last * count + content[-2:]).decode()


def wordy() -> str:
    """A PNG with texts that unpack to megabytes."""
    written, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    for number in range(20):
        texts.add_text(f"t{number}", "x" * 1_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(written, "PNG", pnginfo=texts)
    return base64.b64encode(written.getvalue()).decode()


# --- the card ---


def test_a_card_says_what_was_measured():
    found = card(content(
        name="Weapons", encoder={"name": "CLIP-L"}, recipe={"preset": "region", "pairs": 241, "steps": 0},
        calibration={"bound": 0.0097, "harmless_prompts": 2000, "harmless_touched": 0.008,
                     "held_out_unsafe_touched": 0.98},
        measured={"seen words": {"unsafe_before": 1.0, "unsafe_after": 0.04},
                  "harmless": {"unsafe_before": 0.01, "unsafe_after": 0.01}},
        licence="CC0-1.0", author="me", source="https://example.org"), NAME)  # fmt: skip
    assert found["title"] == "Weapons" and found["encoder"] == "CLIP-L" and found["name"] == NAME
    assert found["effect"].split("; ") == [
        "prompts with new words: not counted", "acts on 98% of other sentences with the same words",
        "unsafe pictures: seen words 100% → 4%"]  # fmt: skip
    assert found["harmless_touched"] == (
        "changes on average about 1.0% of harmless prompts like the 2,000 of its calibration")  # fmt: skip
    assert found["recipe"] == "region, 241 prompt pairs, 0 steps"
    assert (found["licence"], found["author"], found["source"]) == ("CC0-1.0", "me", "https://example.org")
    assert found["gate"] and found["parts"] == ["a"] and found["preview"] == ""
    assert found["verdict"]["tone"] == "good" and found["verdict"]["text"].startswith("Good: it acts on 98%")
    assert (found["kind"], found["checkpoint"], found["family"], found["unfinished"]) == ("region", "", "", "")
    assert card_text(found).splitlines() == [
        "Weapons", found["verdict"]["text"], "learned on CLIP-L", found["effect"], found["harmless_touched"],
    ]  # fmt: skip


def test_a_card_says_when_training_did_not_finish_and_on_which_checkpoint_it_was():
    found = card(content(recipe={"preset": "region", "pairs": 5, "steps": 250}, family="sdxl",
                         checkpoint="juggernaut.safetensors", unfinished="stopped after 3 of 250 steps"), NAME)
    assert (found["recipe"], found["unfinished"]) == ("region, 5 prompt pairs", "stopped after 3 of 250 steps")
    assert found["verdict"] == {"text": found["verdict"]["text"], "tone": "warn"}
    assert (found["checkpoint"], found["family"]) == ("juggernaut.safetensors", "sdxl")
    assert card(content(attribute="gender"), NAME)["kind"] == "balance"


def test_without_walls_it_acts_on_every_prompt_and_without_measures_it_says_what_its_walls_see():
    bare = region_bytes(Region((Part("a", {"cross_attn": example_move(6)}),)))
    assert card(bare, NAME)["harmless_touched"] == "acts on every prompt"
    assert card(bare, NAME)["gate"] is False
    seen = card(content(calibration={"held_out_unsafe_touched": 0.987}), NAME)["effect"]
    assert seen.endswith("acts on 99% of other sentences with the same words")
    assert card(content(shares={"man": 0.5, "woman": 0.5}), NAME)["effect"] == "draws man 50%, woman 50%"


@pytest.mark.parametrize(
    "value",
    [HTML, "x" * 200_000, NESTED, [HTML] * 1000, {HTML: HTML, "bound": HTML, "name": NESTED}, 10**400, -1e308, True,
     None, {"seen": {"unsafe_before": 10**400, "unsafe_after": "x"}, "man": -3, "bound": 2, "pairs": [1]},
     "\u202egnp.exe\u0000\n\r\t\u200b"],
    ids=["html", "3 MB", "nested", "list", "odd dict", "huge", "negative", "bool", "null", "numbers", "control"],
)  # fmt: skip
def test_hostile_metadata_gives_short_plain_texts(value):
    found = card(content(**dict.fromkeys(FIELDS, value)), NAME)
    assert len(json.dumps(found)) < 6000
    for key, text in found.items():
        assert isinstance(text, str | int) or key in ("parts", "verdict"), key
        if isinstance(text, str):
            assert not text or text.isprintable(), key
    lines = card_text(found)
    assert "<" not in lines and len(lines) < 1000


def test_not_a_number_is_no_card():
    header = {"format": "safe_region", "version": "1", "region": '{"calibration": {"bound": NaN}}'}
    raw = save(example_region().parts[0].named_tensors(), header)
    with pytest.raises(RegionError, match="description is damaged"):
        card(raw, NAME)


def test_plain_takes_texts_and_numbers_only():
    assert plain("a\n b\t\u202ec") == "a b c"
    assert plain("x" * 1000, 10) == "x" * 9 + "…"
    assert (plain(3), plain(0.5), plain(True), plain(None), plain(["a"])) == ("3", "0.5", "", "", "")


# --- the preview ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_preview_is_encoded_anew(kind):
    address = preview(picture((2048, 1024), kind))
    head, _, data = address.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 256)


def test_a_progressive_preview_is_shown():
    assert preview(many_scans(5)).startswith("data:image/jpeg;base64,")


def test_lists_decode_no_picture_and_one_card_decodes_it_once(tmp_path, monkeypatch):
    cards._encoded_anew.cache_clear()
    opened, usual = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **more: opened.append(1) or usual(*args, **more))
    (tmp_path / NAME).write_bytes(content(preview=picture((33, 44))))
    assert cards.look(tmp_path / NAME).card and not opened
    for _ in range(3):
        found = standing(NAME, "", lambda name: tmp_path / name, tmp_path)
        assert found.card and found.card["preview"].startswith("data:image/jpeg")
    assert len(opened) == 1


@pytest.mark.parametrize(
    "odd",
    [None, 5, [picture()], "", "no base64!", base64.b64encode(HTML.encode()).decode(), picture((2049, 8)),
     picture(kind="GIF"), picture(kind="BMP"), picture()[:200], "A" * 400_000, "data:image/svg+xml," + HTML,
     picture((2048, 2048)), many_scans(200), wordy()],
    ids=["none", "number", "list", "empty", "text", "html", "wide", "gif", "bmp", "cut", "large", "svg", "area",
         "scans", "texts"],
)  # fmt: skip
def test_anything_odd_is_no_preview(odd):
    assert preview(odd) == ""


# --- what is remembered ---


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path):
    path = tmp_path / NAME
    for name in ("before", "behind"):
        path.write_bytes(content(name=name))
        os.utime(path, ns=(10**18, 10**18))
        found = cards.look(path)
        assert found.card and found.card["title"] == name and found.sha256 == cards.sha256(path.read_bytes())


def test_lists_read_a_file_once_and_anew_when_it_changes(tmp_path, monkeypatch):
    path, read, usual = tmp_path / NAME, [], cards.read_limited
    monkeypatch.setattr(cards, "read_limited", lambda path: read.append(path) or usual(path))
    for name in ("one", "another"):
        path.write_bytes(content(name=name))
        assert {cards.glance(path).card["title"] for _ in range(3)} == {name}
    assert len(read) == 2 and "cannot be read" in cards.glance(tmp_path / "gone").error


# --- embedding ---


def test_an_embedded_region_comes_back_to_the_byte(tmp_path):
    (tmp_path / NAME).write_bytes(content(source="https://example.org"))
    text = embedded(NAME, "", lambda name: tmp_path / name, tmp_path)
    known = unpack(text)
    assert known.content == (tmp_path / NAME).read_bytes()
    assert (known.name, known.source, known.sha256) == (NAME, "https://example.org", cards.sha256(known.content))
    assert pack(known) == text
    # it needs no file
    assert chosen_content(NAME, text, lambda name: None, tmp_path) == known.content
    found = standing(NAME, text, lambda name: None, tmp_path)
    assert (found.state, found.runs, found.in_folder, found.carried) == ("embedded", True, False, text)


def test_an_embedded_region_never_stands_for_the_users_own_file_of_that_name(tmp_path):
    own, brought = content(name="mine"), content(name="theirs")
    (tmp_path / NAME).write_bytes(own)

    def find(name: str) -> Path | None:
        return tmp_path / name if (tmp_path / name).is_file() else None

    text = pack(Carried(NAME, cards.sha256(brought), "", brought))
    found = standing(NAME, text, find, tmp_path)
    assert (found.state, found.runs, found.carried, found.in_folder) == ("differs", False, text, True)
    assert found.card and found.card["title"] == "theirs"
    with pytest.raises(RegionError) as caught:
        chosen_content(NAME, text, find, tmp_path)
    said = str(caught.value)
    assert said == found.message and cards.sha256(own)[:12] in said and cards.sha256(brought)[:12] in said
    assert 'leave "carried" empty' in said and "\n" not in said
    (tmp_path / NAME).write_bytes(b"damaged")
    assert standing(NAME, text, find, tmp_path).state == "differs", "nor for a damaged one"
    # under a name that no file has, and without one of that name, it runs and says where it is from
    name = "theirs.safetensors"
    text = pack(Carried(name, cards.sha256(brought), "", brought))
    found = standing(name, text, find, tmp_path)
    assert (found.state, found.in_folder, found.message) == ("embedded", False, cards.STRANGER)
    assert cards.origin(name, text, find) == cards.STRANGER and chosen_content(name, text, find, "") == brought
    (tmp_path / NAME).write_bytes(brought)
    text = pack(Carried(NAME, cards.sha256(brought), "", brought))
    assert standing(NAME, text, find, tmp_path).message == cards.origin(NAME, text, find) == "", "the very same file"


def test_a_large_region_is_not_embedded(tmp_path):
    large = region_bytes(Region((example_part("a", cross_attn=9000),)))
    assert len(large) > cards.EMBED_BYTES
    (tmp_path / NAME).write_bytes(large)
    with pytest.raises(RegionError, match=r"This region has \d+ kB, and at most 256 kB fit into a workflow: share"):
        embedded(NAME, "", lambda name: tmp_path / name, tmp_path)
    data = base64.b64encode(large).decode()
    with pytest.raises(RegionError, match="larger than 256 kB: ask for the file"):
        unpack(json.dumps({"name": NAME, "sha256": cards.sha256(large), "data": data}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("junk", "is damaged"), ("[1]", "is damaged"), ("5", "is damaged"), ("[" * 100_000, "is damaged"),
        (json.dumps({"name": {}}), "is damaged"), (json.dumps({"name": NAME, "sha256": HTML}), "is damaged"),
        (json.dumps({"name": NAME, "sha256": "A" * 64}), "is damaged"), (json.dumps({"data": 3}), "is damaged"),
        (json.dumps({"name": NAME, "sha256": "a" * 64, "data": "%%%"}), "is damaged"),
        (json.dumps({"name": NAME, "sha256": "a" * 64, "data": "QUJD"}), "has the hash b5d4045c3f46, but the"),
        (json.dumps({"name": NAME, "data": "QUJD"}), "but the workflow says nothing"),
        ("x" * 10_000_000, "is larger than 256 kB"),
    ],
)  # fmt: skip
def test_junk_in_the_workflow_is_refused_in_one_sentence(text, words):
    for look in (lambda: unpack(text), lambda: chosen_content(NAME, text, lambda name: None, "folder")):
        with pytest.raises(RegionError, match=words) as caught:
            look()
        assert "Use the file as it is now" in str(caught.value) and len(str(caught.value)) < 300
    found = standing(NAME, text, lambda name: None, "folder")
    assert (found.state, found.runs) == ("damaged", False)


def test_an_embedded_file_is_checked_like_any_file():
    noise = b"no region at all"
    text = pack(Carried(NAME, cards.sha256(noise), "", noise))
    found = standing(NAME, text, lambda name: None, "folder")
    assert found.state == "damaged" and "not a readable .safetensors file" in found.message


# --- verdicts ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME).write_bytes(content(source="https://example.org"))
    return tmp_path


def judged(folder: Path, text: str, name: str = NAME) -> cards.Standing:
    def find(name: str) -> Path | None:
        return folder / name if os.path.isfile(folder / name) else None

    found = standing(name, text, find, folder)
    if found.runs:
        assert chosen_content(name, text, find, folder)
    else:
        with pytest.raises(RegionError):
            cards.card(chosen_content(name, text, find, folder), name)
    return found


def test_a_sound_file_is_remembered(folder):
    found = judged(folder, "")
    assert found.state == "ok" and found.card and found.message == ""
    known = unpack(found.carried)
    assert known == Carried(NAME, cards.sha256((folder / NAME).read_bytes()), "https://example.org")
    assert judged(folder, found.carried).carried == found.carried
    # what is known of another file does not count
    assert judged(folder, pack(Carried("other.safetensors", "a" * 64))).carried == found.carried


def test_another_file_of_the_same_name_stops_the_run(folder):
    carried = judged(folder, "").carried
    before = unpack(carried).sha256
    (folder / NAME).write_bytes(content(name="another"))
    found = judged(folder, carried)
    now = cards.sha256((folder / NAME).read_bytes())
    assert (found.state, found.carried) == ("changed", carried)
    assert before[:12] in found.message and now[:12] in found.message and "https://example.org" in found.message
    assert "Use the file as it is now" in found.message
    assert found.card and found.card["title"] == "another", "so that one can see what it is"
    assert unpack(judged(folder, "").carried).sha256 == now


def test_a_missing_file_is_described(folder):
    carried = judged(folder, "").carried
    (folder / NAME).unlink()
    found = judged(folder, carried)
    assert found.state == "missing"
    for word in (NAME, unpack(carried).sha256[:12], "https://example.org", str(folder)):
        assert word in found.message
    assert judged(folder, "", "").message.startswith("No region is chosen")


def test_a_damaged_file_says_what_is_wrong(folder):
    (folder / NAME).write_bytes(b"noise")
    found = judged(folder, "")
    assert (found.state, found.in_folder) == ("damaged", True)
    assert found.message == f"{NAME}: this is not a readable .safetensors file."


def test_names_from_strangers_are_shown_as_text(folder):
    for name in (HTML, "../../x", "a\0b", "x" * 100_000):
        found = judged(folder, pack(Carried(name, "a" * 64, HTML * 1000)), name)
        assert found.state == "missing" and "<" not in found.message and len(found.message) < 1200
