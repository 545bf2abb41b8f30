"""Images that are read during training: decoded by worker processes a few batches ahead, augmented on the device."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from espalier.data.augment import to_unit
from espalier.data.augmentation import Augmentation
from espalier.data.decode import central_square, random_area
from espalier.data.decoded import MappedPixels, check_memory, progress
from espalier.data.encoded import EncodedImages
from espalier.data.images import ImageBatches
from espalier.data.normalizer import build_normalizer, value_counts
from espalier.data.source import contents_digest, epoch_order, require_step
from espalier.errors import EspalierError, require_known
from espalier.files import cache_folder, read_sealed, write_sealed
from espalier.randomness import derive_generator
from espalier.sizes import whole_number

# Note [Position]
# Where a run stands in its data is (seed, epoch, step), which the run's checkpoint holds anyway: the order of an epoch
# and every image's crop derive from them. Nothing of the loader has to be saved, a resumed run opens the files of the
# steps that are left and no other, and the number of workers may differ. (torchdata's StatefulDataLoader saves the
# workers' own states instead, which no other number of workers can take up.)

_Batch = tuple[Tensor, tuple[int, ...]]
# Images that a worker decodes at a time: small, so that the workers share a batch and the first one comes soon.
_CHUNK = 32
# Images whose pixels stand for those of the training set in the normaliser; all, where there are no more.
_STATISTICS = 2048


@dataclass(frozen=True)
class StreamedPixels:
    """Images that are decoded whenever they are asked for: squared, or in training cut out at random, then resized."""

    images: EncodedImages
    size: int
    crop_scale: tuple[float, float] = (1.0, 1.0)

    @property
    def labels_N(self) -> Tensor:
        """Class indices ``(N,)``."""
        return self.images.labels_N

    def read(self, index: int, generator: torch.Generator | None) -> Tensor:
        """Return image ``index`` as uint8 ``(3, size, size)``.

        Raises:
            EspalierError: it cannot be decoded.
        """
        image = self.images.open(index)
        if generator is None or tuple(self.crop_scale) == (1.0, 1.0):
            return central_square(image, self.size)
        return random_area(image, self.size, self.crop_scale, generator=generator)

    def fingerprint(self, indices_M: Tensor) -> str:
        """Return a digest of the images at ``indices_M``: names, sizes, times and a sample of their contents."""
        return self.images.take(indices_M).fingerprint(self.size)


Pixels = StreamedPixels | MappedPixels
"""Images of one size that are fetched one by one."""


class StreamSource(ImageBatches):
    """A ``Source`` of image batches that are never all in memory: a pure function of (seed, epoch, step).

    Worker processes keep a few batches ready beyond the step that was asked for last; what is asked for in order comes
    from there, anything else starts them anew (Note [Position]). Batches do not depend on the number of workers. Of
    several training processes each decodes its own part of a batch: the images of a step are the same for any number of
    processes, the draws of their augmentation are not.

    Args:
        train: the training images.
        test: the test images.
        class_names: the classes that their labels index.
        augmentation: what is done to training batches on the device.
        normalize: ``mean_std``, ``mean`` or ``none``: per channel, measured on 2,048 training images (all, if fewer).
        workers: processes that read and decode; None: one per thread of this run; 0: none but this one.

    Raises:
        EspalierError: an image of the sample cannot be decoded, or a padding that the images are too small for.
    """

    def __init__(
        self,
        train: Pixels,
        test: Pixels,
        class_names: tuple[str, ...],
        augmentation: Augmentation | None = None,
        normalize: str = "mean_std",
        *,
        workers: int | None = None,
    ) -> None:
        splits = {"train": train, "test": test}
        super().__init__(splits, class_names, augmentation, (3, train.size, train.size))
        self._workers = _default_workers() if workers is None else workers
        self._device = torch.device("cpu")
        self._rank, self._world = 0, 1
        self._next: tuple[int, ...] | None = None
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._counts_CV = torch.zeros(3, 256, dtype=torch.int64) if normalize == "none" else self._value_counts()
        self.normalizer = build_normalizer(self._counts_CV, normalize)

    @property
    def digest(self) -> str:
        """Digest of the classes, of all images as their kind has it, of their labels, and of what normalises them."""
        splits = self._splits.values()
        whole = [split.fingerprint(torch.arange(len(split.labels_N))) for split in splits]
        # Counts and not the numbers made of them, whose last bits depend on the machine.
        return contents_digest(*self.class_names, *whole, *(split.labels_N for split in splits), self._counts_CV)

    @property
    def contents(self) -> str | None:
        """The digest of decoded images, which is that of their pixels; that of others holds their place and times."""
        return self.digest if all(isinstance(split, MappedPixels) for split in self._splits.values()) else None

    def to(self, device: torch.device | str) -> Self:
        """Choose the device that batches are moved to and augmented on, and return the source."""
        self._device = torch.device(device)
        self.normalizer = self.normalizer.to(device)
        return self

    def share(self, rank: int, world: int) -> Self:
        """Make batches the part of process ``rank`` of ``world``, every ``world``-th image, and return the source."""
        self._rank, self._world, self._next = rank, world, None
        return self

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step`` of ``epoch``: augmented, normalised images and their targets.

        Raises:
            IndexError: the epoch has no such step.
            EspalierError: an image that cannot be decoded, or a worker process that was killed.
        """
        steps = self.steps_per_epoch(batch_size)
        require_step(step, steps, batch_size)
        if self._next != (seed, epoch, step, batch_size):
            size = len(self._splits["train"].labels_N)
            self._batches = self._read("train", _positions(size, seed, epoch, step, batch_size))
        self._next = None  # should the read fail
        pixels_BCHW, labels_B = next(self._batches)
        self._next = (seed, epoch, step + 1, batch_size) if step + 1 < steps else (seed, epoch + 1, 0, batch_size)
        part = (self._rank, self._world) if self._world > 1 else ()
        return self._finish(pixels_BCHW, labels_B, seed, epoch, step, *part)

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the normalised images and labels of ``split`` in their stored order.

        Raises:
            EspalierError: unknown split, an image that cannot be decoded, or a worker process that was killed.
        """
        require_known("split", split, self._splits)
        whole = torch.arange(len(self._splits[split].labels_N)).split(batch_size)
        for pixels_BCHW, labels_B in self._read(split, ((indices_B, ()) for indices_B in whole)):
            yield self.normalizer(to_unit(pixels_BCHW)), labels_B

    def images(self, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first ``limit`` images of ``train`` or ``test`` (None: all) in [0, 1], and their labels.

        Raises:
            EspalierError: unknown split, a limit below 1, more than memory holds, or an image that cannot be decoded.
        """
        require_known("split", split, self._splits)
        pixels = self._splits[split]
        count = len(pixels.labels_N) if limit is None else whole_number("limit", limit)
        chosen_M = torch.arange(len(pixels.labels_N))[:count]
        check_memory(3 * 4 * len(chosen_M) * pixels.size**2, "take fewer, by a smaller limit")
        read = self._read(split, ((part_M, ()) for part_M in chosen_M.split(_CHUNK)))
        return torch.cat([to_unit(batch) for batch, _ in read]), pixels.labels_N[:count].to(self._device)

    def _read(self, split: str, batches: Iterable[_Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        # The generators know nothing of this object: without a circle, workers end as soon as nobody wants their work.
        rank, world = self._rank, self._world
        mine = ((indices_B[rank::world], key) for indices_B, key in batches)
        return _read(self._splits[split], mine, self._workers, self._device)

    def _value_counts(self) -> Tensor:
        train = self._splits["train"]
        drawn_N = torch.randperm(len(train.labels_N), generator=derive_generator(0, "statistics"))
        sample_M = drawn_N[:_STATISTICS].sort().values
        cache = cache_folder() / f"values-{train.fingerprint(sample_M)}.json"
        with contextlib.suppress(ValueError, TypeError, RuntimeError, KeyError):  # not measured yet, or damaged
            counts_CV = torch.tensor(read_sealed(cache, "colour statistics")["counts"], dtype=torch.int64)
            # Its seal may be the part that is damaged: every pixel of the sample has been counted once a channel.
            if counts_CV.shape == (3, 256) and (counts_CV.sum(1) == len(sample_M) * train.size**2).all():
                return counts_CV
        parts: list[_Batch] = [(part_M, ()) for part_M in sample_M.split(_CHUNK)]
        steps = progress(_read(train, parts, self._workers, self._device), len(parts), "measuring the images' colours")
        counts_CV = sum((value_counts(pixels) for pixels, _ in steps), torch.zeros(3, 256, dtype=torch.int64))
        with contextlib.suppress(OSError):  # nothing is lost but the time
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(cache, {"counts": counts_CV.tolist()})
        return counts_CV


def _positions(size: int, seed: int, epoch: int, step: int, batch_size: int) -> Iterator[_Batch]:
    """Yield the images of every batch from ``step`` of ``epoch`` on, without end, and what their crops derive from."""
    for later in count(epoch):
        order_N = epoch_order(size, seed, later)
        for start in range(step * batch_size, size - batch_size + 1, batch_size):
            yield order_N[start : start + batch_size], (seed, later)
        step = 0


def _read(
    pixels: Pixels, batches: Iterable[_Batch], workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels and labels of every batch on the device, while the workers decode those that follow."""
    pending: deque[Tensor] = deque()

    def chunks() -> Iterator[list[tuple[int, ...]]]:
        for indices_B, key in batches:
            pending.append(indices_B)
            for part in indices_B.split(_CHUNK) if len(indices_B) else ():
                yield [(index, *key) for index in part.tolist()]

    loader = DataLoader(
        _Reader(pixels),
        batch_sampler=chunks(),
        collate_fn=default_convert,  # which leaves tensors and texts as they are
        num_workers=workers,
        worker_init_fn=_heed_parent_alone,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the stream that dropout reads
    )
    parts: list[Tensor] = []
    for part in _one_line_errors(loader):
        parts.append(part.to(device, non_blocking=True))
        if sum(map(len, parts)) == len(pending[0]):
            yield torch.cat(parts), pixels.labels_N[pending.popleft()].to(device, non_blocking=True)
            parts = []
    # The last test images may be fewer than the processes; those without one are given a batch all the same, because
    # processes that share a model run it together.
    for indices_B in pending:
        yield torch.empty(0, 3, pixels.size, pixels.size, dtype=torch.uint8, device=device), indices_B.to(device)


class _Reader(Dataset[Tensor]):
    """What a worker process holds: the images, and how to read those of a chunk."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def __getitems__(self, keys: list[tuple[int, ...]]) -> Tensor | str:
        # An error is handed over in words: what crosses the border as an exception arrives with a worker's traceback.
        try:
            return torch.stack([self._read(*key) for key in keys])
        except EspalierError as error:
            return str(error)

    def _read(self, index: int, *key: int) -> Tensor:
        generator = derive_generator(key[0], "crop", *key[1:], index) if key else None
        return self._pixels.read(index, generator)


def _one_line_errors(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    try:
        for part in _without_alarm(loader):
            if isinstance(part, str):
                raise EspalierError(part)
            yield part
    except (RuntimeError, EOFError, OSError) as error:  # the last two where a worker dies while it hands a chunk over
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise EspalierError(
            "a process that decodes images was killed, as a rule for want of memory (or of room in /dev/shm): use "
            f"fewer, --data-args.workers 2 ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error


def _without_alarm(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    # torch has SIGCHLD raise in whatever line runs when a worker ends. The wait for the next batch finds that out too.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    parts = iter(loader)
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    return parts


def _heed_parent_alone(worker: int) -> None:
    # Ctrl-C and Slurm's signals reach every process of a run. What follows from them is for the training process to
    # decide, and its workers have to be there until its checkpoint is written. Only its own SIGTERM ends them, which
    # multiprocessing sends when it exits, and waits: to ignore it would be to hang.
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _default_workers() -> int:
    # torchrun sets one thread a process, whatever the machine has.
    if "LOCAL_WORLD_SIZE" in os.environ:
        return max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))
    return torch.get_num_threads()
