"""Batched augmentation against references that treat one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.data import augment
from espalier.data.augmentation import Augmentation
from espalier.data.randaugment import rand_augment
from espalier.errors import EspalierError
from espalier.randomness import derive_generator
from reference.augment_reference import crop_reference, resized_window_reference


def stream(*keys: int | str) -> torch.Generator:
    return derive_generator(0, "test", *keys)


def random_images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=stream("images"))


def one_hot_rows(batch: int) -> Tensor:
    """Return labels that tell which image they belong to: row b of the identity."""
    return torch.eye(batch)


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 1, 7, 10)])
@pytest.mark.parametrize("padding", [1, 4, 6])
def test_every_crop_is_a_window_of_the_padded_image(shape: tuple[int, ...], padding: int) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=stream("pixels"))
    cropped = augment.random_crop(images, padding, generator=stream(padding))
    assert cropped.dtype == torch.uint8
    for image, crop in zip(images.numpy(), cropped.numpy(), strict=True):
        windows = (
            crop_reference(image, top, left, padding, "reflect")
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        )
        assert any(np.array_equal(crop, window) for window in windows)


def test_crops_reach_every_offset_evenly() -> None:
    image = torch.arange(25.0).view(1, 1, 5, 5)
    cropped = augment.random_crop(image.expand(9000, -1, -1, -1), 1, generator=stream())
    centres = cropped[:, 0, 2, 2].long()
    counts = centres.bincount(minlength=25)[[6, 7, 8, 11, 12, 13, 16, 17, 18]]
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_crop_says_what_is_wrong() -> None:
    with pytest.raises(EspalierError, match="crop_padding is 8 and the images are 8×8"):
        augment.random_crop(random_images(1, 1, 8, 8), 8, generator=stream())


def test_flip_mirrors_half_of_the_images() -> None:
    images = random_images(2000, 2, 3, 4)
    flipped = augment.random_flip(images, generator=stream())
    mirrored = np.array(
        [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(flipped.numpy(), images.numpy(), strict=True)]
    )
    same = np.array([np.array_equal(a, b) for a, b in zip(flipped.numpy(), images.numpy(), strict=True)])
    assert (mirrored ^ same).all()
    assert abs(mirrored.sum() - 1000) < 5 * math.sqrt(500)


@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 0.9), (1.0, 1.0)), ((0.5, 1.0), (0.5, 2.0))])
def test_resized_crop_samples_the_window_it_drew(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    batch, height, width = 5, 6, 9
    images = random_images(batch, 2, height, width)
    result = augment.random_resized_crop(images, scale, ratio=ratio, generator=stream("resize"))
    # The window's place is read from coordinates that went through the same call, not from its internals.
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = augment.random_resized_crop(
        torch.stack([y, x]).expand(batch, -1, -1, -1).contiguous(), scale, ratio=ratio, generator=stream("resize")
    )
    for image, place, found in zip(images.numpy(), places.double().numpy(), result.numpy(), strict=True):
        # Away from the border coordinates are exact and evenly spaced: extrapolate to the window's edges.
        step_y = place[0, height // 2, 0] - place[0, height // 2 - 1, 0]
        step_x = place[1, 0, width // 2] - place[1, 0, width // 2 - 1]
        top = place[0, height // 2, 0] - step_y * (height // 2 + 0.5)
        left = place[1, 0, width // 2] - step_x * (width // 2 + 0.5)
        area = step_y * step_x
        assert -1e-4 <= top <= height * (1 - step_y) + 1e-4
        assert -1e-4 <= left <= width * (1 - step_x) + 1e-4
        assert area <= scale[1] + 1e-4
        assert ratio != (1.0, 1.0) or (step_y == pytest.approx(step_x, abs=1e-4) and area >= scale[0] - 1e-4)
        expected = resized_window_reference(image.astype(float), top, left, height * step_y, width * step_x)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_resized_crop_of_the_whole_area_is_the_image() -> None:
    images = random_images(3, 1, 8, 8)
    torch.testing.assert_close(augment.random_resized_crop(images, (1.0, 1.0), generator=stream()), images)


def test_erasing_overwrites_one_rectangle_of_the_stated_share() -> None:
    images = torch.full((1000, 2, 16, 12), 2.0)
    erased = augment.random_erasing(images, 0.25, generator=stream())
    hit = [image for image in (erased != 2).numpy() if image.any()]
    assert abs(len(hit) - 250) < 5 * math.sqrt(1000 * 0.25 * 0.75)
    for mask in hit:
        assert np.array_equal(mask[0], mask[1])
        rows, columns = mask[0].any(1).nonzero()[0], mask[0].any(0).nonzero()[0]
        assert mask[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # Sides are rounded to pixels, each by at most one half.
        height, width = len(rows), len(columns)
        assert (height - 0.5) * (width - 0.5) <= 16 * 12 / 3
        assert (height + 0.5) * (width + 0.5) >= 0.02 * 16 * 12
    noise = erased[erased != 2]
    assert noise.min() >= 0
    assert noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(augment.random_erasing(images, 0.0, generator=stream()), images)


@given(alpha=st.floats(0.1, 4.0), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_mixup_mixes_images_and_labels_by_one_share(alpha: float, seed: int) -> None:
    images, labels = random_images(7, 2, 4, 5), one_hot_rows(7)
    mixed, targets = augment.mixup(images, labels, alpha, generator=stream(seed))
    # Row b of the targets names the partners of image b and their shares: rebuild the image from it alone.
    torch.testing.assert_close(mixed, torch.einsum("bk,kchw->bchw", targets, images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(7))
    torch.testing.assert_close(targets.sum(0), torch.ones(7), msg="every example must keep its total weight")


@given(alpha=st.floats(0.1, 4.0), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_cutmix_labels_are_shares_of_pixels(alpha: float, seed: int) -> None:
    batch, height, width = 6, 7, 9
    # Every image is painted in its own colour, so the share of each source can be counted.
    images = torch.arange(batch, dtype=torch.float32).view(batch, 1, 1, 1).expand(batch, 3, height, width).contiguous()
    mixed, targets = augment.cutmix(images, one_hot_rows(batch), alpha, generator=stream(seed))
    for b in range(batch):
        counted = torch.stack([(mixed[b] == k).float().mean() for k in range(batch)])
        torch.testing.assert_close(targets[b], counted)
        foreign = (mixed[b, 0] != b).numpy()
        if foreign.any():
            rows, columns = foreign.any(1).nonzero()[0], foreign.any(0).nonzero()[0]
            assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    torch.testing.assert_close(targets.sum(0), torch.ones(batch))


def test_mixing_shares_follow_the_beta_distribution() -> None:
    images, alpha = torch.zeros(2, 1, 1, 1), 0.4
    partners_swapped = []
    for draw in range(1500):
        _, targets = augment.mixup(images, one_hot_rows(2), alpha, generator=stream("beta", draw))
        if targets[0, 0] < 1:
            partners_swapped.append(targets[0, 0].item())
    shares = torch.tensor(partners_swapped)
    assert abs(len(shares) - 750) < 5 * math.sqrt(375)
    # Beta(α, α): mean ½, variance 1/(4(2α + 1)).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.07)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.02)


def test_cutmix_reads_the_images_before_it_writes() -> None:
    images = random_images(4, 1, 6, 6)
    kept = images.clone()
    augment.cutmix(images, one_hot_rows(4), 1.0, generator=stream())
    assert torch.equal(images, kept)


def is_solarize_add(images: Tensor, result: Tensor, addition: float) -> Tensor:
    """Say which images were brightened and then inverted from some threshold on (kornia draws it for each image)."""
    bright = (images + addition).clamp(0, 1).flatten(1)
    result = result.flatten(1)
    kept, inverted = torch.isclose(result, bright), torch.isclose(result, 1 - bright)
    highest_kept = torch.where(kept & ~inverted, bright, 0.0).amax(1)
    lowest_inverted = torch.where(inverted & ~kept, bright, 1.0).amin(1)
    return (kept | inverted).all(1) & (highest_kept <= lowest_inverted)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_one_of_kornias_operations_on_each_image(channels: int) -> None:
    from kornia.augmentation.auto import RandAugment
    from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

    images, magnitude = random_images(96, channels, 12, 12), 9
    result = rand_augment(images, 1, magnitude, generator=stream())
    assert result.shape == images.shape
    policy = [step for step in default_policy if channels == 3 or step[0][0] != "color"]
    explained = torch.zeros(len(policy), 96, dtype=torch.bool)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for number, step in enumerate(policy):
            kornias = RandAugment(n=1, m=magnitude, policy=[step])
            # The sign of a rotation, shear or shift is drawn per image: twelve draws show both.
            for seed in range(12 if step[0][1] < 0 else 1):
                torch.manual_seed(seed)
                expected = kornias(images).clamp(0, 1)
                explained[number] |= torch.isclose(result, expected, atol=1e-6).flatten(1).all(1)
            if step[0][0] == "solarize_add":
                explained[number] = is_solarize_add(images, result, step[0][2] * magnitude / 30)
    assert explained.any(0).all(), "an image shows no operation of the policy"
    # 96 images draw from 14 or 15 operations: one that never comes up has probability below 0.2 %.
    assert explained.any(1).sum() >= len(policy) - 1
    assert explained.sum(1).max() < 30, "the images of a batch must not share one draw"


def test_randaugment_leaves_the_global_stream_alone_and_ignores_it() -> None:
    images = random_images(16, 3, 8, 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rand_augment(images, 2, 12, generator=stream("ra"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, rand_augment(images, 2, 12, generator=stream("ra")))
    assert not torch.equal(first, rand_augment(images, 2, 12, generator=stream("another")))


EVERYTHING = Augmentation(
    crop_padding=2, crop_scale=(0.5, 1.0), flip=True, randaugment=(2, 9), erasing=0.5, mixup=0.5, cutmix=0.5
)


def test_the_whole_chain_depends_on_its_generator_alone() -> None:
    pixels = torch.randint(0, 256, (12, 3, 10, 10), dtype=torch.uint8, generator=stream("pixels"))
    labels = torch.arange(12) % 4
    kept = pixels.clone()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = EVERYTHING(pixels, labels, 4, generator=stream("chain"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = EVERYTHING(pixels, labels, 4, generator=stream("chain"))
    other = EVERYTHING(pixels, labels, 4, generator=stream("other"))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(pixels, kept)
    images, targets = first
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert targets.shape == (12, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(12))


def test_both_mixes_take_turns() -> None:
    pixels = torch.randint(0, 256, (4, 1, 6, 6), dtype=torch.uint8, generator=stream("pixels"))
    # An image whose pixels all come from one of two images was pasted; mixup blends.
    blended = 0
    for draw in range(200):
        both = Augmentation(mixup=1.0, cutmix=1.0)
        images, _ = both(pixels, torch.arange(4), 4, generator=stream("turn", draw))
        known = torch.isin((images * 255).round(), pixels.float()) & ((images * 255) % 1 < 1e-3)
        blended += not bool(known.all())
    assert 60 < blended < 140


def test_no_augmentation_scales_pixels_and_keeps_class_indices() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    labels = torch.tensor([3, 1, 0, 2])
    images, targets = Augmentation()(pixels, labels, 4, generator=stream())
    torch.testing.assert_close(images, pixels.double().div(255).float())
    assert torch.equal(targets, labels)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_padding", -1),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_scale", (0.5, 1.5)),
        ("randaugment", (0, 9)),
        ("randaugment", (2, 30)),
        ("erasing", 1.5),
        ("mixup", -0.1),
        ("cutmix", float("nan")),
    ],
)
def test_fields_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(EspalierError, match=f"^{field} is ") as caught:
        Augmentation(**{field: value})
    assert "\n" not in str(caught.value)


def test_kornia_draws_from_the_global_stream_which_is_why_the_other_augmentations_are_ours() -> None:
    from kornia.augmentation import RandomHorizontalFlip

    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        RandomHorizontalFlip()(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        assert not torch.equal(torch.random.get_rng_state(), before)
