"""Datasets and loaders of the user's own as a source: batches of (seed, epoch, step) alone, whatever else draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from espalier.data import LoaderSource, Source, build_source
from espalier.errors import EspalierError
from espalier.recipes import Recipe


class Noisy(Dataset[tuple[Tensor, int]]):
    """Items whose augmentation draws from every global stream there is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()]), index % 3  # noqa: NPY002


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Items in order, with noise."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.tensor([float(i), torch.rand(())]), i % 2) for i in range(10)])


def train_sets(batch_size: int) -> dict[str, object]:
    sampler = WeightedRandomSampler([1.0] * 20, 20)
    return {
        "dataset": Noisy(23),
        "shuffled loader": DataLoader(Noisy(23), batch_size, shuffle=True),
        "loader with its own generator": DataLoader(Noisy(9), batch_size, shuffle=True, generator=torch.Generator()),
        "sampler": DataLoader(Noisy(20), batch_size, sampler=sampler, drop_last=True),
        "stream": Stream(),
        "stream in a loader": DataLoader(Stream(), batch_size),
    }


@pytest.mark.parametrize("kind", train_sets(1))
@settings(deadline=None, max_examples=15)
@given(data=st.data(), seed=st.integers(0, 3), batch_size=st.integers(1, 9))
def test_batches_depend_on_seed_epoch_and_step_alone(
    kind: str, data: st.DataObject, seed: int, batch_size: int
) -> None:
    source = LoaderSource({"train": train_sets(batch_size)[kind], "test": Noisy(2)})
    steps = source.steps_per_epoch(batch_size)
    unbroken = {(e, s): source.train_batch(seed, e, s, batch_size) for e in range(2) for s in range(steps)}
    other = LoaderSource({"train": train_sets(batch_size)[kind], "test": Noisy(2)})
    for _ in range(4):
        epoch, step = data.draw(st.integers(0, 1)), data.draw(st.integers(0, steps - 1))
        torch.rand(data.draw(st.integers(1, 3)))
        random.random()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        inputs, targets = other.train_batch(seed, epoch, step, batch_size)
        assert inputs.equal(unbroken[epoch, step][0])
        assert targets.equal(unbroken[epoch, step][1])
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
        assert before[0].equal(after[0])
        assert before[1] == after[1]
        assert (before[2] == after[2]).all()
    noise = [float(value) for inputs, _ in unbroken.values() for value in inputs[:, 1]]
    assert len(set(noise)) == len(noise)  # no two steps or epochs share their noise


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 5))
def test_an_epoch_of_a_dataset_is_a_permutation_without_its_ragged_rest(count: int, batch_size: int, seed: int) -> None:
    source = LoaderSource({"train": Noisy(count), "test": Noisy(1)})
    steps = source.steps_per_epoch(batch_size)
    assert steps == count // batch_size
    seen = [float(x) for s in range(steps) for x in source.train_batch(seed, 0, s, batch_size)[0][:, 0]]
    assert len(set(seen)) == len(seen) == steps * batch_size
    assert set(seen) <= set(map(float, range(count)))


def test_every_example_is_evaluated_once_in_order_and_types_are_mended() -> None:
    images = torch.rand(7, 3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1], dtype=torch.int32)
    data = TensorDataset(images, labels)
    source = LoaderSource({"train": Subset(data, [0, 1, 2]), "val": data, "other": data})
    assert isinstance(source, Source)
    assert source.eval_splits == ("val", "other")
    assert source.model_args == {"num_classes": 5, "in_chans": 3, "img_size": 4}
    batches = list(source.eval_batches("val", 3))
    assert torch.cat([x for x, _ in batches]).equal(images.float())
    assert torch.cat([y for _, y in batches]).equal(labels.long())


def test_workers_of_a_loader_are_seeded_too() -> None:
    def first() -> Tensor:
        train = DataLoader(Noisy(6), 3, num_workers=1, multiprocessing_context="fork")
        return LoaderSource({"train": train, "test": Noisy(1)}).train_batch(1, 0, 0, 3)[0]

    one, two = first(), first()
    assert one[:, :2].equal(two[:, :2])  # torch seeds its own stream in a worker, and Python's


class Unsized:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))])


class Lying(Unsized):
    def __len__(self) -> int:
        return 3


def test_bad_data_are_one_line() -> None:
    good = Noisy(4)
    for splits, message in (
        ({"train": good}, "give 'train' and at least one other"),
        ({"test": good, "val": good}, "give 'train'"),
        ({"train": good, "test": 3}, "test is int"),
        ({"train": good, "test": Noisy(0)}, "test is empty"),
        ({"train": good, "test": TensorDataset(torch.zeros(2, 3))}, "a batch is 1 parts"),
        ({"train": good, "test": [{"image": torch.zeros(2)}]}, "a batch is dict"),
    ):
        with pytest.raises(EspalierError, match=message) as caught:
            LoaderSource(splits)
        assert "\n" not in str(caught.value)
    with pytest.raises(EspalierError, match="has no length"):
        LoaderSource({"train": Unsized(), "test": good}).steps_per_epoch(2)
    with pytest.raises(EspalierError, match="has batches of 4: set --batch-size 4"):
        LoaderSource({"train": DataLoader(good, 4), "test": good}).steps_per_epoch(2)
    source = LoaderSource({"train": Lying(), "test": good})
    with pytest.raises(EspalierError, match="epoch 0 ended before step 1"):
        [source.train_batch(0, 0, step, 2) for step in range(3)]
    with pytest.raises(EspalierError, match="unknown split 'tset'"):
        list(source.eval_batches("tset", 1))


FACTORY = """
import torch
from torch.utils.data import TensorDataset
def pair(count=4, data_path=None):
    if count < 0:
        raise ValueError("no such\\ncount")
    data = TensorDataset(torch.zeros(count, 2), torch.zeros(count, dtype=torch.long))
    return data, data
def plain():
    return pair()
def nothing():
    return 3
"""


def test_factories_get_their_arguments_and_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    recipe = Recipe(name="r", dataset=f"{tmp_path / 'mine.py'}:pair", data_args={"count": 6})
    assert build_source(recipe).steps_per_epoch(2) == 3
    assert build_source(replace(recipe, data_path="here")).steps_per_epoch(2) == 3
    for change, message in (
        ({"data_args": {"cuont": 1}}, "does not take {'cuont': 1}: got an unexpected keyword argument 'cuont'"),
        ({"data_args": {"count": -1}}, r"fails with ValueError: no such count \(.*mine.py, line 6\)"),
        ({"flip": True, "crop_scale": (0.5, 1.0)}, r"crop_scale, flip would not act .*--crop-scale 1.0 1.0 --no-flip"),
        ({"dataset": recipe.dataset.replace("pair", "nothing"), "data_args": {}}, "returned int"),
        ({"dataset": recipe.dataset.replace("pair", "plain"), "data_args": {}, "data_path": "x"}, "does not take"),
    ):
        with pytest.raises(EspalierError, match=message) as caught:
            build_source(replace(recipe, **change))
        assert "\n" not in str(caught.value)


class Drawing(Dataset[tuple[Tensor, int]]):
    """Items with noise from something of the data set's own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index), self.draw()]), 0


@dataclass(slots=True)
class Slotted:
    """A transform without a dictionary of attributes."""

    stream: np.random.Generator

    def __call__(self) -> float:
        return float(self.stream.random())


class Shuffled(Sampler[int]):
    """A sampler with a stream of NumPy's or Python's own."""

    def __init__(self, stream: np.random.Generator | random.Random) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        order = list(range(12))
        self.stream.shuffle(order)
        return iter(order)


def own_streams() -> dict[str, object]:
    """Return training data whose random numbers come from generators of their own, each kind in another place."""
    plain = TensorDataset(torch.arange(24.0).view(12, 2), torch.zeros(12, dtype=torch.long))
    seeded = RandomSampler(plain, generator=torch.Generator().manual_seed(1))
    weighted = WeightedRandomSampler([1.0] * 12, 12, generator=torch.Generator().manual_seed(1))
    transform = np.random.default_rng(1)
    torchs, old, python = torch.Generator(), np.random.RandomState(1), random.Random(1)
    return {
        "sampler": DataLoader(plain, 4, sampler=seeded),
        "weighted sampler": DataLoader(plain, 4, sampler=weighted),
        "batch sampler": DataLoader(plain, batch_sampler=BatchSampler(seeded, 4, drop_last=True)),
        "sampler of numpy's": DataLoader(plain, 4, sampler=Shuffled(np.random.default_rng(1))),
        "sampler of python's": DataLoader(plain, 4, sampler=Shuffled(random.Random(1))),
        "dataset": Drawing(transform.random),
        "dataset in a loader": DataLoader(Drawing(old.random_sample), 4),
        "subset": DataLoader(Subset(Drawing(python.random), list(range(12))), 4),
        "closure": Drawing(lambda: float(torch.rand((), generator=torchs))),
        "partial": Drawing(partial(lambda stream: float(stream.random()), transform)),
        "slots": Drawing(Slotted(np.random.Generator(np.random.PCG64(1)))),
        "workers that live on": DataLoader(
            Drawing(python.random), 4, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
        ),
    }


@pytest.mark.parametrize("kind", own_streams())
def test_generators_of_the_loaders_own_stand_where_an_unbroken_run_has_them(kind: str) -> None:
    def source() -> LoaderSource:
        return LoaderSource({"train": own_streams()[kind], "test": Noisy(2)})

    unbroken = source()
    batches = {(epoch, step): unbroken.train_batch(3, epoch, step, 4)[0] for epoch in range(2) for step in range(3)}
    assert source().train_batch(3, 1, 1, 4)[0].equal(batches[1, 1])
    assert source().train_batch(3, 0, 2, 4)[0].equal(batches[0, 2])
    assert not batches[0, 0].equal(batches[1, 0])  # and every epoch draws anew
    assert not source().train_batch(4, 0, 0, 4)[0].equal(batches[0, 0])


def test_two_generators_do_not_draw_the_same_numbers() -> None:
    one, other = np.random.default_rng(1), np.random.default_rng(1)
    data = Drawing(lambda: float(one.random() - other.random()))
    noise = LoaderSource({"train": data, "test": Noisy(1)}).train_batch(0, 0, 0, 4)[0][:, 1]
    assert bool((noise != 0).all())


def test_the_global_streams_are_left_alone_where_data_refer_to_them() -> None:
    data = DataLoader(Drawing(random.random), 4, shuffle=True, generator=torch.default_generator)
    source = LoaderSource({"train": data, "test": Noisy(1)})
    before = torch.get_rng_state(), random.getstate()
    batch = source.train_batch(0, 0, 0, 4)[0]
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert batch.equal(source.train_batch(0, 0, 0, 4)[0])


class CountsEpochs(Shuffled):
    """A sampler that seeds itself from the number of times that it was read."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist())


@pytest.mark.parametrize("kind", ["counts epochs", "entropy of the system", "module"])
def test_data_that_seed_themselves_out_of_sight_are_refused(kind: str) -> None:
    """A run that is resumed in epoch 1 reads the data for the first time there."""
    plain = TensorDataset(torch.arange(12.0), torch.zeros(12, dtype=torch.long))
    train = {
        "counts epochs": DataLoader(plain, 4, sampler=CountsEpochs(random.Random())),
        "entropy of the system": Drawing(lambda: float(np.random.default_rng().random())),
        "module": Drawing(hidden_draw),
    }[kind]
    with pytest.raises(EspalierError, match="begin epoch 1 otherwise when they are read again") as caught:
        LoaderSource({"train": train, "test": Noisy(1)}).train_batch(0, 1, 0, 4)
    assert "\n" not in str(caught.value)


_hidden = random.Random(0)


def hidden_draw() -> float:
    """Draw from a generator that is no attribute of anything."""
    return _hidden.random()


def test_numbers_that_are_none_are_no_reason_to_refuse() -> None:
    train = TensorDataset(torch.full((4, 1), torch.nan), torch.zeros(4, dtype=torch.long))
    assert LoaderSource({"train": train, "test": train}).train_batch(0, 0, 0, 4)[0].isnan().all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_iterator_is_refused_at_the_start(split: str) -> None:
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))] * 3
    for once in (iter(batches), (batch for batch in batches), zip(*zip(*batches, strict=True), strict=True)):
        with pytest.raises(EspalierError, match=f"dataset: {split} is .*, an iterator, which is read once"):
            LoaderSource({"train": batches, "test": batches, split: once})
    LoaderSource({"train": batches, "test": batches})


def test_a_loader_that_gives_batches_as_they_arrive_is_refused() -> None:
    loader = DataLoader(Noisy(4), 2, num_workers=2, in_order=False)
    with pytest.raises(EspalierError, match="set in_order=True"):
        LoaderSource({"train": loader, "test": Noisy(1)})
