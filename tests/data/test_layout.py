"""How folders of images are laid out: every usual layout is known, and a doubtful one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.data.layout import list_folder
from espalier.errors import EspalierError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("train", "test"),
        ("train", "valid"),
        ("Train", "Validation"),
        ("training", "testing"),
        ("TRAIN", "VAL"),
    ],
)
def test_a_folder_with_splits_is_known(tmp_path: Path, train: str, test: str) -> None:
    touch(tmp_path, f"{train}/cat/1.jpg", f"{train}/cat/deep/2.JPEG", f"{train}/dog/1.png", f"{test}/dog/9.webp")
    touch(tmp_path, "README.txt", "devkit/notes.txt")
    listing = list_folder(tmp_path)
    assert listing.class_names == ("cat", "dog")
    assert listing.train.labels_N.tolist() == [0, 0, 1]
    assert listing.test.labels_N.tolist() == [1], "labels follow the training classes"
    places = [listing.train.place(index) for index in range(3)]
    assert places == [str(tmp_path / train / name) for name in ("cat/1.jpg", "cat/deep/2.JPEG", "dog/1.png")]


def test_classes_may_bear_the_names_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("train", "plane", "test") for number in range(5)))
    assert list_folder(tmp_path).class_names == ("plane", "test", "train")


def test_what_is_hidden_is_no_image_and_no_class(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(5)))
    touch(tmp_path, "__MACOSX/cat/0.jpg", "cat/._0.jpg", "cat/.thumbs/0.jpg", "cat/__MACOSX/0.jpg", ".git/0.jpg")
    listing = list_folder(tmp_path)
    assert listing.class_names == ("cat", "dog")
    assert len(listing.train) + len(listing.test) == 10


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/cat/1.jpg", "train/dog/1.jpg"], "no val/ or test/"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/1.jpg"], "sort the images of"),
        (["val/cat/1.jpg", "val/dog/1.jpg"], "no train/"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "test/cat/1.jpg"], "--data-args.test test"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/fox/1.jpg"], "fox"),
        (["train/cat/1.jpg", "val/cat/1.jpg"], "alone"),
        (["imagenet/train/cat/1.jpg", "imagenet/val/cat/1.jpg"], "'imagenet' alone"),
        (["train/cat/1.jpg", "train/dog/x.txt", "val/cat/1.jpg"], "holds no image"),
        (["1.jpg", "2.jpg"], "has no subfolder"),
    ],
)  # fmt: skip
def test_a_doubtful_folder_is_refused_in_one_line(tmp_path: Path, names: list[str], words: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(EspalierError) as caught:
        list_folder(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_test_set_can_be_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "val", "test", "sketch") for name in ("a", "b")))
    for name in ("val", "test", "sketch"):
        assert list_folder(tmp_path, test=name).test.place(0) == str(tmp_path / name / "a" / "1.jpg")
    with pytest.raises(EspalierError, match="'other'"):
        list_folder(tmp_path, test="other")


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and name != "__MACOSX"
)


@settings(max_examples=60, deadline=None)
@given(classes=st.dictionaries(NAMES, st.sets(NAMES, min_size=2, max_size=4), min_size=2, max_size=4))
def test_every_image_is_listed_once_under_its_class(
    tmp_path_factory: pytest.TempPathFactory, classes: dict[str, set[str]]
) -> None:
    root = tmp_path_factory.mktemp("names")
    for name, files in classes.items():
        touch(root / "classes", *(f"{name}/{file}.jpg" for file in files))
    listing = list_folder(root / "classes", test_share=0.4)
    found = [
        (listing.class_names[label], split.place(index))
        for split in (listing.train, listing.test)
        for index, label in enumerate(split.labels_N.tolist())
    ]
    wanted = [(name, str(root / "classes" / name / f"{file}.jpg")) for name, files in classes.items() for file in files]
    assert sorted(found) == sorted(wanted)
