"""How well a tokenizer shows images again: ``python -m genssm.metrics.reconstruction --tokenizer RUN --data RUN``.

Numbers compare each image with its reconstruction; how the set as a whole fares (the reconstruction FID) is measured by
``python -m genssm.metrics.fid`` on the files that ``--out`` writes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from genssm import errors
from genssm.data.codes import load_tokenizer
from genssm.devices import device_option
from genssm.metrics.sources import ImageSource, add_data_options, dataset_source


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]: -10 log10 of the mean square error, (B,)."""
    return -10 * (images - others).square().flatten(1).mean(dim=1).clamp(min=1e-12).log10()


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, C, H, W) in [0, 1], (B,).

    Gaussian window of 11 pixels and deviation 1.5 (less where the image is smaller), constants 0.01^2 and 0.03^2, mean
    over the places where the window fits and over channels.
    """
    size = min(11, *images.shape[2:])
    size -= 1 - size % 2
    axis = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    window = torch.exp(-axis.square() / (2 * 1.5**2))
    window = (window / window.sum())[:, None] * (window / window.sum())

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window[None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    mean, other = blur(images), blur(others)
    spread = blur(images.square()) - mean.square()
    other_spread = blur(others.square()) - other.square()
    together = blur(images * others) - mean * other
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean * other + c1) * (2 * together + c2)
    similarity = similarity / ((mean.square() + other.square() + c1) * (spread + other_spread + c2))
    return similarity.flatten(1).mean(dim=1)


@torch.no_grad()
def measure(
    tokenizer: torch.nn.Module, source: ImageSource, count: int, batch_size: int = 64, out: Path | None = None
) -> dict[str, Any]:
    """Reconstruct images and compare.

    Args:
        tokenizer: a :class:`genssm.models.VQTokenizer` on its device.
        source: the images.
        count: how many, from the first on.
        batch_size: images at a time.
        out: folder to write the reconstructions to, ``000000.png`` and so on.

    Returns:
        ``images``, the means ``psnr`` (dB), ``ssim``, ``l1`` and ``mse`` (of values in 0..1), ``codes_used`` and
        ``perplexity`` of the codes of these images, ``codes``: the size of the vocabulary.
    """
    device, vocabulary = tokenizer.device, tokenizer.config.num_vq_embeddings
    sums = dict.fromkeys(("psnr", "ssim", "l1", "mse"), 0.0)
    used = torch.zeros(vocabulary, dtype=torch.int64)
    if out is not None:
        out.mkdir(parents=True, exist_ok=False)
    for batch in source.batches(range(count), batch_size):
        images = batch.images.to(device).float() / 255
        if tokenizer.config.in_channels == 1:
            images = images[:, :1]
        output = tokenizer(images * 2 - 1)
        again = (output.sample.float() / 2 + 0.5).clamp(0, 1).mul(255).round() / 255  # what a file holds
        error = again - images
        sums["psnr"] += float(psnr(images, again).sum())
        sums["ssim"] += float(ssim(images, again).sum())
        sums["l1"] += float(error.abs().flatten(1).mean(dim=1).sum())
        sums["mse"] += float(error.square().flatten(1).mean(dim=1).sum())
        used += torch.bincount(output.quantized.codes.flatten().cpu(), minlength=vocabulary)
        if out is not None:
            for index, image in zip(batch.indices, again):
                pixels = image.mul(255).byte().permute(1, 2, 0).cpu().numpy().squeeze()
                Image.fromarray(pixels).save(out / f"{index:06d}.png")
    share = used / used.sum()
    entropy = -(share * share.clamp(min=1e-30).log()).sum()
    means = {name: total / count for name, total in sums.items()}
    counted = {"codes_used": int((used > 0).sum()), "perplexity": float(entropy.exp()), "codes": vocabulary}
    return {"images": count, **means, **counted}


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.metrics.reconstruction",
        description="Compare images with what a tokenizer makes of them: PSNR, SSIM, L1, mean square, codes in use.",
        epilog="the reconstruction FID: write the files with --out, then python -m genssm.metrics.fid --samples OUT "
        "--reference dataset:DATA:SPLIT",
    )
    parser.add_argument("--tokenizer", required=True, help="folder of a VQTokenizer, or a run or pipeline with one")
    parser.add_argument("--data", required=True, help="name of a data set, or a run or configuration: its data")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--num-images", type=int, help="default: all")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder to make: the reconstructions as PNG files")
    parser.add_argument("--report", type=Path, help="write the numbers to this JSON file")
    parser.add_argument(
        "--device",
        type=device_option,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    add_data_options(parser)
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.tokenizer).to(options.device)
    source = dataset_source(options.data, options.split, options)
    count = len(source) if options.num_images is None else options.num_images
    if not 1 <= count <= len(source):
        raise ValueError(f"--num-images is {count}; {source.name} has {len(source)} images")
    if options.out is not None and options.out.exists():
        raise FileExistsError(f"{options.out} exists; choose another --out or remove it")
    numbers = measure(tokenizer, source, count, options.batch_size, options.out)
    about = {"tokenizer": options.tokenizer, "data": source.name}
    if options.report is not None:
        options.report.write_text(json.dumps(about | numbers, indent=2) + "\n", encoding="utf-8")
    print(
        f"{numbers['images']} images of {source.name}: PSNR {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.4f}, "
        f"L1 {numbers['l1']:.4f}, mean square {numbers['mse']:.5f}; {numbers['codes_used']} of {numbers['codes']} "
        f"codes used, perplexity {numbers['perplexity']:.1f}"
    )


if __name__ == "__main__":
    errors.cli(main)
