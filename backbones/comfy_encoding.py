"""Many prompts through ComfyUI's text encoders in few passes.

ComfyUI cuts a prompt into rows of tokens and has each part of its text encoder make states of those; all else is the
prompt's own affair, and cheap. Here, too, prompts go one by one through all of ComfyUI's code. But a part that is asked
for rows encodes with them the rows of the same length that the next prompts will ask it for, and remembers those.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from numbers import Integral
from typing import Any
from unittest.mock import patch

import comfy.model_management
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..region.conditioning import Entry

PROMPTS = 256  # looked ahead over; what is remembered is at most a pass for each length of rows
FEWEST = 4  # prompts; fewer gain nothing
CHECKED = 8  # prompts, encoded in both ways once
# At most so many tokens, and bytes of states, in a pass: more is hardly faster, and ComfyUI leaves room for one prompt.
TOKENS, BYTES = 2048, 2**26
TOLERANCE = 1e-3  # of a token's length; rounding in fp32 is a thousandth of that
SMALL = 50_000_000  # weights that compute: with fewer, threads mostly wait for each other where a machine is busy
PLAIN = (bool, int, float, str, list, tuple, type(None))

Row = tuple[int, ...]


def row_of(tokens: Any) -> Row | None:
    """A row of tokens to remember it by; None where it holds something else than numbers, as pictures are."""
    return tuple(tokens) if all(type(token) is int or isinstance(token, Integral) for token in tokens) else None


def rows_of(tokens: Any) -> Iterator[tuple[str, Row]]:
    """The rows in what ComfyUI's tokenizer makes of a prompt, `{name: [[(token, weight), ...], ...]}`, with names."""
    for name, rows in tokens.items() if isinstance(tokens, Mapping) else ():
        for pairs in rows if isinstance(rows, list) else ():
            pairs = pairs if isinstance(pairs, list) else ()
            row = row_of([pair[0] if isinstance(pair, tuple) and pair else None for pair in pairs])
            if row:
                yield name, row


def alike(one: Any, other: Any) -> bool:
    """Whether two nested values are equal up to rounding."""
    (ones, shape), (others, other_shape) = tree_flatten(one), tree_flatten(other)
    return shape == other_shape and all(map(_alike, ones, others))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(type(one) is type(other) and one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    apart, length = (one.float() - other.float()).norm(dim=-1), other.float().norm(dim=-1)
    return bool((apart <= TOLERANCE * length).all())


def _split(encoded: Any, count: int) -> list[Any]:
    """What a part made of so many rows, for each of them. Raises ValueError where it does not come apart."""
    leaves, shape = tree_flatten(encoded)
    if any(leaf is not None and not (isinstance(leaf, Tensor) and leaf.ndim > 1 and len(leaf) == count)
           for leaf in leaves):  # fmt: skip
        raise ValueError("This text encoder does not keep its rows apart.")
    cut = [[leaf] * count if leaf is None else leaf.split(1) for leaf in leaves]
    return [tree_unflatten(row, shape) for row in zip(*cut)]


def _joined(rows: Sequence[Any]) -> Any:
    """The opposite of `_split`. Always a copy: ComfyUI writes weights of words into it."""
    flat, shapes = zip(*map(tree_flatten, rows))
    return tree_unflatten([few[0] if few[0] is None else torch.cat(few) for few in zip(*flat)], shapes[0])


class _Plan:
    """The rows of several prompts."""

    def __init__(self, prompts: Sequence[Any]) -> None:
        found = [pair for tokens in prompts for pair in rows_of(tokens)]
        self.uses = Counter(row for _, row in found)
        self.names: dict[Row, set[str]] = {}
        self.rows: dict[tuple[str, int], list[Row]] = {}  # by name and length, in the order of the prompts
        for name, row in found:
            self.names.setdefault(row, set()).add(name)
            self.rows.setdefault((name, len(row)), []).append(row)


class _Part:
    """Stands in for the `encode` of a text encoder's part, while a plan's prompts go through it in their order.

    Counts how often it knew the answer: `recalled`. It `failed` where rows came out of a pass in another way than
    alone, or not at all; from then on it is asked as ComfyUI asks it.
    """

    def __init__(self, module: nn.Module, plan: _Plan) -> None:
        self.module, self.encode, self.plan = module, module.encode, plan
        self.recalled, self.failed = 0, False
        self._names: set[str] = set()  # that this part's rows may have
        self._known: dict[tuple[str, Row], Any] = {}
        self._left = Counter(plan.uses)
        self._queues: dict[tuple[str, int], Iterator[Row]] = {}
        self._token_bytes = 0.0

    def __call__(self, tokens: Sequence[Any]) -> Any:
        rows = [row_of(row) for row in tokens]
        planned = [self.plan.names[row] for row in rows if row in self.plan.names]
        if self.failed or None in rows or not planned:
            return self.encode(tokens)
        self._names = self._names.intersection(*planned) or planned[0]
        # some encoders read with one setting, then with another
        state = repr([value for value in vars(self.module).values() if isinstance(value, PLAIN)])
        if missing := dict.fromkeys(row for row in rows if (state, row) not in self._known):
            alone = None if self._token_bytes else self.encode(tokens)
            if alone is not None:
                leaves = [leaf for leaf in tree_flatten(alone)[0] if isinstance(leaf, Tensor)]
                self._token_bytes = max(sum(leaf.nbytes for leaf in leaves) / sum(map(len, rows)), 1.0)
            try:
                wanted = [*missing, *self._next(state, missing)]
                encoded = self.encode([list(row) for row in wanted])
                self._known |= {(state, row): states for row, states in zip(wanted, _split(encoded, len(wanted)))}
                self.failed = alone is not None and not alike(self._of(state, rows), alone)
            except comfy.model_management.InterruptProcessingException:
                raise
            except Exception:  # made for one prompt, or for less memory
                self.failed = True
            if self.failed:
                self._known.clear()
                return self.encode(tokens) if alone is None else alone
        self.recalled += not missing
        result = self._of(state, rows)
        for row in rows:
            self._left[row] -= 1
            if self._left[row] == 0:
                self._known.pop((state, row), None)
        return result

    def _of(self, state: str, rows: Sequence[Row]) -> Any:
        return _joined([self._known[state, row] for row in rows])

    def _next(self, state: str, missing: Mapping[Row, None]) -> list[Row]:
        """Rows of the same length for prompts to come, as many as go into a pass beside the missing ones."""
        length = len(next(iter(missing)))
        queue = min(self._names), length
        coming = self._queues.setdefault(queue, iter(self.plan.rows.get(queue, ())))
        new = (row for row in coming
               if row not in missing and self._left[row] > 0 and (state, row) not in self._known)  # fmt: skip
        most = int(min(TOKENS, BYTES / self._token_bytes)) // max(length, 1)
        return list(dict.fromkeys(islice(new, max(most - len(missing), 0))))


@contextmanager
def few_threads(module: nn.Module) -> Iterator[None]:
    """One thread for what a small module does on the CPU."""
    threads = torch.get_num_threads()
    layers = (layer for layer in module.modules() if not isinstance(layer, nn.Embedding))
    if sum(weight.numel() for layer in layers for weight in layer.parameters(recurse=False)) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Together:
    """Encodes prompts of one CLIP with each other, for as long as that gives what one by one gives.

    Args:
        one: encodes the tokens of one prompt, in all of ComfyUI's ways.
    """

    def __init__(self, clip: Any, one: Callable[[Any], Entry]) -> None:
        self.clip, self.one = clip, one
        self.encoder = getattr(clip, "cond_stage_model", nn.Module())  # packs have CLIPs of other kinds
        self.works: bool | None = None  # not known until some prompts were encoded in both ways
        self.barred: set[str] = set()  # parts that are asked for each prompt alone

    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        entries = []
        with few_threads(self.encoder):
            for begin in range(0, len(prompts), PROMPTS):
                with torch.inference_mode():  # as ComfyUI's nodes do: tokens may hold embeddings from a file
                    tokens = [self.clip.tokenize(prompt) for prompt in prompts[begin : begin + PROMPTS]]
                entries += self._encoded(tokens)
        return entries

    def _encoded(self, prompts: Sequence[Any]) -> list[Entry]:
        # hooks change weights between prompts, or within one
        hooked = getattr(getattr(self.clip, "patcher", None), "forced_hooks", None) is not None
        if self.works is False or hooked or len(prompts) < FEWEST:
            return [self.one(tokens) for tokens in prompts]
        entries, remembered = [], []
        with self._parts(_Plan(prompts)) as parts:
            for tokens in prompts:
                before = sum(part.recalled for part in parts)
                entries.append(self.one(tokens))
                if sum(part.recalled for part in parts) > before:
                    remembered.append(len(entries) - 1)
        if self.works is None and remembered:
            # a part may leave something behind for the code around it, or see a row in the light of others
            tried = remembered[:: -(-len(remembered) // CHECKED)]
            self.works = all(alike(entries[i], self.one(prompts[i])) for i in tried)
            if not self.works:
                return [self.one(tokens) for tokens in prompts]
        return entries

    @contextmanager
    def _parts(self, plan: _Plan) -> Iterator[list[_Part]]:
        """The text encoder's parts, with their `encode` replaced."""
        with ExitStack() as stack:
            parts = {}
            for name, module in self.encoder.named_modules():
                if hasattr(module, "encode_token_weights") and hasattr(module, "encode") and name not in self.barred:
                    parts[name] = _Part(module, plan)
                    stack.enter_context(patch.object(module, "encode", parts[name]))
            try:
                yield list(parts.values())
            finally:
                self.barred |= {name for name, part in parts.items() if part.failed}
