"""Every option of a conditioning that this ComfyUI's own code reads or writes is classified in region/blocks.py."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfyui_safe_region.region.blocks import BESIDE, LOOKED_INTO, NO_TEXT, TEXT_KEYS, UNREACHED

COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))
CLASSIFIED = {*TEXT_KEYS, *(key for group in BESIDE for key in group), *UNREACHED, *LOOKED_INTO, *NO_TEXT}
# What reads entries. ControlNets and diffusion models read what `extra_conds` made of them.
READERS = ("model_base.py", "samplers.py", "sampler_helpers.py", "hooks.py", "context_windows.py")
ENTRIES = {"kwargs", "args", "params", "cond", "conds", "cond_dict", "c", "x", "kk", "t", "n", "d", "temp", "smallest",
           "entry"}  # fmt: skip
# that the names above hold elsewhere in these files: what a sampler hands to a callback or a model, a hook, a window
OTHERS = {"denoised", "device", "i", "x", "sigma", "sigma_hat", "positive", "target", "transformer_options",
          "model_options", "latent_shape", "pre_filter_count"}  # fmt: skip


def constant(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def is_options(node: ast.AST) -> bool:
    """Whether an expression may be the options of an entry: `kwargs`, or `entry[1]`."""
    if isinstance(node, ast.Name):
        return node.id in ENTRIES
    return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 1


def keys_read(tree: ast.AST) -> Iterator[str]:
    """Of `kwargs.get("key")`, `kwargs["key"]`, `"key" in kwargs`, and the same of each of several keys in a loop."""
    looped: dict[str, list[str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Tuple | ast.List):
            looped.setdefault(getattr(node.target, "id", ""), []).extend(map(constant, node.iter.elts))
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=options, attr="get" | "pop"), args=[key, *_]):
                pass
            case ast.Subscript(value=options, slice=key):
                pass
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[options]):
                pass
            case _:
                continue
        if is_options(options):
            yield from filter(None, [constant(key), *looped.get(getattr(key, "id", ""), [])])


def keys_of(mapping: ast.AST, named: dict[str, set[str]]) -> Iterator[str]:
    """The keys of a dict that is written out, or of one that has a name."""
    if isinstance(mapping, ast.Name):
        yield from named.get(mapping.id, ())
    elif isinstance(mapping, ast.Dict):
        for key, value in zip(mapping.keys, mapping.values):
            if key is None:  # {**others}
                yield from keys_of(value, named)
            elif found := constant(key):
                yield found


def keys_written(function: ast.FunctionDef) -> Iterator[str]:
    """Of `conditioning_set_values(cond, {"key": ...})`, and of `entry[1]["key"] = ...`, copied or not."""
    named: dict[str, set[str]] = {}
    copies = set()
    stored = []
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict() as mapping):
                named.setdefault(name, set()).update(keys_of(mapping, {}))
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(value=of, attr="copy"))):
                copies |= {name} if is_options(of) else set()
            case ast.Assign(targets=[ast.Subscript(value=of, slice=key)]) if constant(key):
                stored.append((of, key.value))
    for of, key in stored:
        if isinstance(of, ast.Name):
            named.get(of.id, set()).add(key)
        if getattr(of, "id", "") in copies or (is_options(of) and isinstance(of, ast.Subscript)):
            yield key
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called.startswith("conditioning_set_values"):
                for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                    yield from keys_of(argument, named)


def keys_encoded(function: ast.FunctionDef) -> Iterator[str]:
    """What a text encoder returns beside states and pooled vector, which becomes options of the entry."""
    if not function.name.startswith("encode"):
        return
    extra = {"extra", "pooled_dict"}
    for node in ast.walk(function):
        match node:
            case ast.Return(value=ast.Tuple(elts=[_, _, ast.Dict() as mapping])):
                yield from keys_of(mapping, {})
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict() as mapping) if name in extra:
                yield from keys_of(mapping, {})
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=key)]) if name in extra:
                yield from filter(None, [constant(key)])


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def read() -> set[str]:
    trees = (ast.parse((COMFYUI / "comfy" / name).read_text(encoding="utf-8")) for name in READERS)
    return {key for tree in trees for key in keys_read(tree)} - OTHERS


def written() -> set[str]:
    paths = [COMFYUI / "nodes.py", COMFYUI / "comfy" / "hooks.py", *(COMFYUI / "comfy_extras").glob("*.py")]
    return {key for path in paths for function in functions(path) for key in keys_written(function)}


def encoded() -> set[str]:
    paths = [*(COMFYUI / "comfy" / "text_encoders").glob("*.py"), *(COMFYUI / "comfy").glob("sd*.py")]
    return {key for path in paths for function in functions(path) for key in keys_encoded(function)}


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (read, {"cross_attn", "attention_mask", "conditioning_llama3", "pooled_output", "gligen", "default"}),
        (written, {"gligen", "cross_attn_controlnet", "reference_latents", "area", "vace_frames", "hooks"}),
        (encoded, {"conditioning_llama3", "conditioning_mt5xl", "conditioning_lyrics", "clip_start_percent"}),
    ],
    ids=["read", "written", "encoded"],
)  # fmt: skip
def test_every_option_of_comfyui_is_classified(found, known):
    keys = found()
    assert known <= keys, "the search finds what is there"
    assert not sorted(keys - CLASSIFIED), "options that region/blocks.py does not know: text, or no text?"


def test_no_option_is_two_things():
    kinds = (TEXT_KEYS, *BESIDE, UNREACHED, LOOKED_INTO, NO_TEXT)
    assert len(CLASSIFIED) == sum(map(len, kinds))


def test_the_search_finds_every_way_of_reading_and_writing():
    code = """
def extra_conds(self, **kwargs):
    a, b = kwargs.get("one", None), kwargs["two"]
    if "three" in kwargs:
        pass
    for k in ("four", "five"):
        kwargs.get(k)
    [kwargs[key] for key in ["six"]]
"""
    assert set(keys_read(ast.parse(code))) == {"one", "two", "three", "four", "five", "six"}
    code = """
def execute(self, positive):
    values = {"one": 1}
    values["two"] = 2
    positive = node_helpers.conditioning_set_values(positive, {"three": 3, **values}, append=True)
    conditioning_set_values_with_timestep_range(positive, values={"four": 4})
    for t in positive:
        d = t[1].copy()
        d["five"] = 5
        t[1]["six"] = 6
"""
    (function,) = ast.parse(code).body
    assert set(keys_written(function)) == {"one", "two", "three", "four", "five", "six"}
