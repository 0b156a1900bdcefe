"""Every text that reaches a model has walls of its own: any one opens, and the budget holds for all together."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch
from test_training import HARMLESS, PAIRS, SHORT, UNSEEN

from comfyui_safe_region.region import apply_to_conditioning, region_bytes, region_from_bytes
from comfyui_safe_region.region.conditioning import check_fit
from comfyui_safe_region.training.gate import Gate, depth, joined, widened
from comfyui_safe_region.training.pairs import everyday_prompts, parse_pairs
from comfyui_safe_region.training.text_states import GATED_LAYERS, Source, sources_of
from comfyui_safe_region.training.trainer import Trainer
from comfyui_safe_region.training.walls import CONTEXTS, best_of, separating
from toy_model import WIDTH, ToyBackbone, word_vectors

INSTANT = replace(SHORT, steps=0, prompts=4000)
WORDS = "rope club fist dart claw maul whip fang spur hook"
MANY = parse_pairs("\n".join([PAIRS.text(), *(f"a zz{word} {{red|blue|old|new|big|wide}} box => "
                                              "a lamp {red|blue|old|new|big|wide} box" for word in WORDS.split())]))
CALM = [prompt for prompt in everyday_prompts() if len(prompt.split()) < 9][:300]


WIDE = 3 * WIDTH


def tokens_of(prompt: str, width: int, length: int = 32) -> torch.Tensor:
    vectors = word_vectors(prompt, width)[:length]
    return torch.stack(vectors + [vectors[-1]] * (length - len(vectors)))


class Reader(ToyBackbone):
    """A text encoder alone."""

    can_denoise = can_decode = False

    def encode(self, prompts):
        return [self.encode_two(prompt, prompt) for prompt in prompts]

    def encode_two(self, first: str, second: str):
        return [tokens_of(first, WIDE)[None], {}]


class TwoTexts(Reader):
    """Like Flux: the first text becomes the tokens, the second one the pooled vector."""

    def encode_two(self, first: str, second: str):
        return [tokens_of(first, WIDE)[None], {"pooled_output": word_vectors(second, 2 * WIDE)[-1][None]}]


class SideBySide(Reader):
    """Like SDXL: the features of two encoders beside one another."""

    def encode_two(self, first: str, second: str):
        both = torch.cat([tokens_of(first, 768, 16), tokens_of(second, 1280, 16)], -1)[None]
        return [both, {"pooled_output": both[:, -1, 768:]}]


class Layered(Reader):
    """Like HiDream: six layers of a second encoder, each turned another way."""

    turns = torch.linalg.qr(torch.randn(6, WIDE, WIDE, generator=torch.Generator().manual_seed(5))).Q

    def encode_two(self, first: str, second: str):
        layers = tokens_of(second, WIDE) @ self.turns
        return [tokens_of(first, WIDE)[None], {"conditioning_llama3": layers[None]}]


MODELS = {
    TwoTexts: ["cross_attn", "pooled_output"],
    SideBySide: ["cross_attn[0:768]", "cross_attn[768:2048]", "pooled_output"],
    Layered: ["cross_attn", *(f"conditioning_llama3__layer{i}" for i in (0, 2, 3, 5))],
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda kind: kind.__name__)
def learned(request):
    backbone = request.param()
    recipe = replace(INSTANT, prompts=3000) if request.param is SideBySide else INSTANT
    return backbone, Trainer(backbone, MANY, recipe, "bad things").run(), MODELS[request.param]


def opened(region, entries):
    """Which entries the region changes."""
    return [not torch.equal(before[0], after[0]) or
            any(not torch.equal(tensor, after[1][key]) for key, tensor in before[1].items())
            for before, after in zip(entries, apply_to_conditioning(entries, region))]  # fmt: skip


def test_unsafe_text_in_any_one_of_them_moves_the_prompt(learned):
    backbone, region, _ = learned
    first = opened(region, [backbone.encode_two(bad, "a lamp in the hall") for bad in UNSEEN])
    second = opened(region, [backbone.encode_two("a lamp in the hall", bad) for bad in UNSEEN])
    assert min(sum(first), sum(second)) > 0.7 * len(UNSEEN)


def test_all_blocks_move_when_one_opens(learned):
    backbone, region, _ = learned
    before = backbone.encode_two("a lamp in the hall", UNSEEN[0])
    (after,) = apply_to_conditioning([before], region)
    assert not torch.equal(before[0], after[0])
    assert all(not torch.equal(tensor, after[1][key]) for key, tensor in before[1].items())


def test_harmless_texts_in_all_of_them_stay_to_the_bit(learned):
    backbone, region, _ = learned
    assert not any(opened(region, backbone.encode(HARMLESS)))
    assert sum(opened(region, backbone.encode(CALM))) <= 0.04 * len(CALM), "the budget is for all of them together"
    mixed = [backbone.encode_two(a, b) for a, b in zip(CALM, reversed(CALM))]
    assert sum(opened(region, mixed)) <= 0.05 * len(CALM)


def test_the_card_says_what_each_text_opens_alone(learned):
    backbone, region, names = learned
    card = region.metadata["calibration"]
    assert list(card["sources"]) == names and all(share > 0.6 for share in card["sources"].values())
    assert max(card["sources"].values()) <= card["held_out_unsafe_touched"]
    again = region_from_bytes(region_bytes(region))
    check_fit(again, backbone.encode(["a lamp"])[0])
    assert again.parts[0].id == region.parts[0].id


def test_a_text_that_says_nothing_costs_the_others_nothing():
    class Noisy(Reader):
        def encode_two(self, first: str, second: str):
            noise = torch.Generator().manual_seed(zlib.crc32(second.encode()))
            return [tokens_of(first, WIDE)[None], {"pooled_output": torch.randn(1, 200, generator=noise)}]

    noisy, plain = (Trainer(kind(), MANY, INSTANT, "bad things").run() for kind in (Noisy, Reader))
    card = noisy.metadata["calibration"]
    assert card["sources"] == {"cross_attn": card["held_out_unsafe_touched"], "pooled_output": 0.0}
    assert card["held_out_unsafe_touched"] >= plain.metadata["calibration"]["held_out_unsafe_touched"] - 0.05
    first, second = torch.randn(2, 200, generator=torch.Generator().manual_seed(1)), torch.ones(2, 60)
    like, held = torch.stack([first[0] - 9, first[1]]), torch.stack([second[0], first[0, :60]])
    assert separating(like, held) == [0], "with enough prompts to be sure, it gets no walls at all"
    assert separating(like, held[:, :10]) == [0, 1]
    assert all(opened(noisy, Noisy().encode(UNSEEN))) and not any(opened(noisy, Noisy().encode(HARMLESS)))


class Smeared(Reader):
    """What tells unsafe prompts lies in all of their tokens, a little in each, below what else they say."""

    def encode_two(self, first: str, second: str):
        noise = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(first.encode())))
        noise[:, 0] += 1.2 * any(word.startswith("zz") for word in first.split())
        return [noise[None], {}]


def test_walls_see_the_average_where_single_tokens_do_not_tell(monkeypatch):
    def run(contexts: tuple[float, ...]):
        monkeypatch.setattr(Trainer, "contexts", contexts)
        region = Trainer(Smeared(), MANY, INSTANT, "bad things").run()
        return region.parts[0].gates["cross_attn"], sum(opened(region, Smeared().encode(UNSEEN)))

    (alone, few), (seeing, many) = run(CONTEXTS[:1]), run(CONTEXTS)
    assert alone.context is None and seeing.context is not None
    assert many > 0.6 * len(UNSEEN) > 2 * few


def test_the_simplest_walls_are_taken_where_they_are_good_enough():
    like = torch.linspace(-2, -1, 100).expand(2, -1)

    def depths(*shares: float) -> torch.Tensor:  # so many of 100 unsafe prompts lie deeper than all harmless ones
        return torch.stack([torch.where(torch.arange(100) < 100 * share, 1.0, -3.0) for share in shares])

    assert best_of(like, depths(0.95, 1.0)) == 0
    assert best_of(like, depths(0.6, 0.7)) == 1
    assert best_of(like, depths(0.6, 0.58)) == 1, "no worse, as far as can be told"
    assert best_of(like, depths(0.6, 0.5)) == 0
    assert best_of(like[:, :0], depths(0.6, 0.7)) == best_of(like, torch.zeros(2, 0)) == 0


def test_text_that_only_some_prompts_have_is_judged_where_it_is():
    class Quoting(Reader):
        def encode_two(self, first: str, second: str):
            quoted = {"conditioning_byt5small": tokens_of(second.split('"')[1], WIDE, 6)[None]} if '"' in second else {}
            return [tokens_of(first, WIDE)[None], quoted]

    words = "one two lamp boat tree house star road bird shoe spoon hat".split()
    pairs = parse_pairs(
        "\n".join(f'a sign "zz{word}" {at} => a sign "{word}" {at}' for word in words for at in ("here", "there"))
        + "\n" + "\n".join(f'keep: a board "{a} {b}"' for a in words for b in words) + "\n" + PAIRS.text()
    )  # fmt: skip
    backbone = Quoting()
    region = Trainer(backbone, pairs, replace(INSTANT, prompts=6000), "bad things").run()
    assert "conditioning_byt5small" in region.parts[0].gates
    assert region.metadata["calibration"]["sources"]["conditioning_byt5small"] > 0
    (hidden,) = backbone.encode(['a sign "lamp" here'])
    hidden[1]["conditioning_byt5small"] = tokens_of("zzboat", WIDE, 6)[None]
    assert opened(region, [hidden]) == [True]
    assert not any(opened(region, backbone.encode([*HARMLESS, 'a board "tree road"'])))
    others = backbone.encode(["a zzgun at night", "red zzbomb and a dog"])
    assert all(opened(region, others)), "prompts without such text are judged by the others"


# --- which texts ---


def random_states(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(10, *shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ({"cross_attn": (7, 768), "pooled_output": (1, 768)}, ["cross_attn", "pooled_output"]),
        ({"cross_attn": (7, 2048), "pooled_output": (1, 1280)},
         ["cross_attn[0:768]", "cross_attn[768:2048]", "pooled_output"]),
        ({"cross_attn": (7, 4096), "pooled_output": (1, 2048)},
         ["cross_attn__narrow2048[0:768]", "cross_attn__narrow2048[768:2048]", "cross_attn__beyond2048",
          "pooled_output[0:768]", "pooled_output[768:2048]"]),
        ({"cross_attn": (7, 15_360)}, ["cross_attn"]),  # Flux.2: layers of one encoder
        ({"cross_attn": (7, 2048)}, ["cross_attn"]),  # AuraFlow: as wide as SDXL, one encoder
        ({"cross_attn": (7, 1024), "conditioning_mt5xl": (5, 2048)}, ["cross_attn", "conditioning_mt5xl"]),
        ({"cross_attn": (7, 4096), "pooled_output": (1, 2048), "conditioning_llama3": (32, 5, 4096)},
         ["cross_attn", "pooled_output[0:768]", "pooled_output[768:2048]",
          *(f"conditioning_llama3__layer{i}" for i in (7, 15, 23, 31))]),
    ],
)  # fmt: skip
def test_the_texts_of_known_models(shapes, names):
    states = {key: random_states(shape) for key, shape in shapes.items()}
    if len(names) == 5:  # SD3: CLIP's tokens come first, and are narrow
        states["cross_attn"][:, :4, 2048:] = 0
    found = sources_of(states, {key: tensor[:4] for key, tensor in states.items()})
    assert [source.name for source in found] == names
    assert GATED_LAYERS == 4 and all(source.of(states).ndim == 3 for source in found)
    if len(names) == 5:
        assert [source.of(states).shape[1:] for source in found][:3] == [(4, 768), (4, 1280), (3, 4096)]


def test_what_is_the_same_in_every_prompt_or_in_too_few_is_no_text():
    same = {"cross_attn": random_states((5, 12)), "pooled_output": torch.ones(10, 1, 8)}
    rare = same | {"conditioning_byt5small": torch.zeros(10, 4, 6)}
    rare["conditioning_byt5small"][:3] = 1
    assert sources_of(same) == sources_of(rare) == [Source("cross_attn")]
    assert sources_of(same, {"pooled_output": same["pooled_output"]}) == []


def test_walls_in_some_features_do_not_look_at_the_others():
    generator = torch.Generator().manual_seed(1)
    gates = [Gate(torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator),
                  torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5, torch.tensor(0.1),
                  context)
             for context in (None, torch.randn(3, 4, generator=generator))]  # fmt: skip
    tokens, counts = torch.randn(20, 9, generator=generator), torch.arange(20) > 4
    whole = joined([widened(gates[0], 0, 9), widened(gates[1], 5, 9)])
    expected = torch.cat([depth(tokens[:, :4], gates[0], counts), depth(tokens[:, 5:], gates[1], counts)], -1)
    torch.testing.assert_close(depth(tokens, whole, counts), expected, atol=1e-4, rtol=1e-4)
    assert joined([gates[0], gates[0]]).context is None  # as older regions have it
