"""Encode a data set once with a VQ tokenizer: ``python -m genssm.data.encode_codes --tokenizer RUN --out FOLDER ...``

The result is a folder that ``data.name: codes`` reads: ``codes.npy`` (images, views, codes; memory-mapped),
``labels.npy``, ``captions.json`` and ``meta.json`` with checksums (:mod:`genssm.data.blocks`). It is written beside its
final place and renamed when complete; a command that was stopped continues where it was, and under ``accelerate
launch`` or ``torchrun`` the processes share the work.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from genssm.config import DataConfig, load_data_config
from genssm.data import build_dataset
from genssm.data.blocks import fill_folder
from genssm.data.codes import load_tokenizer
from genssm.data.transforms import to_model_range
from genssm.devices import device_option, means_cpu
from genssm.errors import cli


@torch.no_grad()
def encode_codes(
    config: DataConfig,
    tokenizer_path: str,
    out: str | Path,
    *,
    flip: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> Path:
    """Encode every image of a data set to codes.

    Args:
        config: the images; their mirror option is replaced by ``flip``.
        tokenizer_path: folder of the tokenizer, or a run or pipeline that holds one.
        out: folder to make; must not exist.
        flip: also encode the mirrored images, as a second view.
        batch_size: images at a time.
        device: where the tokenizer runs.
        quiet: no progress bar.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: the data are no images, or a half-made folder is of another command.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    if config.name in ("codes", "latents"):
        raise ValueError(f"data.name={config.name} holds no images; name a data set of images")
    tokenizer = load_tokenizer(tokenizer_path).to(device)
    channels = config.channels or tokenizer.config.in_channels
    dataset = build_dataset(dataclasses.replace(config, flip=False, channels=channels))
    vocabulary, factor = tokenizer.config.num_vq_embeddings, tokenizer.scale_factor
    height, width = dataset.item_shape[1] // factor, dataset.item_shape[2] // factor
    rows, views = len(dataset), 2 if flip else 1
    meta = {
        "format_version": 1,
        "form": "codes",
        "num_codes": vocabulary,
        "grid": [height, width],
        "views": ["plain", "mirrored"][:views],
        "class_names": list(dataset.class_names),
        "rows": rows,
        "tokenizer": str(tokenizer_path),
        "data": dataclasses.asdict(config),
    }

    beside = {} if dataset.labels is None else {"labels.npy": dataset.labels}
    if dataset.captions is not None:
        beside["captions.json"] = dataset.captions

    def compute(start: int, stop: int) -> np.ndarray:
        images = torch.from_numpy(np.stack([dataset.pixels(row) for row in range(start, stop)]))
        images = to_model_range(images).to(device)
        drawn = [tokenizer.tokenize(images.flip(-1) if view else images) for view in range(views)]
        return torch.stack(drawn, 1).cpu().numpy()  # (B, views, codes)

    return fill_folder(
        out,
        "codes.npy",
        meta,
        compute,
        shape=(rows, views, height * width),
        dtype=np.uint16 if vocabulary <= 2**16 else np.int32,
        beside=beside,
        batch_size=batch_size,
        quiet=quiet,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.data.encode_codes",
        description="Encode a data set once with a VQ tokenizer; train on it with data.name=codes data.path=FOLDER.",
        epilog="example: python -m genssm.data.encode_codes --tokenizer runs/tokenizer --out codes/flowers "
        "name=image_folder path=flowers resolution=256",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the data section: name, path, ...")
    parser.add_argument("--config", help="take the data section of this run file first")
    parser.add_argument("--tokenizer", required=True, help="folder of a VQTokenizer, or a run or pipeline with one")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--flip", action="store_true", help="also encode the mirrored images")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--device",
        type=device_option,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    config = load_data_config(args.config, args.overrides)
    state = PartialState(cpu=means_cpu(args.device))
    out = encode_codes(
        config,
        args.tokenizer,
        args.out,
        flip=args.flip,
        batch_size=args.batch_size,
        device=args.device if state.num_processes == 1 else state.device,
        quiet=args.quiet,
    )
    if state.is_main_process:
        print(f"codes of {config.name} in {out}; train with data.name=codes data.path={out} data.vae={args.tokenizer}")


if __name__ == "__main__":
    cli(main)
