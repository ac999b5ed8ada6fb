"""The library of C in the cache: only one's own whole file is loaded, nothing is left.

A small source stands for experts.c: it compiles in a tenth of the time.
"""

import ctypes
import hashlib
import os
import pathlib
import stat
import subprocess
import tempfile
import threading
import time

import pytest

from kernels_pallas import device
from kernels_pallas.native import library

pytestmark = pytest.mark.skipif(
    device.platform() != "cpu" or library.find_compiler() is None,
    reason="no C compiler",
)

ANOTHER = 65534  # a user that this process is not


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of libraries; temporary files and the small source are beside it."""
    for name in ("cache", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "small.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "SOURCES", ("small.c",))
    monkeypatch.setattr(library, "_processor", lambda: "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "cache" / "moex" / "native"


def answer(compiler=None):
    return library._load(compiler or library.find_compiler()).answer()


def only(folder):
    (file,) = folder.iterdir()
    return file


def is_whole(file):
    return hashlib.sha256(file.read_bytes()).hexdigest() in file.name


def compile_evil(path, marker):
    """A library that writes `marker` as soon as it is loaded."""
    source = path.with_suffix(".c")
    source.write_text(
        "#include <stdio.h>\n"
        "__attribute__((constructor)) static void run(void) "
        f'{{ fclose(fopen("{marker}", "w")); }}\n'
        "int answer(void) { return 666; }\n"
    )
    compiler = [*library.find_compiler(), "-shared", "-fPIC"]
    subprocess.run([*compiler, "-o", path, source], check=True)
    source.unlink()
    return path


def give_away(path, monkeypatch):
    """Make a path another user's; who is not root becomes another user instead."""
    if os.geteuid() == 0:
        os.chown(path, ANOTHER, ANOTHER)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: ANOTHER)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_compiled_once_and_is_private_whatever_the_umask(cache, tmp_path):
    before = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(before)
    made = only(cache)
    assert is_whole(made)
    assert mode(made) & 0o077 == 0
    for folder in (cache, cache.parent):
        assert mode(folder) == 0o700
    about = made.stat()
    assert answer() == 42
    assert only(cache).stat() == about
    assert not any((tmp_path / "temporary").iterdir())


def test_other_code_is_another_library(cache):
    compiler = library.find_compiler()
    assert answer() == answer((*compiler, "-DOTHER")) == 42
    assert len([*cache.iterdir()]) == 2


def test_a_cache_of_parents_that_are_missing_is_private(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/moex", "a/b/moex/native"):
        assert mode(tmp_path / folder) == 0o700, folder


def flip(data):
    return data[:3000] + bytes([data[3000] ^ 4]) + data[3001:]


DAMAGES = {
    "flipped": flip,
    "cut": lambda data: data[:5000],
    "of one byte": lambda data: data[:1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "text": lambda data: b"no library\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_again(cache, damage):
    assert answer() == 42
    file = only(cache)
    damaged = DAMAGES[damage](file.read_bytes())
    file.unlink()  # it is in memory here
    file.write_bytes(damaged)
    file.chmod(0o600)
    assert answer() == 42
    assert is_whole(only(cache))


@pytest.mark.parametrize("kind", ["pipe", "link", "link to nothing", "folder"])
def test_a_name_in_the_cache_that_is_no_file_is_not_followed(cache, tmp_path, kind):
    assert answer() == 42
    file = only(cache)
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(elsewhere if kind == "link" else tmp_path / "nothing")
    assert answer() == 42
    if kind != "folder":  # nobody but the user made it, and nothing is lost
        assert is_whole(only(cache)) and not only(cache).is_symlink()


@pytest.mark.parametrize("wrong", ["owner", "group", "others", "name", "old name"])
def test_a_library_that_another_user_may_have_written_is_not_run(
    cache, tmp_path, monkeypatch, wrong
):
    assert answer() == 42
    good = only(cache)
    marker = tmp_path / "ran"
    evil = compile_evil(tmp_path / "evil.so", marker)
    sha256 = hashlib.sha256(evil.read_bytes()).hexdigest()
    key = good.name.rpartition("-")[0]
    names = {"name": good.name, "old name": f"../{key}.so"}
    good.unlink()
    planted = cache / names.get(wrong, f"{key}-{sha256}.so")
    evil.rename(planted)
    planted.chmod({"group": 0o660, "others": 0o606}.get(wrong, 0o600))
    if wrong == "owner":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        give_away(planted, monkeypatch)
    assert answer() == 42
    assert not marker.exists()
    assert is_whole(only(cache))


def test_a_cache_of_another_user_is_not_used_and_said(cache, tmp_path, monkeypatch):
    cache.mkdir(parents=True)
    give_away(cache, monkeypatch)
    with pytest.warns(UserWarning, match="native belongs to user .*XDG_CACHE_HOME"):
        assert answer() == 42
    assert not any(cache.iterdir())
    assert not any((tmp_path / "temporary").iterdir())


def test_a_cache_that_others_can_write_is_made_private(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert answer() == 42
    assert mode(cache) == 0o700 and is_whole(only(cache))


def test_a_cache_whose_mode_cannot_be_changed_is_not_used(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: None)  # a disk of Windows
    with pytest.warns(UserWarning, match=r"can be written by other .*mode is 777"):
        assert answer() == 42
    assert not any(cache.iterdir())


def test_a_folder_that_is_renamed_while_it_is_compiled_gets_nothing(cache, tmp_path):
    """Who may write in the folder above puts his own in the place of ours."""
    assert answer() == 42
    marker = tmp_path / "ran"
    evil = compile_evil(tmp_path / "evil.so", marker)
    script = tmp_path / "cc"
    script.write_text(
        "#!/bin/sh\n"
        f"cd {cache} && work=$(echo moex-native-*) && mv {cache} {cache}.ours\n"
        f"mkdir -p {cache}/$work && cp {evil} {cache}/$work/experts.so\n"
        f'exec {" ".join(library.find_compiler())} "$@"\n'
    )
    script.chmod(0o755)
    assert answer((str(script),)) == 42
    assert not marker.exists()
    ours = cache.with_name("native.ours")
    assert sum(is_whole(p) for p in ours.glob("*.so")) == 2


def test_without_a_cache_nothing_is_left_in_the_temporary_folder(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-home")
    assert answer() == 42
    assert not any(pathlib.Path(tempfile.tempdir).iterdir())


@pytest.mark.parametrize("home", ["/proc/no-home", None])
def test_a_compiler_that_fails_leaves_nothing(cache, monkeypatch, home):
    if home:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    with pytest.raises(subprocess.CalledProcessError):
        library._load(("false",))
    assert not any(pathlib.Path(tempfile.tempdir).iterdir())
    assert home or not any(cache.iterdir())


def test_a_daemon_that_the_compiler_begins_holds_nothing_up(cache, tmp_path):
    script = tmp_path / "cc"
    real = " ".join(library.find_compiler())
    script.write_text(
        f'#!/bin/sh\nsleep 30 </dev/null >/dev/null 2>&1 &\n{real} "$@"\n'
    )
    script.chmod(0o755)
    began = time.monotonic()
    assert answer((str(script),)) == 42
    assert time.monotonic() - began < 20
    assert is_whole(only(cache))


def test_a_link_in_the_place_of_the_cache_changes_no_other_folder(cache, tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    cache.parent.mkdir(parents=True)
    cache.symlink_to(other)
    assert answer() == 42
    assert mode(other) == 0o755 and not any(other.iterdir())


def test_folders_left_by_processes_that_were_killed_are_removed(cache):
    cache.mkdir(parents=True)
    for name, age_s in (("old", 3700), ("new", 60)):
        folder = cache / f"moex-native-{name}"
        folder.mkdir()
        (folder / "cc1.s").touch()
        os.utime(folder, (time.time() - age_s,) * 2)
    assert answer() == 42
    names = {p.name for p in cache.iterdir() if p.is_dir()}
    assert names == {"moex-native-new"}


def test_many_that_compile_at_once_do_not_disturb_each_other(cache):
    # Each load opens another file, though they have one name.
    start, found = threading.Barrier(6), []

    def work():
        start.wait(20)
        found.append(answer())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [42] * 6
    assert all(is_whole(file) for file in cache.iterdir())
    assert answer() == 42


def test_the_file_that_was_checked_is_the_one_that_is_loaded(cache, monkeypatch):
    """The name is given to another file between the check and the load."""
    assert answer() == 42
    file, load = only(cache), ctypes.CDLL

    def swap(name):
        file.unlink()
        file.write_bytes(b"another file")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", swap)
    assert answer() == 42
