"""Compile the C++ kernels once per machine and keep the library in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
_TIMEOUT_SECONDS = 300


class KernelBuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def build() -> Path:
    """Return the compiled kernels' shared library, compiling it when the cache has none.

    The file's name is a digest of the sources, the compiler, the flags, the processor and torch's version, and it
    appears by rename: two processes may build at once, and neither sees half a library.

    Raises:
        KernelBuildError: no C++ compiler, no writable cache folder, or the compilation failed.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not compiler or not shutil.which(compiler[0]):
        raise KernelBuildError(f"no C++ compiler found ({' '.join(named) or 'g++, clang++ or $CXX'})")
    flags = [*_FLAGS, *_processor_flags()]
    texts = [path.read_text() for path in (*_sources(), *sorted(FOLDER.glob("*.hpp")))]
    key = "\n".join([*texts, *compiler, _version(compiler), *flags, _processor(), torch.__version__])
    target = cache_folder() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    try:
        if target.exists():
            return target
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
            part = Path(scratch) / target.name
            _compile(compiler, flags, part)
            os.replace(part, target)
    except OSError as error:
        raise KernelBuildError(f"cannot write {target.parent}: {error}") from error
    return target


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``$ESPALIER_CACHE``, else ``$XDG_CACHE_HOME/espalier`` or its default."""
    chosen = os.environ.get("ESPALIER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "espalier"


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cpp"))


def _compile(compiler: list[str], flags: list[str], out: Path) -> None:
    """Compile with threads if that works, else without; raise with the compiler's first complaint."""
    complaint = ""
    for threads in (["-fopenmp", *_torch_openmp()], ["-fopenmp"], []):
        command = [*compiler, *flags, *map(str, _sources()), "-o", str(out), *threads]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelBuildError(f"{compiler[0]} did not run: {error}") from error
        if done.returncode == 0:
            return
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
    raise KernelBuildError(f"{compiler[0]} failed: {complaint}")


def _torch_openmp() -> list[str]:
    # Two OpenMP runtimes in one process keep two pools of spinning threads that steal each other's cores: share
    # torch's. It is already loaded, so naming the file as an input is enough.
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else []


def _processor_flags() -> list[str]:
    return ["-march=native"] if platform.machine().lower() in ("x86_64", "amd64") else ["-mcpu=native"]


def _processor() -> str:
    """Return what ``-march=native`` depends on, so that a shared home never serves another processor's library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(f"{compiler[0]} --version failed: {error}") from error
