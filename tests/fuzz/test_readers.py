"""Damaged and hostile files by the hundred: no reader of ours raises anything but one line."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.readers import TARGETS, survives

# (place as a share of the length, bytes taken out there, bytes put in there)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), max_size=4)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(edits=EDITS, foreign=st.one_of(st.none(), st.binary(max_size=80), st.sampled_from(sorted(TARGETS))))
def test_no_file_breaks_a_reader(
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[float, int, bytes]],
    foreign: bytes | str | None,
) -> None:
    content = TARGETS[name][1] if foreign is None else foreign if isinstance(foreign, bytes) else TARGETS[foreign][1]
    for place, taken, put in edits:
        at = int(place * len(content))
        content = content[:at] + put + content[at + taken :]
    survives(name, content, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_are_read(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A fuzzer that starts from what is refused anyway tests nothing; two samples are no real ones."""
    from espalier.errors import EspalierError

    target, sample = TARGETS[name]
    folder = tmp_path_factory.mktemp("sample")
    if name == "manifest":
        (folder / "file").write_bytes(b"content")
    if name in ("statistics", "cifar"):
        with pytest.raises(EspalierError, match=r"statistics|md5"):
            target(sample, folder)
    else:
        target(sample, folder)


def test_long_headers_and_deep_json(tmp_path_factory: pytest.TempPathFactory) -> None:
    deep = b"[" * 100_000
    many_axes = bytes([0, 0, 8, 255]) + bytes(4 * 255)
    huge_axes = bytes([0, 0, 8, 2]) + b"\xff" * 8
    header = (2**40).to_bytes(8, "little") + b"{}"
    for name in TARGETS:
        for content in (deep, many_axes, huge_axes, header, b"", b"\0" * 1000, b"\xff\xfe" * 50):
            survives(name, content, tmp_path_factory.mktemp("long"))
