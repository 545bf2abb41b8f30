"""Files that appear whole or not at all, weights that are read without running code, and the cache folder."""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import hashlib
import json
import os
import pickle
import secrets
import stat
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, path_of

if TYPE_CHECKING:
    from filelock import BaseFileLock

_STALE_SECONDS = 3600.0
_TAKE_OVER_SECONDS = 0.5
# Where training scripts keep the weights within what they save.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file through a temporary sibling of its own name and a rename; on failure nothing is left of it.

    Two processes that write one file at the same time each write a sibling of their own: the last rename wins. What a
    kill left behind is cleared by whoever writes the file again an hour later or more. A link stays one: the file that
    it leads to is written.

    Raises:
        EspalierError: the folder does not exist, or there is something of that name which is no regular file.
        OSError: the file cannot be written.
    """
    target = target_of(path)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError):  # its writer may just have renamed it
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
    part = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        part.write_bytes(content)
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that was asked for
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def target_of(path: Path) -> Path:
    """Return the file that is to be replaced where ``path`` is written.

    Raises:
        EspalierError: its folder does not exist, or there is something of that name which is no regular file.
    """
    # The system is asked, not the name: /dev/stdout is a link to what has no place among the files.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(mode := path.stat().st_mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, device or socket"
            raise EspalierError(f"file {path} is {kind}, which a rename would replace: name a regular file to write")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise EspalierError(f"file {path}: folder {target.parent} does not exist: make it first")
    return target


def write_json(path: Path, content: Any) -> None:
    """Write JSON through ``write_bytes``; NaN is refused (ValueError)."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as ``write_json`` does, with a digest of itself that ``read_sealed`` holds it to."""
    write_json(path, {**content, "digest": _digest_of(content)})


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a file of JSON holds.

    Raises:
        OSError: the file cannot be read, or is no regular one.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(read_regular(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not an object of fields")
    return content


def read_sealed(path: Path, what: str) -> dict[str, Any]:
    """Return the object that ``write_sealed`` wrote, without its digest; the oldest files do not have one.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        EspalierError: it is missing, unreadable, no object, or not as it was written.
    """
    try:
        content = read_object(path)
        if content.pop("digest", None) not in (None, _digest_of(content)):
            raise ValueError("another digest")
    except OSError as error:
        raise EspalierError(f"{what} {path} cannot be read ({error.strerror}): name a file that is there") from None
    except ValueError:
        raise EspalierError(
            f"{what} {path} is damaged: it is not as it was written; restore it or make it again"
        ) from None
    return content


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors as safetensors through ``write_bytes`` and return the path.

    Every entry is a contiguous copy: that undoes channels-last strides and separates tied weights, both of which
    safetensors refuses.
    """
    from safetensors.torch import save

    apart = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_bytes(path, save(apart, None if metadata is None else dict(metadata)))
    return path


def read_tensors(path: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """Return the tensors that a file holds by name, on the CPU, without running code that is in it.

    Files that end in ``.safetensors`` are read as such, all others by ``torch.load(weights_only=True)``; there the
    weights may lie under ``state_dict``, ``model`` or their averaged counterparts.

    Args:
        path: the file.
        mapped: map a file of torch's into memory rather than reading it whole, where its format allows.

    Raises:
        EspalierError: the file is missing, cannot be read safely, or holds no tensors by name.
    """
    if not path.is_file():
        raise EspalierError(f"there is no checkpoint {path}: name a file of weights")
    try:
        _refuse_bombs(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # timm's scripts keep their command line beside the weights: a plain bag of values.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of what is refused or read in the next line
                # Files from before torch 1.6 are no zip archives and cannot be mapped.
                mapped = mapped and zipfile.is_zipfile(path)
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # both readers raise half a dozen kinds for a damaged or hostile file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is no file of weights, or would run code"
        elif isinstance(error, OSError) and error.errno == errno.EINVAL:  # what it says it holds lies past its end
            reason = "it is cut short or damaged"
        raise EspalierError(f"checkpoint {path} cannot be read safely: {reason}") from None
    if not isinstance(content, Mapping):
        content = {}
    below = (content[name] for name in _NESTED if isinstance(content.get(name), Mapping))
    nested = next((held for held in below if any(isinstance(value, Tensor) for value in held.values())), content)
    found = {
        name: tensor.resolve_conj().resolve_neg()  # which not all of torch can read as they are
        for name, tensor in nested.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    refuse_odd_names(path, found)
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
            raise EspalierError(
                f"checkpoint {path}: {name} is sparse, ragged, quantised or without values: save it as a dense tensor"
            )
        # A stride of zero repeats one number: a copy of what claims to be larger than its file fills the memory.
        if tensor.nbytes > path.stat().st_size:
            raise EspalierError(f"checkpoint {path}: {name} claims to be larger than the file: save its values")
    if not found:
        raise EspalierError(f"checkpoint {path} holds no tensors by name, nor under any of {', '.join(_NESTED)}")
    return found


def refuse_odd_names(path: Path, names: Iterable[str]) -> None:
    """Refuse tensors whose names would reach the terminal, or break a table, as something else than a name.

    Raises:
        EspalierError: a name holds line breaks, terminal codes or what is no text.
    """
    for name in names:
        if not name.isprintable():
            raise EspalierError(f"checkpoint {path}: a tensor is named {name[:60]!r}: rename it")


def _refuse_bombs(path: Path) -> None:
    """Refuse an archive that grows when it is read: torch stores its entries side by side, as they are."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it holds more than its size: torch does not compress")


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the state saved at ``path`` into ``model``, in place, keeping its memory layout and device.

    Raises:
        EspalierError: the file is missing, cannot be read safely, or does not fit the model.
    """
    state = read_tensors(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise EspalierError(f"weights {path} do not fit the model: {' '.join(str(error).split())[:300]}") from error


def read_checked(path: Path, md5: str) -> bytes:
    """Return the content of ``path`` after comparing its md5 with the published one.

    The bytes that were hashed are the bytes returned, so nobody can swap the file in between.

    Raises:
        EspalierError: the file is missing, unreadable or not the published one; the message names it.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise EspalierError(f"cannot read {path} ({error.strerror}): give the folder with --data") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise EspalierError(f"{path} has md5 {found}, the published file {md5}: fetch it again")
    return content


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading its bytes; a pipe, a device or a folder is refused rather than waited for.

    Args:
        path: the file.
        buffering: of ``open``: 0 for none.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    # To open a pipe is to wait for its writer, and a device may never end: neither begins here.
    now = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | now))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """Return the content of a file that ``open_regular`` opens.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read()


def require_regular(path: Path) -> None:
    """Refuse what ``open_regular`` does, ahead of a library that opens the file by its name.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    open_regular(path).close()


def named(path: Path) -> Path:
    """Return a path that has a name, to put others beside it: ``.`` and ``a/..`` are written out."""
    return path if path.name not in ("", "..") else path.resolve()


def lock_of(path: Path) -> Path:
    """Return the lock file of a file or folder, beside the place that its name leads to: one for all its names."""
    place = Path(os.path.realpath(path))
    return place.parent / f".{place.name}.lock"  # with_name fails for "/"


# Note [Locks]
# The system lets go of a flock when its holder ends, however it ends. Some network file systems have none, because they
# are mounted so or their lock service does not run. There a lock is a file that exists, with its holder's process and
# host in it: filelock takes it over from a process of this host that is gone. What another host left behind in a crash
# stays until somebody deletes it. The folder is asked ahead with a file of its own: a lock file that failed to be
# locked would look like one that is held.


def lock_at(file: Path, seconds: float = 0.0) -> BaseFileLock:
    """Return the lock that stands behind a file in a folder that exists (Note [Locks]).

    Args:
        file: the lock file; it is made when missing.
        seconds: how long to wait for another holder before ``filelock.Timeout`` is raised.
    """
    from filelock import FileLock, SoftFileLock  # torch depends on it

    if _has_flock(file.parent):
        return FileLock(file, timeout=seconds)
    return SoftFileLock(file, timeout=max(seconds, _TAKE_OVER_SECONDS))


def _has_flock(folder: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has locks of its own
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a folder that cannot be written is named by who makes the lock file
        return error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file or folder for the length of a ``with`` block, by a lock file beside it that a kill lets go of.

    Raises:
        EspalierError: another process holds it.
        OSError: no lock file can be written there.
    """
    from filelock import SoftFileLock, Timeout

    lock = lock_at(lock_of(path))
    soft = isinstance(lock, SoftFileLock)
    try:
        lock.acquire()
    except Timeout:
        hint = f" (this disk has no flock: if nobody is, delete {lock.lock_file})" if soft else ""
        raise EspalierError(
            f"{path} is in use by another process{hint}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        if not soft:
            # Deleted while it is held: whoever waits for it finds that it has no name any more, and makes a new one.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()
        lock.release()


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``ESPALIER_CACHE``, or ``espalier`` in the user's cache folder."""
    if named := os.environ.get("ESPALIER_CACHE"):
        return path_of("ESPALIER_CACHE", named)
    return path_of("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "espalier"
