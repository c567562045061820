"""Errors of samples to the true pictures: closed forms, seeds, the command on a real pipeline and folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.data import build_dataset
from genssm.metrics import pairs
from genssm.pipelines import TextToImagePipeline
from tests.pipelines.test_text_to_image import make_pipe
from tests.pipelines.test_video import make_pipe as make_video

pytest.importorskip("tokenizers")
TEXTS = ["a red circle", "a blue square", "a circle"]


def test_errors_of_known_differences() -> None:
    truth = torch.full((2, 3, 4, 4), 0.5)
    samples = truth[:, None].repeat(1, 2, 1, 1, 1)
    samples[0, 0] += 0.1
    samples[0, 1] -= 0.1
    samples[1] += 0.2
    found = pairs.pair_errors(truth, samples)
    assert found["mse"] == pytest.approx((0.01 + 0.04) / 2)
    assert found["mse_of_mean"] == pytest.approx((0.0 + 0.04) / 2)  # the two errors of the first picture cancel
    assert found["psnr"] == pytest.approx((20 - 10 * math.log10(0.04)) / 2, abs=1e-4)
    assert found["mse_error"] == pytest.approx(np.std([0.01, 0.04], ddof=1) / math.sqrt(2), rel=1e-4)
    assert pairs.pair_errors(truth, truth[:, None])["mse"] == 0.0
    with pytest.raises(ValueError, match=r"expected 2 times K times \(3, 4, 4\)"):
        pairs.pair_errors(truth, samples[:1])


def test_samples_depend_on_their_number_alone() -> None:
    pipe = make_pipe()
    call = {"num_inference_steps": 2, "guidance_scale": 1.5}
    whole = pairs.draw_samples(pipe, TEXTS, 2, seed=7, **call)
    assert whole.shape == (3, 2, 1, 8, 8)
    assert torch.equal(pairs.draw_samples(pipe, TEXTS, 2, seed=7, batch_size=1, **call), whole)
    one = pipe(TEXTS[1], generator=[torch.Generator().manual_seed(7 + 3)], output_type="pt", **call).images
    assert torch.equal(one[0], whole[1, 1])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A run folder with a pipeline and its data: three captioned pictures, two for training and one held out."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    rows = []
    for i, text in enumerate(TEXTS):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(data / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": text, "split": "test" if i == 2 else "train"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_pipe().save_pretrained(run / "checkpoints" / "step_0000001" / "pipeline")
    lines = ["model: {name: zigma}", f"data: {{name: image_folder, path: {data}, caption: text, cache: ram}}"]
    (run / "config.yaml").write_text("\n".join(lines))
    return run, data


def test_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, data = folders
    report, picture = tmp_path / "pairs.json", tmp_path / "pairs.png"
    how = ["--samples", "2", "--num-inference-steps", "2", "--guidance-scale", "1.5", "--device", "cpu"]
    where = ["--report", str(report), "--picture", str(picture)]
    pairs.main(["--model", str(run), "--split", "train", "test", *how, *where])
    found = json.loads(report.read_text())
    printed = capsys.readouterr().out
    assert "train                   2" in printed and "test                    1" in printed
    pipe = TextToImagePipeline.from_pretrained(run / "checkpoints" / "step_0000001" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    for split in ("train", "test"):
        dataset = build_dataset(name="image_folder", path=str(data), split=split, caption="text")
        truth, texts = pairs.true_pictures(dataset)
        samples = pairs.draw_samples(pipe, texts, 2, num_inference_steps=2, guidance_scale=1.5)
        assert found["results"][split]["mse"] == pytest.approx(
            float((samples - truth[:, None]).square().mean()), rel=1e-5
        )
    assert found["results"]["test"]["pictures"] == 1 and found["data"]["caption"] == "text"
    assert any("text_encoder" in name for name in found["model"]["weights_sha256"])
    grid = np.asarray(Image.open(picture))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2)  # three truths above three samples


def test_a_pipeline_folder_with_data_of_its_own(folders: tuple[Path, Path]) -> None:
    run, data = folders
    options = pairs.parser().parse_args(
        ["--model", str(run / "checkpoints" / "step_0000001"), "--num-inference-steps", "1", "--device", "cpu",
         "--scheduler", "heun", "split=test", f"path={data}"]
    )  # fmt: skip
    assert list(pairs.evaluate(options)["results"]) == ["test"]


def test_mistakes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = folders
    for options, message in (
        (["--samples", "0"], "--samples is 0"),
        (["caption=null"], "set caption=COLUMN"),
        (["--split", "other"], "has test, train"),
    ):
        with pytest.raises(ValueError, match=message):
            pairs.evaluate(pairs.parser().parse_args(["--model", str(run), "--device", "cpu", *options]))
    make_video().save_pretrained(tmp_path / "video")
    with pytest.raises(ValueError, match="holds a VideoPipeline; pairs are measured of a TextToImagePipeline"):
        pairs.evaluate(pairs.parser().parse_args(["--model", str(tmp_path / "video"), "--device", "cpu"]))
