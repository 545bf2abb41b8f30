"""Shards: what follows the last readable header is never taken for the end, and every usual writer's is read."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from espalier.data.shards import list_shards
from espalier.errors import EspalierError

COUNT = 12


def content_of(number: int) -> bytes:
    return bytes([number + 1]) * (300 * number + 1)


def samples() -> dict[str, bytes]:
    """Return images that are none, which listing does not care about, and their classes."""
    found = {}
    for number in range(COUNT):
        stem = f"{'long' * 30 if number % 5 == 0 else 'short'}/{number:04}"
        found |= {f"{stem}.jpg": content_of(number), f"{stem}.cls": str(number % 2).encode()}
    return found


def write(path: Path, how: int = tarfile.PAX_FORMAT, mode: Literal["w", "w|"] = "w") -> bytes:
    with tarfile.open(path, mode, format=how) as archive:
        for name, content in samples().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def by_gnu_tar(path: Path, *options: str) -> None:
    if (tar := shutil.which("tar")) is None:
        pytest.skip("there is no tar: install GNU tar")
    for name, content in samples().items():
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(content)
    subprocess.run([tar, "-cf", path, *options, *samples()], cwd=path.parent, check=True)


def shortest(path: Path) -> None:
    """Write the end that POSIX asks for, two blocks of zeros, and no padding to a record."""
    content = write(path)
    path.write_bytes(content[: -(-len(content.rstrip(b"\0")) // 512) * 512 + 1024])


@pytest.mark.parametrize(
    "writer",
    [
        lambda path: write(path, tarfile.USTAR_FORMAT),
        lambda path: write(path, tarfile.GNU_FORMAT),
        lambda path: write(path, tarfile.PAX_FORMAT),
        by_gnu_tar,
        lambda path: by_gnu_tar(path, "--blocking-factor=1"),
        lambda path: by_gnu_tar(path, "--format=posix"),
        lambda path: write(path, mode="w|"),  # as webdataset's TarWriter does
        shortest,
    ],
)
def test_shards_of_every_writer_are_listed_whole(tmp_path: Path, writer: Callable[[Path], object]) -> None:
    writer(tmp_path / "a.tar")
    listing = list_shards(tmp_path)
    splits = (listing.train, listing.test)
    found = [split.read(index) for split in splits for index in range(len(split))]
    assert sorted(found) == sorted(content_of(number) for number in range(COUNT))


def refusal(path: Path) -> str:
    with pytest.raises(EspalierError) as caught:
        list_shards(path.parent)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def headers(path: Path) -> list[int]:
    """Return where the blocks of headers lie, from how the format pads: tarfile's own offsets are not asked."""
    content, place, found = path.read_bytes(), 0, []
    while content[place] != 0:
        found.append(place)
        size = int(content[place + 124 : place + 135], 8)
        place += 512 + -(-size // 512) * 512
    return [*found, place]


def test_no_damage_to_a_header_passes_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = write(path, tarfile.GNU_FORMAT)
    *places, end = headers(path)
    assert len(places) > 2 * COUNT, "with those of long names"
    for number, place in enumerate(places):
        block = bytearray(whole[place : place + 512])
        block[number * 13 % 512] ^= 1 << number % 8
        damages = {
            "one bit flipped": whole[:place] + block + whole[place + 512 :],
            "zeroed": whole[:place] + bytes(512) + whole[place + 512 :],
            "cut off before it": whole[:place],
            "cut off within it": whole[: place + 200],
            "cut off and padded": whole[:place] + bytes(512),
            "overwritten to the end": whole[:place] + b"\xff" * (len(whole) - place),
        }
        for content in damages.values():
            path.write_bytes(content)
            refusal(path)
    path.write_bytes(whole[:end] + bytes(10240) + whole)
    assert "one behind the other" in refusal(path)
    path.write_bytes(whole[:-1] + b"x")
    assert str(end) in refusal(path)


@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"0x1f       \0"])
def test_a_header_of_an_impossible_size_is_one_line(tmp_path: Path, size: bytes, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    whole = bytearray(write(path, tarfile.USTAR_FORMAT))
    place = headers(path)[1]
    whole[place + 124 : place + 136], whole[place + 156 : place + 157] = size, kind
    whole[place + 148 : place + 156] = b" " * 8
    whole[place + 148 : place + 156] = b"%06o\0 " % sum(whole[place : place + 512])  # so that it is believed
    path.write_bytes(whole)
    refusal(path)


def test_an_image_replaced_within_a_shard_changes_its_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = write(path)

    def fingerprints() -> list[str]:
        os.utime(path, ns=(10**18, 10**18))
        listing = list_shards(path)
        return [images.fingerprint(8) for images in (listing.train, listing.test)]

    before = fingerprints()
    for number in range(COUNT):
        content = content_of(number)
        path.write_bytes(whole.replace(content, content[:-1] + b"\xff"))
        after = fingerprints()
        assert (after[0] != before[0]) + (after[1] != before[1]) == 1, "the set that the image is in"
    path.write_bytes(whole)
    assert fingerprints() == before


def test_names_of_two_lines_are_told_in_one(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.tar"
    for name in ("c\nd.cls", "c\nd.jpg"):
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo(name))
        with pytest.raises(EspalierError) as caught:
            list_shards(tmp_path)
        assert "a\\nb.tar" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_sample_of_two_classes_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("a.jpg", b"x"), ("a.cls", b"0"), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(EspalierError, match="holds two classes of the name /a: rename one"):
        list_shards(tmp_path)


def sample(name: str, ending: str = ".png") -> list[tarfile.TarInfo]:
    """Return the empty image and the class of a sample; ``pack`` writes them."""
    return [tarfile.TarInfo(name + ending), tarfile.TarInfo(f"{name}.cls")]


def pack(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as archive:
        for member in members:
            is_class = member.isreg() and member.name.lower().endswith(".cls")
            member.size = int(is_class)
            archive.addfile(member, io.BytesIO(b"0") if is_class else None)


@pytest.mark.parametrize("name", ["cat.0", "set/cat.0", "v1.5_cat", "cat.", "cat.0.left", "a.b/cat.0"])
@pytest.mark.parametrize("ending", [".png", ".JPEG", ".cls"])
def test_a_point_within_the_name_of_a_sample_is_refused(tmp_path: Path, name: str, ending: str) -> None:
    """WebDataset takes "cat" for the sample and "0.png" for the kind of file."""
    pack(tmp_path / "a.tar", *sample("0"), *sample("1"), tarfile.TarInfo(name + ending))
    message = refusal(tmp_path / "a.tar")
    assert f"{name}{ending} has a point within its name" in message
    renamed = message.partition("rename it, as ")[2].partition(",")[0]
    pack(tmp_path / "a.tar", *sample("0"), *sample("1"), *sample(renamed.partition(".")[0]))
    listing = list_shards(tmp_path)
    assert len(listing.train) + len(listing.test) == 3, "the name that the message gives is taken"


def test_points_in_folders_and_in_what_is_no_image_are_nobodys_matter(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("v1.0.png")
    folder.type = tarfile.DIRTYPE
    others = [tarfile.TarInfo(name) for name in ("0.meta.json", "notes", "._0.png", "v1.0.png/.x.y.png", "0.png.md5")]
    pack(tmp_path / "a.tar", folder, *others, *sample("v1.0.png/0"), *sample("v1.0/1", ".JPG"), *sample("./2", ".Tiff"))
    listing = list_shards(tmp_path)
    assert len(listing.train) + len(listing.test) == 3


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("place", [0, 1])
def test_an_image_or_class_that_is_a_link_is_not_left_out(tmp_path: Path, kind: bytes, place: int) -> None:
    members = sample("9")
    members[place].type, members[place].linkname = kind, "0.png"
    pack(tmp_path / "a.tar", *sample("0"), *sample("1"), *members)
    assert f"{members[place].name} is a link or no file: pack with tar --deref" in refusal(tmp_path / "a.tar")
    members[0].type = members[1].type = kind
    pack(tmp_path / "a.tar", *sample("0"), *sample("1"), *members)
    assert "9.png is a link" in refusal(tmp_path / "a.tar")


def test_the_remedy_for_links_is_one(tmp_path: Path) -> None:
    first = tmp_path / "packed" / next(iter(samples()))
    for name, content in samples().items():
        (tmp_path / "packed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "packed" / name).write_bytes(content)
    linked = [first.with_name("again.jpg"), first.with_name("more.jpg")]
    linked[0].hardlink_to(first)
    linked[1].symlink_to(first)
    for link in linked:
        link.with_suffix(".cls").write_bytes(b"1")
    if (tar := shutil.which("tar")) is None:
        pytest.skip("there is no tar: install GNU tar")
    shard = tmp_path / "shards" / "a.tar"
    shard.parent.mkdir()
    command = [tar, "-C", str(tmp_path / "packed"), "-cf", str(shard)]
    subprocess.run([*command, "."], check=True)
    assert "is a link or no file" in refusal(shard)
    subprocess.run([*command, "--dereference", "--hard-dereference", "."], check=True)
    listing = list_shards(shard)
    assert len(listing.train) + len(listing.test) == COUNT + 2


def test_linked_folders_of_shards_are_listed(tmp_path: Path) -> None:
    for name in ("set/train/0.tar", "elsewhere/1.tar", "elsewhere/._1.tar", "set/val/0.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    (tmp_path / "elsewhere" / "._1.tar").write_bytes(b"left by another system")
    (tmp_path / "set" / "train" / "more").symlink_to(tmp_path / "elsewhere")
    listing = list_shards(tmp_path / "set")
    assert (len(listing.train), len(listing.test)) == (2 * COUNT, COUNT)


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    writer = os.open(tmp_path / "a.tar", os.O_RDWR)
    try:
        os.write(writer, b"not a header" * 100)
        assert "pipe" in refusal(tmp_path / "a.tar")
        with pytest.raises(EspalierError, match="not a regular file"):
            list_shards(tmp_path / "a.tar")
    finally:
        os.close(writer)


def test_an_image_whose_zeros_are_left_out_is_refused(tmp_path: Path) -> None:
    """What GNU tar -S packs: the pixels that follow would stand in place of the zeros."""
    whole = b"P6 64 64 255\n" + bytes(2048) + bytes(range(256)) * 40
    stored = whole[:512] + whole[1536:]
    header = tarfile.TarInfo("0.ppm")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, len(stored)
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:434] = b"".join(b"%011o\0" % number for number in (0, 512, 1536, len(whole) - 1536))
    block[483:495] = b"%011o\0" % len(whole)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.fileobj.write(bytes(block) + stored + bytes(-len(stored) % 512))  # type: ignore[union-attr]
        archive.offset = archive.fileobj.tell()  # type: ignore[union-attr]
        label = tarfile.TarInfo("0.cls")
        label.size = 1
        archive.addfile(label, io.BytesIO(b"0"))
    with tarfile.open(tmp_path / "0.tar") as archive:
        member = archive.getmembers()[0]
        assert archive.extractfile(member).read() == whole  # type: ignore[union-attr]
    with pytest.raises(EspalierError, match=r"0\.ppm is stored with gaps"):
        list_shards(tmp_path)
