"""Images code by code: same image in any batch, filters, guidance, completion, previews, saving, errors, one graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from genssm.kernels.draw_token import invert_cdf
from genssm.models import AiM, CaptionTokenizer, TextEncoder
from genssm.pipelines import AutoregressiveImagePipeline
from genssm.pipelines.code_images import guidance_scales
from genssm.pipelines.token_sampling import TokenSampling, filter_logits
from tests.models.common import randomise
from tests.models.test_vq import make_tokenizer

MakePipe = Callable[..., AutoregressiveImagePipeline]
LABELS = [0, 2, 1, 1]
FILTERED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def make_pipe(**changes: object) -> AutoregressiveImagePipeline:
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "vocab_size": 32, "num_classes": 3, "hidden_size": 32, "num_layers": 2, "d_state": 8}
    model = randomise(AiM(**{**sizes, "headdim": 16, "tie_embeddings": False, **changes}))
    with torch.no_grad():
        model.code_embed.weight.mul_(10)  # codes that tell on the logits
        model.proj_out.weight.mul_(3)  # logits that prefer some codes
    pipe = AutoregressiveImagePipeline(model.eval(), make_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> AutoregressiveImagePipeline:
    return make_pipe()


def generators(rows: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in rows]


@pytest.mark.parametrize("call", [{}, FILTERED, {"guidance_scale": 2.5, "guidance_schedule": "cosine"}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"mixer": "mamba", "headdim": None, "num_groups": 1}], ids=str)
def test_images_do_not_depend_on_the_batch(changes: dict, call: dict) -> None:
    """Bit for bit."""
    pipe = make_pipe(**changes)
    batch = pipe(LABELS, generator=generators(range(4)), output_type="pt", **call).images
    codes = pipe(LABELS, generator=generators(range(4)), output_type="latent", **call).images
    assert batch.shape == (4, 1, 8, 8) and torch.isfinite(batch).all()
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[2], codes[3])
    for i in range(4):
        single = pipe(LABELS[i], generator=generators(range(i, i + 1)), output_type="pt", **call).images
        assert torch.equal(single[0], batch[i])


def test_codes_are_drawn_from_the_model(pipe: AutoregressiveImagePipeline) -> None:
    """Greedy codes are the best of the whole sequence's logits; others follow the first code's distribution."""
    model = pipe.model
    codes = pipe([1], temperature=0, output_type="latent").images
    with torch.no_grad():
        logits = model(codes[:, :-1], torch.tensor([1])).logits
    assert torch.equal(logits.argmax(dim=-1), codes)
    first = pipe([1] * 500, generator=torch.Generator().manual_seed(0), output_type="latent").images[:, 0]
    expected = logits[0, 0].softmax(dim=-1)
    share = torch.bincount(first, minlength=32) / 500
    assert (share - expected).abs().sum() / 2 < 0.15


def test_guidance(pipe: AutoregressiveImagePipeline) -> None:
    call = {"temperature": 0, "output_type": "latent"}
    plain = pipe(LABELS, **call).images
    assert torch.equal(pipe(LABELS, guidance_scale=[1.0] * 16, **call).images, plain)
    guided = pipe(LABELS, guidance_scale=3.0, **call).images
    assert not torch.equal(guided, plain)
    for scale in (3.0, [1.0] * 8 + [3.0] * 8):
        codes = pipe([0], guidance_scale=scale, **call).images
        with torch.no_grad():
            real, null = pipe.model(codes[:, :-1].repeat(2, 1), torch.tensor([0, 3])).logits
        expected = null + guidance_scales(scale, "constant", 16)[:, None] * (real - null)
        assert torch.equal(expected.argmax(dim=-1), codes[0])


def test_guidance_schedules() -> None:
    assert guidance_scales(3.0, "constant", 5).tolist() == [3.0] * 5
    assert guidance_scales(3.0, "linear", 5).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guidance_scales(3.0, "cosine", 5).tolist() == pytest.approx([1.0, 1.2929, 2.0, 2.7071, 3.0], abs=1e-4)
    with pytest.raises(ValueError, match="expected one of constant, linear, cosine"):
        guidance_scales(2.0, "steps", 5)
    with pytest.raises(ValueError, match="one for each of the 5 steps"):
        guidance_scales([2.0], "constant", 5)


def test_completion(pipe: AutoregressiveImagePipeline) -> None:
    """Given rows stay; an image's own rows with its own seed lead to itself."""
    call = {"output_type": "latent", "guidance_scale": 2.0}
    whole = pipe(LABELS, generator=generators(range(4)), **call).images
    for given in (4, 15):
        again = pipe(LABELS, codes=whole[:, :given], generator=generators(range(4)), **call).images
        assert torch.equal(again, whole)
    other = pipe(LABELS, codes=whole[:, :8], generator=generators(range(9, 13)), **call).images
    assert torch.equal(other[:, :8], whole[:, :8]) and not torch.equal(other, whole)


def test_callback_and_preview(pipe: AutoregressiveImagePipeline) -> None:
    seen = []

    def callback(pipe: DiffusionPipeline, step: int, time: int, tensors: dict) -> None:
        seen.append((step, pipe.preview(tensors["codes"], step + 1, "pt")))

    images = pipe([0, 1], generator=generators(range(2)), callback_on_step_end=callback, output_type="pt").images
    assert [step for step, _ in seen] == list(range(16))
    assert torch.equal(seen[-1][1], images)
    half = seen[7][1]
    assert torch.equal(half[:, :, 4:], torch.full((2, 1, 4, 8), 0.5)) and not (half[:, :, :4] == 0.5).all()

    def stop(pipe: DiffusionPipeline, step: int, time: int, tensors: dict) -> None:
        pipe._interrupt = step == 3

    stopped = pipe([0, 1], generator=generators(range(2)), callback_on_step_end=stop, output_type="pt").images
    assert torch.equal(stopped, seen[3][1])


def test_released_sampling_is_an_option(pipe: AutoregressiveImagePipeline) -> None:
    """The temperature is ignored, and all images come from one generator, both halves of the batch drawn."""
    call = {"guidance_scale": 2.0, "top_k": 5, "as_released": True, "output_type": "latent"}
    first = pipe(LABELS, generator=torch.Generator().manual_seed(0), **call).images
    hot = pipe(LABELS, generator=torch.Generator().manual_seed(0), temperature=9.0, **call).images
    assert torch.equal(first, hot)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = pipe.model(class_labels=torch.tensor([*LABELS, 3, 3, 3, 3])).logits[:, 0]
        conditional, null = logits.chunk(2)
        filtered = filter_logits(null + 2.0 * (conditional - null), 5).softmax(dim=-1)
    drawn = torch.multinomial(filtered.repeat(2, 1), 1, generator=generator)[:4, 0]
    assert torch.equal(first[:, 0], drawn)


def test_text() -> None:
    pipe = make_pipe(num_classes=0, context_dim=6, context_length=4)
    text = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    call = {"temperature": 0, "output_type": "latent"}
    plain = pipe(prompt_embeds=text, **call).images
    guided = pipe(prompt_embeds=text, guidance_scale=4.0, **call).images
    assert plain.shape == (2, 16) and not torch.equal(plain, guided)
    assert torch.equal(pipe(prompt_embeds=text[1:], guidance_scale=4.0, **call).images[0], guided[1])
    assert pipe(num_images=2, **call).images.shape == (2, 16)


def make_text_pipe(**changes: object) -> AutoregressiveImagePipeline:
    pytest.importorskip("tokenizers")
    pipe = make_pipe(num_classes=0, context_dim=8, context_length=6, **changes)
    tokenizer = CaptionTokenizer.learn(["red", "blue", "green"], 280, 6)
    encoder = randomise(TextEncoder(len(tokenizer), 8, num_layers=1, num_heads=2, max_length=6)).eval()
    pipe = AutoregressiveImagePipeline(pipe.model, pipe.vqvae, text_encoder=encoder, tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 2.0, "negative_prompt": "green"}], ids=str)
def test_prompts(call: dict) -> None:
    """An image depends on its text and its generator, bit for bit; embeddings are the same as their texts."""
    pipe, prompts = make_text_pipe(), ["red", "blue", ""]
    call = {"output_type": "latent", **call}
    batch = pipe(prompt=prompts, generator=generators(range(3)), **call).images
    for i, prompt in enumerate(prompts):
        single = pipe(prompt=prompt, generator=generators(range(i, i + 1)), **call).images
        assert torch.equal(single[0], batch[i])
    states, mask = pipe.encode_prompt(prompts)
    given = {"prompt_embeds": states, "prompt_attention_mask": mask}
    assert torch.equal(pipe(**given, generator=generators(range(3)), **call).images, batch)
    others = pipe(prompt=["blue", "red", "red"], generator=generators(range(3)), **call).images
    assert all(not torch.equal(a, b) for a, b in zip(others, batch))
    many = pipe(prompt="red", num_images=3, generator=generators(range(3)), **call).images
    assert torch.equal(many[0], batch[0]) and not torch.equal(many[1], batch[1])
    if "negative_prompt" not in call:
        assert torch.equal(pipe(num_images=3, generator=generators(range(3)), **call).images[2], batch[2])


def test_negative_prompt_is_on_the_other_side_of_the_guidance() -> None:
    pipe = make_text_pipe()
    call = {"temperature": 0, "output_type": "latent", "guidance_scale": 3.0}
    codes = pipe(prompt="red", negative_prompt="blue", **call).images
    states, mask = pipe.encode_prompt(["red", "blue"])
    with torch.no_grad():
        text = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        real, null = pipe.model(codes[:, :-1].repeat(2, 1), **text).logits
    assert torch.equal((null + 3.0 * (real - null)).argmax(dim=-1), codes[0])
    assert not torch.equal(pipe(prompt="red", **call).images, codes)
    same = pipe(prompt="red", negative_prompt="", **call).images
    assert torch.equal(pipe(prompt="red", **call).images, same)


def test_text_parts_are_saved(tmp_path: Path) -> None:
    pipe = make_text_pipe()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    codes = [p(prompt="blue", generator=generators(range(1)), output_type="latent").images for p in (pipe, loaded)]
    assert torch.equal(*codes)


def test_errors_of_texts(pipe: AutoregressiveImagePipeline) -> None:
    text, bare = make_text_pipe(), make_pipe(num_classes=0, context_dim=8, context_length=6)
    for target, call, message in (
        (pipe, {"prompt": "red"}, "prompt given but this model reads no text"),
        (bare, {"prompt": "red"}, "no text encoder and tokenizer; pass prompt_embeds"),
        (text, {"prompt": "red", "negative_prompt": "blue"}, "takes effect through guidance"),
        (text, {"negative_prompt": "blue", "guidance_scale": 2.0}, "a negative prompt needs a prompt"),
        (text, {"prompt": "red", "prompt_embeds": torch.zeros(1, 1, 8)}, "either prompt or prompt_embeds"),
        (text, {"prompt": ["red"] * 2, "num_images": 3}, "2 prompts for num_images=3"),
        (text, {"prompt": ["red"] * 2, "negative_prompt": ["a"] * 3, "guidance_scale": 2.0}, "3 negative prompts"),
        (text, {"prompt_embeds": torch.zeros(1, 1, 7)}, r"expected \(B, S, 8\)"),
        (text, {"prompt": [3]}, "expected a text or a list"),
        (text, {"prompt": "red", "class_labels": 1}, "unconditional"),
    ):
        with pytest.raises(ValueError, match=message):
            target(**call)
    with pytest.raises(ValueError, match="a text_encoder is given but this model reads no text"):
        AutoregressiveImagePipeline(pipe.model, pipe.vqvae, text_encoder=text.text_encoder)


def test_unconditional() -> None:
    assert make_pipe(num_classes=0)(num_images=3, output_type="latent").images.shape == (3, 16)


def test_output_types(pipe: AutoregressiveImagePipeline) -> None:
    images = {kind: pipe([2], generator=generators(range(1)), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert images["np"].shape == (1, 8, 8, 1) and images["pil"][0].size == (8, 8)
    np.testing.assert_array_equal(images["np"][0, :, :, 0], images["pt"][0, 0].numpy())
    assert pipe([2], return_dict=False)[0][0].mode == "L"


def test_save_and_load(pipe: AutoregressiveImagePipeline, tmp_path: Path) -> None:
    named = AutoregressiveImagePipeline(pipe.model, pipe.vqvae, class_names=["cat", "dog", "emu"])
    named.save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    assert '"genssm",\n    "AiM"' in index and '"genssm",\n    "VQTokenizer"' in index
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, AutoregressiveImagePipeline)
    loaded.set_progress_bar_config(disable=True)
    expected = pipe(1, generator=generators(range(1)), output_type="pt").images
    assert torch.equal(loaded("dog", generator=generators(range(1)), output_type="pt").images, expected)


def test_offloading_gives_the_same_images(pipe: AutoregressiveImagePipeline) -> None:
    from accelerate import cpu_offload

    moved = make_pipe()
    cpu_offload(moved.model, execution_device=torch.device("cpu"))
    expected = pipe(LABELS, generator=generators(range(4)), output_type="latent").images
    assert torch.equal(moved(LABELS, generator=generators(range(4)), output_type="latent").images, expected)


def test_errors(pipe: AutoregressiveImagePipeline) -> None:
    for call, message in (
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        (
            {"codes": torch.zeros(2, 16, dtype=torch.int64)},
            r"codes have shape \(2, 16\); expected \(2, n\) with n < 16",
        ),
        ({"codes": torch.full((2, 3), 32)}, "outside 0..31"),
        ({"generator": generators(range(3))}, "3 generators for 2 images"),
        ({"generator": generators(range(2)), "as_released": True}, "draws all images with one generator"),
        ({"output_type": "gif"}, "output_type"),
        ({"state_dtype": torch.int8}, "state_dtype is torch.int8; expected torch.float32, torch.float16"),
        ({"prompt_embeds": torch.zeros(2, 1, 6)}, "reads no text"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "a callback cannot be given"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([0, 1], **call)
    with pytest.raises(ValueError, match="guidance_scale needs a class or a text"):
        pipe(num_images=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="draws 32 codes but the tokenizer knows 16"):
        AutoregressiveImagePipeline(pipe.model, make_tokenizer(num_vq_embeddings=16))


def test_filters() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, -1.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, top_k=9).isfinite().all()
    assert filter_logits(logits, top_p=0.01).isfinite().tolist() == [[True, False, False, False]]
    codes, previous = torch.full((1, 2), -1), torch.full((2, 1), -1)
    TokenSampling(temperature=0).draw(logits, torch.tensor([[0.5, 0.99]]), None, torch.tensor([1]), codes, previous)
    assert codes.tolist() == [[-1, 0]] and previous.tolist() == [[0], [0]]


def test_inverted_cdf_never_draws_the_impossible() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for uniform, expected in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.999999, 3)):
        assert invert_cdf(probabilities, torch.tensor([uniform])).item() == expected
    many = invert_cdf(probabilities.expand(4000, 5), torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    assert (many == 3).float().mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call", [{}, FILTERED, {"guidance_scale": 2.0}, {"state_dtype": torch.float32}, {"state_dtype": torch.bfloat16}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_graph_draws_what_the_plain_loop_draws(call: dict, dtype: torch.dtype) -> None:
    pipe = make_pipe().to("cuda")
    pipe.model.to(dtype)
    for _ in range(2):  # the second call replays the graph of the first
        loop, graph = (
            pipe(LABELS, generator=generators(range(4)), output_type="latent", cuda_graph=use, **call).images
            for use in (False, True)
        )
        assert torch.equal(loop, graph)
    with torch.no_grad():
        for parameter in pipe.model.parameters():
            parameter.mul_(0.9)
    assert torch.equal(
        *(
            pipe(LABELS, generator=generators(range(4)), output_type="latent", cuda_graph=use, **call).images
            for use in (False, True)
        )
    )
