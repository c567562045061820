"""Motion data sets: published folders, recordings, captions, cropping, mirror images, and what is wrong with files."""

import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.data.motion import Lengths, MotionDataset, build_motion_dataset
from genssm.data.motion.clips import Caption, Clip, mirror_joints, read_captions, swap_sides
from genssm.data.motion.folders import describe_recordings
from genssm.data.motion.prepare import main as prepare_main
from genssm.data.motion.prepare import prepare
from genssm.motion import T2M, FeatureStatistics, features_to_joints, joints_to_features

LINE = "a man walks#a/DET man/NOUN walk/VERB#0.0#0.0\n"
UNIT = FeatureStatistics(torch.zeros(263), torch.ones(263))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as HumanML3D's users have it."""
    root = tmp_path / "dataset" / "HumanML3D"
    for name in ("new_joint_vecs", "texts"):
        (root / name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, frames in (("000000", 120), ("000001", 39), ("000002", 300), ("M000000", 120)):
        np.save(root / "new_joint_vecs" / f"{name}.npy", draw.standard_normal((frames, 263)))
        (root / "texts" / f"{name}.txt").write_text(LINE + "he turns#he/PRON turn/VERB#1.0#4.0\n")
    np.save(root / "Mean.npy", np.full(263, 0.5))
    np.save(root / "Std.npy", np.full(263, 2.0))
    (root / "train.txt").write_text("000000\n000001\n000002\nM000000\n")
    return root


def test_published_folder(published: Path) -> None:
    dataset = build_motion_dataset(published.parents[1])
    names = [clip.name for clip in dataset.clips]
    # 39 and 300 frames are out of bounds, the parts of 3 seconds are 60 frames long (of 39 only 19 are there).
    assert names == ["000000", "000000 1-4 s", "000002 1-4 s", "M000000", "M000000 1-4 s"]
    item = dataset[1]
    assert item["length"] == 60 and item["text"] == "he turns" and item["motion"].shape == (196, 263)
    stored = np.load(published / "new_joint_vecs" / "000000.npy")[20:80]
    np.testing.assert_allclose(item["motion"][:60], (stored - 0.5) / 2, atol=1e-6)
    assert item["motion"][60:].eq(0).all() and "class_labels" not in item
    assert dataset.clips[1].captions[0].tokens == ("he/PRON", "turn/VERB")


@pytest.mark.parametrize("name", ["Mean.npy", "train.txt", "texts"])
def test_missing_file_is_named(published: Path, name: str) -> None:
    (published / name).rename(published / "elsewhere")
    with pytest.raises(FileNotFoundError, match=name):
        build_motion_dataset(published)


def test_missing_and_broken_clips_are_named(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = np.load(published / "new_joint_vecs" / "000000.npy")
    broken[[5, 6], 3] = np.nan
    np.save(published / "new_joint_vecs" / "000000.npy", broken)
    (published / "texts" / "000002.txt").unlink()
    with caplog.at_level(logging.WARNING, "genssm"):
        dataset = build_motion_dataset(published)
    # The part of the broken clip that does not hold the frames is good.
    assert [clip.name for clip in dataset.clips] == ["000000 1-4 s", "M000000", "M000000 1-4 s"]
    assert "clip 000000 is left out: its features are not finite in 2 frames: 5, 6" in caplog.text
    assert "1 of 4 clips are left out because files are missing" in caplog.text and "000002.txt" in caplog.text


def test_other_mistakes(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for recordings"):
        build_motion_dataset(published, mirror=True)
    with pytest.raises(ValueError, match="split"):
        build_motion_dataset(published, "tomorrow")
    with pytest.raises(FileNotFoundError, match="nothing"):
        build_motion_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="none of"):
        build_motion_dataset(published, lengths=Lengths(min_frames=150))
    with pytest.raises(ValueError, match="multiple of unit_length"):
        Lengths(max_frames=198)
    np.save(published / "new_joint_vecs" / "000001.npy", np.zeros((50, 251)))
    with pytest.raises(ValueError, match=r"000001\.npy has shape \(50, 251\)"):
        build_motion_dataset(published)


def test_captions() -> None:
    lines = read_captions(LINE + "\na plain line\nshe sits#she/PRON sit/VERB#nan#nan\n", "a.txt")
    assert [timed.caption.text for timed in lines] == ["a man walks", "a plain line", "she sits"]
    assert all(timed.start == timed.end == 0 for timed in lines)
    assert lines[1].caption.tokens == ("a/DET", "plain/NOUN", "line/NOUN")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: expected caption#words#start#end"):
        read_captions(LINE + "a man#walks\n", "a.txt")


def test_mirror() -> None:
    assert swap_sides("Left arm, then turns right clockwise") == "Right arm, then turns left counterclockwise"
    caption = Caption.of("turns left").mirrored()
    assert caption.text == "turns right" and caption.tokens == ("turn/VERB", "right/ADV")
    joints = torch.randn(4, 22, 3)
    twice = mirror_joints(mirror_joints(joints, T2M), T2M)
    assert torch.equal(twice, joints)
    torch.testing.assert_close(mirror_joints(joints, T2M)[:, 1], joints[:, 2] * torch.tensor([-1.0, 1, 1]))


def make_dataset(frames: int, **lengths) -> MotionDataset:
    features = torch.arange(frames, dtype=torch.float32)[:, None].expand(frames, 263)
    captions = tuple(Caption(text, ()) for text in "abc")
    return MotionDataset([Clip("clip", features, captions)], T2M, UNIT, Lengths(**lengths))


def test_draws_depend_on_the_key_alone() -> None:
    dataset = make_dataset(103)
    drawn = [dataset.item(0, key) for key in range(400)]
    lengths = [item["length"] for item in drawn]
    assert set(lengths) == {96, 100} and 0.25 < np.mean(np.equal(lengths, 96)) < 0.42
    starts = {int(item["motion"][0, 0]) for item in drawn if item["length"] == 100}
    assert starts == {0, 1, 2, 3}
    assert {item["text"] for item in drawn} == {"a", "b", "c"}
    for item in drawn[:5]:  # a stretch of the clip
        own = item["motion"][: item["length"], 0]
        assert own.diff().eq(1).all()
    again = dataset.item(0, 7)
    assert torch.equal(again["motion"], drawn[7]["motion"]) and again["text"] == drawn[7]["text"]
    assert dataset[0]["length"] == 100 and dataset[0]["motion"][0, 0] == 0 and dataset[0]["text"] == "a"


def test_windows_of_long_clips() -> None:
    with pytest.raises(ValueError, match="none of 1 clips"):
        make_dataset(1000)
    dataset = make_dataset(1000, longer="window", max_frames=64)
    starts = [int(dataset.item(0, key)["motion"][0, 0]) for key in range(200)]
    assert max(starts) > 800 and min(starts) < 200
    assert make_dataset(199)[0]["length"] == 196


def test_recordings(recordings: Path) -> None:
    dataset = build_motion_dataset(recordings, mirror=True)
    assert [clip.name for clip in dataset.clips[:2]] == ["clip0", "Mclip0"] and len(dataset) == 8
    assert dataset.class_names == ("turn", "walk") and dataset.labels.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert dataset[0]["class_labels"] == 1
    assert {dataset.item(1, key)["text"] for key in range(20)} == {"a person turns right", "someone moves number 0"}
    test = build_motion_dataset(recordings, "test", mirror=True)
    assert [clip.name for clip in test.clips] == ["clip4", "Mclip4", "clip5", "Mclip5"]
    assert torch.equal(test.statistics.mean, dataset.statistics.mean), "statistics are those of the training part"
    normalised = torch.cat([item["motion"][: item["length"]] for item in map(dataset.__getitem__, range(8))])
    assert normalised.mean(0).abs().max() < 0.6
    # A mirror image turns the other way.
    turn = [features_to_joints(clip.features)[-1, 0, 0] for clip in dataset.clips[:2]]
    assert abs(turn[0] + turn[1]) < 0.05 and abs(turn[0]) > 0.2


def test_prepared_folder_is_the_recordings(recordings: Path, tmp_path: Path) -> None:
    assert prepare(recordings, tmp_path / "out", mirror=True, quiet=True) == 12
    made = build_motion_dataset(tmp_path / "out", lengths=Lengths(longer="window"))
    live = build_motion_dataset(recordings, mirror=True)
    assert [clip.name for clip in made.clips] == [clip.name for clip in live.clips]
    for a, b in zip(made.clips, live.clips):
        assert torch.equal(a.features, b.features) and a.captions == b.captions and a.label == b.label
    torch.testing.assert_close(made.statistics.std, live.statistics.std)
    joints = torch.from_numpy(np.load(tmp_path / "out" / "new_joints" / "clip0.npy"))
    torch.testing.assert_close(joints_to_features(joints, T2M), made.clips[0].features, atol=3e-2, rtol=0)
    assert json.loads((tmp_path / "out" / "skeleton.json").read_text())["name"] == "t2m"
    with pytest.raises(FileExistsError, match="exists already"):
        prepare_main([str(recordings), str(tmp_path / "out")])


def test_names_with_blanks_are_found_again_and_none_is_written_over(recordings: Path, tmp_path: Path) -> None:
    (recordings / "index.csv").unlink()
    (recordings / "clip0.npy").rename(recordings / "walk fast.npy")
    prepare(recordings, tmp_path / "out", quiet=True)
    made = build_motion_dataset(tmp_path / "out", "all", lengths=Lengths(longer="window"))
    assert "walk fast" in [clip.name for clip in made.clips]
    (recordings / "clip1.npy").rename(recordings / "Mwalk fast.npy")
    with pytest.raises(ValueError, match="would be written as Mwalk fast; rename one"):
        prepare(recordings, tmp_path / "second", mirror=True, quiet=True)


@pytest.mark.parametrize("content", [b"", b"PK", b"years of work"])
def test_damaged_recordings_are_named(content: bytes, recordings: Path, tmp_path: Path) -> None:
    (recordings / "clip1.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"clip1\.npy holds no numbers as \.npy, or is damaged"):
        build_motion_dataset(recordings, "all")
    (recordings / "clip1.npy").unlink()
    np.save(recordings / "clip1.npy", np.zeros((0, 22, 3)))
    with pytest.raises(ValueError, match=r"clip1 has shape \(0, 22, 3\)"):
        build_motion_dataset(recordings, "all")
    (recordings / "more.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"archive .*more\.tar\.gz cannot be read"):
        describe_recordings(recordings)


def test_captions_beside_recordings_and_from_names(recordings: Path) -> None:
    (recordings / "index.csv").unlink()
    (recordings / "clip0.txt").write_text("a person limps\n")
    (recordings / "clip1.npy").rename(recordings / "walk_fast-01.npy")
    found = {recording.name: recording for recording in describe_recordings(recordings)}
    assert found["clip0"].captions[0].caption.text == "a person limps" and found["clip0"].label is None
    assert found["walk_fast-01"].captions[0].caption.text == found["walk_fast-01"].label == "walk fast"


def test_archives_and_what_a_table_names_wrongly(recordings: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "clips.tar.xz", "w:xz") as archive:
        archive.add(recordings / "clip0.npy", "deep/clip0.npy")
    (packed / "index.csv").write_text("path,captions\nclip0.npy,a person moves\n")
    (found,) = describe_recordings(packed)
    assert found.joints().shape == (50, 22, 3) and found.captions[0].caption.text == "a person moves"
    (packed / "index.csv").write_text("path,captions\nclip9.npy,a person moves\n")
    with pytest.raises(FileNotFoundError, match=r"clip9\.npy, which is neither there nor in an archive"):
        describe_recordings(packed)
    np.save(recordings / "clip3.npy", np.zeros((40, 17, 3)))
    with pytest.raises(ValueError, match=r"clip3 has shape \(40, 17, 3\)"):
        build_motion_dataset(recordings)


def test_cmu_folder(cmu) -> None:
    """The shared recordings: every kind of file, every caption; a few of them converted."""
    assert len(cmu) == 75
    assert all(recording.captions and recording.label for recording in cmu.values())
    assert cmu["asfamc__02__02_01"].captions[1].caption.text == "someone is walking straight ahead"
    splits = [split for recording in cmu.values() for split in ("train", "val", "test") if recording.in_split(split)]
    assert len(splits) == 75 and splits.count("train") > 50
    for name in ("asfamc__02__02_03", "actions__train__walking_extra__walking_27", "cmu__bvh__131_01"):
        assert joints_to_features(cmu[name].joints().double(), T2M).isfinite().all()
