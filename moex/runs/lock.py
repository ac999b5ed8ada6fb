"""One writer of a run directory at a time, over all hosts that see it.

A writer has two things. A lock of the operating system on the folder ends with the
process that has it, so that a killed one never stands in the way; it decides between
the processes of one machine. Other machines may not see it (few network file systems
pass it on). For them there is `run.lock` in the folder: it says who writes and since
when, and its time of change moves on as long as the writer lives.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Iterator

from moex.config.base import ConfigError, RunError
from moex.data.files import naming
from moex.json_files import parse_object
from moex.runs.directory import RunDir

BOOT = "/proc/sys/kernel/random/boot_id"  # differs with every start of a machine
BEAT_S = 5.0  # seconds between two signs of life of a writer
STALE_S = 60.0  # seconds of silence after which a writer elsewhere counts as dead
SETTLE_S = 2.0  # seconds for which a lock that was taken over must stay ours


class LockLostError(RunError):
    """Another process writes this run directory now; this one must not."""


@contextlib.contextmanager
def held(run: RunDir, flag: str, say=print) -> Iterator["RunLock"]:
    """Hold the lock of a run directory that exists, until the end of the block.

    Args:
      flag: names it in the error, such as "--workdir=runs/a".
      say: called with a line where a lock of a dead process is taken over.

    Raises:
      ConfigError: if another process has it.
    """
    lock = RunLock(run, flag, say)
    try:
        lock.acquire()
        yield lock
    finally:
        lock.release()


class RunLock:
    """The lock of a run directory; `held` acquires and releases it."""

    def __init__(self, run: RunDir, flag: str, say=print):
        self.file, self.flag, self.say = run.lock, flag, say
        self.token = uuid.uuid4().hex
        self.lost: dict | None = None  # the record of the process that took it
        self._folder = os.open(run.path, os.O_RDONLY)
        self._ended = threading.Event()
        self._beating = threading.Thread(
            target=self._beat, daemon=True, name="moex-lock"
        )

    def acquire(self) -> None:
        """Take the lock, from a dead process too.

        Raises:
          ConfigError: naming the holder, if it lives.
        """
        locked = _flock(self._folder)
        if locked is False:
            raise self._refusal(_read(self.file) or {})
        self.record = _here(self._folder, locked) | {
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "token": self.token,
        }
        while not self._create():
            holder = _read(self.file)
            if holder is not None and self._take_over(holder):
                break
        self._beating.start()

    def check(self) -> None:
        """Check that the lock is still ours; call this before anything is written.

        Raises:
          LockLostError: if another process took it over.
        """
        holder = _read(self.file)
        if holder is not None and holder.get("token") != self.token:
            self.lost = holder
        self.check_told()

    def check_told(self) -> None:
        """Check that the lock was ours at the last sign of life; this costs nothing."""
        if self.lost is not None:
            raise LockLostError(
                f"{self.flag}: this process was silent for too long, and "
                f"{_who(self.lost)} took the run directory over; this one has stopped "
                "and written nothing since."
            )

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        if self._beating.ident is not None:
            self._beating.join()
        holder = _read(self.file)
        if holder is not None and holder.get("token") == self.token:
            self.file.unlink(missing_ok=True)
        os.close(self._folder)

    def _create(self) -> bool:
        """Make the file with our record; False if there is a file already."""
        made = self._own_file()
        try:
            os.link(made, self.file)
            return True
        except FileExistsError:
            return False
        except OSError:  # the file system has no links
            return self._create_exclusively()
        finally:
            made.unlink()

    def _create_exclusively(self) -> bool:
        try:
            with naming(self.file), self.file.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self.record))
            return True
        except FileExistsError:
            return False

    def _own_file(self) -> pathlib.Path:
        """Write a file with our record next to the lock file."""
        made = self.file.with_name(f".{self.file.name}.{self.token}")
        with naming(made):
            made.write_text(json.dumps(self.record), encoding="utf-8")
        return made

    def _take_over(self, holder: dict) -> bool:
        """Take the lock of a dead process; False if the lock file is gone meanwhile.

        Raises:
          ConfigError: if it lives.
        """
        lives = self._lives(holder)
        if lives is None:
            self.say(
                f"{self.file} is of {_who(holder)}, on another machine; looking for "
                f"{STALE_S:g} s whether it lives"
            )
            lives = self._beats(holder)
        if lives:
            raise self._refusal(holder)
        if _read(self.file) != holder:
            return False
        self._own_file().replace(self.file)
        if self.record["locks"] is None or self.record["locks"] != holder.get("locks"):
            time.sleep(SETTLE_S)  # others may have found it dead at the same moment
        if (_read(self.file) or {}).get("token") != self.token:
            return False
        self.say(f"{_who(holder)} ended without a word; its lock is taken over")
        return True

    def _lives(self, holder: dict) -> bool | None:
        """Whether the holder lives; None if only time can tell.

        We have the system's lock where there is one, so a holder that had it is dead.
        """
        if self.record["locks"] and holder.get("locks") == self.record["locks"]:
            return False
        if holder.get("pids") != self.record["pids"]:
            return None
        born = _born(holder.get("pid"))
        return born is not None and born == holder.get("born")

    def _beats(self, holder: dict) -> bool:
        """Whether the file changes or disappears within `STALE_S`."""
        first, deadline = _changed(self.file), time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(0.5, BEAT_S))
            if _changed(self.file) != first or _read(self.file) != holder:
                return _read(self.file) == holder  # if not, look again who has it
        return False

    def _refusal(self, holder: dict) -> ConfigError:
        return ConfigError(
            f"{self.flag}: {_who(holder)} writes this run since "
            f"{holder.get('since', 'an unknown time')}; wait until it ends, end it, or "
            "give another folder."
        )

    def _beat(self) -> None:
        """Show a sign of life until the end; notice if another took the lock."""
        while not self._ended.wait(BEAT_S):
            # A disk may not answer for a while: other processes wait longer than that.
            with contextlib.suppress(OSError):
                holder = _read(self.file)
                if holder is None:
                    self._create()  # somebody deleted it
                elif holder.get("token") != self.token:
                    self.lost = holder
                    return
                else:
                    os.utime(self.file)


def _here(folder: int, locked: bool | None) -> dict:
    """Describe this process; `locks` and `pids` say who can see whether it lives."""
    try:
        boot = pathlib.Path(BOOT).read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # this system is not Linux
        boot, space = platform.node(), ""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "locks": f"{boot} {os.fstat(folder).st_dev}" if locked else None,
        "pids": f"{boot} {space}",
    }


def _born(pid) -> str | None:
    """The start time of a process here, in the kernel's units; None if it is gone."""
    try:
        text = pathlib.Path(f"/proc/{int(pid)}/stat").read_bytes()
        return text.rpartition(b")")[2].split()[19].decode()
    except (TypeError, ValueError, IndexError):
        return None
    except OSError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return None
    except OSError:  # it belongs to another user
        pass
    return "unknown"


def _flock(folder: int) -> bool | None:
    """Lock an open folder: True, False if another has it, None if locks do not work."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _read(file: pathlib.Path) -> dict | None:
    """Read the record of a lock file: {} if it has none (yet), None without a file."""
    try:
        return parse_object(file.read_bytes(), file.name)
    except FileNotFoundError:
        return None
    except ConfigError:
        return {}


def _changed(file: pathlib.Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime_ns
    return None


def _who(record: dict) -> str:
    if "pid" not in record:
        return "another process"
    return f"process {record['pid']} on {record.get('host')}"
