"""The compiled kernels as files: what a build leaves, what the loader accepts, what each level computes."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.nn import (
    CayleyConv2d,
    DepthwiseConv2d,
    GatedRMSNorm,
    backend,
    causal_conv_silu,
    selective_scan,
    ssd,
    use_backend,
)
from espalier.nn.depthwise import mixing_block, pointwise_block
from espalier.nn.kernels import arguments, library
from espalier.nn.kernels.library import KernelError, call, open_library

ROOT = Path(__file__).parents[3]
needs_kernels = pytest.mark.skipif(
    not any(path.exists() for path in library.candidates()), reason="the package was built without a compiler"
)
INSTALLED = """
import warnings, torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import espalier
    from espalier.nn import Mamba1, backend
    net = Mamba1(8, 4, generator=torch.Generator().manual_seed(0))
    y = net(torch.arange(72.0).sin().view(1, 9, 8))
told = sum("plain torch" in str(one.message) for one in seen)
print(backend().name, told, y.sum().item(), espalier.__file__, sep="|")
"""


def build_wheel(folder: Path, compiler: str) -> tuple[Path, str]:
    """Build a wheel of the tree with another C++ compiler, and return it and what the build said."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    left_out = shutil.ignore_patterns("*.so", "*.sha256", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tree / "src", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, tree]
    # The search path stays: only the compiler is exchanged, by the variables that every build tool reads.
    environment = {"PATH": "/usr/bin:/bin", "CC": compiler, "CXX": compiler, "PIP_NO_INPUT": "1", "LANG": "C.UTF-8"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, run.stdout + run.stderr


def import_installed(wheel: Path, folder: Path) -> list[str]:
    """Unpack the wheel into a folder of its own and run a Mamba layer from there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {"PYTHONPATH": str(folder), "PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", INSTALLED], env=environment, capture_output=True, text=True, timeout=120, cwd=folder
    )
    assert run.returncode == 0, run.stderr
    parts = run.stdout.strip().split("|")
    assert Path(parts.pop()).is_relative_to(folder)
    return parts


def output_here() -> float:
    from espalier.nn import Mamba1

    net = Mamba1(8, 4, generator=torch.Generator().manual_seed(0))
    return net(torch.arange(72.0).sin().view(1, 9, 8)).sum().item()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs /bin/false")
def test_a_build_without_a_compiler_succeeds_says_so_once_and_computes_the_same(tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path, "/bin/false")
    assert said.count("built without the C++ kernels") == 1
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "kernels" in name and not name.endswith(".py")]
    name, warnings, total = import_installed(wheel, tmp_path / "site")
    assert (name, warnings) == ("torch", "1")
    assert float(total) == pytest.approx(output_here(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script as compiler")
@needs_kernels
def test_the_wheel_carries_the_kernels_and_needs_no_compiler_to_run_them(tmp_path: Path) -> None:
    # Compiling took place when this environment was made; here "linking" takes its libraries, so that what is tested
    # is the way from the linker's output through the wheel to an import.
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nwhile [ "$1" ]; do [ "$1" = -o ] && out="$2"; shift; done\n'
        f'case "$out" in *.so) cp "{library.FOLDER}/${{out##*/}}" "$out";; *) : > "$out";; esac\n'
    )
    compiler.chmod(0o755)
    wheel, said = build_wheel(tmp_path, str(compiler))
    assert "built without" not in said
    assert "-py3-none-" in wheel.name
    wanted = {f"espalier/nn/kernels/{path.stem}{end}" for path in library.candidates() for end in (".so", ".sha256")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= names
    assert not [name for name in names if name.endswith(("pp", ".o"))]
    name, warnings, total = import_installed(wheel, tmp_path / "site")
    assert (name, warnings) == ("compiled", "0")
    assert float(total) == pytest.approx(output_here(), rel=1e-5)


@needs_kernels
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_library_is_refused_before_it_is_opened(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original = library.candidates()[-1]
    content = original.read_bytes()
    copy = tmp_path_factory.mktemp("damaged") / original.name
    at = data.draw(st.integers(0, len(content) - 1), label="at")
    if data.draw(st.booleans(), label="truncated"):
        content = content[:at]
    else:
        content = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    copy.write_bytes(content)
    shutil.copy(original.with_suffix(".sha256"), copy.parent)
    with pytest.raises(KernelError, match="is damaged"):
        open_library(copy)


@needs_kernels
@pytest.mark.parametrize("note", [None, b"", b"\xff\xfe\x00", b"0" * 64])
def test_a_library_without_its_checksum_is_refused(tmp_path: Path, note: bytes | None) -> None:
    original = library.candidates()[-1]
    copy = tmp_path / original.name
    shutil.copy(original, copy)
    if note is not None:
        copy.with_suffix(".sha256").write_bytes(note)
    with pytest.raises(KernelError):
        open_library(copy)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library"])
def test_what_is_no_library_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    with pytest.raises(KernelError, match="cannot use"):
        open_library(path)


@needs_kernels
def test_structures_of_another_size_are_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(arguments.Arguments):
        _fields_ = (*arguments.CONV_FORWARD._fields_, ("more", ctypes.c_int64))
        kernel = "conv_forward"

    path, opened = library._library()
    given = arguments.CONV_FORWARD(size=ctypes.sizeof(Longer), threads=1)
    assert opened.conv_forward_f32(ctypes.byref(given)) == 1
    monkeypatch.setattr(library, "KINDS", [Longer])
    with pytest.raises(KernelError, match="other sources"):
        open_library(path)


def test_a_call_names_every_argument() -> None:
    with pytest.raises(TypeError, match="planes_factor takes"):
        call(arguments.PLANES_FACTOR, torch.float32, re=torch.ones(1), im=torch.ones(1))


@pytest.mark.parametrize(
    ("level", "fast_pairs", "damaged", "chosen"),
    [
        (5, 1, (), "v4_bf16"),
        (5, 0, (), "v4"),  # it can run, and is slower
        (4, 0, (), "v4"),
        (3, 1, (), "v3"),
        (2, 0, (), "v2"),
        (5, 1, ("v4_bf16",), "v4"),
        (4, 0, ("v4",), "v3"),
        (3, 0, ("v3",), "v2"),
    ],
)
def test_the_best_library_for_the_processor_is_chosen(
    monkeypatch: pytest.MonkeyPatch, level: int, fast_pairs: int, damaged: tuple[str, ...], chosen: str
) -> None:
    def pretend(path: Path) -> SimpleNamespace:
        if path.stem in {f"x86_64_{name}" for name in damaged}:
            raise KernelError("damaged")
        return SimpleNamespace(espalier_processor_level=lambda: level, espalier_fast_pairs=lambda: fast_pairs)

    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library, "open_library", pretend)
    assert library._library.__wrapped__()[0].stem == f"x86_64_{chosen}"


def test_an_old_or_unknown_processor_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "open_library", lambda path: SimpleNamespace(espalier_processor_level=lambda: 0))
    monkeypatch.setattr(library.platform, "machine", lambda: "AMD64")
    with pytest.raises(KernelError, match="below x86_64_v2"):
        library._library.__wrapped__()
    monkeypatch.setattr(library.platform, "machine", lambda: "riscv64")
    with pytest.raises(KernelError, match="riscv64"):
        library._library.__wrapped__()


def _levels() -> list[str]:
    """Return the libraries that this processor can run."""
    try:
        paths = library.candidates()
        level = open_library(paths[-1]).espalier_processor_level()
    except (KernelError, IndexError):
        return []
    return [path.stem for path in paths if path.exists() and library._X86_LEVELS.get(path.stem, 0) <= level]


@pytest.fixture(params=_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    path = library.FOLDER / f"{request.param}.so"
    opened = open_library(path)
    monkeypatch.setattr(library, "_library", lambda: (path, opened))
    return request.param


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _hot_loops(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return every operation that has kernels, as a function of x (2, 13, 24)."""
    draw = lambda *shape, seed=1: _draw(*shape, dtype=dtype, seed=seed)  # noqa: E731
    steps, decays = draw(2, 13, 24).abs(), -draw(24, 5).abs()
    layer = CayleyConv2d(6, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = GatedRMSNorm(24, groups=2).to(dtype)
    torch.manual_seed(0)
    depthwise = DepthwiseConv2d(24, (5, 3)).to(dtype)
    pointwise, batch_norm = nn.Conv2d(24, 24, 1).to(dtype), nn.BatchNorm2d(24).to(dtype)
    return {
        "scan": lambda x: selective_scan(x, steps, decays, draw(2, 13, 5), draw(2, 13, 5, seed=2)),
        "ssd": lambda x: ssd(
            x.unflatten(2, (4, 6)), steps[..., :4], decays[:4, 0], draw(2, 13, 2, 5), draw(2, 13, 2, 5), chunk_size=4
        ).flatten(2),
        "conv": lambda x: causal_conv_silu(x, draw(24, 4), draw(24)),
        "norm": lambda x: norm(x, draw(2, 13, 24)),
        "depthwise": lambda x: mixing_block(x.reshape(2, 24, 13, 1), depthwise, nn.GELU(), batch_norm).reshape(
            2, 13, 24
        ),
        "pointwise": lambda x: pointwise_block(x.reshape(2, 24, 13, 1), pointwise, nn.GELU(), batch_norm).reshape(
            2, 13, 24
        ),
        "orthogonal": lambda x: layer(x[:, :12].reshape(4, 6, 4, 6)).reshape(2, 12, 24),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["scan", "ssd", "conv", "norm", "depthwise", "pointwise", "orthogonal"])
def test_every_level_computes_what_torch_does(level: str, name: str, threads: int, dtype: torch.dtype) -> None:
    function, before = _hot_loops(dtype)[name], torch.get_num_threads()
    results = {}
    try:
        torch.set_num_threads(threads)
        for choice in ("auto", "torch"):
            x = _draw(2, 13, 24, dtype=dtype, seed=0).requires_grad_()
            with use_backend(choice):
                y = function(x)
            y.backward(_draw(*y.shape, dtype=dtype, seed=3))
            results[choice] = (y.detach(), x.grad)
    finally:
        torch.set_num_threads(before)
    scale = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(results["auto"], results["torch"], rtol=scale, atol=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [32, 20])  # rows of whole cache lines, and others
def test_results_stored_past_the_caches_are_the_same(
    level: str, channels: int, threads: int, dtype: torch.dtype
) -> None:
    cache = ctypes.c_int64.in_dll(library._library()[1], "espalier_last_cache")
    kept, before = cache.value, torch.get_num_threads()
    layer = CayleyConv2d(channels, channels, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    try:
        torch.set_num_threads(threads)
        for choice, size in (("torch", kept), ("auto", 1)):  # nothing fits a cache of one byte
            cache.value = size
            x = _draw(8, channels, 6, 8, dtype=dtype, seed=0).requires_grad_()
            with use_backend(choice):
                y = layer.train()(x)
                y.backward(_draw(*y.shape, dtype=dtype, seed=1))
                evaluated = layer.eval()(x.detach().contiguous(memory_format=torch.channels_last))
            results.append((y.detach(), x.grad, layer.weight.grad, evaluated.detach()))
            layer.zero_grad()
    finally:
        cache.value = kept
        torch.set_num_threads(before)
    scale = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(results[1], results[0], rtol=scale, atol=scale)


@pytest.mark.parametrize("kernel", [(5, 5), (3, 4), (2, 7), (3, 1), (1, 1)])
@pytest.mark.parametrize("side", [(9, 16), (6, 5)])
def test_bfloat16_maps_are_summed_in_float32_on_every_level(
    level: str, kernel: tuple[int, int], side: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    padding = (kernel[0] // 2, kernel[1] // 2)
    layer = DepthwiseConv2d(20, kernel, padding=padding)
    twin = nn.Conv2d(20, 20, kernel, padding=padding, groups=20, dtype=torch.float64)
    twin.load_state_dict({**layer.state_dict(), "weight": layer.weight.bfloat16()})  # as autocast rounds it
    x = _draw(2, 20, *side, dtype=torch.float32, seed=1).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    with use_backend("auto"), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    up = _draw(*y.shape, dtype=torch.float32, seed=2).bfloat16()
    y.backward(up)
    reference = twin(exact)
    reference.backward(up.double())
    for found, wanted, rounding in (
        (y.detach(), reference.detach(), 2**-8),
        (x.grad, exact.grad, 2**-8),
        (layer.weight.grad, twin.weight.grad, 2**-20),
        (layer.bias.grad, twin.bias.grad, 2**-20),
    ):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=rounding * float(wanted.abs().max()))


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_what_is_infinite_stays_within_its_windows_on_every_level(level: str, columns: int) -> None:
    layer = DepthwiseConv2d(8, (1, columns), padding=(0, 1), dtype=torch.bfloat16)
    x = torch.zeros(1, 8, 3, 12, dtype=torch.bfloat16)
    x[0, :, 1, 6] = float("inf")
    sees = nn.functional.conv2d(x.isinf().float(), torch.ones(8, 1, 1, columns), padding=(0, 1), groups=8) > 0
    with use_backend("auto"):
        assert torch.equal(layer(x).isfinite(), ~sees)


def test_the_kernels_share_the_threads_of_torch() -> None:
    if backend().name == "compiled" and sys.platform == "linux":
        assert library._team() is not None
