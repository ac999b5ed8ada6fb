"""The project folder: the one place outside of moex whose classes a config may name.

A run directory names the classes of its config. A class that is not part of moex is
looked for in the project folder alone: the folder of `--project`, or else that of the
config file, or else the current one. No other module is imported because a run names
it, and a file inside a run directory is never run as code.
"""

import importlib.util
import os
import pathlib
import sys
import traceback
import types
from importlib.machinery import ModuleSpec, PathFinder

TYPE_KEY = "__config__"  # the key of the class name in config.json


class ProjectError(ValueError):
    """A class of the project folder cannot be loaded; the message is one line."""


_given: dict[str, pathlib.Path] = {}
_found: set[str] = set()  # modules of the project folder that have a class we use


def use(folder: pathlib.Path | None) -> None:
    """Set the project folder of a command, if one is given; forget the last one."""
    _given.clear()
    _found.clear()
    if folder is not None:
        _given["flag"] = folder.absolute()
        _extend_path(_given["flag"])


def use_config_file(file: pathlib.Path) -> None:
    """Take the folder of a config file as the project folder, unless one is given."""
    _given["config"] = file.absolute().parent
    _extend_path(_given["config"])
    _extend_path(_given["config"].parent)  # for a package that the file is part of


def folder() -> pathlib.Path:
    """The project folder."""
    return _given.get("flag") or _given.get("config") or pathlib.Path.cwd()


def flags() -> list[str]:
    """The flags by which another command in this folder finds the same classes."""
    root, here = folder(), pathlib.Path.cwd()
    if not _found or root == here:
        return []
    return [
        f"--project={root.relative_to(here) if root.is_relative_to(here) else root}"
    ]


def where_in_own_code(error: BaseException) -> str | None:
    """The last line of the user's own code that an error came through; None: no line.

    Returns:
      Such as "cosine.py, line 23, in validate".
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = pathlib.Path(frame.filename)
        inside = file.is_relative_to(folder()) and "site-packages" not in file.parts
        if inside and not file.is_relative_to(pathlib.Path(__file__).parent):
            name = file.relative_to(folder())
            return f"{name}, line {frame.lineno}, in {frame.name}"
    return None


def _extend_path(folder: pathlib.Path) -> None:
    """Let modules of the folder import each other; installed modules come first."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def find_class(module: str, name: str) -> type | None:
    """Find the class `name` in a module of the project folder; None if there is none.

    Raises:
      ProjectError: if the module lies in a run directory, has the name of a module that
        is imported from elsewhere, or cannot be imported.
    """
    root, parts = folder(), module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    importlib.invalidate_caches()
    places = [str(root)]
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
        if spec.origin is None:  # a folder without __init__.py, of this place alone
            spec.submodule_search_locations = places
        _extend_path(root)
        found = _load(spec)
    cls = vars(found).get(name)
    if not isinstance(cls, type):
        return None
    _found.add(module)
    return cls


def _load(spec: ModuleSpec) -> types.ModuleType:
    """Import a module of the folder from its place there."""
    name, place = spec.name, pathlib.Path(_place(spec))
    if name in sys.modules:
        old = sys.modules[name]
        if old.__spec__ is None or _place(old.__spec__) != _place(spec):
            raise ProjectError(
                f"{place} has the name of another module, {name}, which is imported "
                "already; rename it."
            )
        return old
    _refuse_run_directory(place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        if spec.loader is not None:
            spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        text = " ".join(str(e).split())
        at = where_in_own_code(e)
        raise ProjectError(
            f"{place} cannot be imported: {type(e).__name__}: {text}"
            + (f" ({at})" if at else "")
        ) from e
    return module


def _place(spec: ModuleSpec) -> str:
    """The file of a module, or the folder of a package without __init__.py."""
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    return os.path.abspath(next(filter(None, places), ""))


def _refuse_run_directory(place: pathlib.Path) -> None:
    """Check that code lies outside of every folder with the config of a run."""
    for parent in (place, *place.parents):
        config = parent / "config.json"
        if config.is_file():
            data = config.read_bytes()
            if TYPE_KEY.encode() in data or b"\\u" in data:
                raise ProjectError(
                    f"{place} lies in the run directory {parent}; code is never taken "
                    "from there: move it, and give its folder as --project=FOLDER."
                )
