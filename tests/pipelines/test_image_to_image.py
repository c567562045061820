"""Sampling that starts from an image, or paints a part of one, with every kind of scheduler."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from genssm.pipelines import ClassConditionalImagePipeline
from genssm.pipelines.inputs import to_mask, to_pixels
from genssm.schedulers import SCHEDULER_NAMES, swap_scheduler
from genssm.training.objectives import DiffusionObjective, FlowObjective
from tests.pipelines.conftest import make_denoiser

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
MakePipe = Callable[..., ClassConditionalImagePipeline]
FLOW = ("euler", "heun", "ddim", "sde", "dpmsolver++", "dpmsolver++-singlestep", "unipc")
PICTURE = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
MASK = torch.zeros(1, 8, 8)
MASK[:, :, 4:] = 1.0


def schedulers() -> list:
    flow = [("flow", name) for name in FLOW]
    return flow + [("diffusion", name) for name in SCHEDULER_NAMES if name != "sde"]


def make(make_pipe: MakePipe, kind: str, name: str) -> ClassConditionalImagePipeline:
    objective = FlowObjective() if kind == "flow" else DiffusionObjective()
    return make_pipe(swap_scheduler(objective.scheduler(), name))


@pytest.mark.parametrize(("kind", "name"), schedulers())
def test_starts_at_the_noise_level_of_its_first_step(make_pipe: MakePipe, kind: str, name: str) -> None:
    """The denoiser first sees alpha image + sigma noise of the time it is told."""
    pipe, seen = make(make_pipe, kind, name), []
    handle = pipe.denoiser.register_forward_hook(lambda m, args, out: seen.append(args))
    noise = torch.randn(1, 1, 8, 8)
    call = {"image": PICTURE, "latents": noise, "num_inference_steps": 10, "output_type": "latent"}
    with torch.no_grad():
        pipe(0, strength=0.5, **call)
    handle.remove()
    x, t = seen[0][:2]
    clean = 2 * PICTURE[None] - 1
    if kind == "flow":
        s = float(t[0]) / 1000
        assert 0.35 < s < 0.65
        expected = (1 - s) * clean + s * noise
    else:
        # fractional levels of euler, heun and the continuous solver lie between two entries of the table
        abar = float(np.interp(float(t[0]), np.arange(1000), pipe.scheduler.alphas_cumprod.numpy()))
        expected = abar**0.5 * clean + (1 - abar) ** 0.5 * noise
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("kind", "name"), schedulers())
def test_known_part_of_a_mask_stays(make_pipe: MakePipe, kind: str, name: str) -> None:
    pipe = make(make_pipe, kind, name)
    call = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    found = pipe(0, image=PICTURE, mask_image=MASK, **call).images
    clean = 2 * PICTURE[None] - 1
    torch.testing.assert_close(found[..., :4], clean[..., :4])
    assert torch.isfinite(found).all()
    assert (found[..., 4:] - clean[..., 4:]).abs().max() > 1e-2


def test_less_strength_stays_nearer(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    call = {"image": PICTURE, "latents": torch.randn(1, 1, 8, 8), "num_inference_steps": 20, "output_type": "latent"}
    clean = 2 * PICTURE[None] - 1
    distances = [float((pipe(1, strength=s, **call).images - clean).norm()) for s in (0.1, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]
    from_noise = pipe(1, latents=call["latents"], num_inference_steps=20, output_type="latent").images
    torch.testing.assert_close(pipe(1, strength=1.0, **call).images, from_noise)  # nothing of the image is left
    many = pipe(1, strength=0.5, **{**call, "num_inference_steps": 400}).images
    torch.testing.assert_close(pipe(1, strength=0.5, ode_solver="dopri5", **call | {"num_inference_steps": 1}).images,
                               many, rtol=0, atol=0.02)  # fmt: skip


def test_images_do_not_depend_on_the_batch(make_pipe: MakePipe, kl: AutoencoderKL) -> None:
    pipe = make_pipe(model=make_denoiser(sample_size=4, in_channels=4), vae=kl)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (10, 9, 3), np.uint8)) for i in range(3)]
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    call = {"mask_image": mask, "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 2.0}
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    batch = pipe([0, 1, 2], image=pictures, generator=seeds, **call).images
    for i in range(3):
        one = pipe(i, image=pictures[i], generator=[torch.Generator().manual_seed(i)], **call).images
        assert torch.equal(one[0], batch[i])


def test_images_of_every_kind_agree() -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    picture = to_pixels(Image.fromarray(array), 3, 4, 6)
    assert picture.shape == (1, 3, 4, 6) and picture.min() >= -1 and picture.max() <= 1
    for other in (array / 255, torch.from_numpy(array).permute(2, 0, 1) / 255, [array / 255]):
        torch.testing.assert_close(to_pixels(other, 3, 4, 6), picture, check_dtype=False, rtol=0, atol=1e-6)
    clear = Image.new("RGBA", (6, 4), (10, 20, 30, 0))
    assert (to_pixels(clear, 3, 4, 6) == 1).all()  # transparent parts show white
    assert to_pixels(Image.fromarray(array), 1, 8, 8).shape == (1, 1, 8, 8)
    coarse = to_mask(MASK, 8, 8, (4, 4))
    assert coarse[0, 0].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0.5}, "change an image; pass image"),
        ({"mask_image": MASK}, "change an image; pass image"),
        ({"image": PICTURE, "strength": 0.0}, "strength is 0.0"),
        ({"image": PICTURE, "strength": 0.01, "num_inference_steps": 10}, "leaves none of 10 steps"),
        ({"image": PICTURE, "mask_image": MASK, "ode_solver": "dopri5"}, "leave out ode_solver"),
        ({"image": PICTURE.expand(3, -1, -1)}, "expected 1 channel"),
        ({"image": PICTURE * 255}, "between 0 and 1"),
        ({"image": "a.png"}, "image is a str"),
        ({"image": [PICTURE] * 2, "num_images": 3}, "2 entries of image for 3 images"),
    ],
)
def test_impossible_calls_are_refused(make_pipe: MakePipe, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipe()(0, **call)


def test_latents_without_a_vae_take_no_image(make_pipe: MakePipe) -> None:
    with pytest.raises(ValueError, match="no VAE to encode an image"):
        make_pipe(model=make_denoiser(in_channels=4))(0, image=PICTURE, output_type="latent")
