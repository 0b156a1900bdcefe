"""Saving loses nothing: an old file or a new one, whole, whoever writes at the same time and whatever stops it."""
from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfyui_safe_region.cli import main
from comfyui_safe_region.cli.train import run
from comfyui_safe_region.cli.voice import Failure
from comfyui_safe_region.region import RegionError, load_region, region_bytes, save_region, writing
from comfyui_safe_region.region.files import write_new
from comfyui_safe_region.region.writing import write_atomically
from region_examples import example_region

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes, limits and kill -9 of POSIX")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(writing.UNFINISHED)]


@pytest.fixture(params=["links", "no links"])
def disk(request, monkeypatch):
    """Folders with and without hard links, which exFAT and some network folders lack."""
    if request.param == "no links":

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)


# Several writers


@pytest.mark.usefixtures("disk")
def test_of_many_threads_that_save_one_name_none_loses_its_file(tmp_path):
    saved = [f"region {i}".encode() * 500 for i in range(60)]
    with ThreadPoolExecutor(20) as pool:
        paths = list(pool.map(lambda content: write_new(tmp_path, "a", content), saved))
    assert len(set(paths)) == len(saved)
    assert [path.read_bytes() for path in paths] == saved
    assert set(tmp_path.iterdir()) == set(paths)
    assert {path.name for path in paths} == {"a.safetensors", *(f"a_{i}.safetensors" for i in range(2, 61))}


SAVES = """
import sys
from pathlib import Path
from comfyui_safe_region.region.files import write_new
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    write_new(Path(sys.argv[1]), "a", f"{sys.argv[2]} {i}".encode() * 1000)
"""


def test_of_two_servers_that_save_one_name_none_loses_its_file(tmp_path):
    servers = [subprocess.Popen([sys.executable, "-c", SAVES, tmp_path, str(n)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True) for n in range(2)]  # fmt: skip
    for server in servers:
        assert server.stdout.readline() == "ready\n"
    for server in servers:  # both at once
        server.stdin.write("\n")
        server.stdin.flush()
    for server in servers:
        server.communicate(timeout=60)
        assert server.returncode == 0
    saved = [f"{n} {i}".encode() * 1000 for n in range(2) for i in range(40)]
    assert sorted(contents(tmp_path).values()) == sorted(saved)


@pytest.mark.usefixtures("disk")
def test_who_may_not_overwrite_never_does(tmp_path):
    write_atomically(tmp_path / "a", b"first", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", b"second", overwrite=False)
    assert contents(tmp_path) == {"a": b"first"}
    write_atomically(tmp_path / "a", b"third")
    assert contents(tmp_path) == {"a": b"third"}


def test_overwriting_replaces_the_one_of_that_name(tmp_path):
    write_new(tmp_path, "a", region_bytes(example_region("a")))
    path = write_new(tmp_path, "a", region_bytes(example_region("b")), overwrite=True)
    assert contents(tmp_path) == {"a.safetensors": region_bytes(example_region("b"))} and path.name == "a.safetensors"


# What stops it


LOOPS = """
import runpy, sys
from pathlib import Path
write = runpy.run_path(sys.argv[1])["write_atomically"]
folder, one, other = map(Path, sys.argv[2:])
contents = [one.read_bytes(), other.read_bytes()]
print("ready", flush=True)
for i in range(10**6):
    write(folder / "overwritten.safetensors", contents[i % 2])
    write(folder / "new.safetensors", contents[i % 2], overwrite=False)
    (folder / "new.safetensors").unlink()
"""


@POSIX
def test_kill_9_while_saving_leaves_the_old_file_or_the_new_one(tmp_path):
    regions = [example_region("a", cross_attn=3000), example_region("b", cross_attn=5000)]
    files = [save_region(region, tmp_path / f"{n}.safetensors") for n, region in enumerate(regions)]
    whole, folder, draw = {path.read_bytes() for path in files}, tmp_path / "folder", random.Random(0)
    folder.mkdir()
    for _ in range(100):
        # torch is not needed to write, and would take a second each time
        saver = subprocess.Popen([sys.executable, "-c", LOOPS, writing.__file__, folder, *files],
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert saver.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.02))
        os.kill(saver.pid, signal.SIGKILL)
        saver.communicate()
        found = {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}
        assert found.keys() <= {"overwritten.safetensors", "new.safetensors"} and set(found.values()) <= whole
        (folder / "new.safetensors").unlink(missing_ok=True)
    left = left_over(folder)
    assert left, "none was killed in the midst of it"
    for path in left:
        os.utime(path, (0, 0))
    save_region(regions[0], folder / "overwritten.safetensors")
    assert not left_over(folder), "the next save removes what the killed ones left"


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    old, young = (tmp_path / f"{writing.UNFINISHED}{n}.tmp" for n in range(2))
    other = tmp_path / ".x.tmp"
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "a", b"")
    assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name, "a"}


@POSIX
def test_a_disk_that_fills_up_changes_nothing(tmp_path):
    import resource

    path = save_region(example_region(), tmp_path / "r.safetensors")
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = region_bytes(example_region(cross_attn=9000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the write itself fails, half way
    try:
        for attempt in (lambda: write_atomically(path, large), lambda: write_new(tmp_path, "r", large)):
            with pytest.raises(OSError, match="large"):
                attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_read_only_folder_ends_in_one_sentence(overwrite, tmp_path, monkeypatch, capsys):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writing.os, "open", refuse)  # root may write anywhere
    with pytest.raises(PermissionError):
        write_new(tmp_path, "a", region_bytes(example_region()), overwrite)
    assert not contents(tmp_path)
    weapons = Path(__file__).parent.parent / "demo" / "regions" / "demo-weapons.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["combine", str(weapons), str(weapons), "--out", str(tmp_path / "both.safetensors")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "Permission denied" in said and said.count("\n") == 1


def test_a_file_where_a_folder_is_needed_ends_in_an_error_too(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for overwrite in (True, False):
        with pytest.raises(OSError, match="director"):
            write_new(tmp_path / "file", "a", b"", overwrite)
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError):
        write_new(tmp_path, "a", b"", overwrite=True)
    assert write_new(tmp_path, "a", b"").name == "a_2.safetensors"
    assert not left_over(tmp_path)


# What is overwritten


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_file_keeps_who_may_read_it(mode, tmp_path):
    path = save_region(example_region(), tmp_path / "r.safetensors")
    path.chmod(mode)
    save_region(example_region("b"), path)
    assert path.stat().st_mode & 0o777 == mode and load_region(path).name == "region b"


@POSIX
def test_a_new_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_model_is_never_written_over(tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    save_file({"lora_up.weight": torch.ones(2)}, model)
    before = contents(tmp_path)
    with pytest.raises(RegionError, match=r"model\.safetensors holds no safe region"):
        save_region(example_region(), model)
    with pytest.raises(RegionError, match="another name"):
        write_new(tmp_path, "model", region_bytes(example_region()), overwrite=True)
    for command in (["train", "--pack", "weapons"], ["train-balance", "--pack", "gender"]):
        with pytest.raises(SystemExit) as ended:  # before anything is learned
            main([*command, "--out", str(model)])
        assert ended.value.code == 2 and "--out FILE: model.safetensors holds no safe region" in capsys.readouterr().err
    assert contents(tmp_path) == before
    (tmp_path / "damaged.safetensors").write_bytes(b"half")
    save_region(example_region(), tmp_path / "damaged.safetensors")


@POSIX
def test_a_link_is_replaced_and_a_folder_that_is_one_is_followed(tmp_path):
    """Whoever may make links in the model folder says with one where regions are to lie; this pack makes none."""
    elsewhere, models = tmp_path / "elsewhere", tmp_path / "models"
    models.mkdir()
    target = save_region(example_region("a"), elsewhere / "a.safetensors")
    before = target.read_bytes()
    (models / "a.safetensors").symlink_to(target)
    (models / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    save_region(example_region("b"), models / "a.safetensors")
    assert target.read_bytes() == before and load_region(models / "a.safetensors").name == "region b"
    assert write_new(models, "dangling", region_bytes(example_region())).name == "dangling_2.safetensors"
    assert not (tmp_path / "nowhere").exists()
    (models / "team").symlink_to(elsewhere)
    write_new(models, "team/c", region_bytes(example_region("c")))
    assert (elsewhere / "c.safetensors").is_file()
    assert not [path for path in (models / "team").iterdir() if path.is_symlink()]


# Interrupted trainings


def test_stopping_a_training_never_costs_the_region_that_was_there(tmp_path):
    out = save_region(example_region("finished"), tmp_path / "weapons.safetensors")
    before = out.read_bytes()

    def stopped(visit: Any) -> None:
        raise KeyboardInterrupt

    for number in (2, 3):
        trainer = SimpleNamespace(run=stopped, region=example_region(f"try-{number}"))
        with pytest.raises(Failure, match=rf"Stopped\. What was learned so far is in .*weapons_{number}\.safetensors"):
            run(trainer, out, {"family": "demo"}, lambda progress: None)
    assert out.read_bytes() == before
    assert [load_region(tmp_path / f"weapons_{n}.safetensors").name for n in (2, 3)] == ["region try-2", "region try-3"]
