"""The paper's published vectors: what they do here is what they do there, and a pickle with code in it does not run."""
from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_safe_region.region import RegionError, apply_to_conditioning, import_paper, load_region, save_region
from region_examples import no_hang, same_bits

WIDTH, TOKENS = 8, 77


def vectors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"a": torch.randn(1, 1, WIDTH, generator=draw), "b": torch.rand(1, TOKENS, 1, generator=draw)}


def written(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(RegionError) as caught:
        import_paper(path)
    text = str(caught.value)
    assert text.startswith(path.name + ": ") and text.endswith(".") and "\n" not in text
    return text


def test_the_direction_acts_as_in_the_paper(tmp_path):
    state = vectors()
    region = import_paper(written(tmp_path / "nudity.pth", state))
    assert [part.label for part in region.parts] == ["nudity"] and not region.parts[0].gates
    c = torch.randn(2, TOKENS, WIDTH)
    (out,) = apply_to_conditioning([[c, {}]], region)
    assert torch.equal(out[0], c + state["b"] * state["a"]), "c + b a, exactly"
    for beta in (0.5, 2.0, 4.0):  # powers of two: the order of the factors makes no rounding
        (out,) = apply_to_conditioning([[c, {}]], region, beta)
        assert torch.equal(out[0], c + beta * state["b"] * state["a"])
    (out,) = apply_to_conditioning([[c, {}]], region, 0.3)
    torch.testing.assert_close(out[0], c + 0.3 * state["b"] * state["a"])
    (half,) = apply_to_conditioning([[c.half(), {}]], region)
    assert torch.equal(half[0], (c.half().float() + state["b"] * state["a"]).half())


def test_long_prompts_get_the_direction_in_each_chunk(tmp_path):
    state = vectors()
    c = torch.randn(1, 2 * TOKENS, WIDTH)
    (out,) = apply_to_conditioning([[c, {}]], import_paper(written(tmp_path / "x.pth", state)))
    assert torch.equal(out[0], c + (state["b"] * state["a"]).repeat(1, 2, 1))


@pytest.mark.parametrize("kind", ["ordered", "half", "parameter", "legacy", "extra"])
def test_the_forms_such_a_file_may_have(kind, tmp_path):
    state = vectors()
    path = tmp_path / "x.pth"
    if kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        forms = {
            "ordered": OrderedDict(state), "half": {name: tensor.half() for name, tensor in state.items()},
            "parameter": {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
            "extra": {**state, "step": 3},
        }  # fmt: skip
        torch.save(forms[kind], path)
    region = import_paper(path, "a concept")
    move = region.parts[0].moves["cross_attn"]
    assert move.direction.shape == (WIDTH,) and move.profile.shape == (TOKENS,)
    assert not move.direction.requires_grad and move.direction.dtype == torch.float32
    save_region(region, tmp_path / "x.safetensors")
    loaded = load_region(tmp_path / "x.safetensors")
    assert same_bits(loaded.parts[0].moves["cross_attn"].direction, move.direction)
    assert loaded.metadata == region.metadata and loaded.name == "a concept" and loaded.parts[0].label == "a-concept"


class Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_the_pickle_does_not_run(form, tmp_path):
    path, target = tmp_path / "evil.pth", tmp_path / "it-ran"
    state = {**vectors(), "c": Bomb(str(target))}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    refused(path)
    assert not target.exists()
    if form != "plain pickle":  # the bomb is a real one
        torch.load(path, weights_only=False)
        assert target.exists()


def packed(method: int, size: int) -> bytes:
    """A file of the paper's form with one tensor more, of `size` bytes, all of it compressed."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save({**vectors(), "c": torch.zeros(1)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(out, "w", method) as target:
        for entry in source.infolist():
            with target.open(entry.filename, "w") as file:
                for _ in range(size // 2**20 if entry.filename.endswith("data/2") else 0):
                    file.write(bytes(2**20))
                file.write(source.read(entry))
    return out.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_small_file_that_unpacks_to_a_large_one(method, tmp_path):
    resource = pytest.importorskip("resource", reason="memory is measured on POSIX")
    path = tmp_path / "bomb.pth"
    path.write_bytes(packed(method, 2**30 if method == zipfile.ZIP_DEFLATED else 2**27))
    assert path.stat().st_size < 2**21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with no_hang():
        refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "kB"


def test_a_compressed_file_of_the_right_form_is_read(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(packed(zipfile.ZIP_DEFLATED, 0))
    assert same_bits(import_paper(path).parts[0].moves["cross_attn"].direction, vectors()["a"].flatten())


def test_a_file_larger_than_any_direction(tmp_path):
    (tmp_path / "x.pth").write_bytes(saved(_use_new_zipfile_serialization=False) + bytes(5 * 2**20))
    assert "larger than 4 MB" in refused(tmp_path / "x.pth")


def sparse() -> torch.Tensor:
    return torch.ones(1, 1, WIDTH).to_sparse()


@pytest.mark.parametrize(
    "state",
    [
        {}, [1, 2], torch.ones(3), {"a": torch.ones(1, 1, 8)}, {"a": 1, "b": 2}, {"a": "x", "b": None},
        {**vectors(), "a": torch.ones(8)}, {**vectors(), "a": torch.ones(1, 2, 8)},
        {**vectors(), "a": torch.ones(1, 1, 0)},
        {**vectors(), "b": torch.ones(1, 77, 2)}, {**vectors(), "b": torch.ones(2, 77, 1)},
        {**vectors(), "b": torch.ones(1, 5000, 1)}, {**vectors(), "a": torch.ones(1, 1, 1).expand(1, 1, 10**9)},
        {**vectors(), "a": torch.ones(1, 1, 8, dtype=torch.int64)},
        {**vectors(), "b": torch.full((1, 77, 1), torch.nan)},
        {**vectors(), "a": torch.full((1, 1, 8), torch.inf)}, {**vectors(), "a": sparse()},
        {**vectors(), "a": torch.ones(1, 1, 8).to(torch.float8_e4m3fn)},
        {**vectors(), "b": torch.ones(1, 77, 1).to(torch.float8_e5m2)},
        {**vectors(), "a": torch.full((1, 1, 8), 1e300, dtype=torch.float64)},
        {**vectors(), "a": torch.full((1, 1, 8), 1e30)},
        {**vectors(), "a": torch.ones(1, 1, 8, device="meta")}, {**vectors(), "a": torch.ones(1, 1, 8) * 1j},
    ],
)  # fmt: skip
def test_other_contents_are_refused(state, tmp_path):
    refused(written(tmp_path / "x.pth", state))


def test_files_that_are_none(tmp_path):
    for name, noise in (("empty.pth", b""), ("text.pth", b"hello"), ("pickle.pth", pickle.dumps({"a": 1}))):
        (tmp_path / name).write_bytes(noise)
        refused(tmp_path / name)
    (tmp_path / "folder.pth").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder.pth")
    assert "cannot be read" in refused(tmp_path / "missing.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("x", "y")
    refused(tmp_path / "zip.pth")


def saved(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(vectors(), buffer, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from([saved(), saved(_use_new_zipfile_serialization=False)]),
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=6), st.integers(0, 3000),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_damaged_files_give_a_sentence_or_a_direction(tmp_path_factory, content, flips, length):
    damaged = bytearray(content[:length])
    for position, value in flips:
        if position < len(damaged):
            damaged[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(damaged)
    try:
        import_paper(path)
    except RegionError as error:
        assert str(error).startswith("damaged.pth: ") and "\n" not in str(error)
