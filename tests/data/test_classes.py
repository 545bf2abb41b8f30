"""Classes of torch's datasets: one number each, and one count, however the datasets are wrapped or joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
)

from espalier.data import LoaderSource
from espalier.data.classes import count_classes, refuse_two_numbers
from espalier.errors import EspalierError


class Named(Dataset[tuple[Tensor, int]]):
    """Items of named classes, as torchvision's folders state them."""

    def __init__(self, *classes: str, mapped: bool = False) -> None:
        self.classes, self.target_transform = list(classes), (int if mapped else None)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3), index % len(self.classes)


class NamedStream(IterableDataset[tuple[Tensor, int]]):
    """The same without indices."""

    def __init__(self, *classes: str) -> None:
        self.classes = classes

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.zeros(3), 0)])


class Wrapper(Dataset[tuple[Tensor, int]]):
    """What users write around a dataset; ``stated`` are attributes of its own."""

    def __init__(self, dataset: object, **stated: object) -> None:
        self.dataset = dataset
        vars(self).update(stated)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index]  # type: ignore[index,no-any-return]


def nameless() -> TensorDataset:
    return TensorDataset(torch.zeros(6, 3), torch.tensor([0, 1, 4, 1, 0, 0]))


WRAPS: dict[str, Callable[[Named], object]] = {
    "itself": lambda data: data,
    "loader": lambda data: DataLoader(data, 2),
    "subset": lambda data: Subset(data, [0]),
    "wrapper": Wrapper,
    "joined": lambda data: ConcatDataset([nameless(), data]),
    "stacked": lambda data: StackDataset(nameless(), data),
    "stacked by name": lambda data: StackDataset(image=nameless(), label=data),
    "streams": lambda data: ChainDataset([NamedStream("cat"), NamedStream(*data.classes)]),
    "deep": lambda data: DataLoader(Subset(ConcatDataset([Wrapper(Subset(data, [0, 1])), nameless()]), [0]), 2),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_a_class_under_two_numbers_is_refused_wherever_it_is_stated(kind: str) -> None:
    wrap = WRAPS[kind]
    train = wrap(Named("cat", "dog", "hen"))
    splits = {"train": train, "test": wrap(Named("cat", "dog", "hen")), "val": wrap(Named("cat", "hen"))}
    with pytest.raises(EspalierError, match="class 'hen' has number 2 in train and 1 in val: give") as caught:
        refuse_two_numbers("data", splits)
    assert "\n" not in str(caught.value)
    for classes in (("cat", "dog"), ("cat", "dog", "hen", "owl")):
        refuse_two_numbers("data", {"train": train, "test": wrap(Named(*classes))})
    if kind != "streams":
        refuse_two_numbers("data", {"train": train, "test": wrap(Named("hen", mapped=True))})


def test_a_source_compares_all_parts_of_all_splits() -> None:
    cat, dog = Named("cat", "dog"), Named("dog", "cat")
    with pytest.raises(EspalierError, match="class 'dog' has number 1 in train and 0 in train"):
        LoaderSource({"test": cat, "train": ConcatDataset([cat, dog])})
    with pytest.raises(EspalierError, match="class 'dog' has number 1 in train and 0 in test"):
        LoaderSource({"test": Subset(dog, [0]), "train": DataLoader(ConcatDataset([cat]), 2)})
    with pytest.raises(EspalierError, match="class 'dog' has number 1 in test and 0 in val"):
        LoaderSource({"train": nameless(), "test": cat, "val": dog})
    assert LoaderSource({"test": cat, "train": ConcatDataset([cat, cat])}).model_args == {"num_classes": 2}


def test_a_wrapper_that_states_classes_speaks_for_what_it_wraps() -> None:
    cat, dog = Named("cat", "dog"), Named("dog", "cat")
    renumbered = Wrapper(dog, classes=["cat", "dog", "hen"])
    refuse_two_numbers("data", {"train": cat, "test": DataLoader(renumbered, 2)})
    assert count_classes(DataLoader(renumbered, 2)) == 3
    refuse_two_numbers("data", {"train": cat, "test": Wrapper(dog, target_transform=int)})
    with pytest.raises(EspalierError, match="class 'hen' has number 7 in train and 0 in test"):
        refuse_two_numbers("data", {"train": Wrapper(cat, class_to_idx={"cat": 0, "hen": 7}), "test": Named("hen")})


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (nameless(), 5),
        (DataLoader(Subset(nameless(), [0]), 2), 5),
        (Named("cat", "dog", mapped=True), 2),
        (Wrapper(Named("cat", "dog"), target_transform=int), 2),
        (Wrapper(Named("cat"), class_to_idx={"cat": 0, "tiger": 0, "hen": 3}), 4),
        (ConcatDataset([Named("cat", "dog"), Named("cat", "dog", "hen"), Named("cat", "dog")]), 3),
        (ConcatDataset([Named("cat", "dog"), nameless()]), 5),
        # Targets of one may begin where those of the other end.
        (ConcatDataset([Named("cat", "dog"), Named("cat", "dog", mapped=True)]), None),
        (ConcatDataset([Named("cat", "dog"), Wrapper(Named("leaf", "sky"))]), None),
        (ConcatDataset([Named("cat", "dog"), TensorDataset(torch.zeros(2, 3), torch.zeros(2))]), None),
        ([(torch.zeros(2, 3), torch.zeros(2))], None),
    ],
)
def test_how_many_classes_there_are(data: object, count: int | None) -> None:
    assert count_classes(data) == count


def test_a_joint_dataset_may_hold_the_targets_of_its_parts() -> None:
    joint = ConcatDataset([Wrapper([1, 2]), Wrapper([3])])
    assert count_classes(joint) is None
    joint.targets = [0, 2, 1]  # type: ignore[attr-defined]
    assert count_classes(joint) == count_classes(DataLoader(joint, 2)) == 3


def test_wrappers_in_a_circle_and_without_end_are_walked_once() -> None:
    circle = Wrapper(None)
    circle.dataset = Wrapper(circle)
    assert count_classes(circle) is None

    class Endless:
        @property
        def dataset(self) -> object:
            return Endless()

    refuse_two_numbers("data", {"train": Endless(), "test": circle})


def test_a_chain_of_an_iterator_is_left_to_the_training() -> None:
    chain = ChainDataset(iter([NamedStream("cat")]))
    refuse_two_numbers("data", {"train": chain, "test": chain})
    assert next(iter(chain))[1] == 0
