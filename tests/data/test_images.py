"""Image sources: batches that depend on (seed, epoch, step) alone, statistics, names and messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from espalier.data import SOURCES, ImageSource, Source, build_source
from espalier.data.augmentation import Augmentation
from espalier.data.labelled import ImageData, LabelledImages
from espalier.data.normalizer import build_normalizer, channel_statistics, value_counts
from espalier.errors import EspalierError
from espalier.files import cache_folder
from espalier.recipes.base import Recipe
from needs import needs_data

EVERYTHING: dict[str, Any] = {
    "crop_padding": 2,
    "crop_scale": (0.5, 1.0),
    "flip": True,
    "randaugment": (2, 9),
    "erasing": 0.5,
    "mixup": 0.5,
    "cutmix": 0.5,
}


def recipe(**changes: Any) -> Recipe:
    return replace(Recipe(name="test"), **changes)


def numbered_source(count: int = 23, **changes: Any) -> ImageSource:
    """Return a source whose image i is filled with the value i and labelled i % 3."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 4, 4).contiguous()
    split = LabelledImages(pixels, torch.arange(count) % 3)
    return ImageSource(
        ImageData(split, split.take(torch.arange(7)), ("a", "b", "c")), **{"normalize": "none", **changes}
    )


def indices(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().long().tolist()


def test_an_epoch_shows_every_image_at_most_once_with_its_label() -> None:
    source = numbered_source()
    assert source.steps_per_epoch(5) == 4
    seen = []
    for step in range(4):
        images, labels = source.train_batch(3, 1, step, 5)
        assert labels.tolist() == [index % 3 for index in indices(images)]
        seen += indices(images)
    assert len(seen) == len(set(seen)) == 20
    assert seen != sorted(seen)


def test_order_changes_with_seed_and_epoch_and_with_nothing_else() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return indices(numbered_source().train_batch(seed, epoch, 0, 23)[0])

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # Smaller batches are slices of the same order, so gradient accumulation sees the same examples.
    source = numbered_source()
    halves = [indices(source.train_batch(0, 0, step, 10)[0]) for step in range(2)]
    assert halves[0] + halves[1] == order(0, 0)[:20]


def test_a_batch_is_the_same_whatever_was_asked_before() -> None:
    asked = [(seed, epoch, step) for seed in (0, 1) for epoch in (0, 1) for step in (0, 3)]
    first_source, second_source = (build_source(recipe(**EVERYTHING)) for _ in range(2))
    first = {key: first_source.train_batch(*key, 16) for key in asked}
    torch.manual_seed(123)
    second = {key: second_source.train_batch(*key, 16) for key in reversed(asked)}
    for key in asked:
        for a, b in zip(first[key], second[key], strict=True):
            assert torch.equal(a, b), key
    distinct = {images.numpy().tobytes() for images, _ in first.values()}
    assert len(distinct) == len(asked)


def test_every_step_epoch_and_seed_draws_its_own_augmentation() -> None:
    alike = LabelledImages(torch.full((8, 1, 6, 6), 9, dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    source = ImageSource(ImageData(alike, alike, ("a",)), Augmentation(erasing=1.0), "none")
    keys = [(seed, epoch, step) for seed in (0, 1) for epoch in (0, 1) for step in (0, 1)]
    assert len({source.train_batch(*key, 4)[0].numpy().tobytes() for key in keys}) == len(keys)


def test_a_batch_can_be_changed_in_place_without_harm() -> None:
    source = numbered_source()
    images, labels = source.train_batch(0, 0, 0, 5)
    images.zero_(), labels.zero_()
    again, labels_again = source.train_batch(0, 0, 0, 5)
    assert again.any()
    assert labels_again.any()


def test_a_step_beyond_the_epoch_is_refused() -> None:
    source = numbered_source()
    for step in (-1, 4):
        with pytest.raises(IndexError):
            source.train_batch(0, 0, step, 5)
    assert source.steps_per_epoch(24) == 0


def test_evaluation_shows_every_test_image_once_in_order() -> None:
    source = numbered_source(augmentation=Augmentation(flip=True, mixup=1.0))
    batches = list(source.eval_batches("test", 3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert [index for images, _ in batches for index in indices(images)] == list(range(7))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(EspalierError, match="unknown split 'tset': did you mean 'test'"):
        next(source.eval_batches("tset", 3))


def test_statistics_are_those_of_all_pixels_in_float64() -> None:
    pixels = torch.randint(0, 256, (50, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[:, 1] //= 3
    mean, std = channel_statistics(value_counts(pixels))
    values = pixels.double() / 255
    torch.testing.assert_close(mean, values.mean((0, 2, 3)), atol=1e-12, rtol=0)
    torch.testing.assert_close(std, values.std((0, 2, 3), correction=0), atol=1e-12, rtol=0)


def test_normalised_training_images_have_mean_zero_and_spread_one() -> None:
    source = build_source(recipe())
    images, _ = source.train_batch(0, 0, 0, 1437)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw, labels = source.images("test")
    assert raw.min() == 0
    assert raw.max() == 1
    [(normalised, eval_labels)] = source.eval_batches("test", 1000)
    torch.testing.assert_close(source.normalizer(raw), normalised)
    assert torch.equal(labels, eval_labels)
    few, _ = source.images("train", 12)
    assert few.shape == (12, 1, 8, 8)


def test_mean_alone_keeps_distances_and_none_keeps_everything() -> None:
    pixels = torch.randint(0, 256, (20, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = pixels.double() / 255
    centred = build_normalizer(value_counts(pixels), "mean").double()(images)
    assert centred.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(centred[0] - centred[1], images[0] - images[1])
    assert isinstance(build_normalizer(value_counts(pixels), "none"), nn.Identity)
    # A constant channel has no spread to divide by.
    pixels[:, 1] = 77
    assert build_normalizer(value_counts(pixels), "mean_std")(pixels.float() / 255).isfinite().all()


def test_the_source_fixes_the_models_arguments() -> None:
    source = build_source(recipe())
    assert isinstance(source, Source)
    assert dict(source.model_args) == {"num_classes": 10, "in_chans": 1, "img_size": 8}
    assert source.eval_splits == ("test",)
    assert source.class_names == tuple("0123456789")
    assert source.to("cpu") is source


def test_limits_and_their_statistics_follow_the_arguments() -> None:
    source = build_source(recipe(data_args={"train_limit": 100, "test_limit": 50}))
    assert source.steps_per_epoch(1) == 100
    assert len(source.images("test")[1]) == 50
    images, _ = source.train_batch(0, 0, 0, 100)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)


def test_mixed_targets_keep_the_share_of_every_class() -> None:
    source = numbered_source(augmentation=Augmentation(mixup=0.4, cutmix=1.0))
    plain = numbered_source()
    for step in range(4):
        _, targets = source.train_batch(0, 0, step, 5)
        _, labels = plain.train_batch(0, 0, step, 5)
        assert targets.shape == (5, 3)
        torch.testing.assert_close(targets.sum(0), labels.bincount(minlength=3).float())
        torch.testing.assert_close(targets.sum(1), torch.ones(5))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("cifar10", marks=needs_data("cifar10")),
        pytest.param("fashion_mnist", marks=needs_data("fashion-mnist")),
    ],
)
def test_real_data_through_the_front_door(name: str) -> None:
    source = build_source(recipe(dataset=name, crop_padding=4, flip=True))
    assert isinstance(source.normalizer, nn.Module)
    # The statistics everybody quotes.
    mean, std = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "fashion_mnist": ([0.2860], [0.3530]),
    }[name]
    assert source.normalizer.mean.flatten().tolist() == pytest.approx(mean, abs=1e-4)
    assert source.normalizer.std.flatten().tolist() == pytest.approx(std, abs=1e-4)
    images, labels = source.train_batch(0, 0, 0, 64)
    assert images.shape == (64, source.model_args["in_chans"], *2 * (source.model_args["img_size"],))
    assert labels.shape == (64,)


def test_a_folder_through_the_front_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    for name in ("cat", "dog"):
        for number in range(4):
            (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 7), 50 * number).save(tmp_path / "pets" / name / f"{number}.png")
    arguments = {"size": 6, "test_share": 0.25}
    source = build_source(recipe(dataset="folder", data_path=str(tmp_path / "pets"), data_args=arguments))
    assert dict(source.model_args) == {"num_classes": 2, "in_chans": 3, "img_size": 6}
    assert source.steps_per_epoch(1) == 6
    for wrong in ({"size": 0}, {"size": "big"}, {"test_share": 1.0}, {"test_share": "half"}):
        with pytest.raises(EspalierError, match=f"^{next(iter(wrong))} is "):
            build_source(recipe(dataset="folder", data_path=str(tmp_path / "pets"), data_args=wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "cifar"}, "unknown dataset 'cifar': did you mean 'cifar10'"),
        (
            {"data_args": {"train_limt": 5}},
            "unknown argument of dataset 'digits' 'train_limt': did you mean 'train_limit'",
        ),
        ({"data_args": {"train_limit": 5000}}, "train_limit is 5000, and there are 1437 images"),
        (
            {"dataset": "cifar10"},
            "say where it is with --data PATH, or set ESPALIER_DATA to the folder that contains cifar10/",
        ),
        (
            {"dataset": "cifar10", "data_path": "/nowhere"},
            "no dataset 'cifar10' at /nowhere: give its place with --data",
        ),
        ({"dataset": "fashion_mnist", "data_path": "/"}, "cannot read /train-images-idx3-ubyte.gz"),
        ({"dataset": "folder", "data_path": __file__}, "is not a folder"),
        ({"crop_padding": 8}, "crop_padding is 8, the images' side 8"),
        ({"normalize": "std"}, "unknown normalize 'std'"),
        ({"erasing": 2.0}, "erasing is 2.0"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    with pytest.raises(EspalierError) as caught:
        build_source(recipe(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "copying", "sorting", "ngram_lookup", "mqar"])
def test_a_place_that_would_be_ignored_is_refused(name: str) -> None:
    with pytest.raises(EspalierError, match=f"dataset '{name}' reads no files and would ignore --data photos"):
        build_source(recipe(dataset=name, data_path="photos"))


def test_the_environment_names_a_place_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    with pytest.raises(EspalierError, match="no dataset 'cifar10' at") as caught:
        build_source(recipe(dataset="cifar10"))
    assert str(tmp_path / "cifar10") in str(caught.value)


def test_every_source_is_reached_by_a_name() -> None:
    assert {"cifar10", "digits", "fashion_mnist", "folder"} <= SOURCES.keys()


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist", "folder", "shards", "text"])
@pytest.mark.parametrize("named", ["data_path", "environment"])
def test_a_home_that_nobody_has_is_refused_in_one_line(
    dataset: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_DATA", "~no-such-user")
    asked = recipe(dataset=dataset, data_path="~no-such-user/x" if named == "data_path" else None)
    with pytest.raises(EspalierError, match="nobody's home is known as ~no-such-user") as caught:
        build_source(asked)
    assert ("data_path" if named == "data_path" else "ESPALIER_DATA") in str(caught.value)


def test_a_cache_in_a_home_that_nobody_has_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", "~no-such-user/cache")
    with pytest.raises(EspalierError, match="ESPALIER_CACHE is ~no-such-user/cache"):
        cache_folder()
