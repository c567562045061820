"""Compile the C files of the ops once, into the user's cache, and load them through ctypes.

Nothing is built at install time and nothing depends on torch's headers or ABI: the C functions see plain pointers.
The library lies in ``$XDG_CACHE_HOME/genssm`` (default ``~/.cache/genssm``) under a name that is a hash of everything
that shaped it: sources, flags, compiler and processor. It is written under another name first and then renamed, so
that processes may build at the same time.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
# No -ffast-math: it would give up infinities and, when linking, switch the whole process to flushing denormals.
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{_HERE}")


def why_not() -> str | None:
    """Why nothing can be compiled here, or None when it can."""
    if os.name != "posix":
        return f"the compiled backend needs a Unix C compiler, this is {platform.system()}"
    if _compiler() is None:
        return "the compiled backend needs a C compiler (cc, gcc or clang on the PATH, or the CC variable); none found"
    return None


@functools.cache
def load(source: str) -> ctypes.CDLL:
    """Build a C file, unless the cache holds it, and load it.

    Args:
        source: path of the file inside ``kernels/``.
    Raises:
        RuntimeError: no compiler, or it fails; the message holds what it said.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    sources = (_HERE / source, _HERE / "vectors.c")
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in sources), *(text.encode() for text in _circumstances())):
        digest.update(len(part).to_bytes(8, "little") + part)
    path = cache_folder() / f"{sources[0].stem}-{digest.hexdigest()[:24]}.so"
    if not path.is_file():
        _build(sources[0], path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """Where built libraries lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genssm"


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in ([chosen] if chosen else []) + [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return tuple(command)
    return None


def _circumstances() -> list[str]:
    """All that shapes a build beside its sources."""
    version = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return [*_compiler(), version, repr(_attempts()), platform.machine(), platform.processor(), _processor()]


def _processor() -> str:
    """What the processor can do: -march=native must not meet another machine through a shared home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _attempts() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Compile and link flags, best first.

    The OpenMP runtime that torch brought is preferred: a second one in the process would compete for the cores.
    """
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    bundled = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    parallel = [(("-fopenmp",), (bundled[0],))] if bundled else []
    parallel += [(("-fopenmp",), ("-fopenmp",)), ((), ())]
    return [((*_FLAGS, *tune, *flags), link) for flags, link in parallel for tune in ((native,), ())]


def _build(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise RuntimeError(
            f"cannot write to {target.parent} ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    with folder as name:
        made, library = Path(name) / "made.o", Path(name) / "made.so"
        for compile_flags, link_flags in _attempts():
            steps = (
                [*_compiler(), *compile_flags, "-c", str(source), "-o", str(made)],
                [*_compiler(), "-shared", str(made), *link_flags, "-lm", "-o", str(library)],
            )
            for command in steps:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    break
            else:
                os.replace(library, target)
                return
    raise RuntimeError(f"the C compiler failed: {shlex.join(command)}\n{done.stderr.strip()[-2000:]}")
