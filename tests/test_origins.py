"""Which requests may write: those of our own page, by every name that it can have. The server itself: tests/host."""
from __future__ import annotations

import pytest

from comfyui_safe_region.nodes.origins import refusal

EVIL = "http://evil.example:8188"
HERE = {"X-Safe-Region": "1", "Host": "127.0.0.1:8188"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL}, {"Origin": "null"}, {"Origin": "file://"}, {"Origin": ""}, {"Origin": "*"},
        {"Origin": "http://[::1"}, {"Origin": "http://127.0.0.1:8188x"}, {"Origin": "http://127.0.0.1:99999999"},
        {"Origin": "http://127.0.0.1"}, {"Origin": "http://user@127.0.0.1:8189"}, {"Origin": "ws://127.0.0.1:8188"},
        {"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:8188.evil.example"}, {"Host": "", "Origin": "http://"},
        {"Host": "", "Origin": EVIL}, {"Host": "evil.example:8188", "Origin": EVIL},
        {"Host": "EVIL.example.:8188", "Origin": "http://evil.example.:8188"},
        {"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"},
        {"Host": "lan.evil", "Origin": "http://lan.evil"}, {"Host": "x" * 5000, "Origin": "http://" + "<" * 5000},
    ],
    ids=lambda headers: str(headers)[:60],
)  # fmt: skip
@pytest.mark.parametrize("trusted", ["", "*", "https://comfy.example.org"])
def test_others_are_refused_in_one_sentence(headers, trusted):
    said = refusal(HERE | headers, trusted)
    assert said and "<" not in said and "\n" not in said and len(said) < 600


def test_the_header_that_no_other_site_can_send_is_needed():
    assert "X-Safe-Region: 1" in refusal({"Host": "127.0.0.1:8188"})
    assert "X-Safe-Region: 1" in refusal({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188"})
    assert refusal(HERE) == "", "a program, which has no origin"


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188"), ("localhost:8188", "http://localhost:8188"),
        ("LOCALHOST:8188", "http://localhost:8188"), ("[::1]:8188", "http://[::1]:8188"),
        ("192.168.0.7", "http://192.168.0.7"), ("gpu-box:8188", "http://gpu-box:8188"),
        ("gpu-box.local:8188", "http://gpu-box.local:8188"), ("comfy.tail1234.ts.net", "http://comfy.tail1234.ts.net"),
        ("comfy.example.org", "https://comfy.example.org"), ("comfy.example.org:443", "https://comfy.example.org"),
    ],
)  # fmt: skip
def test_our_own_page_may(host, origin):
    assert refusal(HERE | {"Host": host, "Origin": origin, "Sec-Fetch-Site": "same-origin"}) == ""


def test_an_origin_that_the_user_named_may():
    headers = HERE | {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"}
    assert refusal(headers) and refusal(headers, EVIL) == ""
