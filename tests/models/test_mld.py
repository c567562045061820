"""MLD's VAE and denoiser: round trips of lengths and losses, what every denoiser does, published checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genssm.convert import load_published, main
from genssm.models import MLD, MotionVAE
from genssm.models.motion_vae import MotionPosterior, motion_vae_losses
from tests.models import common

SMALL = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "ff_size": 24, "dropout": 0.0}


def make_vae(**changes: object) -> MotionVAE:
    torch.manual_seed(0)
    return MotionVAE(**{**SMALL, "in_channels": 7, **changes})


def make(**changes: object) -> MLD:
    torch.manual_seed(0)
    return MLD(**{**SMALL, "context_dim": 12, **changes})


def latents() -> dict:
    return {
        "hidden_states": torch.randn(2, 1, 16), "timestep": torch.tensor([3.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 3, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }  # fmt: skip


def frames() -> dict:
    return {**latents(), "hidden_states": torch.randn(2, 9, 7), "lengths": torch.tensor([9, 5])}


CASES = {
    "skip": ({}, latents),
    "plain": ({"arch": "encoder", "final_norm": False}, latents),
    "decoder": ({"arch": "decoder"}, latents),
    "sinusoids": ({"pos_embed": "sinusoidal", "activation": "relu", "pre_norm": True}, latents),
    "frames": ({"in_channels": 7}, frames),
    "frames decoder": ({"in_channels": 7, "arch": "decoder"}, frames),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple:
    changes, given = CASES[request.param]
    torch.manual_seed(1)
    return make(**changes), given()


def test_gradients_reach_everything(case) -> None:
    common.check_gradients_reach_everything(*case)


def test_batch_independent(case) -> None:
    common.check_batch_independent(*case)


def test_save_load(case, tmp_path: Path) -> None:
    common.check_save_load(*case, tmp_path)


def test_masked_text_is_not_read(case) -> None:
    model, given = case
    model = common.randomise(model).eval()
    changed = given["encoder_hidden_states"].clone()
    changed[1, 1:] += 1.0
    with torch.no_grad():
        assert torch.equal(model(**given).sample, model(**{**given, "encoder_hidden_states": changed}).sample)


@pytest.mark.parametrize("arch", ["skip_encoder", "decoder"])
def test_padded_frames_are_not_read(arch: str) -> None:
    model, given = common.randomise(make(in_channels=7, arch=arch)).eval(), frames()
    changed = given["hidden_states"].clone()
    changed[1, 5:] += 1.0
    with torch.no_grad():
        sample = model(**given).sample
        assert torch.equal(model(**{**given, "hidden_states": changed}).sample, sample)
        as_released = common.randomise(make(in_channels=7, arch=arch, mask_padding=False)).eval()
        assert not torch.allclose(as_released(**{**given, "hidden_states": changed}).sample[1, :5],
                                  as_released(**given).sample[1, :5], atol=1e-5)  # fmt: skip
    assert (sample[1, 5:] == 0).all()


@pytest.mark.parametrize("arch", ["encoder_decoder", "all_encoder"])
@pytest.mark.parametrize("changes", [{}, {"mlp_dist": True}, {"latent_tokens": 5, "pos_embed": "sinusoidal"}])
def test_vae(arch: str, changes: dict, tmp_path: Path) -> None:
    vae = common.randomise(make_vae(arch=arch, **changes))
    x = torch.randn(2, 9, 7)
    output = vae(x, [9, 5], noise=torch.randn(2, changes.get("latent_tokens", 2), 16))
    assert output.latents.shape == (2, changes.get("latent_tokens", 2), 16) and output.sample.shape == x.shape
    assert (output.sample[1, 5:] == 0).all()
    # Gradients everywhere.
    losses = motion_vae_losses(x, output, None)
    losses["total"].mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # What stands after the length is not looked at, and a clip does not depend on its batch.
    vae.eval()
    poisoned = x.clone()
    poisoned[1, 5:] = 9.0
    with torch.no_grad():
        mean = vae.encode(x, [9, 5]).mean
        torch.testing.assert_close(vae.encode(poisoned, [9, 5]).mean, mean)
        torch.testing.assert_close(vae.encode(x[1:, :5]).mean, mean[1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode(mean[1:], [5]), vae.decode(mean, [9, 5])[1:, :5], rtol=1e-5, atol=1e-5)
        vae.save_pretrained(tmp_path)
        assert torch.equal(MotionVAE.from_pretrained(tmp_path).encode(x).mean, vae.encode(x).mean)


def test_vae_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    vae = make_vae(dropout=0.0)
    phase = 6.3 * torch.rand(16, 1, 1)
    x = torch.sin(phase + torch.arange(12.0)[:, None] / 3 + torch.arange(7.0))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    history = []
    for _ in range(150):
        loss = motion_vae_losses(x, vae(x, noise=torch.randn(16, 2, 16)), None)["total"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0]


def test_posterior() -> None:
    posterior = MotionPosterior(mean=torch.tensor([[[1.0, 0.0]]]), std=torch.tensor([[[2.0, 1.0]]]))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected)
    many = MotionPosterior(mean=torch.ones(2, 100, 8), std=torch.full((2, 100, 8), 0.5))
    draws = many.sample([torch.Generator().manual_seed(i) for i in (0, 1)])
    assert draws.mean() == pytest.approx(1.0, abs=0.05) and draws.std() == pytest.approx(0.5, abs=0.05)
    alone = MotionPosterior(mean=many.mean[1:], std=many.std[1:]).sample([torch.Generator().manual_seed(1)])
    assert torch.equal(draws[1:], alone)


def test_losses_with_joints_and_mask() -> None:
    x = torch.zeros(1, 4, 7)
    with torch.no_grad():
        output = make_vae()(x)
    output.sample = torch.tensor([1.0, 1.0, 3.0, 3.0])[None, :, None].expand(1, 4, 7)
    losses = motion_vae_losses(x, output, lambda f: f[..., :6].unflatten(-1, (2, 3)), joints_weight=2.0, kl_weight=0.5)
    assert losses["feature"] == pytest.approx((0.5 + 2.5) / 2) and losses["joints"] == losses["feature"]
    assert losses["total"] == pytest.approx(float(3 * losses["feature"] + 0.5 * losses["kl"]))
    masked = motion_vae_losses(x, output, None, mask=torch.tensor([[True, True, False, False]]))
    assert masked["feature"] == pytest.approx(0.5) and masked["joints"] == 0


def test_sizes() -> None:
    """Counted in the released code: VAE 18.03 M, of which 7.63 and 10.01; denoiser 8.35 M with an unread table."""
    with torch.device("meta"):
        vae, denoiser = MotionVAE(), MLD()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert [round(count(m) / 1e6, 2) for m in (vae, vae.encoder, vae.decoder)] == [18.03, 7.63, 10.01]
    assert round((count(denoiser) + 500 * 256) / 1e6, 2) == 8.35


@pytest.mark.parametrize(("lengths", "message"), [([9, 10], "9..10"), ([9, 0], "0..9"), ([9], "2 whole numbers")])
def test_wrong_lengths(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vae().encode(torch.zeros(2, 9, 7), lengths)


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, T, 7\)"):
        make_vae().encode(torch.zeros(2, 9, 8))
    with pytest.raises(ValueError, match=r"expected \(B, 2, 16\)"):
        make_vae().decode(torch.zeros(2, 3, 16), [1, 1])
    with pytest.raises(ValueError, match="positions for 8 only"):
        make_vae(num_positions=8).encode(torch.zeros(1, 9, 7))
    with pytest.raises(ValueError, match="odd number"):
        make_vae(num_layers=4)
    with pytest.raises(ValueError, match="3 heads"):
        make(num_heads=3)
    with pytest.raises(ValueError, match="give them to the VAE"):
        make()(**latents(), lengths=[1, 1])


def test_a_whole_checkpoint_is_taken_apart(golden_dir: Path, tmp_path: Path) -> None:
    """``denoiser.`` and ``vae.`` of one MLD checkpoint, with other networks beside them, through the command line."""
    from safetensors.torch import load_file

    whole = {"t2m_textencoder.x": torch.zeros(1)}
    for prefix, name in (("vae", "vae_encdec_l2"), ("denoiser", "den_skip_l2")):
        tensors = load_file(golden_dir / "motion" / f"{name}.safetensors")
        whole |= {f"{prefix}.{key[2:]}": value for key, value in tensors.items() if key.startswith("w.")}
    save_file(whole, tmp_path / "mld.safetensors")
    vae, report = load_published("motion_vae", whole, {"num_heads": 2})
    assert report.complete and vae.config.latent_tokens == 2
    for model, part in (("mld", "denoiser"), ("motion_vae", "")):
        out = tmp_path / model
        config = '{"num_heads": 4}' if model == "mld" else '{"num_heads": 2}'
        assert main([model, str(tmp_path / "mld.safetensors"), str(out), "--config", config]) in (0, None)
        assert (out / part / "config.json").is_file()
        assert (out / "scheduler").is_dir() == (model == "mld")
    assert MLD.from_pretrained(tmp_path / "mld" / "denoiser").config.latent_tokens == 2


def test_a_converted_checkpoint_is_prompted(golden_dir: Path, tmp_path: Path) -> None:
    """VAE, denoiser and the data set's statistics become a pipeline that needs no data set."""
    import numpy as np
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    torch.manual_seed(0)
    make_vae(in_channels=263, hidden_size=32, num_heads=4).save_pretrained(tmp_path / "vae")
    tensors = load_file(golden_dir / "motion" / "den_skip_l2.safetensors")
    denoiser = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    save_file(denoiser, tmp_path / "denoiser.safetensors")
    for name, values in (("Mean", np.zeros(263)), ("Std", np.ones(263))):
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    options = ["mld", str(tmp_path / "denoiser.safetensors"), str(tmp_path / "out"), "--config", '{"latent_tokens": 2}']
    with pytest.raises(ValueError, match="needs --vae"):
        main([*options, "--statistics", str(tmp_path)])
    with pytest.raises(ValueError, match="give --statistics"):
        main([*options, "--vae", str(tmp_path / "vae")])
    assert not (tmp_path / "out").exists()
    assert main([*options, "--statistics", str(tmp_path), "--vae", str(tmp_path / "vae")]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1 and pipe.config.max_frames == 196
    text = torch.randn(2, 1, 40)
    call = {"prompt_embeds": text[:1], "null_prompt_embeds": text[1:], "num_frames": 9, "num_inference_steps": 2}
    motion = pipe(**call, generator=torch.Generator().manual_seed(0)).motions[0]
    assert motion.shape == (9, 22, 3) and motion.isfinite().all()
