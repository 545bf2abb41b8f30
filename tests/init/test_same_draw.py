"""One seed gives one structure: over threads, instruction sets, types of weights and where the generator lives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.init.attention.near_identity import near_identity, near_identity_factors, split, split_square
from espalier.models import SequenceModel

# As Note [The same draw everywhere] states them: width, rank, bound on factors, bound on their product.
BOUNDS = [
    (64, 16, 1e-9, 1e-9),
    (300, 300, 1e-9, 1e-9),
    (384, 64, 1e-3, 1e-5),
    (640, 64, 0.1, 1e-4),
    (640, 640, 0.1, 1e-4),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest entry."""
    return float((one.double() - other.double()).abs().max() / one.abs().max())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("dim", "rank", "factor", "product"), BOUNDS)
def test_factors_differ_by_rounding_over_threads(dim: int, rank: int, factor: float, product: float) -> None:
    torch.set_num_threads(1)
    alone = near_identity_factors(dim, rank, 0.7, 0.7, generator=seeded(3))
    for count in (2, 4):
        torch.set_num_threads(count)
        found = near_identity_factors(dim, rank, 0.7, 0.7, generator=seeded(3))
        assert max(apart(a, b) for a, b in zip(alone, found, strict=True)) <= factor
        assert apart(alone[0] @ alone[1].mT, found[0] @ found[1].mT) <= product


@pytest.mark.parametrize(("dim", "rank", "factor", "product"), BOUNDS)
def test_factors_differ_by_rounding_over_instruction_sets(
    dim: int, rank: int, factor: float, product: float, tmp_path: Path
) -> None:
    file = tmp_path / "factors.pt"
    code = (
        "import torch; from espalier.init.attention.near_identity import near_identity_factors as f; "
        f"torch.save(f({dim}, {rank}, 0.7, 0.7, generator=torch.Generator().manual_seed(3)), {str(file)!r})"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": "default"}, check=True)
    plain = torch.load(file)
    here = near_identity_factors(dim, rank, 0.7, 0.7, generator=seeded(3))
    assert max(apart(a, b) for a, b in zip(plain, here, strict=True)) <= factor
    assert apart(plain[0] @ plain[1].mT, here[0] @ here[1].mT) <= product


@pytest.mark.parametrize("cut", [lambda matrix: split(matrix, 7), split_square])
def test_signs_of_factors_do_not_hang_on_rounding(cut: object) -> None:
    matrix = near_identity(60, 0.7, 0.7, generator=seeded(1)).double()
    left, right = cut(matrix)  # type: ignore[operator]
    shaken = matrix + 1e-12 * torch.randn(60, 60, generator=seeded(2), dtype=torch.float64)
    for one, other in zip((left, right), cut(shaken), strict=True):  # type: ignore[operator]
        assert apart(one, other) <= 1e-6
    # The library's own choice of sign can be the other one: LAPACK's has columns whose sum is negative.
    assert bool((left.sum(0) >= 0).all())
    assert bool((torch.linalg.svd(matrix).U.sum(0) < 0).any())


def model() -> nn.ModuleDict:
    """Return all three families, with weights that bfloat16 holds exactly."""
    generator = seeded(9)
    mixers = SequenceModel(20, 64, "mamba1 mamba2 attention", head_dim=16, num_heads=4)
    mixers.init_weights(generator)
    found = nn.ModuleDict({"mixers": mixers, "filters": nn.Conv2d(16, 16, 7, groups=16, bias=False)})
    found.filters.weight.data.fill_(1.0)
    return found.bfloat16().float()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 4])
def test_weights_of_every_type_are_the_float64_ones_rounded(dtype: torch.dtype, count: int) -> None:
    specs = {"ssm": espalier.MimeticSSM(correlate=0.5, gain=0.5, delta_weight=0.5, convolution="covariance")}
    wide = model().double()
    espalier.structure_(wide, **specs, generator=seeded(4))
    torch.set_num_threads(count)
    narrow = model().to(dtype)
    espalier.structure_(narrow, **specs, generator=seeded(4))
    rounding, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    for (name, found), expected in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        # Half of a last digit from rounding once, and as much again for products that were rounded on their way.
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=smallest + 1e-9, msg=name)


@pytest.mark.parametrize("dim", [64, 576])
def test_heads_that_are_turned_copies_agree_too(dim: int) -> None:
    layers = []
    for dtype in (torch.float64, torch.float32):
        layer = nn.MultiheadAttention(dim, 8, dtype=dtype)
        espalier.structure_(layer, generator=seeded(2))
        layers.append(layer)
    torch.testing.assert_close(layers[0].in_proj_weight.float(), layers[1].in_proj_weight, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_gets_the_weights_of_the_cpu() -> None:
    here, there = model(), model().cuda()
    for one in (here, there):
        espalier.structure_(one, generator=seeded(4))
    for (name, found), expected in zip(there.named_parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-8, msg=name)
    for dim in (768,):
        pair = [
            near_identity_factors(dim, 64, 0.7, 0.7, generator=seeded(1), device=device) for device in ("cpu", "cuda")
        ]
        assert apart(pair[0][0] @ pair[0][1].mT, (pair[1][0] @ pair[1][1].mT).cpu()) <= 1e-4
    espalier.structure_(there, generator=torch.Generator(device="cuda").manual_seed(1))


@pytest.mark.parametrize("width", [32, 544])
def test_autocast_changes_neither_what_is_written_nor_what_is_measured(width: int) -> None:
    """544 features are factorised in float32, which autocast would narrow to eight bits; all are measured in it."""
    plain, narrowed = (nn.MultiheadAttention(width, 8) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        here = espalier.structure_(narrowed, generator=torch.Generator().manual_seed(0)).layers[0]
        seen, fitted = espalier.audit(narrowed).layers[0], espalier.init.fit(narrowed)
    there = espalier.structure_(plain, generator=torch.Generator().manual_seed(0)).layers[0]
    for part, other in (
        (plain.in_proj_weight, narrowed.in_proj_weight),
        (plain.out_proj.weight, narrowed.out_proj.weight),
    ):
        assert torch.equal(part, other)
    assert here.measured == there.measured == seen.measured
    assert fitted == espalier.init.fit(plain)
