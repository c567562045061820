"""Text to image: same image in any batch, null and negative prompts, every denoiser, saved folders, frozen encoders."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin

from genssm.models import CaptionTokenizer, DiM, DiMSUM, TextEncoder, ZigMa
from genssm.pipelines import TextToImagePipeline
from genssm.schedulers import swap_scheduler
from genssm.text import load_frozen_encoder
from genssm.training.objectives import DiffusionObjective, FlowObjective

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "context_dim": 16}
DENOISERS = {
    "zigma": (ZigMa, {"drop_path": 0.0}),
    "dim_prefix": (DiM, {"num_text_tokens": 6}),
    "dim_mean": (DiM, {}),
    "dimsum": (DiMSUM, {"text_attention": True, "attention_every": 1}),
}
WORDS = ["a red circle", "a blue square", "a circle", ""]
CALL = {"num_inference_steps": 3, "output_type": "latent"}


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def make_denoiser(name: str = "zigma", **changes: object) -> ModelMixin:
    torch.manual_seed(0)
    cls, options = DENOISERS[name]
    return stirred(cls(**{**SMALL, **options, **changes}))


def make_pipe(name: str = "zigma", **components: object) -> TextToImagePipeline:
    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.learn(2 * WORDS, vocab_size=300, max_length=8)
    encoder = stirred(TextEncoder(len(tokenizer), hidden_size=16, num_layers=1, num_heads=2, max_length=8))
    parts = {"denoiser": make_denoiser(name), "scheduler": FlowObjective().scheduler(),
             "text_encoder": encoder, "tokenizer": tokenizer}  # fmt: skip
    pipe = TextToImagePipeline(**{**parts, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(rows: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in rows]


@pytest.mark.parametrize("name", DENOISERS)
def test_images_do_not_depend_on_the_batch(name: str) -> None:
    pipe = make_pipe(name)
    call = {**CALL, "guidance_scale": 2.5, "guidance_interval": (0.2, 0.9)}
    batch = pipe(WORDS, negative_prompt="a square", generator=generators(range(4)), **call).images
    assert torch.isfinite(batch).all()
    for i, text in enumerate(WORDS):
        one = pipe(text, negative_prompt="a square", generator=generators(range(i, i + 1)), **call).images
        assert torch.equal(one[0], batch[i])


@pytest.mark.parametrize("name", DENOISERS)
def test_words_change_the_image(name: str) -> None:
    pipe = make_pipe(name)
    images = pipe(WORDS, latents=torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), **CALL).images
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(images[i], images[j], atol=1e-4), (WORDS[i], WORDS[j])


class Recorder:
    """Records what a denoiser is called with and what it answers."""

    def __init__(self, denoiser: ModelMixin) -> None:
        self.calls: list[dict] = []
        denoiser.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: ModelMixin, args: tuple, kwargs: dict, output: tuple) -> None:
        self.calls.append({**kwargs, "answer": output[0]})


@pytest.mark.parametrize("name", DENOISERS)
def test_guidance_is_null_plus_scale_times_difference(name: str) -> None:
    pipe = make_pipe(name)
    seen = Recorder(pipe.denoiser)
    noise = torch.randn(2, 1, 8, 8)
    call = {"latents": noise, "num_inference_steps": 1, "output_type": "latent"}
    guided = pipe(WORDS[:2], guidance_scale=3.0, **call).images
    conditional, null = seen.calls[0]["answer"].chunk(2)
    assert not seen.calls[0]["encoder_attention_mask"][2:].any()
    torch.testing.assert_close(guided, noise - (null + 3.0 * (conditional - null)))
    torch.testing.assert_close(pipe(["", " "], **call).images, noise - null, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pipe(WORDS[:2], negative_prompt="", guidance_scale=3.0, **call).images, guided)
    with torch.no_grad():  # and that is what the denoiser says without any text
        absent = pipe.denoiser(noise, 1000.0).sample
    torch.testing.assert_close(absent, null, rtol=1e-4, atol=1e-5)
    other = pipe(WORDS[:2], negative_prompt=["a circle", "a square"], guidance_scale=3.0, **call).images
    negative = pipe(["a circle", "a square"], **call).images
    torch.testing.assert_close(other, noise - ((noise - negative) + 3.0 * (conditional - (noise - negative))))


def test_denoiser_without_null_text_is_led_away_from_the_empty_text() -> None:
    pipe = make_pipe(denoiser=make_denoiser(null_condition=False))
    call = {"latents": torch.randn(1, 1, 8, 8), "num_inference_steps": 1, "output_type": "latent"}
    real, empty, guided = (pipe(text, guidance_scale=s, **call).images
                           for text, s in (("a circle", 1.0), ("", 1.0), ("a circle", 2.0)))  # fmt: skip
    torch.testing.assert_close(guided, empty + 2.0 * (real - empty), rtol=1e-4, atol=1e-5)


def test_embeddings_stand_for_texts() -> None:
    pipe = make_pipe()
    states, mask = pipe.encode_prompt(WORDS[:2])
    assert states.shape == (2, 8, 16) and mask.sum(1).tolist() == [4, 4]
    call = {**CALL, "latents": torch.randn(2, 1, 8, 8), "guidance_scale": 2.0}
    expected = pipe(WORDS[:2], negative_prompt="a", **call).images
    negative, negative_mask = pipe.encode_prompt(["a"])
    given = {"prompt_embeds": states, "prompt_attention_mask": mask, "negative_prompt_embeds": negative[:, :4],
             "negative_prompt_attention_mask": negative_mask[:, :4]}  # fmt: skip
    without = make_pipe(text_encoder=None, tokenizer=None)
    torch.testing.assert_close(without(**given, **call).images, expected, rtol=1e-4, atol=1e-5)


def test_several_images_of_each_prompt() -> None:
    pipe = make_pipe()
    images = pipe(WORDS[:2], num_images_per_prompt=2, generator=generators(range(4)), **CALL).images
    single = pipe(WORDS[1], generator=generators(range(2, 3)), **CALL).images
    assert images.shape[0] == 4 and torch.equal(images[2], single[0])


def test_padding_is_read_only_on_request() -> None:
    _, mask = make_pipe(read_padding=True).encode_prompt(["a circle", ""])
    assert mask[0].all() and not mask[1].any()


def test_diffusion_solver_vae_and_sizes(kl: AutoencoderKL) -> None:
    denoiser = make_denoiser("dimsum", in_channels=4, patch_size=1, sample_size=4)
    scheduler = swap_scheduler(DiffusionObjective().scheduler(), "dpmsolver++")
    pipe = make_pipe(denoiser=denoiser, scheduler=scheduler, vae=kl)
    image = pipe("a circle", num_inference_steps=2, height=16, width=8).images[0]
    assert image.mode == "RGB" and image.size == (8, 16)
    pipe = make_pipe(denoiser=denoiser, vae=kl)
    assert pipe("a circle", ode_solver="euler", num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", DENOISERS)
def test_saved_folder_loads_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    pipe = make_pipe(name)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["text_encoder"] == ["genssm", "TextEncoder"]
    assert index["tokenizer"] == ["genssm", "CaptionTokenizer"]
    expected = pipe("a blue circle", latents=torch.ones(1, 1, 8, 8), **CALL).images
    if name != "zigma":  # one fresh process is enough
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded("a blue circle", latents=torch.ones(1, 1, 8, 8), **CALL).images, expected)
        return
    code = f"""
import sys, torch, genssm
pipe = genssm.TextToImagePipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
torch.save(pipe("a blue circle", latents=torch.ones(1, 1, 8, 8), **{CALL!r}).images, sys.argv[2])
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "pipe"), str(tmp_path / "image.pt")]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "image.pt"), expected)


def save_clip(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    bos_eos = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=300, max_position_embeddings=12, **sizes, **bos_eos)).save_pretrained(
        folder
    )


def save_t5(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=300, **sizes)).save_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = CaptionTokenizer.learn(WORDS, vocab_size=300).backend
    backend.add_special_tokens(["<pad>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_max_length=12).save_pretrained(folder)


@pytest.mark.parametrize(("save", "name"), [(save_clip, "CLIPTextModel"), (save_t5, "T5EncoderModel")])
def test_frozen_encoders_of_transformers(save: Callable, name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    save(tmp_path / "frozen")
    save_tokenizer(tmp_path / "frozen")
    tokenizer, encoder = load_frozen_encoder(str(tmp_path / "frozen"))
    assert type(encoder).__name__ == name and not any(p.requires_grad for p in encoder.parameters())
    pipe = make_pipe(text_encoder=encoder, tokenizer=tokenizer)
    states, mask = pipe.encode_prompt(["a red circle", ""])
    assert states.shape == (2, 12, 16) and mask[0].sum() >= 3 and not mask[1].any()
    call = {**CALL, "latents": torch.ones(1, 1, 8, 8), "guidance_scale": 2.0}
    expected = pipe("a red circle", **call).images
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("a red circle", **call).images, expected)
    again = load_frozen_encoder(str(tmp_path / "pipe"), max_length=7)[0]
    assert again.model_max_length == 7


def test_missing_frozen_encoder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"is no text encoder: config\.json missing"):
        load_frozen_encoder(str(tmp_path))
    save_t5(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no tokenizer: tokenizer\.json or vocab\.json"):
        load_frozen_encoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no text encoder 'nobody/nothing'"):
        load_frozen_encoder("nobody/nothing")


def test_from_pipe_and_offloading() -> None:
    pipe = make_pipe()
    again = TextToImagePipeline.from_pipe(pipe)
    assert again.denoiser is pipe.denoiser and again.text_encoder is pipe.text_encoder
    assert again.tokenizer is pipe.tokenizer
    call = {**CALL, "latents": torch.ones(1, 1, 8, 8)}
    expected = pipe("a circle", **call).images
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(pipe("a circle", **call).images, expected)


def test_runs_on_every_device(device: torch.device) -> None:
    call = {**CALL, "generator": generators(range(2)), "guidance_scale": 2.0}
    images = make_pipe().to(device)(WORDS[:2], **call).images
    call["generator"] = generators(range(2))
    torch.testing.assert_close(images.cpu(), make_pipe()(WORDS[:2], **call).images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give either prompt or prompt_embeds; got neither"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 4, 16)}, "got both"),
        ({"prompt": []}, "expected a text or a list of texts"),
        ({"prompt": [3]}, "expected a text or a list of texts"),
        ({"prompt": 3}, "prompt is 3; expected a text or a list of texts"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 4)}, "belongs to prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 4, 15)}, r"expected \(B, S, 16\)"),
        ({"prompt_embeds": torch.zeros(1, 4, 16), "prompt_attention_mask": torch.ones(1, 3)}, r"expected \(1, 4\)"),
        ({"prompt": "a", "negative_prompt": "b"}, "set guidance_scale above 1"),
        ({"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2, "guidance_scale": 2.0}, "2 negative prompts for 3"),
        ({"prompt": "a", "negative_prompt_attention_mask": torch.ones(1, 4)}, "belongs to negative_prompt_embeds"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "0 samples of each prompt"),
        ({"prompt": "a", "generator": generators(range(2))}, "2 generators for 1 images"),
        ({"prompt": "a", "output_type": "jpeg"}, "output_type is 'jpeg'"),
    ],
)
def test_impossible_calls_are_refused_first(call: dict, message: str) -> None:
    pipe = make_pipe()
    seen = Recorder(pipe.denoiser)
    with pytest.raises(ValueError, match=message):
        pipe(**call)
    assert not seen.calls


def test_impossible_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="reads no text"):
        make_pipe(denoiser=stirred(ZigMa(**{**SMALL, "context_dim": 0})))
    with pytest.raises(ValueError, match="no text encoder and tokenizer; pass prompt_embeds"):
        make_pipe(text_encoder=None, tokenizer=None)("a")
    bare = make_pipe(denoiser=make_denoiser(null_condition=False), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="pass negative_prompt_embeds or leave guidance_scale"):
        bare(prompt_embeds=torch.zeros(1, 3, 16), guidance_scale=2.0)
