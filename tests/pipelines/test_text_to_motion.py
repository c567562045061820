"""Text to motion: complete folders, motions that depend on their own generator, given frames, long motions."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from genssm.models import CaptionTokenizer, MotionMamba, MotionMambaFrames, MotionVAE, TextEncoder
from genssm.motion import T2M
from genssm.pipelines import TextToMotionPipeline
from genssm.pipelines.motion_conditions import encode_motion_text, load_motion_text
from genssm.pipelines.motion_editing import CleanView, join_segments, segment_windows
from genssm.schedulers import FlowODEScheduler, swap_scheduler
from genssm.text import tokenize
from tests.models.common import randomise

CAPTIONS = ["a person walks", "a person jumps up", "a person walks in a circle", "a person waves"]
DIM = T2M.feature_dim
DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0, "num_frames": [12, 7]}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def text_parts(width: int) -> dict:
    tokenizer = CaptionTokenizer.learn(CAPTIONS * 2, vocab_size=300, max_length=16)
    encoder = randomise(TextEncoder(len(tokenizer), hidden_size=width, num_layers=1, num_heads=2, max_length=16))
    return {"text_encoder": encoder.eval(), "tokenizer": tokenizer}


def statistics() -> dict:
    generator = torch.Generator().manual_seed(1)
    mean = 0.1 * torch.randn(DIM, generator=generator)
    return {"mean": mean.tolist(), "std": (0.1 + torch.rand(DIM, generator=generator)).tolist()}


def latent_pipeline(scheduler=None, **options) -> TextToMotionPipeline:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "ff_size": 24}
    vae = randomise(MotionVAE(latent_tokens=2, **small)).eval()
    denoiser = randomise(MotionMamba(d_state=4, context_dim=12, **small)).eval()
    scheduler = scheduler or DDIMScheduler(**DIFFUSION)
    pipe = TextToMotionPipeline(denoiser, scheduler, vae, **text_parts(12), **statistics(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frame_pipeline(scheduler=None, **options) -> TextToMotionPipeline:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_layers": 3, "d_state": 4, "channel_group": 8, "patch_size": 2}
    denoiser = randomise(MotionMambaFrames(context_dim=12, **small)).eval()
    scheduler = scheduler or DDIMScheduler(**DIFFUSION)
    pipe = TextToMotionPipeline(denoiser, scheduler, **text_parts(12), **statistics(), text_states="tokens", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def action_pipeline() -> TextToMotionPipeline:
    torch.manual_seed(0)
    denoiser = randomise(
        MotionMambaFrames(hidden_size=16, num_layers=3, d_state=4, channel_group=0, context_dim=0, num_classes=3)
    ).eval()
    pipe = TextToMotionPipeline(
        denoiser, DDIMScheduler(**DIFFUSION), **statistics(), class_names=["walk", "run", "jump"]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"latent": latent_pipeline, "frame": frame_pipeline}


@pytest.fixture(params=PIPELINES, scope="module")
def pipe(request: pytest.FixtureRequest) -> TextToMotionPipeline:
    return PIPELINES[request.param]()


def test_lengths_and_outputs(pipe) -> None:
    output = pipe(CAPTIONS[:2], generator=seeds(0, 1), **CALL)
    assert [tuple(motion.shape) for motion in output.motions] == [(12, 22, 3), (7, 22, 3)]
    assert output.fps == 20 and all(motion.isfinite().all() for motion in output.motions)
    seconds = {**CALL, "num_frames": None, "seconds": 0.5}
    (features,) = pipe(CAPTIONS[0], generator=seeds(0), output_type="features", **seconds, return_dict=False)
    assert features[0].shape == (10, DIM)


def test_motion_depends_on_its_own_generator_and_length(pipe) -> None:
    together = pipe(CAPTIONS[:2], generator=seeds(0, 1), **CALL).motions
    alone = pipe(CAPTIONS[1], generator=seeds(1), **{**CALL, "num_frames": 7}).motions[0]
    assert torch.equal(together[1], alone)
    other = pipe(CAPTIONS[1], generator=seeds(2), **{**CALL, "num_frames": 7}).motions[0]
    assert not torch.allclose(other, alone, atol=1e-3)


def test_prompt_and_guidance_matter(pipe) -> None:
    call = {**CALL, "num_frames": 7}
    one, two = (pipe(text, generator=seeds(0), **call).motions[0] for text in CAPTIONS[:2])
    assert not torch.allclose(one, two, atol=1e-4)
    plain = pipe(CAPTIONS[0], generator=seeds(0), **{**call, "guidance_scale": 1.0}).motions[0]
    assert not torch.allclose(one, plain, atol=1e-4)
    embeds, mask = pipe.encode_prompt([CAPTIONS[0], ""])
    if mask is None:
        given = pipe(prompt_embeds=embeds[:1], null_prompt_embeds=embeds[1:], generator=seeds(0), **call).motions[0]
        assert torch.equal(given, one)


@pytest.mark.parametrize("name", PIPELINES)
def test_folder_needs_nothing_else(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name](max_frames=30)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is TextToMotionPipeline
    before, after = (p(CAPTIONS[:2], generator=seeds(3, 4), **CALL).motions for p in (pipe, loaded))
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    with pytest.raises(ValueError, match=r"makes 1 to 30 \(1.5 seconds\)"):
        loaded(CAPTIONS[0], seconds=2.0)


@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++", "euler", "heun", "unipc"])
def test_schedulers_of_the_family(name: str) -> None:
    pipe = latent_pipeline()
    pipe.scheduler = swap_scheduler(pipe.scheduler, name)
    assert pipe(CAPTIONS[0], generator=seeds(0), **{**CALL, "num_frames": 7}).motions[0].isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**DIFFUSION),
        DDIMScheduler(**DIFFUSION, prediction_type="v_prediction"),
        DDIMScheduler(**DIFFUSION, prediction_type="sample"),
        FlowMatchEulerDiscreteScheduler(),
        FlowODEScheduler(path="gvp"),
    ],
    ids=["epsilon", "v", "sample", "flow", "gvp"],
)
def test_clean_view_inverts(scheduler) -> None:
    scheduler.set_timesteps(5)
    view = CleanView(scheduler)
    time = scheduler.timesteps[2]
    x, prediction = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    clean = view.clean(prediction, x, time)
    torch.testing.assert_close(view.prediction(clean, x, time), prediction, rtol=1e-4, atol=1e-4)
    # The same x_0 as the scheduler's own, where it tells.
    step = scheduler.step(prediction, time, x)
    if hasattr(step, "pred_original_sample"):
        torch.testing.assert_close(clean, step.pred_original_sample, rtol=1e-4, atol=1e-4)


def given_frames(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[:3] = mask[-1] = True
    return torch.randn(length, DIM, generator=generator), mask


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(**DIFFUSION), FlowMatchEulerDiscreteScheduler()], ids=["diffusion", "flow"]
)
def test_given_frames_are_held_exactly_by_a_denoiser_of_frames(scheduler) -> None:
    pipe = frame_pipeline(scheduler)
    known, mask = given_frames(12)
    call = {**CALL, "num_frames": 12, "output_type": "features", "generator": seeds(0)}
    motion = pipe(CAPTIONS[0], known_features=known, known_frames=mask, **call).motions[0]
    torch.testing.assert_close(motion[mask], known[mask])
    free = pipe(CAPTIONS[0], **{**call, "generator": seeds(0)}).motions[0]
    assert not torch.allclose(motion[~mask], free[~mask], atol=1e-4), "the rest does not notice the given frames"


def test_given_frames_pull_latents() -> None:
    pipe = latent_pipeline()
    _, mask = given_frames(12)
    decoded = pipe.statistics.denormalise(pipe.vae.decode(torch.randn(1, 2, 16), [12])[0].detach())
    call = {**CALL, "num_frames": 12, "num_inference_steps": 10}
    given = {"known_features": decoded, "known_frames": mask}
    errors = []
    for extra in ({}, given):
        latents = pipe(CAPTIONS[0], generator=seeds(0), output_type="latent", **call, **extra).motions[0]
        features = pipe.statistics.denormalise(pipe.vae.decode(latents[None], [12])[0].detach())
        errors.append(float((features - decoded)[mask].square().mean()))
    assert errors[1] < 0.5 * errors[0]
    motion = pipe(CAPTIONS[0], generator=seeds(0), output_type="features", **call, **given).motions[0]
    torch.testing.assert_close(motion[mask], decoded[mask])


def test_long_motion(pipe) -> None:
    call = {"num_inference_steps": 3, "guidance_scale": 2.0}
    segments = {"seconds": [0.6, 0.5, 0.7], "transition_seconds": 0.2}
    output = pipe.long(CAPTIONS[:3], generator=seeds(0)[0], **segments, **call)
    assert output.motions[0].shape == (36, 22, 3) and output.borders == [[12, 22]]
    assert output.motions[0].isfinite().all()
    again = pipe.long(CAPTIONS[:3], generator=seeds(0)[0], **segments, **call)
    assert torch.equal(again.motions[0], output.motions[0])
    other = pipe.long([*CAPTIONS[:2], CAPTIONS[3]], generator=seeds(0)[0], **segments, **call)
    assert not torch.allclose(other.motions[0][24:], output.motions[0][24:], atol=1e-4)


def test_one_segment_is_a_plain_motion() -> None:
    pipe = frame_pipeline()
    long = pipe.long(CAPTIONS[:1], seconds=0.6, generator=seeds(0)[0], num_inference_steps=3, guidance_scale=2.0)
    plain = pipe(CAPTIONS[0], seconds=0.6, generator=seeds(0), num_inference_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(long.motions[0], plain.motions[0])


def test_blended_transitions_are_smoother_than_cuts() -> None:
    """The third difference of the joined features at a border, with an overlap and without."""
    generator = torch.Generator().manual_seed(0)
    waves = [torch.sin(torch.arange(24.0)[:, None] / 6 + 3 * torch.rand(8, generator=generator)) for _ in range(2)]
    jerks = []
    for overlap in (0, 12):
        joined = join_segments([waves[0][: 12 + overlap // 2], waves[1][12 - overlap // 2 :]], overlap)
        assert joined.shape == (24, 8)
        jerks.append(float(joined.diff(n=3, dim=0).abs().amax()))
    assert jerks[1] < 0.5 * jerks[0]


def test_windows_cover_everything_once() -> None:
    windows = segment_windows([10, 8, 9], 4)
    assert windows == [(0, 12), (8, 20), (16, 27)]
    pieces = [torch.arange(start, end)[:, None].float() for start, end in windows]
    torch.testing.assert_close(join_segments(pieces, 4), torch.arange(27.0)[:, None])
    with pytest.raises(ValueError, match="make transition_seconds shorter"):
        segment_windows([10, 4], 4)


def test_action_labels() -> None:
    pipe = action_pipeline()
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_frames": 6}
    motions = pipe(class_labels=["walk", "jump"], generator=seeds(0, 0), **call).motions
    assert not torch.allclose(*motions, atol=1e-4)
    assert torch.equal(pipe(class_labels=2, generator=seeds(0), **call).motions[0], motions[1])
    with pytest.raises(ValueError, match="reads no text"):
        pipe("a person walks", **call)


def test_unconditional_motions_are_as_many_as_lengths() -> None:
    denoiser = MotionMambaFrames(hidden_size=16, num_layers=3, d_state=4, channel_group=0, context_dim=0).eval()
    pipe = TextToMotionPipeline(denoiser, DDIMScheduler(**DIFFUSION), **statistics())
    pipe.set_progress_bar_config(disable=True)
    motions = pipe(num_frames=[5, 8], num_inference_steps=2, guidance_scale=1.0).motions
    assert [len(motion) for motion in motions] == [5, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": CAPTIONS[:2], "seconds": [1.0, 2.0, 3.0]}, "3 lengths for 2 motions"),
        ({"prompt": "", "seconds": 1.0, "num_frames": 3}, "seconds and num_frames"),
        ({"class_labels": 1}, "reads text"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 1, 12)}, "reads text"),
        ({"prompt": "a", "generator": seeds(0, 1)}, "2 generators for 1 motions"),
        ({"prompt": "a", "known_frames": torch.ones(3)}, "belong together"),
        ({"prompt": "a", "output_type": "pil"}, "output_type"),
        ({"prompt": "a", "num_frames": 0}, "a motion of 0 frames"),
    ],
)
def test_impossible_calls(pipe, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_parts_must_fit() -> None:
    with pytest.raises(ValueError, match="263 features, mean has 3"):
        TextToMotionPipeline(MotionMambaFrames(hidden_size=16, num_layers=3, channel_group=0), DDIMScheduler(),
                             mean=[0.0] * 3, std=[1.0] * 3)  # fmt: skip
    with pytest.raises(ValueError, match="one token per text"):
        latent_pipeline(text_states="tokens")
    with pytest.raises(ValueError, match="mean and std"):
        TextToMotionPipeline(MotionMambaFrames(hidden_size=16, num_layers=3, channel_group=0), DDIMScheduler())


def save_clip(folder: Path, projection: bool) -> None:
    """A tiny CLIP text model with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    numbers = {
        "vocab_size": 300,
        "max_position_embeddings": 12,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = CLIPTextConfig(**sizes, **numbers, projection_dim=12)
    torch.manual_seed(0)
    (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).save_pretrained(folder)
    backend = CaptionTokenizer.learn(CAPTIONS, vocab_size=300).backend
    backend.add_special_tokens(["<pad>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_max_length=12).save_pretrained(folder)


@pytest.mark.parametrize("projection", [True, False])
def test_clip_gives_its_projected_embedding(projection: bool, tmp_path: Path) -> None:
    """As MLD reads it; a text model that was saved without its projection gives the pooled state."""
    pytest.importorskip("transformers")
    save_clip(tmp_path / "clip", projection)
    tokenizer, encoder = load_motion_text(str(tmp_path / "clip"), None, "pooled")
    width = 12 if projection else 16
    pipe = latent_pipeline()
    denoiser = MotionMamba(hidden_size=16, num_layers=3, num_heads=2, ff_size=24, d_state=4, context_dim=width).eval()
    pipe = TextToMotionPipeline(denoiser, pipe.scheduler, pipe.vae, encoder, tokenizer, **statistics())
    pipe.set_progress_bar_config(disable=True)
    states, mask = pipe.encode_prompt(["a person walks", ""])
    assert states.shape == (2, 1, width) and mask is None
    ids, keep = tokenize(tokenizer, ["a person walks"])
    output = encoder(ids, attention_mask=keep)
    torch.testing.assert_close(states[0], output.text_embeds if projection else output.pooler_output)
    expected = pipe("a person walks", generator=seeds(0), **{**CALL, "num_frames": 7}).motions[0]
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded("a person walks", generator=seeds(0), **{**CALL, "num_frames": 7}).motions[0], expected)
    _, encoder = load_motion_text(str(tmp_path / "pipe"), None, "tokens")
    assert encode_motion_text(encoder, ids, keep, "tokens")[0].shape == (1, 12, 16)
