"""Memory for large results: what is alive is nobody else's, what was freed is used again, and what waits has bounds."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from espalier.models import ConvMixer
from espalier.nn import CayleyConv2d, backend, empty_cache, use_backend
from espalier.nn.kernels.library import LARGE, fresh

pytestmark = [
    pytest.mark.skipif(backend().name != "compiled", reason="the package was built without a compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's own memory is used"),
]
LIKE = torch.empty(0)
ROLLUP = Path("/proc/self/smaps_rollup")
tells_memory = pytest.mark.skipif(not ROLLUP.exists(), reason="the system does not say what is lazily freed")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(1,), (0, 7), (3, 5), (2, 3, 500, 700), (LARGE + 1,)])
def test_it_is_a_contiguous_tensor_of_that_shape_and_kind(size: tuple[int, ...], dtype: torch.dtype) -> None:
    made = fresh(LIKE.to(dtype), *size)
    assert made.shape == size
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert not made.requires_grad
    made.fill_(2)
    assert made.double().sum() == 2 * made.numel()


def test_what_is_alive_is_no_one_elses_and_what_was_freed_is_taken_again() -> None:
    alive = [fresh(LIKE, 700, 1000) for _ in range(6)]
    for number, tensor in enumerate(alive):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(alive))
    freed = {tensor.data_ptr() for tensor in alive[:3]}
    view = alive[0][5:]  # keeps the first one alive
    del alive[:3], tensor
    again = [fresh(LIKE, 700, 1000) for _ in range(3)]
    taken = {tensor.data_ptr() for tensor in again}
    assert len(freed & taken) == 2
    for tensor in again:
        tensor.fill_(-1)
    assert bool((view == 0).all())


def test_threads_share_no_memory() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(60):
            mine = fresh(LIKE, 300_000 + 1000 * (turn % 3)).fill_(number)
            if not bool((mine.mul_(2) == 2 * number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def kept(name: str) -> int:
    """Bytes of this process that the system calls ``name``."""
    lines = ROLLUP.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@tells_memory
def test_a_quarter_of_a_gibibyte_waits_as_it_is_and_the_system_may_have_the_rest() -> None:
    empty_cache()
    before = kept("Rss") - kept("LazyFree")
    many = [fresh(LIKE, 3 << 20).fill_(1) for _ in range(50)]  # of 12 MiB
    assert kept("Rss") - kept("LazyFree") - before > 550 << 20
    del many
    assert 200 << 20 < kept("Rss") - kept("LazyFree") - before < 300 << 20
    again = [fresh(LIKE, 3 << 20) for _ in range(50)]
    assert kept("Rss") - before < 650 << 20
    for number, tensor in enumerate(again):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(again))
    del again, tensor
    empty_cache()
    assert kept("Rss") - before < 50 << 20


@tells_memory
def test_what_waits_and_what_is_used_are_no_more_than_was_ever_used_at_once() -> None:
    code = (
        "import torch; from test_fresh import LIKE, fresh, kept; torch.set_num_threads(1)\n"
        "fresh(LIKE, 1 << 20).fill_(1); before = kept('Rss')\n"
        "for size in range(3 << 20, 4 << 20, 1 << 17):\n"  # nothing that waits fits the next size
        "    many = [fresh(LIKE, size).fill_(1) for _ in range(40)]\n"
        "    del many\n"
        "assert kept('Rss') - before < 700 << 20, kept('Rss') - before\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parent)


def test_such_tensors_are_saved_copied_and_shared_as_torchs_are() -> None:
    made = fresh(LIKE, 600, 700).normal_(generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), made)
    assert torch.equal(copy.deepcopy(made), made)
    before = made.clone()
    assert torch.equal(made.share_memory_(), before)


def test_a_process_ends_with_such_tensors_alive_and_its_children_have_their_own() -> None:
    code = (
        "import os, torch; from espalier.nn.kernels.library import fresh; torch.set_num_threads(1)\n"
        "kept = fresh(torch.empty(0), 1 << 20).fill_(1); freed = fresh(torch.empty(0), 1 << 20).fill_(1); del freed\n"
        "child = os.fork()\n"
        "own = fresh(torch.empty(0), 1 << 20).fill_(2 if child else 3); kept += own\n"
        "assert kept.sum().item() == (3 if child else 4) * kept.numel()\n"
        "assert not child or os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["ConvMixer", "orthogonal"])
def test_steps_on_large_maps_are_those_of_plain_torch(kind: str) -> None:
    def steps(name: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net: torch.nn.Module = CayleyConv2d(32, 32, 3)
            size = (4, 32, 48, 48)
            if kind == "ConvMixer":
                net, size = ConvMixer(48, 2, 5, 2, num_classes=3), (4, 3, 80, 80)
        found = []
        with use_backend(name):
            for _ in range(3):
                y = net(torch.randn(size, generator=generator))
                net.zero_grad()
                y.backward(torch.randn(y.shape, generator=generator))
                found += [y.detach().clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
        return found

    for ours, wanted in zip(steps("compiled"), steps("torch"), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))
