"""Commands that moex prints for the user to copy: they work as they stand."""

import os
import pathlib
import shlex
import shutil
import sys
import sysconfig

from moex import project


def command(program: str, *words: object, folder: pathlib.Path | None = None) -> str:
    """Write a command line that runs in the user's shell.

    A program of an environment that is not activated has its path in front. Commands of
    moex name the project folder if a class was found in another than the current one.

    Args:
      program: `moex`, or the script of a package beside it.
      words: its arguments; they are quoted where a shell needs it.
      folder: where it will be given; None: in the folder that the user is in.
    """
    flags = project.flags() if program == "moex" else []
    return shlex.join([*_program(program, folder), *map(str, words), *flags])


def _program(name: str, folder: pathlib.Path | None) -> list[str]:
    script = pathlib.Path(sysconfig.get_path("scripts"), name)
    found = shutil.which(name)
    if found and (not script.is_file() or os.path.samefile(found, script)):
        return [name]
    if script.is_file():
        here = (folder or pathlib.Path.cwd()).absolute()
        inside = here in script.parent.parents  # a path without "/" would be a name
        return [str(script.relative_to(here) if inside else script)]
    modules = {"moex": "moex.cli", "tensorboard": "tensorboard.main"}
    return [sys.executable, "-m", modules.get(name, name)]
