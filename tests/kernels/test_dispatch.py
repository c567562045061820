"""Which backend runs: automatic choice, the environment variable, refusals with a reason, messages said once."""

import logging
import os
import stat
from pathlib import Path

import pytest
import torch

from genssm.kernels import dispatch, native
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing said yet and no preference in the environment."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("GENSSM_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Elsewhere:
    """Stands for a tensor on a device that this machine may not have."""

    dtype = torch.float32

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def test_cpu_takes_the_chunked_path_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="genssm"):
        for _ in range(3):
            assert dispatch.resolve("selective_scan", "auto", torch.zeros(1)) == "chunked"
        assert dispatch.resolve("causal_conv1d", "auto", torch.zeros(1)) == "chunked"
    assert [r.getMessage() for r in caplog.records] == [
        "selective_scan: backend chunked on cpu",
        "causal_conv1d: backend chunked on cpu",
    ]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_argument_and_variable_choose(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    assert dispatch.resolve("op", backend, torch.zeros(1)) == backend
    monkeypatch.setenv("GENSSM_BACKEND", backend)
    assert dispatch.resolve("op", "auto", torch.zeros(1)) == backend
    assert dispatch.resolve("op", "chunked", torch.zeros(1)) == "chunked"  # the argument is nearer than the variable


def test_the_variable_reaches_the_ops(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    u = torch.randn(1, 4, 2)
    monkeypatch.setenv("GENSSM_BACKEND", "reference")
    with caplog.at_level(logging.INFO, logger="genssm"):
        selective_scan(u, u.abs(), -torch.ones(2, 3), torch.randn(1, 4, 3), torch.randn(1, 4, 3))
        causal_conv1d(u, torch.randn(2, 4))
    assert [r.getMessage() for r in caplog.records] == [
        "selective_scan: backend reference on cpu",
        "causal_conv1d: backend reference on cpu",
    ]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown backend='cuda'; choose one of auto, reference, chunked"):
        dispatch.resolve("op", "cuda", torch.zeros(1))
    monkeypatch.setenv("GENSSM_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown GENSSM_BACKEND=fast"):
        dispatch.resolve("op", "auto", torch.zeros(1))


def test_triton_refuses_cpu_tensors_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="triton needs a CUDA, ROCm or XPU tensor, got cpu"):
        dispatch.resolve("op", "triton", torch.zeros(1))
    with pytest.raises(ValueError, match=r"got float64 inputs; use backend='auto'"):
        dispatch.resolve("op", "triton", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setenv("GENSSM_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"GENSSM_BACKEND=triton is not possible: .*; unset GENSSM_BACKEND"):
        dispatch.resolve("op", "auto", torch.zeros(1))
    monkeypatch.delenv("GENSSM_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve("op", "triton", torch.zeros(1)) == "triton"
    assert dispatch.resolve("op", "auto", torch.zeros(1)) == "chunked"  # interpreted kernels are for tests only


def test_absent_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.resolve("op", "triton", Elsewhere("cuda"))


def test_accelerators_take_triton_or_warn_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    assert dispatch.resolve("op", "auto", Elsewhere("cuda")) == "triton"
    assert dispatch.resolve("op", "auto", Elsewhere("xpu")) == "triton"
    monkeypatch.setattr(dispatch, "_capability", lambda index: (6, 1))
    with caplog.at_level(logging.WARNING, logger="genssm"):
        for _ in range(2):
            assert dispatch.resolve("op", "auto", Elsewhere("cuda:1")) == "chunked"
            assert dispatch.resolve("op", "auto", Elsewhere("mps")) == "chunked"
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [
        "op: slow PyTorch path on cuda, because triton needs compute capability 7.0 or newer, device 1 has 6.1",
        "op: slow PyTorch path on mps, because triton needs a CUDA, ROCm or XPU tensor, got mps",
    ]


def test_compiled_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the compiled backend needs CPU tensors, got cuda"):
        dispatch.resolve("op", "compiled", Elsewhere("cuda"))
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        dispatch.resolve("op", "compiled", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(native, "_compiler", lambda: None)
    with pytest.raises(ValueError, match=r"needs a C compiler .* none found; use backend='auto'"):
        dispatch.resolve("op", "compiled", torch.zeros(1))


@pytest.mark.skipif(native.why_not() is not None, reason="no C compiler")
def test_the_variable_leaves_float64_to_the_chunked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSSM_BACKEND", "compiled")
    assert dispatch.resolve("op", "auto", torch.zeros(1)) == "compiled"
    assert dispatch.resolve("op", "auto", torch.zeros(1, dtype=torch.float64)) == "chunked"


def test_ssd_has_no_compiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ssd has no compiled backend, only reference, chunked and triton"):
        dispatch.resolve("ssd", "compiled", torch.zeros(1))
    monkeypatch.setenv("GENSSM_BACKEND", "compiled")
    assert dispatch.resolve("ssd", "auto", torch.zeros(1)) == "chunked"
    with pytest.raises(ValueError, match="the compiled backend needs CPU tensors, got cuda"):
        dispatch.resolve("ssd", "auto", Elsewhere("cuda"))


# The compiled library


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    native._compiler.cache_clear()
    yield tmp_path / "genssm"
    native.load.cache_clear()
    native._compiler.cache_clear()


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(native.why_not() is not None, reason="no C compiler")
def test_library_is_built_once_into_the_cache(cache: Path) -> None:
    native.load("causal_conv1d/conv.c")
    built = list(cache.iterdir())
    assert [path.suffix for path in built] == [".so"]
    before = built[0].stat().st_mtime_ns
    native.load.cache_clear()
    native.load("causal_conv1d/conv.c")
    assert list(cache.iterdir()) == built
    assert built[0].stat().st_mtime_ns == before


@pytest.mark.skipif(native.why_not() is not None, reason="no C compiler")
def test_flags_that_a_compiler_refuses_are_dropped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = " ".join(native._compiler())
    refuses = f'case "$*" in *=native*|*openmp*) echo no such flag >&2; exit 1;; esac\nexec {plain} "$@"'
    monkeypatch.setenv("CC", _script(tmp_path / "old-cc", refuses))
    native._compiler.cache_clear()
    assert native.load("causal_conv1d/conv.c").genssm_conv_size() > 0


def test_a_failing_compiler_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name != "posix":
        pytest.skip("needs a Unix shell")
    monkeypatch.setenv("CC", _script(tmp_path / "broken-cc", "echo the disk is on fire >&2; exit 1"))
    native._compiler.cache_clear()
    with pytest.raises(RuntimeError, match=r"(?s)the C compiler failed: .*broken-cc.*the disk is on fire"):
        native.load("causal_conv1d/conv.c")
    assert not list(cache.iterdir())


@pytest.mark.skipif(native.why_not() is not None, reason="no C compiler")
def test_an_unwritable_cache_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "genssm").write_text("a file where the folder should be")
    with pytest.raises(RuntimeError, match="set XDG_CACHE_HOME to a writable folder"):
        native.load("causal_conv1d/conv.c")
