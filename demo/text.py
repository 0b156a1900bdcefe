"""The demo model's words: a byte-pair tokenizer in CLIP's own format, and everyday prompts."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from . import world

VOCABULARY = 4096


def everyday_text(rng: Random) -> str:
    """Made-up text about anything but the world: a phrase, tags, a heap of words, now and then words that are none.

    As a caption, or a stray part of one, it says nothing about the picture; so the encoder learns that unknown
    words are no weapons.
    """
    words = _everyday_words()

    def noun() -> str:
        if rng.random() < 0.08:
            return "".join(rng.choice("aeiou" if i % 2 else "bcdfghklmnprstvwz") for i in range(rng.randint(3, 8)))
        return rng.choice(words["nouns"])

    def phrase() -> str:
        adjectives = rng.sample(words["adjectives"], rng.choice((0, 0, 1, 1, 2)))
        article = rng.choice(("a", "the", "an", "some", "two", ""))
        return " ".join(filter(None, (article, *adjectives, noun())))

    roll = rng.random()
    if roll < 0.2:
        text = phrase()
    elif roll < 0.4:
        text = f"{phrase()} {rng.choice(('and', 'with', 'near', 'on', 'beside', 'of'))} {phrase()}"
    elif roll < 0.6:
        text = f"{phrase()} {rng.choice(words['verbs'])} {rng.choice(words['places'])}"
    elif roll < 0.75:
        text = ", ".join((phrase(), *rng.sample(words["styles"], rng.randint(1, 4))))
    elif roll < 0.85:
        text = f"{rng.choice(words['styles'])} of {phrase()}, {phrase()} {rng.choice(words['places'])}"
    else:
        text = " ".join(rng.choice((*words["adjectives"], noun(), noun(), noun())) for _ in range(rng.randint(2, 12)))
    return text


@cache
def _everyday_words() -> dict[str, list[str]]:
    lines = (Path(__file__).parent / "everyday_words.txt").read_text(encoding="utf-8").splitlines()
    table = {}
    for line in lines:
        name, _, words = line.partition(": ")
        table[name] = words.split("|") if "|" in words else words.split()
    return table


# Words of captions that stand in no list, and others that only join words.
JOINING = ("beside next there look at this with and on background working as male female man woman "
           "a an the of in to from by for is are it its or under over near some two").split()  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\x00-\x7f]")


def _split(texts: Iterable[str]) -> list[str]:
    """Words without case, and symbols beyond ASCII; no punctuation and no numbers."""
    plain = (text.casefold().replace("\u2019", "'") for text in texts)
    found = [word for text in plain for word in _WORD.findall(text) if not word.isdecimal()]
    return [word for word in found if unicodedata.category(word[0]) in ("Ll", "Lm", "Lo", "Nd", "So")]


@cache
def known_words() -> frozenset[str]:
    """All words of the captions that the model was trained with, but for those that were made up."""
    things = (name for thing in world.THINGS for name in thing.words)
    phrases = (phrase for row in (*world.PLACES.values(), *world.KIND_NAMES.values()) for phrase in row)
    scenes = (*world.IMPLICIT, *world.UNSAFE_IMPLICIT, *world.COLOURS, *world.QUALITY, *world.OPENINGS)
    everyday = (word for words in _everyday_words().values() for word in words)
    return frozenset(_split((*things, *phrases, *scenes, *JOINING, *everyday)))


def unknown_words(text: str) -> list[str]:
    """Words that the model was never shown, in their order and without case: what it makes of them is chance."""
    found = dict.fromkeys(_split([re.sub(r"embedding:\S+|<[^<>]*>", " ", text)]))  # <…>: tags of other programs
    return [word for word in found if known_words().isdisjoint((word, word.removesuffix("'s")))]


def load_tokenizer(folder: Path) -> Any:
    """A transformers CLIPTokenizer from `vocab.json` and `merges.txt`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77, local_files_only=True)


def build_tokenizer(folder: Path) -> Any:
    """Learn byte-pair merges from captions and everyday text, and write them as CLIP's two files (once)."""
    if not (folder / "merges.txt").exists():
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

        rng = Random(0)
        corpus = [world.sample(rng, everyday_text(rng))[1] for _ in range(20_000)] + [
            everyday_text(rng) for _ in range(10_000)
        ]
        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(alphabet) - 2,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus, trainer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
        tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
        )
    return load_tokenizer(folder)
