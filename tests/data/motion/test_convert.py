"""Single files from one form to another, by the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.data.motion.convert import main
from genssm.motion import T2M, features_to_joints, joints_to_features


def test_joints_to_bvh_to_features(joints: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "a.npy", joints.numpy())
    main([str(tmp_path / "a.npy"), str(tmp_path / "b.bvh")])
    assert "30 frames at 20 per second" in capsys.readouterr().out
    main([str(tmp_path / "b.bvh"), str(tmp_path / "c.npy"), "--features"])
    features = np.load(tmp_path / "c.npy")
    np.testing.assert_allclose(features, joints_to_features(joints.double(), T2M).float(), atol=2e-4)
    main([str(tmp_path / "c.npy"), str(tmp_path / "d.npy")])
    expected = features_to_joints(torch.from_numpy(features))
    np.testing.assert_allclose(np.load(tmp_path / "d.npy"), expected, atol=1e-5)
    main([str(tmp_path / "d.npy"), str(tmp_path / "e.png"), "--place"])
    assert Image.open(tmp_path / "e.png").size[1] == 192


def test_mistakes(joints: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.bvh"):
        main([str(tmp_path / "none.bvh"), str(tmp_path / "a.gif")])
    np.save(tmp_path / "a.npy", joints.numpy())
    with pytest.raises(ValueError, match=r"writes \.npy"):
        main([str(tmp_path / "a.npy"), str(tmp_path / "a.gif"), "--features"])
    with pytest.raises(FileNotFoundError, match="joint map nowhere"):
        main([str(tmp_path / "a.npy"), str(tmp_path / "a.gif"), "--joint-map", "nowhere"])
    np.save(tmp_path / "f.npy", np.zeros((5, 263)))
    with pytest.raises(ValueError, match="holds features; --joint-map, --fps and --up are for recordings"):
        main([str(tmp_path / "f.npy"), str(tmp_path / "a.gif"), "--fps", "30"])
    (tmp_path / "e.npy").touch()
    with pytest.raises(ValueError, match=r"e\.npy holds no numbers as \.npy"):
        main([str(tmp_path / "e.npy"), str(tmp_path / "a.gif")])
    (tmp_path / "walk.amc").write_text("1\n")
    with pytest.raises(FileNotFoundError, match=r"walk\.asf"):
        main([str(tmp_path / "walk.amc"), str(tmp_path / "a.gif")])
