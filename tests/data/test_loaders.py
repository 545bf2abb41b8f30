"""Datasets and loaders of the user's own as a source: batches of (seed, epoch, step) alone, whatever else draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

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
