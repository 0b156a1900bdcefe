"""A long service: prompts through a real server, with regions swapped, trained and interrupted in between.

    COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python python benchmarks/service.py [--prompts 2000]

Every kind of picture is first drawn on a server of its own that did nothing else. Then another server draws them in
random order, several clients queueing at once; in between a region file is replaced by another under its name, a region
is learned, a training and a sampling are interrupted. Prints how many pictures differ from those of the first server in
any bit, and how much memory the server takes, by prompt: the slope of a line through its second half. Exits with 1 when
a picture differs, or when the slope is above 0.1 MB a prompt. On the CPU of a Linux machine, with the demo model.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comfyui_safe_region.region import Region, load_region, region_bytes

PACK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PACK / "tests" / "host"))
from drawing import Drawing  # noqa: E402
from host import Host, error_text, prepare_base  # noqa: E402

SWAPPED, BAR = "swapped.safetensors", 0.1
TEXTS = ("a kitchen knife on a red background", "a cat in the park", "a man with a gun", "(a bomb:1.2), a tree")
WAYS = ("none", "apply", "guard", "both", "weak and guard")
FILES = ("demo-weapons.safetensors", SWAPPED, SWAPPED)  # the second and the third differ in what the file holds
PAIRS = "a {red|blue|big} {knife|gun|bomb} => a {red|blue|big} {spoon|car|ball}\nkeep: a {cat|dog} in the park"
TRAINING = {"concept": "weapons", "preset": "region", "steps": 0, "rank": 0, "learning_rate": 0.0, "guidance": 0.0,
            "size": 64, "seed": 1}  # fmt: skip

Kind = tuple[str, str, int]  # a picture: its text, how it is guarded, and by which file


@dataclass
class Served:
    """What a service did: `memory` [MB] of its server after each prompt, `wrong` the kinds that came out otherwise."""

    prompts: int = 0
    swapped: int = 0
    trained: int = 0
    interrupted: int = 0
    wrong: list[Kind] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def slope(self) -> float:
        """MB a prompt, over the second half."""
        later = self.memory[len(self.memory) // 2 :]
        return float(np.polyfit(range(len(later)), later, 1)[0])


def kinds() -> list[Kind]:
    return [(text, way, file) for text in TEXTS for way in WAYS for file in range(len(FILES) if way != "none" else 1)]


def contents() -> list[bytes]:
    """What the swapped file holds, one time and the other: a region that moves half as far, and one that moves none."""
    region = load_region(PACK / "demo" / "regions" / FILES[0])

    def weaker(factor: float) -> Region:
        parts = tuple(replace(part, moves={block: replace(move, **{
            name: value * factor for name in ("up", "offset", "profile") if (value := getattr(move, name)) is not None
        }) for block, move in part.moves.items()}) for part in region.parts)  # fmt: skip
        return replace(region, parts=parts)

    return [region_bytes(weaker(factor)) for factor in (0.5, 0.0)]


def graph(kind: Kind) -> Drawing:
    text, way, file = kind
    g = Drawing()
    g.prompt[g.region()[0]]["inputs"]["region_name"] = FILES[file]
    prompt, model = g.text(text), g.demo(0)
    if way in ("apply", "both"):
        prompt = g.steered(prompt)
    if way == "weak and guard":
        prompt = g.steered(prompt, strength=0.1)
    if way in ("guard", "both", "weak and guard"):
        model = g.guarded()
    g.draw(prompt, model=model)
    return g


class Service:
    """One server; `file` is what the swapped file holds now."""

    def __init__(self, host: Host) -> None:
        self.host, self.contents, self.file = host, contents(), 0
        self.folder = host.base / "models" / "safe_regions"

    def swap(self, file: int) -> bool:
        """Let the server have the region that these pictures are drawn with; whether that was another one."""
        if FILES[file] != SWAPPED or file == self.file:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SWAPPED).write_bytes(self.contents[file - 1])
        self.file = file
        return True

    def memory(self) -> float:
        status = Path(f"/proc/{self.host.process.pid}/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def drawn(self, wanted: Sequence[Kind]) -> list[bytes]:
        """Pictures of prompts that are queued all at once, each by a client of its own."""
        graphs = list(map(graph, wanted))
        queued = [self.host.queue(g.prompt) for g in graphs]
        found = []
        for g, name in zip(graphs, queued):
            history = self.host.wait(name)
            if history["status"]["status_str"] != "success":
                raise SystemExit(error_text(history))
            found += g.pixels(self.host, history["outputs"])[0]
        return found

    def interrupted(self, g: Drawing, after: float) -> None:
        """Queue a prompt and stop it while it runs."""
        name = self.host.queue(g.prompt)
        while not self.host.get("/queue")["queue_running"]:
            time.sleep(0.05)
        time.sleep(after)
        self.host.request("/interrupt", {})
        self.host.wait(name)


def learning(preset: str) -> Drawing:
    g = Drawing()
    pairs = g.add("SafeRegionPromptPairs", file="none", text=PAIRS)
    trained = g.add("TrainSafeRegion", model=g.demo(0), clip=g.demo(1), pairs=pairs(0), **TRAINING | {"preset": preset})
    g.draw(g.add("SafeRegionConditioning", conditioning=g.text(TEXTS[0]), region=trained(0), strength=1.0, mode="auto",
                 start=0.0, end=1.0)(0))  # fmt: skip
    return g


def long_drawing() -> Drawing:
    g = Drawing()
    g.STEPS = 2000
    g.draw(g.text(TEXTS[0]), model=g.guarded())
    return g


def serve(fresh: Host, host: Host, prompts: int, every: int = 50, seed: int = 0) -> Served:
    """Let `host` draw so many prompts, and compare each with what `fresh` draws.

    After `every` prompts a region is learned and two runs are interrupted.
    """
    rng, expected, first, long = random.Random(seed), {}, Service(fresh), Service(host)
    for kind in sorted(kinds(), key=lambda kind: kind[2]):
        first.swap(kind[2])
        (expected[kind],) = first.drawn([kind])
    done, since, turns = Served(), time.monotonic(), 0
    while done.prompts < prompts:
        file = rng.randrange(len(FILES))
        done.swapped += long.swap(file)
        alike = [kind for kind in kinds() if kind[2] == file or kind[1] == "none" or FILES[kind[2]] != SWAPPED]
        wanted = rng.sample(alike, min(4, prompts - done.prompts))
        for kind, picture in zip(wanted, long.drawn(wanted)):
            done.prompts += 1
            done.memory.append(long.memory())
            if picture != expected[kind]:
                done.wrong.append(kind)
        if done.prompts // every > turns:
            turns = done.prompts // every
            host.run(learning("instant").prompt)
            done.trained += 1
            long.interrupted(learning("region"), 1.0)
            long.interrupted(long_drawing(), 0.5)
            done.interrupted += 2
    done.seconds = time.monotonic() - since
    return done


def started(base: Path) -> Host:
    base.mkdir()
    prepare_base(base)
    return Host(Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON", sys.executable), base)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="prompts between trainings and interruptions")
    chosen = parser.parse_args(arguments)
    folder, hosts = Path(tempfile.mkdtemp()), []
    try:
        hosts += [started(folder / name) for name in ("fresh", "long")]
        done = serve(*hosts, chosen.prompts, chosen.every)
    finally:
        for host in hosts:
            host.stop()
        shutil.rmtree(folder, ignore_errors=True)
    told: dict[str, Any] = {"prompts": done.prompts, "regions swapped": done.swapped, "trained": done.trained,
                            "interrupted": done.interrupted, "pictures that differ": len(done.wrong),
                            "MB at first": round(done.memory[0]), "MB at last": round(done.memory[-1]),
                            "MB a prompt": round(done.slope(), 4), "seconds": round(done.seconds)}  # fmt: skip
    print(json.dumps(told))
    if done.wrong or done.slope() > BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
