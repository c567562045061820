"""Encode a data set once with a VAE: ``python -m genssm.data.encode --vae VAE --out FOLDER name=image_folder path=...``

The result is a folder that ``data.name: latents`` reads: ``latents.npy`` (memory-mapped, one array per split),
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
from genssm.data.images import ImageDataset
from genssm.data.latents import load_vae, vae_moments, vae_scaling
from genssm.data.transforms import to_model_range
from genssm.devices import device_option, means_cpu
from genssm.errors import cli


def encode_dataset(
    config: DataConfig,
    vae_path: str,
    out: str | Path,
    *,
    form: str = "mean_logvar",
    flip: bool = False,
    dtype: str = "float16",
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    quiet: bool = False,
) -> Path:
    """Encode every image of a data set.

    Args:
        config: the images; their mirror option is replaced by ``flip``.
        vae_path: folder of the VAE.
        out: folder to make; must not exist.
        form: ``mean_logvar`` stores the moments, so that training draws a new sample each time; ``sample`` the mean.
        flip: also encode the mirrored images, as rows N..2N-1.
        dtype: of the stored numbers, ``float16`` or ``float32``.
        batch_size: images at a time.
        device: where the VAE runs.
        quiet: no progress bar.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: the VAE has no variance but ``form`` asks for it, or a half-made folder is of another command.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    vae = load_vae(vae_path).to(device)
    dataset = build_dataset(dataclasses.replace(config, flip=False, channels=config.channels or 3))
    if not isinstance(dataset, ImageDataset):
        raise ValueError("data.name=latents cannot be encoded again; name a data set of images")
    shape = _stored_shape(vae, dataset, form, device)
    rows = len(dataset) * (2 if flip else 1)
    meta = {
        "format_version": 1,
        "form": form,
        "scaled": False,
        **dict(zip(("scale", "shift"), vae_scaling(vae))),
        "flip_rows": flip,
        "class_names": list(dataset.class_names),
        "rows": rows,
        "shape": shape,
        "dtype": dtype,
        "vae": str(vae_path),
        "data": dataclasses.asdict(config),
    }
    beside = {} if dataset.labels is None else {"labels.npy": dataset.labels}
    if dataset.captions is not None:
        beside["captions.json"] = dataset.captions

    def compute(start: int, stop: int) -> np.ndarray:
        return _encode(vae, dataset, start, stop, form, device)

    return fill_folder(
        out,
        "latents.npy",
        meta,
        compute,
        shape=(rows, *shape),
        dtype=dtype,
        beside=beside,
        batch_size=batch_size,
        quiet=quiet,
    )


def _stored_shape(vae: torch.nn.Module, dataset: ImageDataset, form: str, device: str | torch.device) -> list[int]:
    clips = len(dataset.item_shape) == 4
    if form == "mean_logvar" and clips:
        raise ValueError("clips are stored as samples; use --form sample")
    with torch.no_grad():
        mean, logvar = _moments(vae, dataset[0]["pixel_values"][None].to(device))
    if form == "mean_logvar" and logvar is None:
        raise ValueError(f"{type(vae).__name__} has no variance; use --form sample")
    *frames, channels, height, width = mean.shape[1:]
    return [*frames, channels * (2 if form == "mean_logvar" else 1), height, width]


def _moments(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and log-variance of images (B, C, H, W), or of clips (B, F, C, H, W) frame by frame."""
    if pixels.dim() == 4:
        return vae_moments(vae, pixels)
    mean, _ = vae_moments(vae, pixels.flatten(0, 1))
    return mean.unflatten(0, pixels.shape[:2]), None


@torch.no_grad()
def _encode(
    vae: torch.nn.Module, dataset: ImageDataset, start: int, stop: int, form: str, device: str | torch.device
) -> np.ndarray:
    """Rows ``start .. stop - 1``; rows from the length of the data set on are mirrored images."""
    count = len(dataset)
    pixels = torch.from_numpy(np.stack([dataset.pixels(row % count) for row in range(start, stop)]))
    mirrored = torch.arange(start, stop) >= count
    pixels = torch.where(mirrored.reshape(-1, *[1] * (pixels.dim() - 1)), pixels.flip(-1), pixels)
    mean, logvar = _moments(vae, to_model_range(pixels).to(device))
    stored = torch.cat([mean, logvar], 1) if form == "mean_logvar" else mean
    return stored.float().cpu().numpy()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.data.encode",
        description="Encode a data set once with a VAE; train on it with data.name=latents data.path=FOLDER.",
        epilog="example: python -m genssm.data.encode --vae sd-vae --out latents/flowers "
        "name=image_folder path=flowers resolution=256",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the data section: name, path, ...")
    parser.add_argument("--config", help="take the data section of this run file first")
    parser.add_argument("--vae", required=True, help="folder of an AutoencoderKL or AutoencoderTiny")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--form", choices=["mean_logvar", "sample"], default="mean_logvar", help="default: %(default)s")
    parser.add_argument("--flip", action="store_true", help="also encode the mirrored images")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="default: %(default)s")
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
    out = encode_dataset(
        config,
        args.vae,
        args.out,
        form=args.form,
        flip=args.flip,
        dtype=args.dtype,
        batch_size=args.batch_size,
        device=args.device if state.num_processes == 1 else state.device,
        quiet=args.quiet,
    )
    if state.is_main_process:
        print(f"latents of {config.name} in {out}; train with data.name=latents data.path={out} data.vae={args.vae}")


if __name__ == "__main__":
    cli(main)
