"""Images by unmasking codes: same image in any batch, given codes stay, guidance, previews, saving, errors."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AmusedScheduler, DiffusionPipeline

from genssm.models import CaptionTokenizer, MaskMamba, TextEncoder
from genssm.pipelines import MaskedImagePipeline
from genssm.schedulers import swap_scheduler
from tests.models.common import randomise
from tests.models.test_vq import make_tokenizer

LABELS = [0, 2, 1, 1]


def make_pipe(**changes: object) -> MaskedImagePipeline:
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "vocab_size": 32, "num_classes": 3, "hidden_size": 32, "num_layers": 2, "d_state": 4}
    model = randomise(MaskMamba(**{**sizes, "num_heads": 4, **changes})).eval()
    pipe = MaskedImagePipeline(model, make_tokenizer(), AmusedScheduler(32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> MaskedImagePipeline:
    return make_pipe()


def generators(rows: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in rows]


@pytest.mark.parametrize(
    "call",
    [{}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}, {"guidance_scale": 3.0, "guidance_schedule": "linear"}],
    ids=str,
)
def test_images_do_not_depend_on_the_batch(pipe: MaskedImagePipeline, call: dict) -> None:
    """Bit for bit."""
    call = {"num_inference_steps": 5, "output_type": "pt", **call}
    batch = pipe(LABELS, generator=generators(range(4)), **call).images
    assert batch.shape == (4, 1, 8, 8) and not torch.equal(batch[2], batch[3])
    for i in range(4):
        single = pipe(LABELS[i], generator=generators(range(i, i + 1)), **call).images
        assert torch.equal(single[0], batch[i])


def test_codes_are_unmasked_step_by_step(pipe: MaskedImagePipeline) -> None:
    """As many as the cosine says, never one that was there before."""
    masked, previous = [], [None]

    def callback(pipe: DiffusionPipeline, step: int, time: torch.Tensor, tensors: dict) -> None:
        codes = tensors["codes"]
        masked.append((codes == 32).sum(dim=1).tolist())
        if previous[0] is not None:
            known = previous[0] != 32
            assert torch.equal(codes[known], previous[0][known])
        previous[0] = codes
        assert pipe.preview(codes, "pt").shape == (2, 1, 8, 8)

    codes = pipe([0, 1], num_inference_steps=4, callback_on_step_end=callback, output_type="latent").images
    assert masked == [[14, 14], [11, 11], [6, 6], [0, 0]]
    assert torch.equal(codes, previous[0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_steps_are_those_of_the_scheduler(schedule: str) -> None:
    """Where m codes are equally likely, whichever is drawn is as sure: the same stay masked as in diffusers."""
    pipe = make_pipe()
    pipe.scheduler = scheduler = AmusedScheduler(32, schedule)
    generator = torch.Generator().manual_seed(0)
    likely = torch.stack([torch.randperm(16, generator=generator) + 1 for _ in range(5)])  # m, no two alike
    logits = torch.where(torch.arange(32) < likely[..., None], 0.0, -math.inf)
    codes = torch.full((5, 16), 32)
    for i in range(5):
        codes[i, : 4 * i] = 31  # the last image has nothing to fill in
    shares = (codes == 32).float().mean(dim=1)
    scheduler.set_timesteps(6, (0.0, 0.0))
    for step, t in enumerate(scheduler.timesteps):
        after = pipe._step(logits, step, codes, shares, torch.rand(5, 2, 16, generator=generator))
        for i in range(4):
            expected = scheduler.step(logits[i : i + 1], t, codes[i : i + 1], shares[i].item()).prev_sample[0]
            assert torch.equal(after[i] == 32, expected == 32)
        assert torch.equal(after[codes != 32], codes[codes != 32])
        codes = after
    assert (codes[codes != 31] < likely[codes != 31]).all()


def test_given_codes_stay(pipe: MaskedImagePipeline) -> None:
    given = torch.full((2, 16), 32)
    given[0, :8] = torch.arange(8)
    given[1] = torch.arange(16)  # nothing to fill in
    codes = pipe([0, 1], codes=given, num_inference_steps=3, output_type="latent").images
    assert torch.equal(codes[0, :8], given[0, :8]) and torch.equal(codes[1], given[1])
    assert codes.max() < 32


def test_guidance_moves_towards_the_class(pipe: MaskedImagePipeline) -> None:
    call = {"num_inference_steps": 1, "output_type": "latent"}
    codes = pipe([0] * 200, guidance_scale=4.0, generator=torch.Generator().manual_seed(0), **call).images
    masked = torch.full((2, 16), 32)
    with torch.no_grad():
        real, null = pipe.model(masked, torch.tensor([0, 3])).logits
    expected = (null + 4.0 * (real - null)).softmax(dim=-1)
    share = torch.nn.functional.one_hot(codes, 32).float().mean(dim=0)
    assert (share - expected).abs().sum(dim=1).mean() / 2 < 0.2
    assert (share - real.softmax(dim=-1)).abs().sum(dim=1).mean() > (share - expected).abs().sum(dim=1).mean()


def test_text_and_no_condition() -> None:
    text = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0))
    pipe = make_pipe(num_classes=0, context_dim=6, context_length=4)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    assert pipe(prompt_embeds=text, guidance_scale=2.0, **call).images.shape == (2, 16)
    assert make_pipe(num_classes=0)(num_images=3, **call).images.shape == (3, 16)


def test_prompts(tmp_path: Path) -> None:
    """As texts or as embeddings, alone or among others, before and after saving: the same codes."""
    pytest.importorskip("tokenizers")
    bare = make_pipe(num_classes=0, context_dim=8, context_length=6)
    tokenizer = CaptionTokenizer.learn(["red", "blue"], 280, 6)
    encoder = randomise(TextEncoder(len(tokenizer), 8, num_layers=1, num_heads=2, max_length=6)).eval()
    pipe = MaskedImagePipeline(bare.model, bare.vqvae, bare.scheduler, text_encoder=encoder, tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    call = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    for p in (pipe, loaded):
        p.set_progress_bar_config(disable=True)
    batch = pipe(prompt=["red", "blue"], generator=generators(range(2)), **call).images
    assert torch.equal(pipe(prompt="blue", generator=generators(range(1, 2)), **call).images[0], batch[1])
    assert torch.equal(loaded(prompt=["red", "blue"], generator=generators(range(2)), **call).images, batch)
    states, mask = pipe.encode_prompt(["red", "blue"])
    given = {"prompt_embeds": states, "prompt_attention_mask": mask}
    assert torch.equal(bare(**given, generator=generators(range(2)), **call).images, batch)
    negative = pipe(prompt=["red", "blue"], negative_prompt="red", generator=generators(range(2)), **call).images
    assert not torch.equal(negative, batch)


def test_save_and_load(pipe: MaskedImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert '"genssm",\n    "MaskMamba"' in (tmp_path / "model_index.json").read_text()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = [p([1], generator=generators(range(1)), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images)


def test_errors(pipe: MaskedImagePipeline) -> None:
    for call, message in (
        ({"temperature": 0}, "temperature is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"codes": torch.zeros(2, 15, dtype=torch.int64)}, r"expected \(2, 16\)"),
        ({"codes": torch.full((2, 16), 33)}, "or 32 where they are masked"),
        ({"guidance_scale": [1.0, 2.0]}, "one for each of the 12 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([0, 1], **call)
    with pytest.raises(ValueError, match="masks with 31 but the model with 32"):
        MaskedImagePipeline(pipe.model, pipe.vqvae, AmusedScheduler(31))
    with pytest.raises(ValueError, match="samples no denoiser"):
        swap_scheduler(pipe.scheduler, "heun")
