"""Generators derived from a seed and a path of keys, so that no result depends on the order of draws."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from espalier.errors import EspalierError


def derive_generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator that depends on ``seed`` and ``keys`` alone.

    ``derive_generator(0, "augment", epoch, step)`` gives the same stream in an unbroken run, in a resumed one and on
    every rank, which is why a checkpoint need not hold any random state.

    Args:
        seed: the run's seed.
        keys: what the draws are for, from general to particular.
        device: where the generator lives.
    """
    text = "/".join(str(key) for key in (seed, *keys))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # manual_seed takes 64 bits; keep 63 so that every backend reads the same non-negative number.
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def cpu_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Return a generator for draws on the CPU: the given one, or for one of another device one that it seeds.

    Noise that is drawn on the CPU and copied is the same on every device. ``None`` stays: torch's global CPU generator.

    Raises:
        EspalierError: it is something else, such as a seed.
    """
    if not isinstance(generator, torch.Generator | None):
        raise EspalierError(f"generator is {generator!r}: give a torch.Generator().manual_seed(…)")
    if generator is None or generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (), generator=generator, dtype=torch.int64, device=generator.device)
    return torch.Generator(device="cpu").manual_seed(int(seed))


@contextmanager
def generators_kept(devices: Sequence[int | torch.device] = ()) -> Iterator[None]:
    """Put back torch's, Python's and numpy's global generators after a ``with`` block, which may run anyone's code.

    Args:
        devices: CUDA devices whose generators are put back, too.
    """
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what others draw from)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)  # noqa: NPY002


@contextmanager
def seeded_globally(generator: torch.Generator) -> Iterator[None]:
    """Start torch's CPU, Python's and numpy's global generators from another's seed in a ``with`` block, and put them
    back after it.

    Constructors and code of a user's own draw from the global ones alone.
    """
    with generators_kept():
        torch.default_generator.manual_seed(generator.initial_seed())
        _seed_the_others(generator)
        yield


def seed_globally(generator: torch.Generator) -> None:
    """Start torch's (on every device), Python's and numpy's global generators from another's seed.

    For use within ``generators_kept``, which puts them back.
    """
    torch.manual_seed(generator.initial_seed())
    _seed_the_others(generator)


def _seed_the_others(generator: torch.Generator) -> None:
    random.seed(generator.initial_seed())
    np.random.seed(generator.initial_seed() % 2**32)  # noqa: NPY002 (what others draw from)
