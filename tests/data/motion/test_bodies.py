"""Target bodies that users bring: KIT-ML's bone lengths from a clip, a data folder or a prepared one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.config import load_config
from genssm.data.motion import build_motion_dataset
from genssm.data.motion.convert import main as convert_main
from genssm.data.motion.folders import with_lengths_from
from genssm.data.motion.prepare import main as prepare_main
from genssm.data.motion.prepare import prepare
from genssm.motion import KIT, T2M, Skeleton, forward_kinematics, joints_to_features
from genssm.motion.rotations import expmap_to_quaternion
from genssm.pipelines import MotionReconstructionPipeline
from genssm.tasks import build_task
from genssm.tasks.motion_data import skeleton_config
from tests.training.conftest import ROOT

LENGTHS = (0.0, *(100.0 + 10 * joint for joint in range(1, 21)))  # millimetres, all different
BODY = Skeleton.from_config(KIT.to_config() | {"bone_lengths": LENGTHS})


def kit_clip(frames: int = 40, seed: int = 0) -> torch.Tensor:
    """Joints (T, 21, 3) of BODY that sways, float64."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 3, frames, dtype=torch.float64)
    phase = torch.rand(21, 3, generator=generator, dtype=torch.float64) * 6
    turns = 0.2 * torch.sin(t[:, None, None] * 3 + phase)
    root = torch.stack([100 * t, 700 + 20 * t.cos(), 300 * t], -1)
    return forward_kinematics(expmap_to_quaternion(turns), root, BODY.offsets(turns), BODY)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Joints of KIT's skeleton, of a body half as large."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed in range(12):
        np.save(folder / f"walk_{seed}.npy", (0.5 * kit_clip(seed=seed)).numpy())
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as users of KIT-ML have it; its clips are of the target body."""
    root = tmp_path / "KIT-ML"
    for name in ("new_joint_vecs", "texts"):
        (root / name).mkdir(parents=True)
    for seed in range(2):
        np.save(root / "new_joint_vecs" / f"{seed:05d}.npy", joints_to_features(kit_clip(seed=seed), BODY).float())
        (root / "texts" / f"{seed:05d}.txt").write_text("a man walks#a/DET man/NOUN walk/VERB#0.0#0.0\n")
    np.save(root / "Mean.npy", np.zeros(251))
    np.save(root / "Std.npy", np.ones(251))
    (root / "train.txt").write_text("00000\n00001\n")
    (root / "test.txt").write_text("00001\n")
    return root


def test_lengths_of_every_kind_of_source(published: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "joints.npy", kit_clip().numpy())
    np.save(tmp_path / "features.npy", joints_to_features(kit_clip(), BODY).numpy())
    for source in (tmp_path / "joints.npy", tmp_path / "features.npy", published, published.parent):
        found = with_lengths_from(KIT, source)
        assert found.name == "kit" and found.bone_lengths == pytest.approx(LENGTHS, rel=1e-5)


def test_prepared_folder_keeps_the_body(recordings: Path, published: Path, tmp_path: Path) -> None:
    options = ["--skeleton", "kit", "--lengths-from", str(published)]
    prepare_main([str(recordings), str(tmp_path / "out"), *options])
    dataset = build_motion_dataset(tmp_path / "out", "all")
    assert dataset.skeleton.bone_lengths == pytest.approx(LENGTHS, rel=1e-5) and dataset.item_shape == (196, 251)
    # Half as large a body does the same movement in the target body.
    expected = joints_to_features(kit_clip(seed=0), BODY).float()
    found = next(clip.features for clip in dataset.clips if clip.name == "walk_0")
    torch.testing.assert_close(found[:, :184], expected[:, :184], rtol=1e-4, atol=2e-2)
    again = with_lengths_from(KIT, tmp_path / "out")  # skeleton.json
    assert again == dataset.skeleton


def test_published_folder_tells_its_body_to_the_pipeline(published: Path, tmp_path: Path) -> None:
    overrides = ["data.name=motion", f"data.path={published}", "model.args.in_channels=251"]
    own = build_task(load_config(ROOT / "configs" / "debug" / "motion_vae.yaml", overrides), torch.device("cpu"))
    pipeline = own.build_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = MotionReconstructionPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.skeleton == own.dataset.skeleton
    assert loaded.skeleton.bone_lengths == pytest.approx(LENGTHS, rel=1e-5)
    test = build_motion_dataset(published, "test")  # another first clip, the same body
    assert loaded.skeleton.makes_features_of(test.skeleton)


def test_bodies_are_compared() -> None:
    longer = Skeleton.from_config(KIT.to_config() | {"bone_lengths": (0.0, *(2 * x for x in LENGTHS[1:]))})
    assert BODY.makes_features_of(KIT) and KIT.makes_features_of(BODY)
    assert not BODY.makes_features_of(longer) and not T2M.makes_features_of(KIT)
    assert skeleton_config(KIT) == "kit" and skeleton_config(BODY)["bone_lengths"] == LENGTHS


def test_convert_joints_of_kit(published: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", kit_clip().numpy())
    convert_main([str(tmp_path / "a.npy"), str(tmp_path / "b.bvh")])  # needs no target body
    assert (tmp_path / "b.bvh").is_file()
    with pytest.raises(ValueError, match="--lengths-from"):
        convert_main([str(tmp_path / "a.npy"), str(tmp_path / "c.npy"), "--features"])
    convert_main([str(tmp_path / "a.npy"), str(tmp_path / "c.npy"), "--features", "--lengths-from", str(published)])
    expected = joints_to_features(kit_clip(), BODY, shortest_turn=True)
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), expected, rtol=1e-4, atol=1e-2)


def test_mistakes(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--lengths-from"):
        prepare_main([str(recordings), str(tmp_path / "out"), "--skeleton", "kit"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        with_lengths_from(KIT, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no clip"):
        with_lengths_from(KIT, tmp_path / "empty")
    np.save(tmp_path / "t2m.npy", np.zeros((4, 22, 3)))
    with pytest.raises(ValueError, match=r"\(T, 21, 3\)"):
        with_lengths_from(KIT, tmp_path / "t2m.npy")
    flat = kit_clip(2)
    flat[:, 4] = flat[:, 3]
    np.save(tmp_path / "flat.npy", flat.numpy())
    with pytest.raises(ValueError, match="bone to 'head' has no length"):
        with_lengths_from(KIT, tmp_path / "flat.npy")
    with pytest.raises(ValueError, match=r"or a folder"):
        with_lengths_from(KIT, __file__)


def test_a_failed_preparation_leaves_nothing(recordings: Path, tmp_path: Path) -> None:
    broken = kit_clip()
    broken[7, 3] = torch.nan
    np.save(recordings / "walk_11.npy", broken.numpy())
    with pytest.raises(ValueError, match=r"walk_11.*frame 7"):
        prepare(recordings, tmp_path / "out", skeleton=BODY, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recordings"]
