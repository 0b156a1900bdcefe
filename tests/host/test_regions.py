"""Region files in a real ComfyUI: the card's routes, uploads, and regions that a workflow carries."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from host import PACK, Graph, Rejected, error_text
from PIL import Image

from comfyui_safe_region.nodes.cards import sha256
from comfyui_safe_region.region import Move, Part, Region, load_region, region_bytes

DEMO = "demo-weapons.safetensors"
MARKED = {"X-Safe-Region": "1"}  # what our page sends where something is written


@cache  # safetensors writes its metadata in any order
def small(name: str = "small", size: int = 4, **metadata: Any) -> bytes:
    """A region file; `size` floats wide."""
    part = Part("a", {"cross_attn": Move(offset=torch.ones(size))})
    return region_bytes(Region((part,), {"name": name, **metadata}))


def folder(comfy: Any) -> Path:
    return comfy.base / "models" / "safe_regions"


def post(comfy: Any, path: str, body: bytes, kind: str, **headers: str | None) -> tuple[int, dict[str, Any]]:
    """Status and answer of a POST."""
    address = f"http://127.0.0.1:{comfy.port}{path}"
    given = {"Content-Type": kind, **headers}
    request = urllib.request.Request(address, body, {key: value for key, value in given.items() if value is not None})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own server
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text[:1] == b"{" else {}


def card(comfy: Any, **wanted: Any) -> tuple[int, dict[str, Any]]:
    return post(comfy, "/safe_region/card", json.dumps(wanted).encode(), "application/json")


def upload(comfy: Any, name: str, content: bytes, field: str = "file", overwrite: bool = False, **headers: str | None):
    head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
    more = b'\r\n--x\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue' if overwrite else b""
    body = head + content + more + b"\r\n--x--\r\n"
    return post(comfy, "/safe_region/upload", body, "multipart/form-data; boundary=x", **MARKED | headers)


def load(comfy: Any, **inputs: Any) -> str:
    """Run a loader; what its node says."""
    g = Graph()
    region = g.add("SafeRegionLoader", **inputs)
    g.add("PreviewAny", source=region(0))
    return comfy.run(g.prompt)[region()[0]]["text"][0]


# --- the routes ---


def test_a_card_by_name(comfy):
    found = comfy.get(f"/safe_region/card?name={DEMO}")
    content = (PACK / "demo" / "regions" / DEMO).read_bytes()
    assert found["state"] == "ok" and found["refusal"] == "" and found["in_folder"]
    assert found["card"]["sha256"] == sha256(content) and found["card"]["bytes"] == len(content)
    assert found["card"]["title"] == "weapons" and found["card"]["encoder"] == "Safe Region demo CLIP"
    assert json.loads(found["carried"]) == {"name": DEMO, "sha256": sha256(content)}
    assert comfy.get(f"/api/safe_region/card?name={DEMO}") == found
    for name in ("gone.safetensors", "../../../etc/passwd", "a%00b", "x" * 5000, "%ff", ""):
        assert comfy.get(f"/safe_region/card?name={name}")["state"] == "missing"


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"name": 5}', b'{"name": "a", "carried": []}', b"[" * 100_000])
def test_an_odd_question_is_refused(comfy, body):
    assert post(comfy, "/safe_region/card", body, "application/json")[0] == 400
    assert post(comfy, "/safe_region/card", b"x" * 2_000_000, "application/json")[0] == 413


def test_upload_is_checked_before_it_is_written(comfy):
    assert upload(comfy, "uploaded.safetensors", small()) == (
        200, {"name": "uploaded.safetensors", "sha256": sha256(small())},
    )  # fmt: skip
    assert (folder(comfy) / "uploaded.safetensors").read_bytes() == small()
    assert "uploaded.safetensors" in str(comfy.get("/object_info/SafeRegionLoader"))
    before = sorted(folder(comfy).rglob("*"))
    status, answer = upload(comfy, "noise.safetensors", b"noise")
    assert status == 400 and "not a readable .safetensors file" in answer["error"]
    for name in ("region.txt", "....safetensors", ""):
        status, answer = upload(comfy, name, small())
        assert status == 400 and ("is no name for a region" in answer["error"] or not name)
    assert upload(comfy, "a.safetensors", small(), field="other")[0] == 400
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data", "text/plain"):
        assert post(comfy, "/safe_region/upload", b"no form", kind, **MARKED)[0] == 400
        assert post(comfy, "/safe_region/upload", b"", kind, **MARKED)[0] == 413
    assert sorted(folder(comfy).rglob("*")) == before


def test_a_huge_upload_is_refused_unread(comfy):
    request = b"POST /safe_region/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999\r\n" + (
        b"X-Safe-Region: 1\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", comfy.port), 30) as connection:
        connection.sendall(request)  # and no byte of the body
        assert b" 413 " in connection.recv(1000).splitlines()[0]


def test_an_upload_stays_in_its_folder(comfy):
    status, answer = upload(comfy, "../../../escaped.safetensors", small("escaped"))
    assert (status, answer["name"]) == (200, "escaped.safetensors")
    status, answer = upload(comfy, "sub/inner.safetensors", small("inner"))
    assert (status, Path(answer["name"])) == (200, Path("sub/inner.safetensors"))
    found = [path.relative_to(comfy.base) for name in ("escaped", "inner") for path in comfy.base.rglob(f"{name}.s*")]
    assert found == [Path("models/safe_regions/escaped.safetensors"), Path("models/safe_regions/sub/inner.safetensors")]


def test_nothing_is_overwritten_without_asking(comfy):
    first, second = small("first"), small("second")
    assert upload(comfy, "twice.safetensors", first)[0] == 200
    assert upload(comfy, "twice.safetensors", first)[0] == 200, "the same file"
    status, answer = upload(comfy, "twice.safetensors", second)
    assert status == 409 and answer["error"] == 'There is another region "twice" already.'
    assert (folder(comfy) / "twice.safetensors").read_bytes() == first
    assert upload(comfy, "twice.safetensors", second, overwrite=True)[0] == 200
    assert (folder(comfy) / "twice.safetensors").read_bytes() == second
    assert upload(comfy, DEMO, second)[0] == 409, "an example of the pack is not replaced unasked either"


EVIL, OWN = "http://evil.example", "http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL}, {"Origin": "null"}, {"Origin": "file://"}, {"Origin": ""},
        {"Origin": OWN, "Sec-Fetch-Site": "cross-site"}, {"Origin": OWN, "Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://localhost:{port}"},
        {"Host": "192.168.0.7:8188", "Origin": EVIL}, {"Host": "box.lan", "Origin": "http://box.lan.evil.example"},
        {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"},  # its name leads to us now
        {"Host": "evil.example", "Origin": EVIL}, {"Host": "evil.example.", "Origin": EVIL + "."},
        {"Origin": OWN, "X-Safe-Region": None}, {"X-Safe-Region": None}, {"Origin": EVIL, "X-Safe-Region": None},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_sites_write_nothing(comfy, headers, overwrite):
    name = "guard-of-the-house.safetensors"
    assert upload(comfy, name, small("ours"))[0] == 200
    before = {path: path.read_bytes() for path in folder(comfy).rglob("*") if path.is_file()}
    sent = {key: value and value.format(port=comfy.port) for key, value in (MARKED | headers).items()}
    for target, content in ((name, small("theirs")), ("foreign.safetensors", small("theirs"))):
        status, answer = upload(comfy, target, content, overwrite=overwrite, **sent)
        assert status == 403 and (not answer or len(answer["error"]) < 500)  # ComfyUI's own answer has no words
    assert {path: path.read_bytes() for path in folder(comfy).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Origin": OWN}, {"Origin": OWN, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"},
        {"Host": "[::1]:8188", "Origin": "http://[::1]:8188"}, {"Host": "192.168.0.7", "Origin": "http://192.168.0.7"},
        {"Host": "gpu-box:8188", "Origin": "http://gpu-box:8188"}, {"Host": "box.lan", "Origin": "http://box.lan"},
        {"Host": "comfy.example.org", "Origin": "https://comfy.example.org"},  # a proxy with a certificate
        {"Host": "comfy.example.org:443", "Origin": "https://comfy.example.org"},
    ],
    ids=str,
)  # fmt: skip
def test_our_own_page_writes_by_every_name_that_it_can_have(comfy, headers):
    sent = {key: value.format(port=comfy.port) for key, value in (MARKED | headers).items()}
    name = f"from-{sha256(str(headers).encode())[:8]}.safetensors"
    assert upload(comfy, name, small(), **sent)[0] == 200
    assert (folder(comfy) / name).read_bytes() == small()


def test_two_uploads_of_one_name_lose_nothing(comfy):
    contents = [small(f"number {number}") for number in range(4)]
    with ThreadPoolExecutor(len(contents)) as pool:
        for turn in range(20):
            name = f"race-{turn}.safetensors"
            answers = list(pool.map(lambda content: upload(comfy, name, content), contents))  # noqa: B023
            assert sorted(status for status, _ in answers) == [200, 409, 409, 409]
            (winner,) = (content for content, (status, _) in zip(contents, answers) if status == 200)
            assert (folder(comfy) / name).read_bytes() == winner
    assert not [path for path in folder(comfy).iterdir() if path.suffix == ".tmp"]


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="odd.safetensors"\r\n'
FLAG = b'\r\n--x\r\nContent-Disposition: form-data; name="overwrite"\r\n'
END = b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PART + b"Content-Transfer-Encoding: odd\r\n\r\nx" + END, {}),
        (PART + b"Content-Transfer-Encoding: base64\r\n\r\n%" + END, {}),
        (PART + b"Content-Encoding: gzip\r\n\r\nx" + END, {}), (PART + b"Content-Encoding: odd\r\n\r\nx" + END, {}),
        (PART + b"\r\nx" + FLAG + b"Content-Type: text/plain; charset=odd\r\n\r\ntrue" + END, {}),
        (PART + b"\r\nx" + FLAG + b"Content-Type: text/plain; charset=utf-8\r\n\r\n\xff\xfe" + END, {}),
        (PART + b"\r\nx" + FLAG.replace(b"overwrite", b"_charset_") + b"\r\nodd" + FLAG + b"\r\ntrue" + END, {}),
        (PART + b"Content-Type: multipart/mixed; boundary=y\r\n\r\n--y--" + END, {}),
        (PART + b"Content-Length: 99999999\r\n\r\nx" + END, {}), (PART * 2000, {}), (PART, {}), (b"--x", {}),
        (b"--x\r\n\r\nx" + END, {}), (b"--x\r\n" + b"a: b\r\n" * 20_000 + b"\r\nx" + END, {}),
        (PART.replace(b'filename="odd', b"filename*=odd''%ff%00") + b"\r\nx" + END, {}),
        (PART + b"\r\nx" + END, {"Content-Encoding": "gzip"}), (PART + b"\r\nx" + END, {"Content-Encoding": "odd"}),
        (PART + b"\r\nx" + END, {"Content-Type": "multipart/form-data; boundary=" + "x" * 200}),
        (PART + b"\r\nx" + END, {"Content-Type": "multipart/mixed; boundary=x"}),
        (b"file=x", {"Content-Type": "application/x-www-form-urlencoded; charset=odd"}),
        (b"file=%ff", {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}),
    ],
)  # fmt: skip
def test_odd_forms_get_one_line(comfy, body, headers):
    before = sorted(folder(comfy).rglob("*"))
    kind = headers.pop("Content-Type", "multipart/form-data; boundary=x")
    status, answer = post(comfy, "/safe_region/upload", body, kind, **MARKED, **headers)
    assert status in (400, 411) and answer["error"] and "\n" not in answer["error"]
    assert sorted(folder(comfy).rglob("*")) == before


@pytest.mark.parametrize(
    ("body", "kind", "more", "wanted"),
    [
        (b'{"name": "x"}', "application/json; charset=odd", {}, 200),
        (b'{"name": "x"}', "application/json; charset=utf-16", {}, 200),
        ('{"name": "x"}'.encode("utf-16"), "application/json", {}, 200), (b'\xff{"name"', "application/json", {}, 400),
        (b'{"name": "\\ud800"}', "application/json", {}, 200), (b'{"name": "a\\u0000b"}', "application/json", {}, 200),
        (b'{"name": ' + b"9" * 10_000 + b"}", "application/json", {}, 400),
        (b'{"name": "x"}', "application/json", {"Content-Encoding": "gzip"}, 411),
        (b'{"name": "x"}', "application/json", {"Content-Encoding": "deflate"}, 411),
    ],
)  # fmt: skip
def test_odd_questions_get_one_line(comfy, body, kind, more, wanted):
    status, answer = post(comfy, "/safe_region/card", body, kind, **more)
    assert status == wanted and (answer["state"] == "missing" if wanted == 200 else answer["error"])


def test_damaged_forms_get_one_line(comfy):
    """A sound form with a few bytes changed, a few hundred times."""
    draw, sound = random.Random(5), PART + b"\r\n" + small("damaged") + FLAG + b"\r\ntrue" + END
    seen = set()
    for _ in range(300):
        body = bytearray(sound)
        for _ in range(draw.choice((1, 2, 8))):
            at = draw.choice((draw.randrange(len(body)), draw.randrange(200), len(body) - 1 - draw.randrange(200)))
            odd = draw.choice((b"", b"\0", b"\r\n", b"--x", b";", b'"', draw.randbytes(4)))
            body[at : at + draw.choice((0, 1, 3))] = odd
        status, answer = post(comfy, "/safe_region/upload", bytes(body), "multipart/form-data; boundary=x", **MARKED)
        seen.add(status)
        assert status in (200, 400) and ("sha256" in answer or "\n" not in answer["error"]), bytes(body)
    assert seen == {200, 400}


ODD_NAMES = ["a\0.txt", "\ud800.txt", "x" * 5000 + ".txt", "../../x.txt", "/etc/passwd", "..", "", 5, True, {"a": 1}]


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("node", ["SafeRegionPromptPairs", "TrainBalanceRegion", "SafeRegionLoader"])
def test_an_odd_file_name_is_refused_at_the_queue(comfy, node, name):
    g = Graph()
    if node == "SafeRegionLoader":
        made = g.add(node, region_name=name)
    elif node == "TrainBalanceRegion":
        demo = g.add("SafeRegionDemoModel")
        made = g.add(node, model=demo(0), clip=demo(1), text="", file=name)
    else:
        made = g.add(node, text="a => b", file=name)
    g.add("PreviewAny", source=made(0))
    with pytest.raises(Rejected) as caught:
        comfy.queue(g.prompt)
    assert "traceback" not in str(caught.value).lower().replace('"traceback": []', ""), caught.value


def test_a_body_of_unknown_length_is_not_read(comfy):
    for path in ("/safe_region/card", "/safe_region/upload"):
        with socket.create_connection(("127.0.0.1", comfy.port), 30) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Safe-Region: 1\r\n"
                               "Transfer-Encoding: chunked\r\n\r\n".encode())  # fmt: skip
            assert b" 411 " in connection.recv(1000).splitlines()[0]


def test_a_preview_with_thousands_of_scans_holds_nobody_up(comfy):
    """Neither the list of nodes nor its own card waits for the decoder."""
    written = io.BytesIO()
    Image.new("RGB", (2048, 1024), "red").save(written, "JPEG", progressive=True)
    content = written.getvalue()
    last = content[content.rfind(b"\xff\xda") : -2]
    bomb = base64.b64encode(content[:-2] + last * 8_000 + content[-2:]).decode()
    (folder(comfy) / "scans.safetensors").write_bytes(small("scans", preview=bomb))
    since = time.monotonic()
    assert "scans.safetensors" in str(comfy.get("/object_info/SafeRegionLoader"))
    found = comfy.get("/safe_region/card?name=scans.safetensors")
    assert (found["state"], found["card"]["preview"]) == ("ok", "")
    assert time.monotonic() - since < 20, "decoding all of it takes minutes"


# --- what a workflow carries ---


def test_the_loader_works_without_what_a_workflow_carries(comfy):
    assert load(comfy, region_name=DEMO).startswith("weapons\n")


def test_a_changed_file_stops_at_the_queue(comfy):
    (folder(comfy) / "changing.safetensors").write_bytes(small("before", source="https://example.org/r"))
    carried = card(comfy, name="changing.safetensors")[1]["carried"]
    assert load(comfy, region_name="changing.safetensors", carried=carried).startswith("before")
    (folder(comfy) / "changing.safetensors").write_bytes(small("afterwards"))
    with pytest.raises(Rejected, match=r"saved with .*https://example\.org/r.*Use the file as it is now"):
        load(comfy, region_name="changing.safetensors", carried=carried)
    assert card(comfy, name="changing.safetensors", carried=carried)[1]["state"] == "changed"
    accepted = card(comfy, name="changing.safetensors")[1]["carried"]
    assert load(comfy, region_name="changing.safetensors", carried=accepted).startswith("afterwards")


def test_an_embedded_region_never_stands_for_the_users_own_file(comfy):
    name, own, brought = "my-guard.safetensors", small("my own"), small("theirs", description="does nothing")
    carried = json.dumps({"name": name, "sha256": sha256(brought), "data": base64.b64encode(brought).decode()})
    assert load(comfy, region_name=name, carried=carried).startswith("Came with the workflow, not from your folder")
    (folder(comfy) / name).write_bytes(own)
    with pytest.raises(Rejected, match="differs from your own file of that name"):
        load(comfy, region_name=name, carried=carried)
    found = card(comfy, name=name, carried=carried)[1]
    assert (found["state"], found["card"]["title"]) == ("differs", "theirs")
    g = Graph()  # and where it can only be looked at when it runs
    region = g.add("SafeRegionLoader", region_name=name, carried=g.add("PrimitiveString", value=carried)(0))
    g.add("PreviewAny", source=region(0))
    assert "differs from your own file" in error_text(comfy.wait(comfy.queue(g.prompt)))
    # what the sentence says one can do
    assert load(comfy, region_name=name, carried="").startswith("my own")
    renamed = carried.replace(name, "the-one-they-sent.safetensors")
    said = load(comfy, region_name="the-one-they-sent.safetensors", carried=renamed)
    assert said.startswith("Came with the workflow") and "theirs" in said
    (folder(comfy) / name).write_bytes(brought)
    assert load(comfy, region_name=name, carried=carried).startswith("theirs"), "the very same file"


def test_a_linked_text_is_looked_at_when_it_runs(comfy):
    for carried, words in (('{"name": "gone.safetensors", "sha256": "' + "ab" * 32 + '"}', "hash abababababab"),
                           ("junk", "is damaged")):  # fmt: skip
        g = Graph()
        text = g.add("PrimitiveString", value=carried)
        region = g.add("SafeRegionLoader", region_name="gone.safetensors", carried=text(0))
        g.add("PreviewAny", source=region(0))
        history = comfy.wait(comfy.queue(g.prompt))
        assert words in error_text(history)


@pytest.mark.parametrize("carried", ["junk", {"a": 1}, 7, True, "[" * 10_000, "x" * 2_000_000])
def test_junk_is_refused_at_the_queue(comfy, carried):
    with pytest.raises(Rejected, match="What this workflow carries about its region is"):
        load(comfy, region_name=DEMO, carried=carried)


def test_a_large_region_is_not_embedded(comfy):
    (folder(comfy) / "large.safetensors").write_bytes(small(size=65_536) + b"")
    assert card(comfy, name="large.safetensors")[1]["refusal"].startswith("This region has 257 kB")
    status, answer = card(comfy, name="large.safetensors", embed=True)
    assert status == 400 and "at most 256 kB fit into a workflow" in answer["error"]


def test_a_picture_carries_its_region_to_a_server_without_the_file(comfy):
    """The file is embedded and saved in a picture's metadata; from there it runs when the file is gone."""
    path = folder(comfy) / "travels.safetensors"
    path.write_bytes((PACK / "demo" / "regions" / DEMO).read_bytes())
    carried = card(comfy, name="travels.safetensors", embed=True)[1]["carried"]
    g = Graph()
    demo = g.add("SafeRegionDemoModel")
    region = g.add("SafeRegionLoader", region_name="travels.safetensors", carried=carried)
    text = g.add("CLIPTextEncode", clip=demo(1), text="a knife")
    steered = g.add("SafeRegionConditioning", conditioning=text(0), region=region(0))
    empty = g.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    latent = g.add("KSampler", model=demo(0), positive=steered(0), negative=text(0), latent_image=empty(0), seed=1,
                   steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)  # fmt: skip
    shown = g.add("SaveImage", images=g.add("VAEDecode", samples=latent(0), vae=demo(2))(0), filename_prefix="travels")
    first = comfy.image(comfy.run(g.prompt)[shown()[0]]["images"][0])
    path.unlink()
    prompt = json.loads(Image.open(io.BytesIO(first)).text["prompt"])
    assert json.loads(prompt[region()[0]]["inputs"]["carried"])["data"]
    prompt[latent()[0]]["inputs"]["seed"] = 2  # drawn anew
    assert comfy.run(prompt)[shown()[0]]["images"]
    found = card(comfy, name="travels.safetensors", carried=carried)[1]
    assert (found["state"], found["in_folder"]) == ("embedded", False)
    assert found["card"]["title"] == "weapons"


def test_source_is_saved(comfy):
    g = Graph()
    region = g.add("SafeRegionLoader", region_name=DEMO)
    g.add("SaveSafeRegion", region=region(0), name="with-source", source=" https://example.org ")
    comfy.run(g.prompt)
    assert load_region(folder(comfy) / "with-source.safetensors").metadata["source"] == "https://example.org"
