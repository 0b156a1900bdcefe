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
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..region.conditioning import Entry

PROMPTS = 64  # looked ahead over: what is remembered takes as much memory as their states
FEWEST = 4  # prompts; fewer gain nothing
# At most so many tokens, and bytes of states, in a pass: more is hardly faster, and ComfyUI leaves room for one prompt.
TOKENS, BYTES = 2048, 2**27
TOLERANCE = 1e-3  # of a token's length; rounding in fp32 is a thousandth of that
PLAIN = (bool, int, float, str, list, tuple, type(None))

Row = tuple[int, ...]


def row_of(tokens: Any) -> Row | None:
    """A row of tokens to remember it by; None where it holds something else than numbers, as pictures are."""
    return tuple(map(int, tokens)) if all(isinstance(token, Integral) for token in tokens) else None


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
    if any(leaf is not None and not (isinstance(leaf, Tensor) and leaf.ndim > 1 and len(leaf) == count)
           for leaf in tree_flatten(encoded)[0]):  # fmt: skip
        raise ValueError("This text encoder does not keep its rows apart.")
    return [tree_map(lambda leaf: leaf if leaf is None else leaf[i : i + 1], encoded) for i in range(count)]


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

    `passes` are those through the part itself. It `failed` where rows came out of a pass in another way than alone;
    from then on it is asked as ComfyUI asks it.
    """

    def __init__(self, module: nn.Module, plan: _Plan) -> None:
        self.module, self.encode, self.plan = module, module.encode, plan
        self.passes, self.failed = 0, False
        self._names: set[str] = set()  # that this part's rows may have
        self._known: dict[tuple[str, Row], Any] = {}
        self._left = Counter(plan.uses)
        self._queues: dict[tuple[str, int], Iterator[Row]] = {}
        self._token_bytes = 0.0

    def __call__(self, tokens: Sequence[Any]) -> Any:
        rows = [row_of(row) for row in tokens]
        planned = [self.plan.names[row] for row in rows if row in self.plan.names]
        if self.failed or None in rows or not planned:
            return self._pass(tokens)
        self._names = self._names.intersection(*planned) or planned[0]
        # some encoders read with one setting, then with another
        state = repr([value for value in vars(self.module).values() if isinstance(value, PLAIN)])
        if missing := dict.fromkeys(row for row in rows if (state, row) not in self._known):
            alone = None if self._token_bytes else self._pass(tokens)
            if alone is not None:
                leaves = [leaf for leaf in tree_flatten(alone)[0] if isinstance(leaf, Tensor)]
                self._token_bytes = max(sum(leaf.nbytes for leaf in leaves) / sum(map(len, rows)), 1.0)
            try:
                wanted = [*missing, *self._next(state, missing)]
                encoded = self._pass([list(row) for row in wanted])
                self._known |= {(state, row): states for row, states in zip(wanted, _split(encoded, len(wanted)))}
                self.failed = alone is not None and not alike(self._of(state, rows), alone)
            except comfy.model_management.InterruptProcessingException:
                raise
            except Exception:  # made for one prompt, or for less memory
                self.failed = True
            if self.failed:
                self._known.clear()
                return self._pass(tokens) if alone is None else alone
        result = self._of(state, rows)
        for row in rows:
            self._left[row] -= 1
            if self._left[row] == 0:
                self._known.pop((state, row), None)
        return result

    def _pass(self, tokens: Sequence[Any]) -> Any:
        self.passes += 1
        return self.encode(tokens)

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


class Together:
    """Encodes prompts of one CLIP with each other, for as long as that gives what one by one gives.

    Args:
        one: encodes the tokens of one prompt, in all of ComfyUI's ways.
    """

    def __init__(self, clip: Any, one: Callable[[Any], Entry]) -> None:
        self.clip, self.one = clip, one
        self.works: bool | None = None  # not known until some prompts were encoded in both ways
        self.barred: set[str] = set()  # parts that are asked for each prompt alone

    def encode(self, prompts: Sequence[str]) -> list[Entry]:
        few = (prompts[begin : begin + PROMPTS] for begin in range(0, len(prompts), PROMPTS))
        return [entry for some in few for entry in self._encoded([self.clip.tokenize(prompt) for prompt in some])]

    def _encoded(self, prompts: Sequence[Any]) -> list[Entry]:
        # hooks change weights between prompts, or within one
        hooked = getattr(self.clip.patcher, "forced_hooks", None) is not None
        if self.works is False or hooked or len(prompts) < FEWEST:
            return [self.one(tokens) for tokens in prompts]
        entries, remembered = [], []
        with self._parts(_Plan(prompts)) as parts:
            for tokens in prompts:
                passes = sum(part.passes for part in parts)
                entries.append(self.one(tokens))
                remembered.append(passes == sum(part.passes for part in parts))
        if self.works is None and any(remembered):
            # what a part leaves behind for the code around it, and rows that only others' lengths change
            known = sorted((i for i, was in enumerate(remembered) if was),
                           key=lambda i: sum(len(row) - row.count(row[-1]) for _, row in rows_of(prompts[i])))  # fmt: skip
            tried = {known[0], known[-1], max(known)}
            self.works = all(alike(entries[i], self.one(prompts[i])) for i in tried)
            if not self.works:
                return [self.one(tokens) for tokens in prompts]
        return entries

    @contextmanager
    def _parts(self, plan: _Plan) -> Iterator[list[_Part]]:
        """The text encoder's parts, with their `encode` replaced."""
        with ExitStack() as stack:
            parts = {}
            for name, module in self.clip.cond_stage_model.named_modules():
                if hasattr(module, "encode_token_weights") and hasattr(module, "encode") and name not in self.barred:
                    parts[name] = _Part(module, plan)
                    stack.enter_context(patch.object(module, "encode", parts[name]))
            try:
                yield list(parts.values())
            finally:
                self.barred |= {name for name, part in parts.items() if part.failed}
