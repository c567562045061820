"""Large arrays computed once, block by block: by any number of processes, resumable, with a checksum for each block.

A folder holds one memory-mapped ``.npy``, small files beside it and ``meta.json``, which also lists the sha256 of every
block of rows and of every other file.
``python -m genssm.data.blocks FOLDER`` reads them all again and says which rows are damaged. While a folder is being
made it is called ``FOLDER.partial``, and every finished block has a note in ``FOLDER.partial/blocks``: a command that
was stopped, or killed, goes on with the missing blocks, whatever the number of processes then.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genssm.errors import cli

BLOCK = 256  # rows


def fill_folder(
    out: Path,
    file: str,
    meta: Mapping[str, Any],
    compute: Callable[[int, int], np.ndarray],
    *,
    shape: Sequence[int],
    dtype: Any,
    beside: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    unit: str = "image",
    quiet: bool = False,
) -> Path:
    """Compute the rows of an array and write them into a new folder.

    In an initialised process group every process takes its share of the blocks and returns when all is done.

    Args:
        out: folder to make; must not exist.
        file: name of the array in it, ``.npy``.
        meta: what ``meta.json`` says; a half-made folder goes on only if it was begun with the same.
        compute: ``(start, stop)`` -> those rows.
        shape: of the whole array, rows first.
        dtype: of the array; rows are cast to it.
        beside: further small files, name -> array (``.npy``) or plain value (``.json``).
        batch_size: rows at a time.
        unit: what a row is, for the progress bar.
        quiet: no progress bar.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: a half-made folder is of other settings or data, or a batch size below 1.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; expected at least 1")
    rank, world = _place()
    part = out.with_name(out.name + ".partial")
    contents = {name: _contents(name, values) for name, values in (beside or {}).items()}
    plan = {
        "meta": json.loads(json.dumps(meta)),
        "shape": list(shape),
        "dtype": np.dtype(dtype).str,
        "beside": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    if rank == 0:
        _begin(part, file, plan, contents)
    _wait()
    missing = [n for n in range(-(-shape[0] // BLOCK)) if not _note(part, n).is_file()]
    _wait()  # nobody writes notes before everybody has looked
    array = np.load(part / file, mmap_mode="r+")
    mine = missing[rank::world]
    rows = sum(min((n + 1) * BLOCK, shape[0]) - n * BLOCK for n in mine)
    with tqdm(total=rows, unit=unit, disable=quiet or rank != 0 or None) as bar:
        for number in mine:
            first, last = number * BLOCK, min((number + 1) * BLOCK, shape[0])
            for start in range(first, last, batch_size):
                stop = min(start + batch_size, last)
                array[start:stop] = compute(start, stop).astype(array.dtype)
                bar.update(stop - start)
            array.flush()
            write_json(_note(part, number), {"sha256": _hash(array[first:last])})
    _wait()
    if rank == 0:
        hashes = [
            json.loads(_note(part, n).read_text(encoding="utf-8"))["sha256"] for n in range(-(-shape[0] // BLOCK))
        ]
        about = {"file": file, "rows": BLOCK, "sha256": hashes, "beside": plan["beside"]}
        write_json(part / "meta.json", {**plan["meta"], "blocks": about})
        shutil.rmtree(part / "blocks")
        (part / "begun.json").unlink()
        os.replace(part, out)
    _wait()
    return out


def verify(folder: str | Path) -> int:
    """Read every block of a folder and compare its checksum; returns the number of blocks.

    In an initialised process group every process reads its share of the blocks.

    Raises:
        FileNotFoundError: no folder of :func:`fill_folder` with checksums, or one of its files is missing.
        ValueError: a file or rows are damaged; the message says which.
    """
    folder = Path(folder)
    about = _read_meta(folder).get("blocks") if (folder / "meta.json").is_file() else None
    if about is None:
        raise FileNotFoundError(
            f"{folder} has no meta.json with checksums; the folders that genssm.data encodes have one: encode it again"
        )
    _, array = open_folder(folder, about["file"])
    rows = about["rows"]
    expected = -(-len(array) // rows)
    if expected != len(about["sha256"]):
        raise ValueError(
            f"{folder / about['file']} has {expected} blocks of {rows} rows, meta.json {len(about['sha256'])}; encode "
            "it again"
        )
    rank, world = _place()
    damaged = [
        f"{n * rows}..{min((n + 1) * rows, len(array)) - 1}"
        for n, digest in enumerate(about["sha256"])
        if n % world == rank and _hash(array[n * rows : (n + 1) * rows]) != digest
    ]
    if damaged:
        raise ValueError(f"{folder / about['file']} is damaged in the rows {', '.join(damaged)}; encode it again")
    return expected


def open_folder(folder: Path, file: str, keys: Sequence[str] = ()) -> tuple[dict[str, Any], np.ndarray]:
    """``meta.json`` and the memory-mapped array of a folder.

    The small files beside the array are compared with their checksums; :func:`verify` also does that with the rows.

    Args:
        folder: with ``meta.json`` and ``file``.
        file: name of the array.
        keys: what ``meta.json`` must say.

    Raises:
        FileNotFoundError: a small file is missing.
        ValueError: a file is cut off or damaged, or ``meta.json`` lacks a key; the message says which.
    """
    meta = _read_meta(folder)
    lacking = [key for key in keys if key not in meta]
    if lacking:
        raise ValueError(f"{folder / 'meta.json'} lacks {', '.join(lacking)}; encode it again")
    for name, digest in meta.get("blocks", {}).get("beside", {}).items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; encode it again")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder / name} is damaged, or was changed after it was made; encode it again")
    try:
        return meta, np.load(folder / file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder / file} cannot be read: {error}; encode it again") from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
    os.replace(temporary, path)


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); encode it again") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{file} is damaged (a {type(meta).__name__}); encode it again")
    return meta


def _contents(name: str, values: Any) -> bytes:
    """What a small file holds: an array (``.npy``) or a plain value (``.json``)."""
    if name.endswith(".json"):
        return json.dumps(values, indent=1, ensure_ascii=False).encode()
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def _begin(part: Path, file: str, plan: dict, beside: Mapping[str, bytes]) -> None:
    """Make the half-made folder, or find that it is of the same command."""
    begun = part / "begun.json"
    if begun.is_file():
        if json.loads(begun.read_text(encoding="utf-8")) != plan:
            raise ValueError(f"{part} was begun with other settings or data; remove it to start anew")
        (part / "blocks").mkdir(exist_ok=True)  # killed while it was being taken away
        return
    shutil.rmtree(part, ignore_errors=True)  # killed before it was begun
    (part / "blocks").mkdir(parents=True)
    np.lib.format.open_memmap(part / file, mode="w+", dtype=plan["dtype"], shape=tuple(plan["shape"])).flush()
    for name, data in beside.items():
        (part / name).write_bytes(data)
    write_json(begun, plan)


def _note(part: Path, number: int) -> Path:
    return part / "blocks" / f"{number:07d}.json"


def _hash(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()


def _place() -> tuple[int, int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _wait() -> None:
    if _place()[1] > 1:
        torch.distributed.barrier()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.data.blocks", description="Compare the checksums of encoded data with what is stored."
    )
    parser.add_argument("folder", help="made by genssm.data.encode, .encode_codes or .text_states")
    args = parser.parse_args()
    print(f"{args.folder}: {verify(args.folder)} blocks are as they were written")


if __name__ == "__main__":
    cli(main)
