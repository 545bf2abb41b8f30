"""Every layer and model on the device, forward and backward, against itself in float64 on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases_gpu import CASES, NETWORKS, ORTHOGONAL, SEQUENCE, Case, oracle, run, with_decisions, worst_error
from espalier.nn import causal_conv_silu, mixing_matrix, selective_scan, ssd
from reference.selective_scan_reference import selective_scan_loop
from reference.ssd_reference import ssd_loop

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:espalier runs Mamba:UserWarning")]

# Float32 rounding (6e-8) grown by the longest chains here: 700 steps of a scan, or ten orthogonal layers in a row.
FLOAT32 = 2e-4
CAPTURED = {**ORTHOGONAL, **SEQUENCE}
IMAGES = {name: case for name, case in NETWORKS.items() if len(case.shape) == 4}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_in_float32(case: Case, device: torch.device) -> None:
    module, x = case.seeded()
    exact, sides = with_decisions(lambda: oracle(module, x))
    found, own_sides = with_decisions(lambda: run(module.to(device), x.to(device)))
    # A gradient jumps where rounding exchanges two numbers that MaxMin sorts: two of 295,000 are worth 1e-2. Such
    # gradients are compared in float64 alone.
    if any(not torch.equal(one, two) for one, two in zip(sides, own_sides, strict=True)):
        found, exact = {"output": found["output"]}, {"output": exact["output"]}
    error, where = worst_error(found, exact)
    assert error <= FLOAT32, f"{where} is off by {error:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_is_exact(case: Case, device: torch.device) -> None:
    module, x = case.seeded()
    exact = oracle(module, x)
    x = x.double() if x.is_floating_point() else x
    error, where = worst_error(run(module.double().to(device), x.to(device)), exact)
    assert error <= 1e-8, f"{where} is off by {error:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bf16_autocast_is_near(case: Case, device: torch.device) -> None:
    module, x = case.seeded()
    with torch.no_grad():
        exact = copy.deepcopy(module)(x)
        module, x = module.to(device), x.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            y = module(x)
    assert torch.isfinite(y).all()
    error = float((y.cpu().float() - exact).norm() / exact.norm())
    assert error <= 0.05, f"off by {error:.1e}"


@pytest.mark.parametrize("case", CAPTURED.values(), ids=CAPTURED)
def test_training_steps_do_not_wait_and_can_be_captured(case: Case, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    module, x = case.seeded()
    module, x = module.to(device).train(), x.to(device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # fills the tables that are kept for a size
            expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ORTHOGONAL.values(), ids=ORTHOGONAL)
def test_evaluation_uses_what_training_has(case: Case, device: torch.device) -> None:
    module, x = case.seeded()
    module, x = module.to(device), x.to(device)
    trained = module.train()(x)
    for _ in range(2):  # the second pass reads the cache
        torch.testing.assert_close(module.eval()(x), trained, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        next(module.parameters()).mul_(-0.5)
    torch.testing.assert_close(module.eval()(x), module.train()(x), rtol=1e-4, atol=1e-5)


def test_orthogonal_layers_keep_norms(device: torch.device) -> None:
    for name in ("conv2d", "conv2d-large-map", "conv2d-many-channels", "conv3d"):
        module, x = ORTHOGONAL[name].seeded()
        module, x = module.to(device).eval(), x.to(device)
        with torch.no_grad():
            y = module(x) - module(torch.zeros_like(x))  # the bias taken off
        sizes = y.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_channels_last_and_contiguous_agree(case: Case, device: torch.device) -> None:
    module, x = case.seeded()
    module, x = module.to(device), x.to(device)
    one = run(copy.deepcopy(module), x)
    two = run(module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    error, where = worst_error(two, {name: value.cpu().double() for name, value in one.items()})
    assert error <= FLOAT32, f"{where} is off by {error:.1e}"


def check_scan(scan: Any, loop: Any, tensors: tuple[Tensor, ...], device: torch.device, **rest: Any) -> None:
    """Compare (y, final state) and all gradients with the float64 loop's; a second run must repeat every bit."""
    exact_inputs = [t.double().requires_grad_() for t in tensors]
    exact = loop(*exact_inputs)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator) for t in exact]
    gradients = torch.autograd.grad(exact, exact_inputs, [w.double() for w in weights])
    exact = [t.detach() for t in (*exact, *gradients)]
    runs = []
    for _ in range(2):
        inputs = [t.to(device).requires_grad_() for t in tensors]
        found = scan(*inputs[:6], initial_state=inputs[6], return_state=True, **rest)
        gradients = torch.autograd.grad(found, inputs, [w.to(device) for w in weights])
        runs.append([t.detach() for t in (*found, *gradients)])
    for place, (mine, again, other) in enumerate(zip(*runs, exact, strict=True)):
        error = float((mine.cpu().double() - other).norm() / other.norm())
        assert error <= 1e-4, f"tensor {place} is off by {error:.1e}"
        assert torch.equal(mine, again), f"tensor {place} does not repeat"


@pytest.mark.parametrize(("channels", "size"), [(6, 5), (40, 16), (9, 64)])
def test_selective_scan_against_the_loop(channels: int, size: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(channels)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x, delta = normal(2, 70, channels), torch.rand(2, 70, channels, generator=generator)
    a, b, c = -torch.rand(channels, size, generator=generator), normal(2, 70, size), normal(2, 70, size)
    inputs = (x, delta, a, b, c, normal(channels), normal(2, channels, size))
    check_scan(selective_scan, selective_scan_loop, inputs, device)


def test_ssd_against_the_loop(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x, delta = torch.randn(2, 70, 4, 6, generator=generator), torch.rand(2, 70, 4, generator=generator)
    a, b, c = -torch.rand(4, generator=generator), *torch.randn(2, 2, 70, 2, 5, generator=generator)
    d, initial = torch.randn(4, generator=generator), torch.randn(2, 4, 5, 6, generator=generator)
    check_scan(ssd, ssd_loop, (x, delta, a, b, c, d, initial), device, chunk_size=16)


def test_causal_convolution_against_a_plain_one(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 9, 6, generator=generator), torch.randn(6, 4, generator=generator)
    bias, history = torch.randn(6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    padded = torch.cat([history, x], dim=1).double()
    exact = F.silu(F.conv1d(padded.mT, weight.double()[:, None], bias.double(), groups=6).mT)
    found = causal_conv_silu(x.to(device), weight.to(device), bias.to(device), history=history.to(device))
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_steps_and_mixing_matrix_follow_the_whole_sequence(name: str, device: torch.device) -> None:
    module, x = CASES[name].seeded()
    module, x = module.to(device).eval(), x.to(device)
    with torch.no_grad():
        whole = module(x)
        first, state = module(x[:, :30], return_state=True)
        rest = []
        for step in range(30, x.shape[1]):
            y, state = module(x[:, step : step + 1], state=state, return_state=True)
            rest.append(y)
        torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(mixing_matrix(module, x[:1, :9])).all()
