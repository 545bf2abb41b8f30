"""Stand-ins for the CUDA libraries that torch's arm64 wheel is linked against: every function says 'no device'.

python tests/arm64_stubs.py FOLDER_OF_TORCHS_LIBRARIES FOLDER_FOR_THE_STUBS        # see tests/arm64.sh
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

_NO_DEVICE = 100
_OURS = re.compile(
    r"_*(cuda|cu[A-Z]|cublas|cudnn|nccl|pnccl|cusparse|cusolver|cufft|curand|nvrtc|cupti|nvshmem|cufile)"
)
_SYSTEM = re.compile(
    r"lib(c|m|gcc_s|stdc\+\+|pthread|dl|rt|z|gomp|gfortran|nvpl\w*|arm_compute\w*|shm|c10\w*|torch\w*)\."
)


def main(libraries: Path, out: Path) -> None:
    """Write a library for each that is wanted and not there, with the functions that torch takes from it."""
    wanted: set[str] = set()
    missing: dict[str, set[str]] = defaultdict(set)
    defined: set[str] = set()
    for library in libraries.glob("*.so*"):
        dynamic = _output("aarch64-linux-gnu-readelf", "-d", library)
        wanted.update(name for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic) if not _SYSTEM.match(name))
        for line in _output("aarch64-linux-gnu-nm", "-D", library).splitlines():
            kind, symbol = line.split()[-2:]
            name, _, version = symbol.partition("@")
            if kind == "U" and _OURS.match(name):
                missing[version.lstrip("@")].add(name)
            elif kind != "U":
                defined.add(name)
    wanted -= {"ld-linux-aarch64.so.1"}
    out.mkdir(parents=True, exist_ok=True)
    for library in sorted(wanted):
        stem = library.partition(".so")[0]
        # What has no version, or one of another name, may be in any of them: all are loaded together.
        versions = {v: names - defined for v, names in missing.items() if v.lower().startswith(stem.lower())}
        if library.startswith("libcudart"):
            taken = tuple(w.partition(".so")[0].lower() for w in wanted)
            versions |= {v: names - defined for v, names in missing.items() if not (v and v.lower().startswith(taken))}
        _build(library, versions, out)


def _build(library: str, versions: dict[str, set[str]], out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stub.c"), Path(folder, "stub.map")
        names = sorted(set().union(*versions.values()))
        lines = [f"long {name}(void) {{ return {_NO_DEVICE if name.startswith('cuda') else 0}; }}" for name in names]
        source.write_text("\n".join(lines) + "\n")
        named = {version: held for version, held in versions.items() if version and held}
        script.write_text("\n".join(f"{v} {{ global: {'; '.join(sorted(held))}; }};" for v, held in named.items()))
        command = ["aarch64-linux-gnu-gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
        command += [f"-Wl,--version-script={script}"] if named else []
        subprocess.run([*command, "-o", out / library, source], check=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
