"""Every random number of a run is a function of (seed, purpose, position): nothing depends on history or on ranks.

Streams derived from the one seed of a run:

======== ==================================================== =======================
stream   decides                                              keyed by
======== ==================================================== =======================
init     initial weights                                      -
data     order of the items                                   epoch
augment  flips, crops, draws from stored moments              place in the stream
noise    noise, noise level, dropped labels, VAE draws        step, for the global batch
dropout  dropout and stochastic depth inside the model        step, part, rank
======== ==================================================== =======================

So a run resumed at a step needs no stored generator state, and two processes that share a global batch draw what one
process draws for it (dropout excepted: each process has its own).
"""

import hashlib
import random

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose, the same on every machine and version.

    Args:
        seed: the seed of the run.
        parts: what the stream is for, e.g. ``"noise", step``.
    """
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def hash_integers(values: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed 64-bit hash of each integer (the splitmix64 finaliser), uint64, same shape."""
    z = (values.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1, int64: the order of the hashes, hence the same under every version of numpy."""
    return np.argsort(hash_integers(np.arange(count), seed), kind="stable")


def generator_for(seed: int, *parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the beginning of the stream ``parts``."""
    return torch.Generator(device).manual_seed(derive(seed, *parts))


def seed_globals(seed: int, *parts: str | int) -> None:
    """Put torch's, Python's and numpy's global generators at the beginning of the stream ``parts``."""
    value = derive(seed, *parts)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - third-party code draws from the global one
