"""Measuring clips: by hand, from files of every kind, in every network, of a pipeline, by several processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from genssm.data.video import write_clip
from genssm.metrics import fid
from genssm.metrics.clip_features import I3DFeatures, build_clip_extractor
from genssm.metrics.clips import Cut, DrawnClips, folder_clips
from genssm.metrics.frechet import frechet_distance_from_features
from genssm.metrics.generated import describe_texts, sampling_protocol
from genssm.metrics.statistics import collect
from genssm.metrics.video import main

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
FRAMES = 8
MODULE = """
import torch
calls = []
def of_clips(clips):
    calls.append(tuple(clips.shape))
    return clips.flatten(1).float().mean(1, keepdim=True)
def of_images(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 1).flatten(1)
"""


class I3DStandIn(nn.Module):
    """The call of the published TorchScript file: (B, 3, F, H, W) and three options."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 6)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        batch, frames = x.shape[0], x.shape[2]
        if frames < 4:
            raise ValueError("too few frames")
        if rescale:
            x = x / 127.5 - 1
        if resize:
            x = x.transpose(1, 2).flatten(0, 1)
            x = nn.functional.interpolate(x, size=[16, 16], mode="bilinear", align_corners=False)
            x = x.unflatten(0, [batch, frames]).transpose(1, 2)
        x = self.linear(nn.functional.adaptive_avg_pool3d(x, (2, 2, 2)).flatten(1))
        return x if return_features else x.softmax(1)


@pytest.fixture(scope="session")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    torch.manual_seed(0)
    torch.jit.script(I3DStandIn().eval()).save(str(file))
    return file


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of a user, in the current folder."""
    (tmp_path / "own_clips.py").write_text(MODULE)
    sys.modules.pop("own_clips", None)  # of the test before, whose file is gone
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def make_clips(count: int, low: int = 0, frames: int = FRAMES) -> np.ndarray:
    """uint8 (N, F, 8, 8, 3)."""
    return RNG.integers(low, 200, (count, frames, 8, 8, 3), dtype=np.uint8)


def write(folder: Path, clips: np.ndarray, suffix: str = ".npy") -> Path:
    for i, clip in enumerate(clips):
        write_clip([Image.fromarray(frame) for frame in clip], folder / f"{i:03d}{suffix}")
    return folder


def run(capsys: pytest.CaptureFixture, report: Path, *arguments: object) -> tuple[dict, str]:
    main([*map(str, arguments), "--report", str(report), "--device", "cpu"])
    return json.loads(report.read_text()), capsys.readouterr().out


def test_frechet_video_distance_by_hand(i3d_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The network's own call on the middle frames, in any batch size; the report and its line say everything."""
    ours, theirs = make_clips(9), make_clips(11, low=60)
    network = torch.jit.load(str(i3d_file))
    options = ["--samples", write(tmp_path / "a", ours), "--reference", write(tmp_path / "b", theirs, "")]
    options += ["--features", f"i3d:{i3d_file}", "--num-frames", 4]
    with torch.no_grad():
        middle = [torch.from_numpy(clips[:, 2:6]).permute(0, 4, 1, 2, 3).float() for clips in (ours, theirs)]
        by_hand = [network(x, rescale=True, resize=True, return_features=True) for x in middle]
    report, shown = run(capsys, tmp_path / "r.json", *options)
    assert report["value"] == pytest.approx(frechet_distance_from_features(*by_hand), rel=1e-5)
    again, _ = run(capsys, tmp_path / "again.json", *options, "--batch-size", 2)
    assert again["value"] == pytest.approx(report["value"], rel=1e-6)
    assert again["subject"]["sha256"] == report["subject"]["sha256"]
    assert report["metric"].startswith("Frechet video distance in the features of i3d_torchscript.pt (")
    clips = {"num_frames": 4, "frame_stride": 1, "cut": "middle", "frames": "as stored", "features_of": "clips"}
    assert report["protocol"]["clips"] == clips
    assert report["protocol"]["samples"] == {"count": 9, "image_size": "8x8", "file_format": "npy"}
    assert report["protocol"]["features"]["resize"] == "224 by the network"
    change = np.abs(np.diff(ours[:, 2:6].astype(float), axis=1)).mean(axis=(1, 2, 3, 4))
    flicker = report["flicker"]["samples"]
    assert flicker["value"] == pytest.approx(1 - change.mean() / 255)
    assert flicker["standard_error"] == pytest.approx(change.std(ddof=1) / 255 / 3)
    for text in ("9 clips 8x8 npy", "clips of 4 frames, stride 1, cut middle, frames as stored", "11 clips, sha256",
                 "torch "):  # fmt: skip
        assert text in shown


def test_known_gaussians(module: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Clips of one grey value: numbers with known means and deviations, (m1 - m2)^2 + (s1 - s2)^2."""
    values = np.array([10, 20, 30]), np.array([40, 80, 120, 160])
    for name, grey in zip("ab", values):
        write(tmp_path / name, np.broadcast_to(grey[:, None, None, None, None], (len(grey), 3, 4, 4, 3)).astype("u1"))
    report, shown = run(
        capsys, tmp_path / "r.json", "--samples", tmp_path / "a", "--reference", tmp_path / "b", "--num-frames", 2,
        "--frame-stride", 2, "--features", "own_clips:of_clips", "--floor", tmp_path / "b",
    )  # fmt: skip
    (m1, s1), (m2, s2) = ((v.mean(), v.std(ddof=1)) for v in values)
    assert report["value"] == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2)
    assert report["flicker"]["samples"]["value"] == 1
    assert report["floor"]["count"] == 3  # as many as there are samples
    assert "temporal flickering, 1 for still clips: 1.0000 (samples), 1.0000 (reference)" in shown


def test_files_of_every_kind(i3d_file: Path, tmp_path: Path) -> None:
    """Frames and arrays are the same clips; GIF is another format, near; all clips of a long file, one by one."""
    clips = np.tile(make_clips(2, frames=10) // 2, (1, 1, 4, 4, 1))  # 32x32
    whole = {kind: folder_clips(write(tmp_path / kind, clips, suffix), Cut(4, 2, "all"))
             for kind, suffix in (("npy", ".npy"), ("frames", ""), ("gif", ".gif"))}  # fmt: skip
    assert [source.file_format for source in whole.values()] == ["npy", "png", "gif"]
    assert all(len(source) == 2 for source in whole.values())  # 7 of 10 frames fit once
    for index in range(2):
        first = torch.from_numpy(clips[index, :7:2]).permute(0, 3, 1, 2)
        assert torch.equal(whole["npy"].read(index)[0], first)
        assert torch.equal(whole["frames"].read(index)[0], first)
        assert (whole["gif"].read(index)[0].int() - first.int()).abs().float().mean() < 12
    extractor = I3DFeatures(i3d_file)
    assert collect(whole["npy"], extractor).sha256 == collect(whole["frames"], extractor).sha256
    several = folder_clips(tmp_path / "npy", Cut(4, 1, "all"))
    assert len(several) == 4
    assert torch.equal(several.read(3)[0], torch.from_numpy(clips[1, 4:8]).permute(0, 3, 1, 2))


def test_lossy_files_are_warned_about(
    module: None, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "gif", make_clips(3), ".gif")
    run(capsys, tmp_path / "r.json", "--samples", folder, "--reference", folder, "--num-frames", 8,
        "--features", "own_clips:of_clips")  # fmt: skip
    assert "samples are gif files: lossy compression changes the distance" in caplog.text
    assert "3 samples and 3 reference clips: below 2048" in caplog.text


def test_frames_as_images(module: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Frame-wise, the distance is that of genssm.metrics.fid between folders of all frames."""
    a, b = write(tmp_path / "a", make_clips(3), ""), write(tmp_path / "b", make_clips(4, low=90), "")
    features = ["--features", "own_clips:of_images"]
    fid.main(["--samples", str(a), "--reference", str(b), *features, "--report", str(tmp_path / "images.json")])
    options = ["--samples", a, "--reference", b, "--num-frames", FRAMES, "--features", "frames:own_clips:of_images"]
    report, _ = run(capsys, tmp_path / "frames.json", *options, "--batch-size", 2)
    images = json.loads((tmp_path / "images.json").read_text())
    assert report["value"] == pytest.approx(images["value"], rel=1e-6)
    assert report["kid"] == images["kid"]  # features in the order of the frames
    assert report["metric"].startswith("Frame-wise Frechet distance in the features of own_clips:of_images (")
    assert report["protocol"]["samples"]["count"] == 3 * FRAMES
    with pytest.raises(ValueError, match=r"clips\.num_frames: None and 8"):
        main(["--compare", str(tmp_path / "images.json"), str(tmp_path / "frames.json")])


def test_statistics_instead_of_the_reference(
    i3d_file: Path, module: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Made by one command; the same report as with the clips themselves, refused for clips that are cut otherwise."""
    a, b = write(tmp_path / "a", make_clips(5)), write(tmp_path / "b", make_clips(6))
    features = ["--features", f"i3d:{i3d_file}", "--num-frames", 4]
    stats = tmp_path / "stats.npz"
    main([str(x) for x in ("--reference", b, *features, "--save-stats", stats, "--with-features")])
    assert "6 clips -> " in capsys.readouterr().out
    first, _ = run(capsys, tmp_path / "a.json", "--samples", a, "--reference", stats, *features)
    second, _ = run(capsys, tmp_path / "b.json", "--samples", a, "--reference", b, *features)
    assert first == second
    main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert capsys.readouterr().out.count(f"{first['value']:.4f}") == 2
    with pytest.raises(
        ValueError, match=r"made of clips of 4 frames, stride 1.*the samples are clips of 4 frames, str"
    ):
        run(capsys, tmp_path / "c.json", "--samples", a, "--reference", stats, *features, "--frame-stride", 2)
    with pytest.raises(ValueError, match="was made with weights_sha256"):
        fid_like = ["--features", "frames:own_clips:of_images", "--num-frames", 4]
        main([str(x) for x in ("--reference", b, *fid_like, "--save-stats", tmp_path / "f.npz")])
        run(capsys, tmp_path / "c.json", "--samples", a, "--reference", tmp_path / "f.npz", "--num-frames", 4,
            "--features", f"frames:torchscript:{three_means(tmp_path)}")  # fmt: skip
    run(capsys, tmp_path / "c.json", "--samples", a, "--reference", b, *features, "--frame-stride", 2)
    with pytest.raises(ValueError, match=r"clips\.frame_stride: 1 and 2"):
        main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")])


def three_means(folder: Path) -> Path:
    """A network of images in a file: three numbers of each."""

    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean([2, 3])

    torch.jit.script(Means()).save(str(folder / "means.pt"))
    return folder / "means.pt"


def test_frames_reach_one_size(module: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """--resolution holds for both; the resize is part of the protocol."""
    a, b = write(tmp_path / "a", make_clips(3)), write(tmp_path / "b", np.tile(make_clips(3), (1, 1, 2, 2, 1)))
    options = ["--samples", a, "--reference", b, "--num-frames", 8, "--features", "own_clips:of_clips"]
    report, _ = run(capsys, tmp_path / "r.json", *options, "--resolution", 4, "--crop", "resize_center")
    assert report["protocol"]["clips"]["frames"] == "4px resize_center"
    assert report["protocol"]["samples"]["image_size"] == report["protocol"]["reference"]["image_size"] == "4x4"
    report, _ = run(capsys, tmp_path / "r.json", *options)
    assert report["protocol"]["reference"]["image_size"] == "16x16"


def test_videomae(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Mean of the last tokens of a tiny random network, frames resized and normalised as it was trained."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=8, patch_size=4, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    network = transformers.VideoMAEModel(config).eval()
    network.save_pretrained(tmp_path / "mae")
    extractor = build_clip_extractor(f"videomae:{tmp_path / 'mae'}", 4)
    clips = torch.from_numpy(make_clips(2, frames=4)).permute(0, 1, 4, 2, 3)
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        by_hand = network(((clips / 255) - mean) / deviation).last_hidden_state.mean(1)
    torch.testing.assert_close(extractor(clips), by_hand, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="reads 4 frames, the clips have 3; set --num-frames"):
        extractor(clips[:, :3])
    (tmp_path / "mae" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="holds a clip network; expected a VideoMAE"):
        build_clip_extractor(f"videomae:{tmp_path / 'mae'}", 4)


def video_pipeline(folder: Path, **arguments: object) -> Path:
    """An untrained ZigMa of clips in a run folder, saved as a user would find it."""
    from genssm import ZigMa
    from genssm.pipelines import VideoPipeline
    from genssm.training.objectives import FlowObjective

    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 16, "num_layers": 3, "num_frames": 3}
    denoiser = ZigMa(**size, video_pattern="sst", **{"num_classes": 4, **arguments})
    pipeline = folder / "checkpoints" / "step_0000002" / "pipeline"
    VideoPipeline(denoiser.eval(), FlowObjective().scheduler()).save_pretrained(pipeline)
    return folder


def load_sample() -> object:
    spec = importlib.util.spec_from_file_location("sample_program", ROOT / "sample.py")
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    return sample


def test_pipeline_equals_what_sample_py_wrote(module: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Drawn on demand in batches of 2, or read from the folder of sample.py: one protocol, one report."""
    folder = video_pipeline(tmp_path / "run")
    drawing = ["--num-inference-steps", "2", "--guidance-scale", "2", "--guidance-power", "1", "--seed", "4"]
    load_sample().main(["--model", str(folder), "--num-images", "5", "--out", str(tmp_path / "out"),
                        "--video-format", "frames", "--device", "cpu", *drawing])  # fmt: skip
    options = ["--reference", "dataset:moving_digits", "--num-frames", 3, "--features", "own_clips:of_clips"]
    stats = tmp_path / "real.npz"
    main([str(x) for x in (*options, "--save-stats", stats, "--with-features")])
    options[1] = stats
    first, _ = run(capsys, tmp_path / "a.json", "--samples", tmp_path / "out", *options)
    second, _ = run(
        capsys, tmp_path / "b.json", "--samples", folder, "--num-samples", 5, *options, *drawing, "--batch-size", 2
    )
    assert first["subject"]["sha256"] == second["subject"]["sha256"]
    assert first["protocol"] == second["protocol"] and first["value"] == second["value"]
    sampling = first["protocol"]["sampling"]
    assert (sampling["labels"], sampling["seeds"], sampling["guidance_power"]) == ("0..3 in turn", "4..8", 1.0)
    assert first["flicker"]["reference"]["value"] < 1
    (tmp_path / "out" / "000003" / "000000.png").rename(tmp_path / "moved.png")
    with pytest.raises(ValueError, match=r"clip .*000003: the clip has 2 frames; 3 with stride 1 need 3"):
        run(capsys, tmp_path / "a.json", "--samples", tmp_path / "out", *options)
    with pytest.raises(
        ValueError, match=r"holds clips of sample\.py; measure them with python -m genssm.metrics.video"
    ):
        fid.main(["--samples", str(tmp_path / "out"), "--reference", "dataset:digits",
                  "--features", "own_clips:of_images"])  # fmt: skip
    with pytest.raises(ValueError, match="--cut all is for files"):
        run(capsys, tmp_path / "b.json", "--samples", folder, "--num-samples", 5, "--cut", "all", "--num-frames", 1,
            "--reference", "dataset:moving_digits", "--features", "own_clips:of_clips")  # fmt: skip
    for more, message in (
        (["--prompt", "x"], "reads no text; leave --prompt out"),
        (["--negative-prompt", "x"], "leave --negative-prompt out"),
        (["--num-frames", 4], "the clip has 3 frames; 4 with stride 1 need 4"),
        (["--labels", 4], r"a class in 0\.\.3"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*map(str, ("--samples", folder, "--num-samples", 5, "--reference", "dataset:moving_digits",
                             "--num-frames", 3, "--features", "own_clips:of_clips", *more))])  # fmt: skip
    with pytest.raises(ValueError, match="how many clips to draw with --num-samples"):
        run(capsys, tmp_path / "b.json", "--samples", folder, *options)


def test_resolution_of_the_run_holds_for_both(module: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = video_pipeline(tmp_path / "run")
    data = "data: {name: moving_digits, resolution: 8, crop: resize_center, num_frames: 3}\n"
    (folder / "config.yaml").write_text("model: {name: zigma}\n" + data)
    report, _ = run(
        capsys, tmp_path / "r.json", "--samples", folder, "--num-samples", 2, "--num-inference-steps", 1,
        "--reference", f"dataset:{folder}:test", "--num-frames", 3, "--features", "own_clips:of_clips",
    )  # fmt: skip
    assert report["protocol"]["clips"]["frames"] == "8px resize_center"
    assert report["protocol"]["reference"]["image_size"] == "8x8"
    assert report["protocol"]["reference"]["name"] == "moving_digits test"


def test_prompts_in_turn() -> None:
    """A clip depends on its number alone; the texts are part of the protocol."""
    from tests.pipelines.test_video import make_text_video

    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    source = DrawnClips(make_text_video(), "p", 5, Cut(2, 2, "first"), None, 3, ["a", "b", "c"], "d", **call)
    whole = next(source.batches(range(5), 5)).images
    assert whole.shape == (5, 2, 3, 8, 8)
    for batch in source.batches([0, 3, 4], 2):
        assert torch.equal(batch.images, whole[batch.indices])
    protocol = sampling_protocol(source, "balanced", Path("p"))
    assert protocol["prompts"] == ["a", "b", "c"] and protocol["negative_prompt"] == "d"
    many = describe_texts([str(i) for i in range(9)], None)
    assert many["prompts"].startswith("9, sha256 ")
    assert many != describe_texts([str(i) for i in range(1, 10)], None)


@pytest.mark.slow
def test_two_processes_equal_one(i3d_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write(tmp_path / "a", make_clips(5)), write(tmp_path / "b", make_clips(6))
    options = ["--samples", str(a), "--reference", str(b), "--features", f"i3d:{i3d_file}", "--num-frames", "4"]
    one, _ = run(capsys, tmp_path / "one.json", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["genssm.metrics.video", *options, "--device", "cpu", "--report", str(tmp_path / "two.json")]
    subprocess.run([*command, *arguments], check=True, timeout=120, cwd=ROOT)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.pop("value") == pytest.approx(one.pop("value"), rel=1e-9)
    assert two.pop("kid") == pytest.approx(one.pop("kid"), rel=1e-6)
    assert two == one


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--features", "i3d:{a}/none.pt"],
            FileNotFoundError,
            "no I3D network .*none.pt.\nFetch https.*i3d_torchscrip",
        ),
        (["--features", "i3d:{a}/000.npy"], ValueError, r"000\.npy is no TorchScript network"),
        (
            ["--features", "i3d:{i3d}", "--num-frames", "3"],
            ValueError,
            r"i3d_torchscript.pt cannot read \(3, 3, 3, 8, 8",
        ),
        (["--features", "i3d:{i3d}"], ValueError, r"clip .*000\.npy: the clip has 8 frames; 16 with stride 1 need 16"),
        (["--features", "i3d:{i3d}", "--num-frames", "0"], ValueError, "--num-frames is 0"),
        (["--features", "i3d:{i3d}", "--crop", "adm"], ValueError, "give it, too"),
        (
            ["--features", "i3d:{i3d}", "--crop", "resize_random", "--resolution", "4"],
            ValueError,
            "resize_random draws",
        ),
        (["--features", "i3d:{i3d}", "--weights", "x"], ValueError, "--weights is for frames:inception"),
        (["--features", "i3d:{i3d}", "--batch-size", "0"], ValueError, "--batch-size is 0"),
        (["--features", "i3d:{i3d}", "--seed", "1"], ValueError, "--seed: for sampling from a pipeline"),
        (["--features", "i3d:{i3d}", "--num-samples", "9"], ValueError, "holds 3 clips, 9 were asked for"),
        (["--features", "fvd"], ValueError, "features 'fvd'; expected i3d"),
        (["--features", "videomae:{a}"], FileNotFoundError, "no VideoMAE in .*expected config.json and weights"),
        (["--features", "frames:clip:{a}"], FileNotFoundError, "no clip network in "),
        (["--features", "frames:inception", "--weights", "{a}/x"], FileNotFoundError, "no Inception weights at"),
        (
            ["--reference", "dataset:digits"],
            ValueError,
            "digits is no data set of clips; those are clips, moving_digit",
        ),
        (["--reference", "{a}/nowhere"], FileNotFoundError, "nowhere is no folder of clips"),
        (["--reference", "{a}/empty"], FileNotFoundError, "no clips in "),
    ],
)
def test_mistakes(
    arguments: list[str], error: type, message: str, i3d_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "a", make_clips(3))
    (folder / "empty").mkdir()
    given = [text.format(a=folder, i3d=i3d_file) for text in arguments]
    if "--features" not in given:
        given += ["--features", f"i3d:{i3d_file}", "--num-frames", "4"]
    if "--reference" not in given:
        given += ["--reference", str(folder)]
    if "--num-frames" not in given and ("--batch-size" in given or "--num-samples" in given or "--seed" in given):
        given += ["--num-frames", "4"]
    with pytest.raises(error, match=message):
        main(["--samples", str(folder), *given, "--device", "cpu"])


def test_damaged_and_mixed_clips_are_named(i3d_file: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_clips(3))
    (folder / "001.npy").write_bytes((folder / "001.npy").read_bytes()[:300])
    options = ["--samples", str(folder), "--reference", str(folder), "--features", f"i3d:{i3d_file}"]
    with pytest.raises(ValueError, match=r"001\.npy"):
        main([*options, "--num-frames", "4"])
    (folder / "001.npy").unlink()
    write(folder, make_clips(1), "")
    Image.new("RGB", (9, 8)).save(folder / "000" / "000004.png")
    with pytest.raises(ValueError, match=r"its frames are 8x8 and 8x9; a clip has one size, or set --resolution"):
        main([*options, "--num-frames", "4"])


def test_program_ends_with_one_line(tmp_path: Path) -> None:
    """Without weights: which file, where from, where to."""
    folder = write(tmp_path / "a", make_clips(2))
    command = [sys.executable, "-m", "genssm.metrics.video", "--samples", str(folder), "--reference", str(folder)]
    environment = {**os.environ, "GENSSM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: no I3D network {tmp_path}/cache/i3d_torchscript.pt" in done.stderr
