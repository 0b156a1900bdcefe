"""A real ComfyUI as a subprocess, and a small client for its API."""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2]
PACK_FOLDER = "Safe Region v0.1"  # ComfyUI must not mind spaces and dots
LEFT_OUT = (".git", "__pycache__", "tests", "build", "*.egg-info", ".venv", ".host", ".*_cache")
RENAMED = {"TestOldName": "SafeRegionConditioning"}  # as if that node had been called so
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
WITH_LLAMA = ("HiDream", "HunyuanVideo")
OURS = ("safe_region", "safe-region", "Safe Region", "SafeRegion")
# Starts ComfyUI so that each entry of its log says how grave it is and where it is from.
START = """
import logging, runpy, sys
make = logging.getLogRecordFactory()
def marked(*args, **more):
    record = make(*args, **more)
    where = f"[{record.levelname}|{record.pathname}|{record.funcName}] "
    record.msg = where.replace("%", "%%") + str(record.msg) if record.args else where + str(record.msg)
    return record
logging.setLogRecordFactory(marked)
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""
ENTRY = re.compile(r"^.{0,40}?\[([A-Z]+)\|(.*?)\|(.*?)\] ", re.MULTILINE)  # newer ones begin with a coloured level
FRAME = re.compile(r'^ +File "(.+)", line \d+, in .+\n +(.*)', re.MULTILINE)
NO_WORDS = "this copy of ComfyUI came without the words of its Llama tokenizer"


def lacks_words(family: str) -> bool:
    """Whether this copy of ComfyUI came without the words of the family's Llama tokenizer: it reads all text alike."""
    words = Path(os.environ["COMFYUI_PATH"], "comfy", "text_encoders", "llama_tokenizer", "tokenizer.json")
    return family in WITH_LLAMA and not words.is_file()


class Rejected(Exception):
    """ComfyUI refused a prompt; the text is its answer."""


class Host:
    """One server with its own base directory. Packs are copied into its custom_nodes."""

    def __init__(self, tree: Path, python: str, base: Path, frontend: str | None = None) -> None:
        self.base = base
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        frontend = frontend or self._some_page()
        self.log_path = base / "server.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-c", START, "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes",
                 "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--front-end-root", frontend],
                cwd=tree, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._wait_until_up()

    def _some_page(self) -> str:
        """A frontend that shows nothing: these tests only talk to the server."""
        folder = Path(tempfile.mkdtemp(dir=self.base))
        (folder / "index.html").write_text("<!doctype html>", encoding="utf-8")
        return str(folder)

    def _wait_until_up(self, timeout: float = 180) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    # --- API ---

    def request(self, path: str, data: Any = None) -> bytes:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"}
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own server
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt in API format. Raises Rejected when its validation fails."""
        try:
            return json.loads(self.request("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Rejected(error.read().decode()) from None

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """The history of a prompt, when it is done."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"]["completed"] is not None:
                status = history[prompt_id]["status"]
                if status["completed"] or status["status_str"] == "error":
                    return history[prompt_id]
            time.sleep(0.2)
        raise TimeoutError(self.log()[-2000:])

    def run(self, prompt: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Outputs by node id. Raises RuntimeError with the error's text."""
        history = self.wait(self.queue(prompt), timeout)
        if history["status"]["status_str"] != "success":
            raise RuntimeError(error_text(history))
        return history["outputs"]

    def image(self, found: dict[str, str]) -> bytes:
        query = "&".join(f"{key}={urllib.request.quote(value)}" for key, value in found.items())
        return self.request(f"/view?{query}")


def complaints(log: str) -> list[str]:
    """Warnings, errors and tracebacks in a server's log that are ours, but for those that a test asked for."""
    _, *parts = ENTRY.split(log)
    if not parts:
        return ["the log has no entry that this can read"]
    entries = zip(*(parts[i::4] for i in range(4)))
    return [f"{level} {where} {text}" for level, where, function, text in entries
            if level in ("WARNING", "ERROR", "CRITICAL") and not _asked_for(where, function, text)
            and (any(name in where + text for name in OURS) or _no_fingerprint(where, text))]  # fmt: skip


def _no_fingerprint(where: str, text: str) -> bool:
    """ComfyUI could not ask a node for its fingerprint, and does not always say which: it runs anew every time."""
    return Path(where).name == "execution.py" and text.startswith("WARNING: ")


def _asked_for(where: str, function: str, text: str) -> bool:
    """A prompt that was refused, or a node that stopped with a sentence of its own: there are tests for both."""
    if Path(where).name != "execution.py" or function not in ("validate_prompt", "execute"):
        return False
    frames = FRAME.findall(text)  # an exception's text comes before its traceback
    return not frames or ("custom_nodes" in frames[-1][0] and frames[-1][1].startswith("raise "))


def error_text(history: dict[str, Any]) -> str:
    """What went wrong: the exception's text, or that it was interrupted."""
    for name, message in history["status"]["messages"]:
        if name == "execution_error":
            return f"{message['exception_type']}: {message['exception_message']}"
        if name == "execution_interrupted":
            return "interrupted"
    return ""


def prepare_base(base: Path, folder: str = PACK_FOLDER) -> None:
    """Copy the pack, and the tests' own models, into the base directory's custom_nodes."""
    nodes = base / "custom_nodes"
    shutil.copytree(PACK, nodes / folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for models in ("other_model", "family_models", "weight_kinds", "wiring_nodes"):
        shutil.copytree(Path(__file__).parent / models, nodes / models)
    renamed = nodes / folder / "nodes" / "renamed.py"
    known = renamed.read_text(encoding="utf-8").replace("str] = {}", f"str] = {RENAMED}", 1)
    renamed.write_text(known, encoding="utf-8")
    extra = os.environ.get("SAFE_REGION_TEST_WEIGHTS")  # weights to use where the pack has none yet
    if extra:
        shutil.copytree(extra, nodes / folder / "demo" / "weights", dirs_exist_ok=True)


def widget_names(info: dict[str, Any]) -> list[str]:
    """Names of a node's widgets in the order of `widgets_values`, with those that the frontend adds."""
    names = []
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list) or spec[0] in WIDGETS:
                names.append(name)
                if options.get("control_after_generate"):
                    names.append("")
    return names


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the frontend saves it, in the API's format. Nodes of a subgraph are named as it names them: 3:1."""
    subgraphs = {one["id"]: one for one in workflow.get("definitions", {}).get("subgraphs", [])}
    prompt: dict[str, Any] = {}
    _Level(workflow, "", [], subgraphs).into(prompt, object_info)
    return prompt


def links_of(graph: dict[str, Any]) -> dict[int, tuple[int, int, int, int, str]]:
    """A graph's links by their ids: source, its slot, target, its slot and type. A subgraph's own ends are -10, -20."""
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    rows = [[link[end] for end in ends] if isinstance(link, dict) else link for link in graph["links"]]
    return {row[0]: tuple(row[1:]) for row in rows}


class _Level:
    """A workflow, or one use of a subgraph in it: `given` holds what comes into its inputs, links and values alike."""

    def __init__(self, graph: dict[str, Any], prefix: str, given: list[Any], subgraphs: dict[str, Any]) -> None:
        self.graph, self.prefix, self.given, self.subgraphs = graph, prefix, given, subgraphs
        self.nodes, self.links = {node["id"]: node for node in graph["nodes"]}, links_of(graph)

    def source(self, link: int) -> Any:
        """What a link brings: [node, slot] of the prompt, or the value of a widget outside."""
        origin, slot = self.links[link][:2]
        if origin == -10:
            return self.given[slot]
        if (kind := self.nodes[origin]["type"]) in self.subgraphs:
            return self.inside(self.nodes[origin]).source(self.subgraphs[kind]["outputs"][slot]["linkIds"][0])
        return [f"{self.prefix}{origin}", slot]

    def inside(self, node: dict[str, Any]) -> _Level:
        values = iter(node["widgets_values"])
        own = [next(values) if "widget" in slot else None for slot in node["inputs"]]
        given = [value if slot["link"] is None else self.source(slot["link"])
                 for slot, value in zip(node["inputs"], own)]  # fmt: skip
        return _Level(self.subgraphs[node["type"]], f"{self.prefix}{node['id']}:", given, self.subgraphs)

    def into(self, prompt: dict[str, Any], object_info: dict[str, Any]) -> None:
        for node in self.nodes.values():
            if node["type"] in self.subgraphs:
                self.inside(node).into(prompt, object_info)
                continue
            info = object_info.get(node["type"])
            if info is None:
                if node["type"] in ("Note", "MarkdownNote"):
                    continue
                raise KeyError(f"there is no node {node['type']}")
            names, values = widget_names(info), node["widgets_values"]
            assert len(values) <= len(names), node["type"]  # fewer: saved before its last inputs were added
            inputs = dict(zip(names, values))
            inputs |= {slot["name"]: self.source(slot["link"]) for slot in node["inputs"] if slot["link"] is not None}
            inputs.pop("", None)
            prompt[f"{self.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}


class Graph:
    """Prompts in API format, built node by node: `g.add("KSampler", model=loader(0))`."""

    def __init__(self) -> None:
        self.prompt: dict[str, Any] = {}

    def add(self, class_type: str, **inputs: Any) -> Callable[[int], list[Any]]:
        name = str(len(self.prompt) + 1)
        self.prompt[name] = {"class_type": class_type, "inputs": inputs}
        return lambda slot=0: [name, slot]
