"""The kernel libraries, one for each kind of processor: compiled when the package is built, and never required.

They are plain shared libraries that ``espalier.nn.kernels.library`` opens with ctypes: nothing of Python or torch is in
them, so that one wheel serves every version of both. A build without a working compiler leaves them out and says so.
"""

import copy
import hashlib
import os
import platform
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

FOLDER = Path("src/espalier/nn/kernels")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-wrapv", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# Kernels pass vectors inside one file only, so their ABI is nobody's; GCC 12 warns of its own headers.
HIDE = ["-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# The second level is for processors without AVX2, whose every vector takes two instructions: there -O3 gains nothing,
# and takes three times as long to compile.
LEVELS = {
    "x86_64": {
        "x86_64_v2": ["-march=x86-64-v2", "-O2"],
        "x86_64_v3": ["-march=x86-64-v3"],
        "x86_64_v4": ["-march=x86-64-v4"],
        "x86_64_v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    },
    "arm64": {"arm64": []},
}
NAMES = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}

# Python's own flags on macOS ask for two processors at once, which no -march fits.
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")


class BuildKernels(build_ext):
    """Compile what can be compiled, and write each library's SHA-256 beside it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.failed: dict[str, str] = {}

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit_…: this is not a Python module

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)  # with a folder of its own: the libraries are made of the same sources, at the same time
        own.build_temp = os.path.join(self.build_temp, ext.name)
        try:
            super(BuildKernels, own).build_extension(ext)
        except (BaseError, CCompilerError, CompileError, LinkError, OSError) as error:
            self.failed[ext.name.rpartition(".")[2]] = str(error)

    def run(self) -> None:
        super().run()
        for ext in self.extensions:
            library = Path(self.get_ext_fullpath(ext.name))
            checksum = library.with_suffix(".sha256")
            if ext.name.rpartition(".")[2] in self.failed:  # a library of an earlier build is not of these sources
                library.unlink(missing_ok=True)
                checksum.unlink(missing_ok=True)
            else:
                checksum.write_text(f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {library.name}\n")
        if self.failed:
            reason = textwrap.shorten(next(iter(self.failed.values())), 160)
            print(
                f"espalier: built without the C++ kernels {', '.join(sorted(self.failed))} ({reason}); what they "
                "compute runs in plain torch, several times slower",
                file=sys.stderr,
            )


class AnyPython(bdist_wheel):
    """Tag the wheel for every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def kernels() -> list[Extension]:
    """Return one extension for each level of the processor that the wheel is for; none for a processor unknown here."""
    machine = NAMES.get(sysconfig.get_platform().rpartition("-")[2].lower(), NAMES.get(platform.machine().lower(), ""))
    sources = sorted(path.as_posix() for path in FOLDER.glob("*.cpp"))
    headers = sorted(path.as_posix() for path in FOLDER.glob("*.hpp"))
    return [
        Extension(
            f"espalier.nn.kernels.{name}",
            sources,
            depends=headers,
            extra_compile_args=[*FLAGS, *HIDE, *flags],
            language="c++",
            optional=True,
        )
        for name, flags in LEVELS.get(machine, {}).items()
    ]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython})
