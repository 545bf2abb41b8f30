"""Any torch ``Dataset`` or ``DataLoader`` as a source of batches: what ``--dataset FILE.py:FUNCTION`` names."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields
from itertools import chain, islice
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from espalier.annotations import refuse_misfits
from espalier.data.augmentation import Augmentation
from espalier.data.classes import count_classes, refuse_two_numbers
from espalier.data.source import Source, epoch_order, image_args
from espalier.errors import EspalierError, require_known
from espalier.lookup import errors_of, load, without_pin
from espalier.randomness import derive_generator, seeded_globally

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe

TRAIN = "train"

# Note [Random numbers of the user's code]
# A resumed run starts an epoch in a process that has not read the epochs before it. It sees the batches of an unbroken
# run if everything that the user's code draws from stands where it would have stood, and nobody saves that. So every
# epoch starts all of it anew: the global streams, and every generator that hangs on the loader, its samplers or its
# dataset. What cannot be found there (a generator in a local variable, a counter of epochs, entropy of the system)
# makes the data begin the same epoch in two ways, and this is looked at once in every process before the first step.
_MOST_ITEMS = 1000
"""Longer lists hold data: nobody keeps a thousand generators."""
_MOST_OBJECTS = 100_000
_EMPTY: Any = CellType()
"""A variable of a function around another that has no value yet."""


class LoaderSource:
    """A ``Source`` over torch's datasets and loaders, each by the name of its split.

    A ``Dataset`` with indices is shuffled here, batch by batch a pure function of (seed, epoch, step), and the ragged
    rest of an epoch is dropped. A ``DataLoader``, or any other iterable of batches with a length, keeps its own batch
    size, sampler and workers; every epoch it starts under streams of random numbers that depend on (seed, epoch) alone
    (torch's, NumPy's and Python's, and every generator among the attributes of the loader, its samplers and its
    dataset), and a step in mid-epoch is reached by reading the batches before it. The first batch is read twice, and
    data that begin an epoch in two ways are refused: a resumed run would not see the batches of an unbroken one.

    Args:
        splits: ``train`` and at least one other; the first other carries the headline score. Batches and items are
            pairs of inputs and targets.
        name: of the data, for messages.

    Raises:
        EspalierError: no training split, nothing to evaluate on, splits of another kind (such as an iterator, which can
            be read only once), or one class under two numbers, in any of the data sets that the splits are made of.
    """

    def __init__(self, splits: Mapping[str, Any], name: str = "dataset") -> None:
        self._name = name
        self._device = torch.device("cpu")
        if TRAIN not in splits or len(splits) < 2:
            raise EspalierError(f"{name} has the splits {sorted(splits)}: give 'train' and at least one other")
        self._splits = dict(splits)
        for split, data in splits.items():
            # A stream without indices is batched by a loader, as torch itself would.
            if not isinstance(data, Dataset | DataLoader) and not hasattr(data, "__iter__"):
                raise EspalierError(f"{name}: {split} is {type(data).__name__}: give a torch Dataset or a DataLoader")
            if isinstance(data, Iterator) and iter(data) is data:
                raise EspalierError(
                    f"{name}: {split} is {type(data).__name__}, an iterator, which is read once: give a torch Dataset, "
                    "a DataLoader, or an object whose __iter__ returns a new iterator"
                )
            if not getattr(data, "in_order", True):
                raise EspalierError(f"{name}: {split} gives batches as they arrive: set in_order=True in its loader")
            if getattr(data, "persistent_workers", False):
                # Workers that live on hold copies that cannot be started anew: every epoch gets workers of its own.
                self._splits[split] = copy.copy(data)
                vars(self._splits[split])["persistent_workers"] = False
        refuse_two_numbers(name, {TRAIN: splits[TRAIN], **splits})
        self._repeats = False
        """Whether the training data were seen to begin an epoch the same way twice."""
        self._place: tuple[int, int, int, int] | None = None
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.model_args: Mapping[str, Any] = self._measure()

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Every split but ``train``, in the order given."""
        return tuple(name for name in self._splits if name != TRAIN)

    def to(self, device: torch.device | str) -> Self:
        """Have batches copied to ``device`` and return the source."""
        self._device = torch.device(device)
        self._place = None
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of whole batches of the training set, or the length of its loader.

        Raises:
            EspalierError: the loader has no length, or batches of another size.
        """
        if _has_indices(data := self._splits[TRAIN]):
            return len(data) // batch_size
        train = self._loader(TRAIN, batch_size)
        if (own := getattr(train, "batch_size", None)) not in (None, batch_size):
            raise EspalierError(f"{self._name}: the training loader has batches of {own}: set --batch-size {own}")
        try:
            return len(train)
        except TypeError:
            raise EspalierError(f"{self._name}: the training loader has no length: define __len__, its steps") from None

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step`` of ``epoch`` of the run with ``seed``.

        Raises:
            EspalierError: the data end before that step, are no pairs of tensors, or begin the epoch in two ways.
        """
        if self._place != (seed, epoch, step, batch_size):
            self._batches = self._start(seed, epoch, batch_size)
            for _ in range(step):
                next(self._batches, None)
        self._place = (seed, epoch, step + 1, batch_size)
        batch = next(self._batches, None)
        if batch is None:
            raise EspalierError(f"{self._name}: epoch {epoch} ended before step {step}: its length is not what it says")
        return batch

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every example of ``split`` once, in the order of its dataset or loader.

        Raises:
            EspalierError: unknown split, or items that are no pairs of tensors.
        """
        require_known("split", split, self._splits)
        generator = derive_generator(0, "evaluation", split)
        return _read(self._name, self._device, self._loader(split, batch_size), generator)

    def _start(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch, once in a process after a look whether they can be had again."""
        if self._repeats:
            return self._epoch(seed, epoch, batch_size)
        before = list(islice(self._epoch(seed, epoch, batch_size), 1))
        batches = self._epoch(seed, epoch, batch_size)
        first = list(islice(batches, 1))
        if len(before) != len(first) or not all(map(_same, chain(*before), chain(*first))):
            raise EspalierError(
                f"{self._name}: the training data begin epoch {epoch} otherwise when they are read again, and a "
                "resumed run would see other batches: draw from torch's, NumPy's or Python's global stream, or from a "
                "generator that is an attribute of the loader, sampler or dataset, and count no epochs there"
            )
        self._repeats = True
        return chain(first, batches)

    def _epoch(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        if _has_indices(data := self._splits[TRAIN]):
            steps = len(data) // batch_size
            order = epoch_order(len(data), seed, epoch)[: steps * batch_size].view(steps, batch_size).tolist()
        loader = self._loader(TRAIN, batch_size, order)
        return _read(self._name, self._device, loader, derive_generator(seed, "data", epoch))

    def _loader(self, split: str, batch_size: int, order: list[list[int]] | None = None) -> Any:
        data = self._splits[split]
        if order is not None:
            return DataLoader(data, batch_sampler=order)
        return DataLoader(data, batch_size) if isinstance(data, Dataset) else data

    def _measure(self) -> dict[str, Any]:
        """Return the size and channels of images, and the number of classes where the training set knows them."""
        train = self._splits[TRAIN]
        found: dict[str, Any] = {}
        if (classes := count_classes(train)) is not None:
            found["num_classes"] = classes
        first = next(self.eval_batches(self.eval_splits[0], 1), None)
        if first is None:
            raise EspalierError(f"{self._name}: {self.eval_splits[0]} is empty: give it examples")
        if first[0].dim() == 4 and first[0].is_floating_point():
            found |= image_args(first[0].shape[1:])
        return found


class _Streams:
    """The global streams of random numbers, exchanged for others of its own for the length of a ``with`` block."""

    # ruff: noqa: NPY002 — NumPy's global stream is what the user's transforms draw from.

    def __init__(self, generator: torch.Generator) -> None:
        seed = generator.initial_seed()
        numpy_state = np.random.RandomState(seed % 2**32).get_state()
        self._others: tuple[Any, ...] = (generator.get_state(), random.Random(seed).getstate(), numpy_state)

    def __enter__(self) -> None:
        present = (torch.get_rng_state(), random.getstate(), np.random.get_state())
        torch.set_rng_state(self._others[0])
        random.setstate(self._others[1])
        np.random.set_state(self._others[2])
        self._others = present

    def __exit__(self, *_: object) -> None:
        self.__enter__()  # the same exchange, back


# No method: an iterator that held the source that holds it would keep its workers until Python collects its garbage.
def _read(
    name: str, device: torch.device, loader: Iterable[Any], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    # What the user's code draws comes from streams of its own, whatever the training draws in between.
    streams = _Streams(generator)
    with errors_of("dataset", name), streams:
        _reseed(loader, generator.initial_seed())
        batches = iter(loader)
    while True:
        with errors_of("dataset", name), streams:
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield _pair(name, device, batch)


def _pair(name: str, device: torch.device, batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        shown = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise EspalierError(f"{name}: a batch is {shown}: let every item be a pair (input tensor, target)")
    inputs, targets = batch[0].to(device), batch[1].to(device)
    if inputs.dtype == torch.float64:  # what NumPy makes of decimals
        inputs = inputs.float()
    return inputs, targets.float() if targets.is_floating_point() else targets.long()


def _reseed(loader: Any, seed: int) -> None:
    """Start every generator anew that hangs on a loader (Note [Random numbers of the user's code])."""
    waiting: list[tuple[str, Any]] = [("", loader)]
    seen = {id(torch.default_generator), id(random.getrandbits.__self__), id(np.random.get_state.__self__)}  # type: ignore[attr-defined]
    for place, item in waiting:  # the nearest first: the list grows
        if id(item) in seen or len(seen) > _MOST_OBJECTS:
            continue
        seen.add(id(item))
        # Two generators with one seed would draw the same numbers; the loader's own has the epoch's.
        digest = hashlib.blake2b(f"{seed}{place}".encode(), digest_size=8).digest()
        own = seed if place == ".generator" else int.from_bytes(digest, "little") >> 1
        match item:
            case torch.Generator():
                item.manual_seed(own)
            case random.Random():
                item.seed(own)
            case np.random.Generator() | np.random.RandomState() | np.random.BitGenerator():
                bits: Any = item if isinstance(item, np.random.BitGenerator) else getattr(item, "_bit_generator")  # noqa: B009 — a RandomState has no public one
                bits.state = type(bits)(own).state
            case _:
                waiting += [(f"{place}.{name}", part) for name, part in _parts(item)]


def _parts(item: Any) -> list[tuple[str, Any]]:
    """Return what an object is made of, as far as generators may hide there, by name."""
    match item:
        case str() | bytes() | int() | float() | complex() | type() | ModuleType() | Tensor() | np.ndarray():
            return []
        case list() | tuple() | dict():
            parts = item.values() if isinstance(item, dict) else item
            return [(str(index), part) for index, part in enumerate(parts)] if len(item) <= _MOST_ITEMS else []
        case functools.partial():
            return [("func", item.func), ("args", item.args), ("keywords", item.keywords)]
        case MethodType() | BuiltinMethodType():
            return [("self", item.__self__), ("func", getattr(item, "__func__", None))]
        case FunctionType():
            cells = dict(zip(item.__code__.co_freevars, item.__closure__ or (), strict=True))
            held = [(name, cell.cell_contents) for name, cell in cells.items() if cell != _EMPTY]
            return [*held, ("defaults", item.__defaults__), ("keywords", item.__kwdefaults__)]
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    named = [(name, getattr(item, name)) for name in slots if hasattr(item, name)]
    return [*getattr(item, "__dict__", {}).items(), *named]


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, NaN included."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def own_source(recipe: Recipe) -> Source:
    """Return the data that a function of the user's own makes.

    It is called with ``data_args``, and with ``data_path`` if it takes one, and returns a pair (train, test), a mapping
    of splits by name (see ``LoaderSource``), or a ``Source``.

    Raises:
        EspalierError: no such function, arguments that it does not take, augmentation (which is the function's own
            matter), or a result of another kind.
    """
    name = without_pin(recipe.dataset)
    asked = Augmentation.from_recipe(recipe)
    changed = [field for field in fields(Augmentation) if getattr(asked, field.name) != field.default]
    if changed:
        names, remedy = ", ".join(field.name for field in changed), " ".join(map(_reset, changed))
        raise EspalierError(
            f"dataset {name}: {names} would not act on data of your own: augment in its function, reset here ({remedy})"
        )
    factory = load("dataset", recipe.dataset)
    arguments = dict(recipe.data_args) | ({} if recipe.data_path is None else {"data_path": recipe.data_path})
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise EspalierError(f"dataset {name} does not take {arguments or 'no arguments'}: {error}") from error
    refuse_misfits(f"dataset {name!r}", factory, arguments)
    # What it draws, such as which examples are held out, is the same in every run, whatever its seed.
    with errors_of("dataset", name), seeded_globally(derive_generator(0, "source")):
        made = factory(**arguments)
    if isinstance(made, Source):
        return made
    if isinstance(made, tuple) and len(made) == 2:
        made = {TRAIN: made[0], "test": made[1]}
    if not isinstance(made, Mapping):
        raise EspalierError(f"dataset {name} returned {type(made).__name__}: return (train, test), or splits by name")
    return LoaderSource(made, name)


def _reset(field: Field[Any]) -> str:
    flag, plain = field.name.replace("_", "-"), field.default
    if plain is False:
        return f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, plain)) if isinstance(plain, tuple) else plain}"


def _has_indices(data: Any) -> bool:
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)
