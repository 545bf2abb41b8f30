"""How folders of images are laid out: every usual layout is known, and a doubtful one is refused by name."""

from __future__ import annotations

import errno
import math
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.data.encoded import EncodedImages
from espalier.data.layout import list_folder, split_off
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
        (["train/cat/1.jpg", "train/dog/1.jpg", "Train/cat/1.jpg", "val/cat/1.jpg"], "Train/ and train/"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "training/cat/1.jpg", "val/cat/1.jpg"], "train/ and training/"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "VAL/cat/1.jpg"], "VAL/ and val/"),
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


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, *(f"set/{name}/{number}.jpg" for name in ("cat", "dog") for number in range(5)))
    touch(tmp_path, "more/9.jpg", "more/deep/8.jpg", "fox/7.jpg", "single.jpg")
    (tmp_path / "set" / "dog" / "more").symlink_to("../../more")
    (tmp_path / "set" / "dog" / "one.jpg").symlink_to("../../single.jpg")
    (tmp_path / "set" / "fox").symlink_to("../fox")
    listing = list_folder(tmp_path / "set")
    found = {split.place(index) for split in (listing.train, listing.test) for index in range(len(split))}
    wanted = {f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(5)}
    wanted |= {"dog/more/9.jpg", "dog/more/deep/8.jpg", "dog/one.jpg", "fox/7.jpg"}
    assert found == {str(tmp_path / "set" / name) for name in wanted}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("dog/again", "."),
        ("dog/inner/up", "../.."),
        ("loop", "."),
        ("dog/itself", "itself"),
        ("dog/x.png", "x.png"),
        ("dog/gone", "nowhere"),
        ("dog/gone.png", "nowhere.png"),
        ("gone", "../nowhere"),
        ("dog/endless.png", "/dev/zero"),
        ("dog/pipe.png", None),
    ],
)
def test_what_is_no_file_or_folder_of_images_is_refused_by_name(tmp_path: Path, name: str, target: str | None) -> None:
    touch(tmp_path, *(f"{folder}/{number}.jpg" for folder in ("cat", "dog", "dog/inner") for number in range(5)))
    if target is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(target)
    with pytest.raises(EspalierError) as caught:
        list_folder(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("cat", "dog", "dog/closed") for number in range(5)))
    scandir = os.scandir

    def refuse(place: Path) -> object:
        if Path(place).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(EspalierError, match="Permission denied") as caught:
        list_folder(tmp_path)
    assert str(tmp_path / "dog" / "closed") in str(caught.value)


def test_classes_are_named_in_utf8_and_files_as_they_like(tmp_path: Path) -> None:
    odd = os.fsdecode(b"d\xe9g")
    touch(tmp_path, *(f"{name}/{odd}{number}.jpg" for name in ("cat", "dog") for number in range(5)))
    listing = list_folder(tmp_path)
    assert len(listing.train) + len(listing.test) == 10
    touch(tmp_path, f"{odd}/1.jpg")
    with pytest.raises(EspalierError, match="no UTF-8: rename") as caught:
        list_folder(tmp_path)
    assert str(caught.value).encode(), "it can be printed"


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 25), min_size=2, max_size=7), share=st.floats(0.02, 0.98))
def test_of_every_class_its_share_is_set_aside_and_never_its_last_image(sizes: list[int], share: float) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    images = EncodedImages.from_names(Path("photos"), map(str, range(len(labels))), labels)
    names = tuple(map(str, range(len(sizes))))
    whole = round(share * len(labels))
    # Rounded up, as far as one image is left, is the most that a class can give.
    most = [min(math.ceil(Fraction(whole * size, len(labels))), size - 1) for size in sizes]
    if not 0 < whole < len(labels) or not any(most):
        with pytest.raises(EspalierError, match="test_share"):
            split_off(images, names, share)
        return
    data = split_off(images, names, share)
    tested = [data.test.labels_N.tolist().count(label) for label in range(len(sizes))]
    for size, count, bound in zip(sizes, tested, most, strict=True):
        assert math.floor(Fraction(whole * size, len(labels))) <= count <= bound
        assert count < size
    assert sum(tested) == min(whole, sum(most)), "as many in all as were asked for, if the classes have them"
    parts = [split.files_F[split.spans_N3[:, 0]].astype(int).tolist() for split in (data.train, data.test)]
    assert sorted(parts[0] + parts[1]) == list(range(len(labels)))
    assert all(part == sorted(part) for part in parts), "both in the order of the listing"


def test_a_class_of_one_image_is_trained_and_not_tested(tmp_path: Path) -> None:
    sizes = {"x": 10, "y": 10, "z": 1}
    touch(tmp_path, *(f"{name}/{number}.jpg" for name, size in sizes.items() for number in range(size)))
    listing = list_folder(tmp_path, test_share=0.6)
    assert listing.train.labels_N.bincount().tolist() == [3, 4, 1]
    assert listing.test.labels_N.bincount(minlength=3).tolist() == [7, 6, 0], "13 of 21 in all"
    single = tmp_path / "single"
    touch(single, "x/1.jpg", "y/1.jpg")
    with pytest.raises(EspalierError, match="every class has one image, which is trained on: add images") as caught:
        list_folder(single, test_share=0.5)
    assert "\n" not in str(caught.value)


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
