"""A folder that only this user can write, and libraries that are loaded from it.

Another user may be able to rename a folder above it. So the folder stays open, its
owner is read from the open folder, and its files are named through it; a library is
checked and loaded as one open file.
"""

import contextlib
import ctypes
import hashlib
import os
import pathlib
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

WORK = "moex-native-"  # the names of folders in which a process compiles begin so
STALE_S = 3600  # an older folder is left over from a process that was killed


class Refused(PermissionError):
    """A file or folder that another user owns or can write."""


class Damaged(OSError):
    """A file that does not hold the bytes that were written."""


class Folder(NamedTuple):
    """An open folder.

    Attributes:
      fd: file descriptor of the folder.
      path: path where it was opened.
    """

    fd: int
    path: pathlib.Path

    def name(self, file: str = "") -> str:
        """The path of one of its files, or its own, here and in children with its `fd`.

        On Linux it leads to the open folder; elsewhere to the one with its name now.
        """
        if os.path.isdir(f"/proc/self/fd/{self.fd}"):
            return f"/proc/self/fd/{self.fd}/{file}"
        return str(self.path / file)


def open_folder(path: pathlib.Path) -> Folder:
    """Open a folder and hold it open; a missing one is made, and is private.

    A folder of root is taken as it is; a folder of this user is made private.

    Raises:
      Refused: if another user owns it or can write there.
      OSError: if it cannot be made or opened.
    """
    for part in reversed([path, *path.parents]):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            os.fchmod(fd, 0o700)
        _check_owner(fd, path)
    except OSError:
        os.close(fd)
        raise
    return Folder(fd, path)


def _check_owner(fd: int, path) -> None:
    found = os.fstat(fd)
    if found.st_uid not in (0, os.geteuid()):
        raise Refused(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise Refused(f"{path} can be written by other users (its mode is {mode:03o})")


@contextlib.contextmanager
def work_folder(parent: str) -> Iterator[Folder]:
    """Make a private folder under `parent`; it is removed at the end of the block.

    Folders of processes that were killed are removed when they are `STALE_S` old.

    Raises:
      OSError: if it cannot be made.
    """
    _remove_stale(parent)
    path = pathlib.Path(os.path.realpath(tempfile.mkdtemp(prefix=WORK, dir=parent)))
    try:
        folder = open_folder(path)
        yield folder
        os.close(folder.fd)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_stale(parent: str) -> None:
    for old in pathlib.Path(parent).glob(f"{WORK}*"):
        with contextlib.suppress(OSError):
            found = old.lstat()
            old_enough = time.time() - found.st_mtime > STALE_S
            if found.st_uid == os.geteuid() and old_enough:
                shutil.rmtree(old, ignore_errors=True)


class Library(NamedTuple):
    """An open file that nobody else can write, and the sha256 of its bytes."""

    fd: int
    sha256: str
    path: str

    def load(self) -> ctypes.CDLL:
        """Load it into this process, until the process ends."""
        # The file stays open: the dynamic linker knows a library by its name, and no
        # other file may get this name.
        name = f"/proc/self/fd/{self.fd}"
        return ctypes.CDLL(name if os.path.exists(name) else self.path)


def open_library(folder: Folder, name: str) -> Library:
    """Open a file and read its bytes once.

    Raises:
      Refused: if another user owns it or can write it.
      Damaged: if it is not a regular file.
      OSError: if it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(name, flags, dir_fd=folder.fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Damaged(f"{folder.path / name} is no file")
        _check_owner(fd, folder.path / name)
        with open(fd, "rb", closefd=False) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        os.close(fd)
        raise
    return Library(fd, sha256, folder.name(name))
