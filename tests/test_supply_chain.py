"""The pack asks nobody for anything: no network when it is imported or runs, and pip replaces nothing of ComfyUI's."""
from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist"}
SHIPPED = [path for path in ROOT.rglob("*.py")
           if not any(p in NOT_SHIPPED or p.startswith(".") for p in path.relative_to(ROOT).parts[:-1])]  # fmt: skip
WEAPONS = ROOT / "demo" / "regions" / "demo-weapons.safetensors"

# Python tells of every look-up and every connection, whoever makes it; the listener also forbids it.
LISTEN = """
import json, pkgutil, sys
asked = []

def listen(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname", "socket.bind"):
        asked.append(f"{event} {args[1:]!r}")
        raise OSError("no network here")

sys.addaudithook(listen)
"""
FOREIGN = {"comfy", "comfy_api", "comfy_kitchen", "folder_paths", "node_helpers", "server", "resvg_py"}


def asked_for(script: str) -> list[str]:
    """What a script asked of the network, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", f"{LISTEN}\n{script}\nprint('asked: ' + json.dumps(asked))"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.rsplit("asked: ", 1)[1])


def test_the_listener_hears():
    script = "import socket\ntry: socket.create_connection(('example.org', 80))\nexcept OSError: pass"
    assert asked_for(script)[0].startswith("socket.getaddrinfo")


def test_importing_everything_asks_nobody():
    names = [".".join(("comfyui_safe_region", *path.relative_to(ROOT).with_suffix("").parts)) for path in SHIPPED]
    names = sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))
    assert len(names) > 80
    assert asked_for(f"""
import importlib
done = []
for name in {names!r}:
    try:
        importlib.import_module(name)
        done.append(name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in {FOREIGN!r}, f"{{name}}: {{error}}"
assert len(done) > 60, done
""") == []


@pytest.mark.parametrize(
    "command",
    [
        ["info", str(WEAPONS)], ["packs"], ["inspect", str(WEAPONS), "a pistol beside a cat"],
        ["train", "--pack", "weapons", "--dry-run"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_the_commands_ask_nobody(command):
    assert asked_for(f"from comfyui_safe_region.cli import main\nmain({command!r})") == []


def test_a_checkpoint_whose_configuration_is_not_here_asks_nobody(tmp_path):
    pytest.importorskip("diffusers")
    file = str(tmp_path / "model.safetensors")
    assert asked_for(f"""
import torch
from safetensors.torch import save_file
from comfyui_safe_region.backbones.diffusers import load_pipeline
save_file({{"model.diffusion_model.x": torch.ones(2)}}, {file!r})
try:
    load_pipeline(None, {file!r})
    raise AssertionError("loaded")
except ValueError as error:
    print(error)
""") == []


NETWORK = {"socket", "ssl", "requests", "httpx", "httpcore", "urllib3", "websockets", "websocket", "ftplib", "smtplib",
           "urllib.request", "http.client", "http.server", "xmlrpc"}  # fmt: skip
ALLOWED = {"aiohttp": {"nodes/routes.py"}, "huggingface_hub": {"backbones/diffusers.py"}}  # ComfyUI's own server; files


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_could_ask(path):
    tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
    found = imports(tree)
    assert not {one for one in found if any(one == known or one.startswith(f"{known}.") for known in NETWORK)}
    for module, files in ALLOWED.items():
        assert name in files or module not in {one.split(".")[0] for one in found}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if called in ("from_pretrained", "from_single_file", "snapshot_download", "hf_hub_download"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("local_files_only") == "True", f"{name}:{call.lineno}"


def test_the_page_asks_only_its_own_server():
    for path in (ROOT / "web").rglob("*"):
        if path.suffix in (".js", ".css", ".html"):
            addresses = re.findall(r"https?://[^\s\"'`)]+|\bfetch\(|XMLHttpRequest|WebSocket|EventSource|@import",
                                   path.read_text(encoding="utf-8"))  # fmt: skip
            assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path.name


def test_installing_the_pack_installs_nothing_else():
    """Where a user's torch, numpy, pillow or safetensors is older than a bound here, pip would replace it."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == [] and "dependencies" not in project.get("dynamic", [])
    # what ComfyUI's managers run when they install a pack
    assert not [name for name in ("requirements.txt", "install.py", "setup.py") if (ROOT / name).exists()]


def test_every_dependency_stands_in_the_table():
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = {re.split(r"[\[>]", one)[0] for extra in extras.values() for one in extra} - {"safe-region"}
    text = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(" `") for row in text.splitlines() if row.startswith("| `")}
    assert rows == wanted
    modules = {"PIL" if name == "pillow" else name.replace("-", "_") for name in wanted}
    brought = {"aiohttp", "huggingface_hub", "comfyui_safe_region"}  # by ComfyUI, by diffusers
    used = {one.split(".")[0] for path in SHIPPED for one in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert used - set(sys.stdlib_module_names) - FOREIGN - brought <= modules
