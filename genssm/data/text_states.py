"""Captions encoded once: ``python -m genssm.data.text_states --encoder CLIP --out FOLDER name=... caption=...``

The folder holds ``captions.json`` (every different caption of the data, sorted, the empty text among them),
``states.npy`` (captions, tokens, width; memory-mapped), ``lengths.npy`` and ``meta.json``. Training reads it with
``text.encoder: CLIP`` and ``text.cache: FOLDER``. It is written beside its final place and renamed when complete.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from genssm.config import DataConfig, load_data_config
from genssm.data import build_dataset
from genssm.errors import cli
from genssm.text import encode_texts, load_frozen_encoder


class TextStates:
    """Encoded captions, looked up by their text.

    Args:
        folder: what the command of this module wrote.

    Raises:
        FileNotFoundError: the folder is not complete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        names = ("captions.json", "states.npy", "lengths.npy", "meta.json")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"text.cache={folder}: {', '.join(missing)} missing; python -m genssm.data.text_states makes the folder"
            )
        captions = json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))
        self.row = {text: i for i, text in enumerate(captions)}
        self.states = np.load(self.folder / "states.npy", mmap_mode="r")
        self.lengths = torch.from_numpy(np.load(self.folder / "lengths.npy"))

    def check(self, captions: Sequence[str], width: int) -> None:
        """Refuse a folder that was made for other captions or another denoiser.

        Raises:
            ValueError: a caption is missing, or the width differs.
        """
        missing = [text for text in captions if text not in self.row]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} captions, first {missing[0]!r}; encode the data again with "
                "python -m genssm.data.text_states"
            )
        if self.states.shape[2] != width:
            raise ValueError(
                f"{self.folder} has states of width {self.states.shape[2]}, model.args.context_dim is {width}"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, S, C), float32, and mask (B, S) bool of texts, on the CPU."""
        rows = [self.row[text] for text in texts]
        states = torch.from_numpy(self.states[rows].astype(np.float32))
        return states, torch.arange(states.shape[1]) < self.lengths[rows][:, None]


def encode_captions(
    config: DataConfig,
    encoder: str,
    out: str | Path,
    *,
    max_length: int | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str = "cpu",
    quiet: bool = False,
) -> Path:
    """Encode every caption of a data set.

    Args:
        config: the data.
        encoder: see :func:`genssm.text.load_frozen_encoder`.
        out: folder to make; must not exist.
        max_length: tokens of a text; None takes the tokenizer's own.
        dtype: of the stored numbers, ``float16`` or ``float32``.
        batch_size: captions at a time.
        device: where the encoder runs.
        quiet: no progress bar.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: the data have no captions.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    dataset = build_dataset(config)
    if dataset.captions is None:
        raise ValueError("the data have no captions; set caption=COLUMN or caption=sidecar")
    tokenizer, model = load_frozen_encoder(encoder, max_length)
    model.to(device)
    captions = sorted({"", *(text for texts in dataset.captions for text in texts)})
    parts, lengths = [], []
    with torch.no_grad(), tqdm(total=len(captions), unit="caption", disable=quiet or None) as bar:
        for start in range(0, len(captions), batch_size):
            states, mask = encode_texts(tokenizer, model, captions[start : start + batch_size], device)
            kept = mask.sum(dim=1).cpu()
            if not torch.equal(mask.cpu(), torch.arange(mask.shape[1]) < kept[:, None]):
                raise ValueError(f"{type(tokenizer).__name__} pads on the left; set its padding_side to right")
            parts += [row[:length].to("cpu", torch.float32).numpy().astype(dtype) for row, length in zip(states, kept)]
            lengths += kept.tolist()
            bar.update(len(kept))
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shape = (len(captions), max(lengths), parts[0].shape[1])
    stored = np.lib.format.open_memmap(part / "states.npy", mode="w+", dtype=dtype, shape=shape)
    for row, states in enumerate(parts):
        stored[row, : len(states)] = states
    stored.flush()
    np.save(part / "lengths.npy", np.asarray(lengths, np.int64))
    meta = {"format_version": 1, "encoder": encoder, "max_length": tokenizer.model_max_length, "dtype": dtype}
    for name, value in (("captions.json", captions), ("meta.json", meta)):
        (part / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(part, out)
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.data.text_states",
        description="Encode the captions of a data set once; train with text.encoder=ENCODER text.cache=FOLDER.",
        epilog="example: python -m genssm.data.text_states --encoder clip --out texts/coco name=coco path=coco",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the data section: name, path, ...")
    parser.add_argument("--config", help="take the data section of this run file first")
    parser.add_argument("--encoder", required=True, help="folder or Hub name of CLIP, T5 or another text encoder")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--max-length", type=int, help="tokens of a text; default: the tokenizer's own")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = vars(parser.parse_args())
    config = load_data_config(args.pop("config"), args.pop("overrides"))
    out = encode_captions(config, args.pop("encoder"), args.pop("out"), **args)
    print(f"captions of {config.name} in {out}; train with text.cache={out}")


if __name__ == "__main__":
    cli(main)
