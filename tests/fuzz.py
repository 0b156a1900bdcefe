"""Files, texts and names from strangers, by the thousand: `python tests/fuzz.py --cases 100000`.

Hypothesis draws them; half are real files with something changed. Whatever comes, it is read or refused in one
sentence: no other exception, at most two seconds and 64 MiB, and nothing is written outside of the folder.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from comfyui_safe_region.nodes import cards, names
from comfyui_safe_region.nodes.origins import refusal
from comfyui_safe_region.nodes.uploads import Refused, store
from comfyui_safe_region.region import Region, RegionError, import_paper, load_region, region_bytes, region_from_bytes
from comfyui_safe_region.region import words as region_words
from comfyui_safe_region.training.attributes import load_attribute, parse_attribute
from comfyui_safe_region.training.packs import FOLDER as PACKS
from comfyui_safe_region.training.pairs import PairsError, load_pairs, parse_pairs
from region_examples import example_part

SENTENCES = (RegionError, PairsError, Refused)  # what a user may get to see
SECONDS, BYTES, LETTERS = 2.0, 64 * 2**20, 1000
DEMO = Path(__file__).parent.parent / "demo" / "regions"
NAME = "mine.safetensors"


# --- what is drawn ---

ODD = ["", "{", "}", "{}", "{|}", "{a|b}" * 30, "=>", " => ", "keep:", "held-out:", '"', ",", "\n", "\r", "\u2028",
       "\0", "\ufeff", "\ud800", "(" * 300, ")" * 300, "((((a:1e9))))", "\\", ":", "#", "a" * 3000, "null", "NaN",
       "1e999", "-0", "9" * 5000, "../", "..\\", "/etc/passwd", "C:\\x", "con", "nul.safetensors", ".safetensors",
       "<b>", "%00", "\U0001f52a", "\u202e"]  # fmt: skip
LETTER = st.characters(codec="utf-8")
texts = st.lists(st.one_of(st.sampled_from(ODD), st.text(LETTER, max_size=20)), max_size=12).map("".join)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -1, 0, 2**63, 1e-45, 3e38]))
plain_values = st.one_of(st.none(), st.booleans(), numbers, texts)
trees = st.recursive(plain_values, lambda inner: st.one_of(
    st.lists(inner, max_size=6), st.dictionaries(texts, inner, max_size=6)), max_leaves=30)  # fmt: skip
seeds = st.integers(0, 2**48)


@cache
def region_files() -> list[bytes]:
    parts = example_part("a", cross_attn=6), example_part("b", seed=1, cross_attn=6, pooled_output=5)
    small = Region(parts, {"name": "small", "preview": picture("PNG"), "recipe": {"preset": "region", "pairs": 3}})
    found = [region_bytes(small), *(path.read_bytes() for path in sorted(DEMO.glob("*.safetensors")))]
    return [*found, *map(unhashed, found)]


def unhashed(content: bytes) -> bytes:
    """A region file as older ones are: nothing in it says whether it is whole."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"].pop("sha256", None)
    return with_length(json.dumps(header).encode()) + content[end:]


def with_length(header: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def picture(kind: str) -> str:
    written, more = io.BytesIO(), {"progressive": True} if kind == "JPEG" else {}
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).save(written, kind, **more)
    return base64.b64encode(written.getvalue()).decode()


@cache
def paper_files() -> list[bytes]:
    found = []
    for legacy in (False, True):
        written = io.BytesIO()
        state = {"a": torch.randn(1, 1, 8), "b": torch.randn(1, 77, 1)}
        torch.save(state, written, _use_new_zipfile_serialization=not legacy)
        found.append(written.getvalue())
    return found


@cache
def pair_texts() -> list[str]:
    packs = [path.read_text(encoding="utf-8") for path in sorted(PACKS.rglob("*.txt"))]
    table = 'unsafe,safe,keep\n"a {knife|gun}, big",a {cup|pen},\n,,a cook\n'
    rows = '{"unsafe": "a gun", "safe": "a cup"}\n{"keep": "a {cat|dog}", "leave_out": "x"}\n'
    return [table, rows, *(text[:3000] for text in packs), *(text[-2000:] for text in packs)]


def mutated(content: bytes, draw: Random) -> bytes:
    """Bytes with a few places changed, cut out, put in or doubled; most often near the beginning, where headers are."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = min(int(draw.random() ** draw.choice((1, 4)) * (len(found) + 1)), max(len(found) - 1, 0))
        kind = draw.randrange(6)
        if kind == 0 and found:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and found:
            found[at : at + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, draw.randbytes(8), b"\x7f\xf0\0\0"))
        elif kind == 2:
            del found[at : at + draw.choice((1, 2, 8, 200))]
        elif kind == 3:
            found[at:at] = draw.choice(ODD).encode(errors="replace")[:400]
        elif kind == 4:
            found[at:at] = found[at : at + draw.choice((4, 64, 1000))] * draw.choice((1, 2, 20))
        else:
            del found[at + draw.randrange(1000) :]
    return bytes(found)


def mutations(of: Callable[[], list[Any]]) -> st.SearchStrategy[bytes]:
    def make(pair: tuple[int, int]) -> bytes:
        which, number = pair
        real = of()[which % len(of())]
        return mutated(real.encode() if isinstance(real, str) else real, Random(number))

    return st.tuples(st.integers(0, 1000), seeds).map(make)


def with_header(metadata: Any, number: int) -> bytes:
    """A region file whose header somebody wrote: its card, and now and then its tensors' names, kinds and places."""
    draw = Random(number)
    real = region_files()[draw.randrange(len(region_files()))]
    end = 8 + int.from_bytes(real[:8], "little")
    header = json.loads(real[8:end])
    known = json.loads(header["__metadata__"]["region"])
    key = draw.choice(("name", "preview", "measured", "calibration", "combined", "recipe", "shares", "encoder"))
    card = {key: metadata if draw.random() < 0.3 else value for key, value in known.items()} | {key: metadata}
    header["__metadata__"]["region"] = json.dumps(card if draw.random() < 0.9 else metadata)
    if draw.random() < 0.8:
        header["__metadata__"].pop("sha256", None)  # as older files have none
    tensors = [key for key in header if key != "__metadata__"]
    for key in draw.sample(tensors, min(len(tensors), draw.choice((0, 0, 1, 3)))):
        entry = header.pop(key)
        kinds = "F64", "F16", "F8_E4M3", "I64"
        shapes = [], [0], [1], [2**40], [-1], [0, 2**62], entry["shape"][::-1]
        entry[draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice((*kinds, *shapes, metadata))
        header[draw.choice((key, key + ".x", "a..gate", key.upper(), "x" * 2000 + key))] = entry
    return with_length(json.dumps(header).encode()) + real[end:]


headers = st.builds(with_header, trees, seeds)


def zipped(number: int) -> bytes:
    """An archive as torch writes them, packed, with other members and other pickles."""
    draw, written = Random(number), io.BytesIO()
    how = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(io.BytesIO(paper_files()[0])) as real, zipfile.ZipFile(written, "w", how) as made:
        for entry in real.infolist():
            content = real.read(entry)
            made.writestr(entry.filename, mutated(content, draw) if draw.random() < 0.4 else content)
        if draw.random() < 0.2:
            made.writestr(f"archive/data/{draw.randrange(9)}", b"\0" * draw.choice((10, 3_000_000, 30_000_000)))
    return written.getvalue()


papers = st.one_of(mutations(paper_files), seeds.map(zipped), st.binary(max_size=200))
region_contents = st.one_of(mutations(region_files), headers, st.binary(max_size=200))
pair_contents = st.one_of(mutations(pair_texts), texts.map(lambda text: text.encode(errors="surrogatepass")))


def carried_text(number: int, content: bytes, tree: Any, text: str) -> str:
    draw = Random(number)
    found = {"name": draw.choice((NAME, NAME, NAME, "other", text)), "sha256": cards.sha256(content), "source": text,
             "data": base64.b64encode(content).decode()}  # fmt: skip
    for key in draw.sample(sorted(found), draw.choice((0, 0, 1, 2))):
        found[key] = draw.choice((tree, text, None, "", "%%%", found[key][:-1]))
    written = json.dumps(found)
    return mutated(written.encode(), draw).decode(errors="replace") if draw.random() < 0.3 else written


carried = st.one_of(st.builds(carried_text, seeds, region_contents, trees, texts), texts, trees.map(json.dumps))


def broken_picture(number: int) -> str:
    draw = Random(number)
    real = base64.b64decode(picture(draw.choice(("PNG", "JPEG"))))
    return base64.b64encode(mutated(real, draw)).decode()


# --- what is done with it ---


class Folder:
    """The folder that files go to, in a temporary one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, name: str) -> Path | None:
        """As ComfyUI does: a file in the folder, whatever the name tries."""
        path = names.inside(self.path, name) if name else None
        return path if path is not None and os.path.isfile(path) else None

    def write(self, content: bytes, suffix: str) -> Path:
        path = self.path / f"given{suffix}"
        path.write_bytes(content)
        return path


def read_region(folder: Folder, content: bytes) -> None:
    cards.look(folder.write(content, ".safetensors"))
    with contextlib.suppress(RegionError):
        load_region(folder.path / "given.safetensors")
    region = region_from_bytes(content, NAME)
    found = cards.card(content, NAME)
    cards.card_text(found)
    json.dumps(found, allow_nan=False).encode()
    region_bytes(region)


def read_preview(folder: Folder, encoded: str) -> None:
    assert len(cards.preview(encoded)) < 500_000


def read_paper(folder: Folder, content: bytes) -> None:
    region_bytes(import_paper(folder.write(content, ".pth")))


def read_pairs(folder: Folder, content: bytes) -> None:
    text = content.decode(errors="replace")
    readers = [partial(parse_pairs, text, form=form) for form in ("text", "csv", "jsonl")]
    readers += [partial(load_pairs, folder.write(content, suffix)) for suffix in (".txt", ".csv", ".jsonl")]
    readers += [partial(parse_attribute, text), partial(load_attribute, folder.write(content, ".txt"))]
    each(readers, lambda found: found.text().encode())


def read_carried(folder: Folder, text: str) -> None:
    if not folder.find(NAME):
        (folder.path / NAME).write_bytes(region_files()[0])
    for name in (NAME, "other", text[:200]):
        found = cards.standing(name, text, folder.find, folder.path)
        json.dumps(vars(found), allow_nan=False).encode()
        assert found.runs or found.message
        said = []
        each([partial(cards.chosen_content, name, text, folder.find, folder.path)], said.append)
        # the card and the run agree, but for a file that is damaged: that one is read when it runs
        assert bool(said) == found.runs or found.state == "damaged", (name, found.state)
        if said and (own := folder.find(name)):
            assert said[0] == own.read_bytes() or found.state == "damaged", "another region than one's own of that name"
        each([partial(cards.embedded, name, text, folder.find, folder.path),
              partial(cards.origin, name, text, folder.find)])  # fmt: skip


def take_upload(folder: Folder, given: tuple[str, bytes, bool]) -> None:
    store(*given, folder.find, folder.path)


def read_names(folder: Folder, given: tuple[str, Any]) -> None:
    name, tree = given
    clean = names.safe_name(name)
    assert names.inside(folder.path, clean) is not None and "\n" not in clean
    names.inside(folder.path, name)
    names.shown(tree).encode(), names.shown(name).encode()
    nodes = {key: {"class_type": "X", "inputs": value if isinstance(value, dict) else {}}
             for key, value in (tree.items() if isinstance(tree, dict) else ())}  # fmt: skip
    names.checkpoint_of(nodes, next(iter(nodes), name))
    refusal({"X-Safe-Region": "1", "Host": name, "Origin": f"http://{name}"}, name)
    refusal({"X-Safe-Region": "1", "Host": "127.0.0.1", "Origin": name})


def read_prompt(folder: Folder, text: str) -> None:
    region_words.without_weights(text)
    region_words.locate([piece.encode() for piece in text[:400].split()] + [None], text[:2000])


KINDS: dict[str, tuple[st.SearchStrategy, Callable[[Folder, Any], None]]] = {
    "regions": (region_contents, read_region), "previews": (seeds.map(broken_picture), read_preview),
    "pth": (papers, read_paper), "pairs": (pair_contents, read_pairs), "carried": (carried, read_carried),
    "uploads": (st.tuples(texts.map(lambda text: text + ".safetensors"), region_contents, st.booleans()), take_upload),
    "names": (st.tuples(texts, trees), read_names),
    "prompts": (texts.map(lambda text: text.encode(errors="replace").decode()), read_prompt),
}  # fmt: skip


def each(acts: list[Callable[[], Any]], then: Callable[[Any], Any] = lambda found: None) -> None:
    """Several ways to read the same; each may refuse."""
    for act in acts:
        try:
            then(act())
        except SENTENCES as error:
            check_sentence(error)


def check_sentence(error: Exception) -> None:
    said = str(error)
    said.encode()
    one = said.strip() and "\n" not in said and len(said) <= LETTERS
    assert one, f"no sentence: {said[:300]!r} ({len(said)} letters)"


# --- what is watched ---


class Hung(BaseException):
    pass


@dataclass
class Watch:
    """One folder where writing is allowed, and what happened that must not."""

    folder: Path
    found: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0
    on: bool = False

    def audit(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            wrote = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            paths = [path] if wrote else []
        else:
            paths = [one for one in args if isinstance(one, str | bytes | os.PathLike)] if event in (
                "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod",
                "subprocess.Popen", "os.system", "socket.connect") else []  # fmt: skip
        for path in paths:
            place = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else str(self.folder)
            if not place.startswith((str(self.folder), "/proc/self/", "/dev/null")):
                self.outside.append(f"{event} {place}")

    def case(self, kind: str, act: Callable[[], None], given: Any) -> None:
        before, since = memory(reset=True), time.process_time()  # waiting for a busy disk is no hang
        self.on = True
        signal.setitimer(signal.ITIMER_REAL, 20)
        try:
            act()
        except SENTENCES as error:
            try:
                check_sentence(error)
            except AssertionError as wrong:
                self.note(f"{kind}: {wrong}", given)
        except (Exception, Hung) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            self.note(f"{kind}: {type(error).__name__} in {place} {str(error)[:40]}", given)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.on = False
        took, grown = time.process_time() - since, memory() - before
        self.slowest, self.largest = max(self.slowest, took), max(self.largest, grown)
        if took > SECONDS:
            self.note(f"{kind}: longer than {SECONDS:.0f} s", given)
        if grown > BYTES:
            self.note(f"{kind}: more than {BYTES // 2**20} MiB", given)
        for place in self.outside:
            self.note(f"{kind}: wrote outside: {place}", given)
        self.outside.clear()

    def note(self, what: str, given: Any) -> None:
        self.found[what] += 1
        self.examples.setdefault(what, repr(given))


def memory(reset: bool = False) -> int:
    """Bytes that this process takes: what it takes now, with `reset`; otherwise the most since then. Linux only."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS" if reset else "VmHWM"))


def hung(*_: Any) -> None:
    raise Hung("for 20 s")


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "regions"
        folder.mkdir()
        watch = Watch(folder)
        sys.addaudithook(watch.audit)  # there is no way to take it away: off where no case runs
        usual = signal.signal(signal.SIGALRM, hung)
        try:
            yield watch
        finally:
            signal.signal(signal.SIGALRM, usual)
            watch.on = False


def quiet(text: str) -> None:
    """Say nothing."""


def run(cases: int, number: int = 0, kinds: list[str] | None = None, say: Callable[[str], None] = quiet) -> Watch:
    """Run so many cases, evenly over the kinds."""
    chosen = kinds or list(KINDS)
    many = settings(max_examples=cases // len(chosen), database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip
    with watched() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in chosen:
            strategy, act = KINDS[kind]
            since, folder = time.monotonic(), Folder(watch.folder)

            @seed(number)
            @many
            @given(strategy)
            def one(given: Any) -> None:
                watch.case(kind, lambda: act(folder, given), given)  # noqa: B023

            one()
            say(f"{kind}: {cases // len(chosen)} cases in {time.monotonic() - since:.0f} s; so far the slowest took "
                f"{watch.slowest:.2f} s and the largest {watch.largest / 2**20:.0f} MiB; "
                f"{sum(watch.found.values())} findings")  # fmt: skip
    return watch


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="default: all")
    parser.add_argument("--examples", type=int, default=400, help="letters of an example of each finding")
    chosen = parser.parse_args()
    watch = run(chosen.cases, chosen.seed, chosen.kinds, lambda text: print(text, flush=True))
    for what, count in watch.found.most_common():
        print(f"\n{count} times  {what}\n    {watch.examples[what][: chosen.examples]}")
    print("\nnothing found" if not watch.found else f"\n{len(watch.found)} kinds of findings")
    return 1 if watch.found else 0


if __name__ == "__main__":
    sys.exit(main())
