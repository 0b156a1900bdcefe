"""Region files in a real ComfyUI: the card's routes, uploads, and regions that a workflow carries."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
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


@cache  # safetensors writes its metadata in any order
def small(name: str = "small", size: int = 4, **metadata: Any) -> bytes:
    """A region file; `size` floats wide."""
    part = Part("a", {"cross_attn": Move(offset=torch.ones(size))})
    return region_bytes(Region((part,), {"name": name, **metadata}))


def folder(comfy: Any) -> Path:
    return comfy.base / "models" / "safe_regions"


def post(comfy: Any, path: str, body: bytes, kind: str, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and answer of a POST."""
    address = f"http://127.0.0.1:{comfy.port}{path}"
    request = urllib.request.Request(address, body, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own server
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text[:1] == b"{" else {}


def card(comfy: Any, **wanted: Any) -> tuple[int, dict[str, Any]]:
    return post(comfy, "/safe_region/card", json.dumps(wanted).encode(), "application/json")


def upload(comfy: Any, name: str, content: bytes, field: str = "file", overwrite: bool = False, **headers: str):
    head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
    more = b'\r\n--x\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue' if overwrite else b""
    body = head + content + more + b"\r\n--x--\r\n"
    return post(comfy, "/safe_region/upload", body, "multipart/form-data; boundary=x", **headers)


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
        assert post(comfy, "/safe_region/upload", b"no form", kind)[0] == 400
        assert post(comfy, "/safe_region/upload", b"", kind)[0] == 413
    assert sorted(folder(comfy).rglob("*")) == before


def test_a_huge_upload_is_refused_unread(comfy):
    request = b"POST /safe_region/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999\r\n" + (
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    import socket

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


def test_other_sites_cannot_upload(comfy):
    assert upload(comfy, "foreign.safetensors", small(), Origin="http://evil.example")[0] == 403
    assert not (folder(comfy) / "foreign.safetensors").exists()


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
