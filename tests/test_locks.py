"""One process at a time: locks of files and folders, also where the disk has no flock."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from espalier.errors import EspalierError
from espalier.files import lock_at, locked


def test_a_lock_holds_under_every_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "place" / "run"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "other").symlink_to(tmp_path / "place")
    monkeypatch.chdir(folder)
    names = [folder, tmp_path / "link", tmp_path / "other" / "run", Path(), Path("../run"), Path("../../link")]
    for mine in names:
        with locked(mine):
            for other in names:
                with pytest.raises(EspalierError, match="in use"), locked(other):
                    pass
    assert {path.name for path in tmp_path.rglob("*")} == {"place", "run", "link", "other"}
    with locked(tmp_path / "new"), locked(folder):  # two folders, one of them not there yet
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks of its own")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_locks_hold_on_file_systems_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Network file systems answer in three ways that they have none; a kill must not leave one held for good."""
    import fcntl

    program = f"""if True:
        import fcntl, os, sys
        from pathlib import Path
        from espalier.files import lock_at, locked
        def flock(file, operation): raise OSError({code}, os.strerror({code}))
        fcntl.flock = flock
        with locked(Path(sys.argv[1])), lock_at(Path(sys.argv[2])):
            print("held", flush=True)
            sys.stdin.read()
    """

    def no_flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    folder, claim = tmp_path / "run", tmp_path / "claim"
    command = [sys.executable, "-c", program, str(folder), str(claim)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(EspalierError, match=r"run is in use by another process \(.*delete .*\.run\.lock"):
            locked(folder).__enter__()
        with pytest.raises(Timeout):
            lock_at(claim).acquire()
        other.kill()
    for _ in range(2):
        with locked(folder), lock_at(claim), pytest.raises(Timeout):
            lock_at(claim).acquire()
        assert list(tmp_path.iterdir()) == []
