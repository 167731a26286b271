"""Randomness belongs to the image, not to the process: every generator is derived from what it is for.

A draw depends on (seed, task, image key, purpose) alone, so that order, resume, worker count and chunking of the
work leave it unchanged.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, *parts: str | int) -> int:
    """Hash (seed, parts) to an int in [0, 2**63): SHA-256, the same on every machine and Python version."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *parts: str | int) -> np.random.Generator:
    """numpy generator (PCG64) of derive(seed, *parts)."""
    return np.random.default_rng(derive(seed, *parts))


def torch_generator(seed: int, *parts: str | int) -> torch.Generator:
    """torch CPU generator of derive(seed, *parts); draw on the CPU, then move, so devices do not change a draw."""
    return torch.Generator().manual_seed(derive(seed, *parts))
