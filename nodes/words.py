"""Which words of a prompt stand where in its conditioning, from ComfyUI's own tokenizer of any family."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..region.blocks import BYT5, CROSS_ATTENTION, LLAMA, MT5, POOLED, block_names
from ..region.words import Token, agreed, common, decoder, fitted, tokens_of

OWN = {LLAMA: "llama", BYT5: "byt5", MT5: "mt5xl"}  # the encoder of an option, by its name in the tokenizer's answer
PROBES = ("the", "and")  # what a tokenizer makes of both alike is its template; the empty prompt may get another one
POOLED_ONLY = {"l", "g", "h", "jina"}  # CLIPs, which give the pooled vector alone where another encoder is beside them


def _tokenizer(owner: Any, name: str) -> Any:
    """The part of a family's tokenizer that one encoder has, or None."""
    found = [getattr(owner, attribute, None) for attribute in (name, f"clip_{name}")]
    return next((one for one in found if hasattr(one, "inv_vocab")), None)


def readings(clip: Any, prompt: str) -> dict[str, list[Token]]:
    """What each of a CLIP's encoders reads, by its name. Encoders of unknown make are left out."""
    try:
        found, *others = (clip.tokenize(text, return_word_ids=True) for text in (prompt, *PROBES))
        probes = {name: [other.get(name, []) for other in others] for name in found}
        return {name: tokens for name in found
                if (tokens := _reading(clip, name, found[name], probes[name], prompt))}  # fmt: skip
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # other packs' tokenizers
        logging.info("Safe Region: this tokenizer does not say where its words are: %r", error)
        return {}


def _template(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """The tokens at the beginning and the end of two short texts that are the same."""
    begin = common(one, other)
    end = common(one[begin:][::-1], other[begin:][::-1])
    return [*one[:begin], *one[len(one) - end :]]


def _reading(clip: Any, name: str, sections: Any, probes: Sequence[Any], prompt: str) -> list[Token] | None:
    tokenizer = _tokenizer(clip.tokenizer, name)
    if tokenizer is None:
        return None
    flat = [token for section in sections for token in section]
    if any(isinstance(token[0], Mapping) for token in flat):  # a picture takes an unknown number of places
        return None
    read = decoder(tokenizer.inv_vocab.values())

    def piece(number: int) -> bytes | None:
        known = tokenizer.inv_vocab.get(number)
        return None if known is None else read(known)

    # a tokenizer that does not say which tokens stand for no text says so of all or of none
    says = any(token[2:] and token[2] for one in probes for section in one for token in section)

    def special(token: Sequence[Any]) -> bool:
        return says and token[2] == 0

    ids = [token[0] if isinstance(token[0], Tensor) else int(token[0]) for token in flat]
    texts = [[token[0] for section in one for token in section if not special(token)] for one in probes]
    return tokens_of(ids, list(map(special, flat)), _template(*texts), piece, prompt)


def _of(option: str, names: Sequence[str], options: Sequence[str]) -> list[str]:
    """The encoders that may have made an option's tensor."""
    if option in OWN:
        return [name for name in names if name == OWN[option]]
    free = [name for name in names if name not in {OWN.get(other) for other in options}]
    return [name for name in free if name not in POOLED_ONLY] or free


def _fitting(found: Mapping[str, list[Token]], names: Sequence[str], count: int) -> list[Token | None]:
    fits = [tokens for name in names if (tokens := fitted(found[name], count)) is not None]
    return agreed(fits, count)


def places(found: Mapping[str, list[Token]], tensors: Mapping[str, Tensor]) -> dict[str, list[Token | None]]:
    """The token at each position of each option; None where that cannot be told.

    Args:
        found: from `readings`.
        tensors: the text of one entry, as `text_tensors` has it.
    """
    names, options = list(found), list(tensors)
    result: dict[str, list[Token | None]] = {}
    narrow = next((name for name in block_names(tensors) if "__narrow" in name), None)
    for option, tensor in tensors.items():
        if option == POOLED:
            continue
        count = tensor.shape[-2]
        if option == CROSS_ATTENTION and narrow:  # CLIP's tokens and T5's follow one another
            small = (tensor[0, :, int(narrow.rpartition("narrow")[2]) :] == 0).all(-1).tolist()
            clips = _fitting(found, [name for name in names if name in POOLED_ONLY], sum(small))
            others = _fitting(found, [name for name in names if name not in POOLED_ONLY], count - sum(small))
            first, second = iter(clips), iter(others)
            result[option] = [next(first if one else second) for one in small]
        else:
            result[option] = _fitting(found, _of(option, names, options), count)
    return result


def same_places(
    known: Mapping[str, Sequence[Token | None]], encoded: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, list[Token | None]]:
    """The tokens of other text, where it holds the very numbers of `encoded`, whose tokens are known."""
    result = {}
    for option, tokens in known.items():
        tensor, ours = tensors.get(option), encoded[option]
        if tensor is None:
            continue
        kept = [None] * tensor.shape[-2]
        if tensor.ndim == ours.ndim and tensor.shape[-1] == ours.shape[-1]:
            count = min(len(kept), len(tokens))
            one, other = (found[0].reshape(-1, *found.shape[-2:])[:, :count].cpu() for found in (tensor, ours))
            equal = (one == other).all(-1).all(0) if one.shape == other.shape else torch.zeros(count)
            kept[:count] = [token if same else None for token, same in zip(tokens, equal.tolist())]
        result[option] = kept
    return result
