"""The diffusers backbone on tiny random models of every class of pipeline that it supports."""
from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfyui_safe_region.backbones import diffusers as diffusers_backbone
from comfyui_safe_region.backbones.diffusers import FAMILIES, DiffusersBackbone, load_pipeline
from comfyui_safe_region.backbones.kept import Living
from comfyui_safe_region.backbones.sampling import guided, sample
from comfyui_safe_region.cli import main
from comfyui_safe_region.region import apply_to_conditioning, load_region
from comfyui_safe_region.region.conditioning import text_blocks
from comfyui_safe_region.training import trainer as training
from comfyui_safe_region.training.pairs import parse_pairs
from comfyui_safe_region.training.recipe import PRESETS

diffusers = pytest.importorskip("diffusers", reason='needs diffusers: pip install ".[diffusers]"')
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SD, XL, SD3, FLUX = FAMILIES
WORDS = "a the knife gun bomb axe cup flower dog cat in on at by park table night sea red blue green and".split()
LETTERS = [chr(code) for code in range(33, 127)]
L, G, T5 = 32, 48, 96  # widths
LONG = " ".join(["a knife"] * 60)
PROMPTS = ["a knife", "", "a cup (of tea:1.2) on the table", LONG]
PAIRS = parse_pairs(
    "a {knife|gun|bomb|axe} {in the park|on a table|at night|by the sea} => "
    "a {cup|flower|cup|flower} {in the park|on a table|at night|by the sea}\n"
)
TINY = replace(PRESETS["region"], steps=2, trajectories=4, sampling_steps=2, batch_size=2, rank=4, prompts=500)


# --- tiny pipelines ---


def clip_tokenizer(folder: Path, padding: str) -> Any:
    """Words that it knows, and letters."""
    vocabulary, merges = [*LETTERS, *(letter + "</w>" for letter in LETTERS)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder, pad_token=padding, model_max_length=77)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -5.0), *((f"▁{word}", -1.0) for word in WORDS)]
    words = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, *((letter, -8.0) for letter in LETTERS)], 2))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=words, extra_ids=0, model_max_length=512)


def clip_encoder(width: int, tokenizer: Any, projected: bool) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=width, pad_token_id=0, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5_encoder(tokenizer: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=T5, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def autoencoder(channels: int, **others: Any) -> Any:
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=[8, 8], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, **others,
    )  # fmt: skip


def unet(text: int, **others: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1, cross_attention_dim=text,
        attention_head_dim=2, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], **others,
    )  # fmt: skip


def tokenizers_and_clips(folder: Path, projected: bool) -> dict[str, Any]:
    """CLIP-L and CLIP-G."""
    first, second = clip_tokenizer(folder / "l", "<|endoftext|>"), clip_tokenizer(folder / "g", "!")
    return {"tokenizer": first, "text_encoder": clip_encoder(L, first, projected),
            "tokenizer_2": second, "text_encoder_2": clip_encoder(G, second, True)}  # fmt: skip


def with_t5(number: int) -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {f"tokenizer_{number}": tokenizer, f"text_encoder_{number}": t5_encoder(tokenizer)}


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd(folder: Path, prediction: str = "epsilon") -> Any:
    tokenizer = clip_tokenizer(folder / "l", "<|endoftext|>")
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(4), unet=unet(L), tokenizer=tokenizer, text_encoder=clip_encoder(L, tokenizer, False),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder: Path) -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": 1,
             "projection_class_embeddings_input_dim": G + 6 * 8}  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(4), unet=unet(L + G, **added), scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
        **tokenizers_and_clips(folder, False),
    )  # fmt: skip


def sd3(folder: Path) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5, caption_projection_dim=16, pooled_projection_dim=L + G, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(8, shift_factor=0.06, use_quant_conv=False), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **tokenizers_and_clips(folder, True),
        **with_t5(3),
    )  # fmt: skip


def flux(folder: Path) -> Any:
    tokenizer = clip_tokenizer(folder / "l", "<|endoftext|>")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5, pooled_projection_dim=L, guidance_embeds=True, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return diffusers.FluxPipeline(
        vae=autoencoder(4, shift_factor=0.12), transformer=transformer, scheduler=scheduler, tokenizer=tokenizer,
        text_encoder=clip_encoder(L, tokenizer, False), **with_t5(2),
    )  # fmt: skip


BUILT: dict[str, Callable[[Path], Any]] = {SD: sd, XL: sdxl, SD3: sd3, FLUX: flux}
SIZES = {SD: 0, XL: 0, SD3: 0, FLUX: 16}  # Flux' own is fixed


@pytest.fixture(scope="module", params=BUILT)
def folder(request, tmp_path_factory) -> Path:
    """A saved pipeline."""
    base = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    pipe = BUILT[request.param](base)
    for module in pipe.components.values():  # random weights of the libraries' own are too small to tell layers apart
        for weight in module.parameters() if isinstance(module, torch.nn.Module) else ():
            torch.nn.init.normal_(weight, std=0.15) if weight.ndim > 1 else None
    pipe.save_pretrained(base / "pipeline", safe_serialization=True)
    return base / "pipeline"


@pytest.fixture(scope="module")
def backbone(folder) -> DiffusersBackbone:
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return DiffusersBackbone(pipe, SIZES[type(pipe).__name__])


def name_of(backbone: DiffusersBackbone) -> str:
    return type(backbone.pipe).__name__


def weights_hash(backbone: DiffusersBackbone) -> str:
    found = hashlib.sha256()
    for module in vars(backbone.pipe).values():
        for name, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
            found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# --- text ---


def test_text_is_laid_out_as_comfyui_lays_it_out(backbone):
    short, empty, _, long = backbone.encode(PROMPTS)
    widths = {SD: L, XL: L + G, SD3: T5, FLUX: T5}
    lengths = {SD: (77, 154), XL: (77, 154), SD3: (154, 154 + 121), FLUX: (256, 256)}
    pooled = {SD: L, XL: G, SD3: L + G, FLUX: L}
    name = name_of(backbone)
    assert [tuple(entry[0].shape) for entry in (short, empty, long)] == [
        (1, length, widths[name]) for length in (lengths[name][0], lengths[name][0], lengths[name][1])
    ]
    for entry in (short, empty, long):
        assert list(entry[1]) == ["pooled_output"] and entry[1]["pooled_output"].shape == (1, pooled[name])
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in text_blocks(entry).values())
    if name == SD3:
        assert not short[0][:, :77, L + G :].any() and short[0][:, 77:, L + G :].all()
    signature = backbone.signature()
    assert signature["blocks"] == {"cross_attn": widths[name], "pooled_output": pooled[name]}
    assert set(signature["parts"]) <= {"clip_l", "clip_g", "t5xxl"} and signature["name"].endswith("ClipModel")


def test_prompts_in_one_batch_are_what_they_are_alone(backbone):
    for prompt, entry in zip(PROMPTS, backbone.encode(PROMPTS)):
        (alone,) = backbone.encode([prompt])
        for name, tensor in text_blocks(alone).items():
            torch.testing.assert_close(text_blocks(entry)[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_short_prompts_text_is_the_pipelines_own(backbone):
    """Where diffusers and ComfyUI agree: one chunk, and T5 without what diffusers pads it with."""
    pipe, name, (entry,) = backbone.pipe, name_of(backbone), backbone.encode(["a knife"])
    if name == SD:
        assert torch.allclose(entry[0], pipe.encode_prompt("a knife", "cpu", 1, False)[0], atol=1e-5)
    elif name == XL:
        text, _, pooled, _ = pipe.encode_prompt("a knife", do_classifier_free_guidance=False)
        assert torch.allclose(entry[0], text, atol=1e-5)
        assert torch.allclose(entry[1]["pooled_output"], pooled, atol=1e-5)
    elif name == SD3:
        others = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": 77}
        text, _, pooled, _ = pipe.encode_prompt("a knife", **others)
        assert torch.allclose(entry[0], text, atol=1e-5)
        assert torch.allclose(entry[1]["pooled_output"][:, L:], pooled[:, L:], atol=1e-5)  # ComfyUI does not project L
    else:
        text, pooled, _ = pipe.encode_prompt("a knife", None, max_sequence_length=256)
        assert torch.allclose(entry[0], text, atol=1e-5)
        assert torch.allclose(entry[1]["pooled_output"], pooled, atol=1e-5)


# --- pictures ---


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_draws_what_the_pipeline_draws(backbone, guidance):
    pipe, name, steps = backbone.pipe, name_of(backbone), 4
    entry, empty = backbone.encode(["a knife", ""])
    sigmas = backbone.sigmas(steps)
    start = backbone.start(1, sigmas[0], torch.Generator().manual_seed(1))
    x = start
    for sigma, following in pairwise(sigmas):
        denoised = guided(backbone, x, sigma.expand(1), [entry], empty, guidance)
        x = x + (x - denoised) / sigma * (following - sigma)

    options = {"num_inference_steps": steps, "output_type": "latent", "prompt_embeds": entry[0]}
    if name != SD:
        options["pooled_prompt_embeds"] = entry[1]["pooled_output"]
    if name == FLUX:  # has its guidance inside
        if guidance != 1:
            return
        size = start.shape[-1] * pipe.vae_scale_factor
        options |= {"height": size, "width": size, "guidance_scale": 3.5}
        packed = pipe._pack_latents(start, *start.shape)
        drawn = pipe._unpack_latents(pipe(latents=packed, **options).images, size, size, pipe.vae_scale_factor)
    else:
        options |= {"guidance_scale": guidance, "negative_prompt_embeds": empty[0]}
        if name != SD:
            options["negative_pooled_prompt_embeds"] = empty[1]["pooled_output"]
        if name == SD3:  # its own steps end at a thousandth; custom ones are shifted as ours are
            drawn = pipe(latents=start, sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist(), **options).images
        else:
            pipe.scheduler.set_timesteps(steps)
            drawn = pipe(latents=start / pipe.scheduler.init_noise_sigma, **options).images
    torch.testing.assert_close(x, drawn, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_unets_prediction_is_what_its_scheduler_makes_of_it(tmp_path, prediction):
    torch.manual_seed(0)
    backbone = DiffusersBackbone(sd(tmp_path, prediction))
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    (entry,) = backbone.encode(["a knife"])
    for timestep in (3, 500, 999):
        signal = scheduler.alphas_cumprod[timestep]
        x = torch.randn(1, 4, 8, 8) / signal.sqrt()
        sigma = ((1 - signal) / signal).sqrt()
        with torch.no_grad():
            output = backbone.pipe.unet(x * signal.sqrt(), timestep, entry[0]).sample
            expected = scheduler.step(output, timestep, x * signal.sqrt()).pred_original_sample
            torch.testing.assert_close(backbone.denoise(x, sigma[None], [entry]), expected, atol=2e-4, rtol=1e-4)


def test_a_flow_models_prediction_is_a_step_to_no_noise(tmp_path):
    torch.manual_seed(0)
    backbone = DiffusersBackbone(sd3(tmp_path))
    (entry,), x, sigma = backbone.encode(["a knife"]), torch.randn(1, 8, 8, 8), torch.tensor([0.7])
    with torch.no_grad():
        velocity = backbone.pipe.transformer(
            hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=entry[0],
            pooled_projections=entry[1]["pooled_output"],
        ).sample  # fmt: skip
        torch.testing.assert_close(backbone.denoise(x, sigma, [entry]), x - 0.7 * velocity)


def test_prompts_of_different_lengths_are_predicted_each_as_it_is(backbone):
    entries = backbone.encode(PROMPTS)
    x = backbone.start(len(entries), backbone.sigmas(4)[1], torch.Generator().manual_seed(0))
    sigma = backbone.sigmas(4)[:4]
    with torch.no_grad():
        together = backbone.denoise(x, sigma, entries)
        for i, entry in enumerate(entries):
            alone = backbone.denoise(x[i : i + 1], sigma[i : i + 1], [entry])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-3, rtol=1e-3)


def test_gradients_reach_the_text_and_no_weight(backbone):
    before, ((text, options),) = weights_hash(backbone), backbone.encode(["a knife"])
    text, pooled = text.clone().requires_grad_(), options["pooled_output"].clone().requires_grad_()
    sigma = backbone.sigmas(4)[:1]
    x = backbone.start(1, sigma[0], torch.Generator().manual_seed(0))
    backbone.denoise(x, sigma, [[text, {"pooled_output": pooled}]]).square().mean().backward()
    assert text.grad is not None and text.grad.any()
    assert (pooled.grad is not None and pooled.grad.any()) == (name_of(backbone) != SD)
    modules = [module for module in vars(backbone.pipe).values() if isinstance(module, torch.nn.Module)]
    assert len(modules) >= 3 and not any(module.training for module in modules)
    assert not any(w.requires_grad or w.grad is not None for module in modules for w in module.parameters())
    assert weights_hash(backbone) == before


def test_what_saves_memory_on_an_accelerator_changes_little(backbone, monkeypatch):
    ((text, options),), sigma = backbone.encode(["a knife"]), backbone.sigmas(4)[:1]
    x = backbone.start(1, sigma[0], torch.Generator().manual_seed(0))

    def prediction_and_gradient(network: Any) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(backbone.pipe, backbone.family.network, network)
        found = text.clone().requires_grad_()
        denoised = DiffusersBackbone(backbone.pipe, backbone.size).denoise(x, sigma, [[found, options]])
        denoised.sum().backward()
        return denoised.detach(), found.grad

    monkeypatch.setattr(diffusers_backbone, "FLUX_GUIDANCE", 4.0)  # bfloat16 has no 3500, which the network looks at
    known = prediction_and_gradient(backbone.network)
    saving = copy.deepcopy(backbone.network)
    saving.enable_gradient_checkpointing()
    for found, exact in zip(prediction_and_gradient(saving), known):
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
    for short, exact in zip(prediction_and_gradient(saving.bfloat16()), known):
        assert short.dtype == torch.float32 and (short - exact).norm() < 0.1 * exact.norm()


def test_what_a_step_takes_is_measured_and_all_stays_as_it_is(backbone, monkeypatch):
    ((text, options),), sigma = backbone.encode([""]), backbone.sigmas(2)[:1]
    x = backbone.start(3, sigma[0], torch.Generator().manual_seed(0))
    for count in (1, 3):
        with Living() as living:
            entries = [[text.clone().requires_grad_(), options] for _ in range(count)]
            denoised = backbone.denoise(x[:count], sigma.expand(count), entries)
            denoised.square().sum().backward()
        assert living.most / 1.5 < backbone.step_bytes(count) < 1.5 * living.most
    saving = copy.deepcopy(backbone.network)
    saving.enable_gradient_checkpointing()
    monkeypatch.setattr(backbone.pipe, backbone.family.network, saving)
    less = DiffusersBackbone(backbone.pipe, backbone.size)
    assert saving.is_gradient_checkpointing and less.step_bytes(1) > 0
    assert less.step_bytes(1) < backbone.step_bytes(1) or name_of(backbone) in (SD3, FLUX), "here of one or two blocks"
    torch.testing.assert_close(backbone.denoise(x[:1], sigma, [[text, options]]), denoised[:1], atol=1e-4, rtol=1e-4)


def test_sampling_ends_in_pictures(backbone):
    entries = backbone.encode(["a knife", "a cup"])
    latents = sample(backbone, entries, backbone.encode([""])[0], 4.0, steps=3, seed=1)
    assert torch.isfinite(latents).all()
    pictures, side = backbone.decode(latents), latents.shape[-1] * backbone.pipe.vae_scale_factor
    assert pictures.shape == (2, 3, side, side) and pictures.device.type == "cpu"
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1


def test_sigmas_fall_to_zero_and_a_size_can_be_asked_for(backbone):
    for steps in (1, 2, 12):
        sigmas = backbone.sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()
    larger = DiffusersBackbone(backbone.pipe, 40)
    assert larger.start(1, larger.sigmas(1)[0], torch.Generator()).shape[-1] == 40 // backbone.pipe.vae_scale_factor


# --- training ---


def test_a_region_learned_on_it_moves_unsafe_prompts_only(backbone):
    before = weights_hash(backbone)
    trainer = training.Trainer(backbone, PAIRS, TINY, "weapons")
    region = trainer.run()
    assert len(trainer.losses) == 2 and weights_hash(backbone) == before
    assert region.metadata["encoder"] == backbone.signature()
    unsafe = backbone.encode([unsafe for unsafe, _ in trainer.sets.pairs])
    harmless = backbone.encode(trainer.sets.calibration)
    moved, touched = (
        sum(not torch.equal(a[0], b[0]) for a, b in zip(entries, apply_to_conditioning(entries, region)))
        for entries in (unsafe, harmless)
    )
    assert moved > 0 and touched <= len(harmless) / 20


# --- the command line ---


def test_the_command_trains_on_a_pipeline(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text(PAIRS.text(), encoding="utf-8")
    out = tmp_path / "r.safetensors"
    command = ["train", "--diffusers", str(folder), "--size", "16", "--pairs", str(tmp_path / "p.txt")]
    command += ["--out", str(out)]
    main([*command, "--dry-run"])
    assert "prompts to encode" in capsys.readouterr().out and not out.exists()
    if folder.parent.name.startswith(SD + "0"):
        main([*command, "--preset", "instant", "--prompts", "150"])
        learned = load_region(out).metadata
        assert learned["encoder"]["name"] == "SD1ClipModel"
        assert (learned["family"], learned["checkpoint"]) == ("sd15", "pipeline")
        capsys.readouterr()
        main(["inspect", str(out), "a knife in the park", "--diffusers", str(folder), "--json"])
        items = json.loads(capsys.readouterr().out)["items"]
        assert [item["text"] for item in items if item["kind"] == "word"] == "a knife in the park".split()


def test_words_are_found_at_their_places_in_all_texts(backbone):
    (entry,) = backbone.encode(["a cup on a table"])
    tokens = backbone.words("a cup on a table")
    assert len(tokens) == entry[0].shape[1]
    each = [token.text for token in tokens if token.kind == "text"]
    assert each == "a cup on a table".split() * (len(each) // 5) and each


def test_a_checkpoint_takes_its_configuration_from_a_folder_and_downloads_nothing(folder, tmp_path, monkeypatch):
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    pipe, asked = load_pipeline(folder), {}

    def from_single_file(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        return pipe

    monkeypatch.setattr(getattr(diffusers, name), "from_single_file", from_single_file)
    file = tmp_path / "model.safetensors"
    found = load_pipeline(folder, file, "cpu", "bfloat16")
    assert asked["path"] == str(file) and asked["config"] == str(folder) and asked["local_files_only"]
    network, parts = FAMILIES[name].network, FAMILIES[name].parts
    assert getattr(found, network).dtype == torch.bfloat16 and found.text_encoder.dtype == torch.float32
    assert "t5xxl" not in parts or getattr(found, f"text_encoder{parts['t5xxl']}").dtype == torch.bfloat16


def test_a_checkpoint_alone_says_which_files_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.output_blocks.0.0.skip_connection.bias": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"configuration and the tokenizer of .*, which are not on this machine"):
        load_pipeline(None, file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="could not be read as a checkpoint"):
        load_pipeline(None, file)


def test_what_is_no_supported_pipeline_is_one_line(tmp_path, capsys, monkeypatch):
    def fails(path: Path) -> str:
        (tmp_path / "p.txt").write_text(PAIRS.text(), encoding="utf-8")
        with pytest.raises(SystemExit):
            main(["train", "--diffusers", str(path), "--pairs", str(tmp_path / "p.txt"), "--out", "r.safetensors"])
        error = capsys.readouterr().err.splitlines()[-1]  # beside diffusers' progress
        assert error.startswith("safe-region: ")
        return error

    assert "model_index.json" in fails(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}', encoding="utf-8")
    assert "PixArtAlphaPipeline" in (error := fails(tmp_path)) and SD3 in error
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": SD, "unet": ["diffusers", "X"]}), "utf-8")
    assert str(tmp_path) in fails(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert '--diffusers needs diffusers: run  python -m pip install ".[train,diffusers]"' in fails(tmp_path)


def test_stable_diffusion_2_is_refused(tmp_path):
    pipe = sd(tmp_path)
    pipe.text_encoder.config.hidden_size = 1024
    with pytest.raises(ValueError, match="train its regions in ComfyUI"):
        DiffusersBackbone(pipe)
