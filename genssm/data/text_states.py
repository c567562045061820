"""Captions encoded once: ``python -m genssm.data.text_states --encoder CLIP --out FOLDER name=... caption=...``

The folder holds ``captions.json`` (every different caption of the data, sorted, the empty text among them),
``states.npy`` (captions, tokens, width; memory-mapped), ``lengths.npy`` and ``meta.json`` with checksums
(:mod:`genssm.data.blocks`). Training reads it with ``text.encoder: CLIP`` and ``text.cache: FOLDER``. It is written
beside its final place and renamed when complete; a command that was stopped continues where it was, and under
``accelerate launch`` or ``torchrun`` the processes share the work.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from genssm.config import DataConfig, load_data_config
from genssm.data import build_dataset
from genssm.data.blocks import fill_folder, verify
from genssm.devices import device_option, means_cpu
from genssm.errors import cli
from genssm.text import encode_texts, load_frozen_encoder, tokenize


class TextStates:
    """Encoded captions, looked up by their text; all checksums are compared first, shared among the processes.

    Args:
        folder: what the command of this module wrote.

    Raises:
        FileNotFoundError: the folder is not complete.
        ValueError: a file is cut off or damaged; the message says which.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        names = ("captions.json", "states.npy", "lengths.npy", "meta.json")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"text.cache={folder}: {', '.join(missing)} missing; python -m genssm.data.text_states makes the folder"
            )
        verify(self.folder)
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

    @torch.no_grad()
    def check_encoder(self, tokenizer: Any, encoder: nn.Module, device: torch.device | str) -> None:
        """Refuse a folder that another encoder made, or with texts of another length: samples would not fit.

        Raises:
            ValueError: the folder's states of a caption are not the encoder's, or ``max_length`` differs.
        """
        made = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        if made["max_length"] != tokenizer.model_max_length:
            raise ValueError(
                f"{self.folder} holds texts of up to {made['max_length']} tokens, the run's have "
                f"{tokenizer.model_max_length}; set text.max_length to the former, or encode the data again"
            )
        text = max(self.row, key=len)
        ours = encode_texts(tokenizer, encoder, [text], device)[0][0].float().cpu()  # (S, C)
        kept = self([text])[0][0][: self.lengths[self.row[text]]]
        if (ours[: len(kept)] - kept).norm() > 0.1 * kept.norm():
            raise ValueError(
                f"{self.folder} was made with another encoder ({made['encoder']}) than text.encoder; set that, or "
                "encode the data again"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, S, C), float32, and mask (B, S) bool of texts, on the CPU."""
        rows = [self.row[text] for text in texts]
        states = torch.from_numpy(self.states[rows].astype(np.float32))
        return states, torch.arange(states.shape[1]) < self.lengths[rows][:, None]


@torch.no_grad()
def encode_captions(
    config: DataConfig,
    encoder: str,
    out: str | Path,
    *,
    max_length: int | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
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
        ValueError: the data have no captions, the tokenizer pads on the left, or a half-made folder is of another
            command.
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
    lengths = count_tokens(tokenizer, captions)
    tokens = int(lengths.max())
    width = encode_texts(tokenizer, model, captions[:1], device)[0].shape[2]
    meta = {
        "format_version": 2,
        "encoder": encoder,
        "max_length": tokenizer.model_max_length,
        "dtype": dtype,
        "rows": len(captions),
        "shape": [tokens, width],
        "data": dataclasses.asdict(config),
    }

    def compute(start: int, stop: int) -> np.ndarray:
        states, mask = encode_texts(tokenizer, model, captions[start:stop], device)
        kept = torch.where(mask[:, :tokens, None], states[:, :tokens], 0.0)
        return kept.float().cpu().numpy()  # (B, tokens, width), 0 after the last token

    return fill_folder(
        out,
        "states.npy",
        meta,
        compute,
        shape=(len(captions), tokens, width),
        dtype=dtype,
        beside={"captions.json": captions, "lengths.npy": lengths},
        batch_size=batch_size,
        unit="caption",
        quiet=quiet,
    )


def count_tokens(tokenizer: Any, captions: Sequence[str], at_once: int = 4096) -> np.ndarray:
    """Tokens of each caption, int64 (N,).

    Raises:
        ValueError: the tokenizer pads on the left.
    """
    counts = []
    for start in range(0, len(captions), at_once):
        _, mask = tokenize(tokenizer, captions[start : start + at_once])
        kept = mask.sum(dim=1)
        if not torch.equal(mask, torch.arange(mask.shape[1]) < kept[:, None]):
            raise ValueError(f"{type(tokenizer).__name__} pads on the left; set its padding_side to right")
        counts.append(kept)
    return torch.cat(counts).numpy()


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_option, default=device, help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    config = load_data_config(args.config, args.overrides)
    state = PartialState(cpu=means_cpu(args.device))
    out = encode_captions(
        config,
        args.encoder,
        args.out,
        max_length=args.max_length,
        dtype=args.dtype,
        batch_size=args.batch_size,
        device=args.device if state.num_processes == 1 else state.device,
        quiet=args.quiet,
    )
    if state.is_main_process:
        print(f"captions of {config.name} in {out}; train with text.encoder={args.encoder} text.cache={out}")


if __name__ == "__main__":
    cli(main)
