"""Archives of arrays: numpy files (.npz) without pickle, with plain data in `about`."""

import dataclasses
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from moex.config.base import ConfigError
from moex.data.files import naming
from moex.json_files import dump_json, parse_object

# Numpy raises these for a file that is no archive, or a damaged one.
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def write_archive(path, about: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write arrays by name, and plain data as JSON under `about`.

    The file has its name only once it is whole.
    """
    text = np.frombuffer(dump_json(about).encode(), np.uint8)
    partial = pathlib.Path(path).with_name(pathlib.Path(path).name + ".partial")
    with naming(partial), partial.open("wb") as file:
        np.savez_compressed(file, about=text, **arrays)
    partial.rename(path)


class Archive:
    """The content of an archive; each method names the file in its errors.

    Attributes:
      where: the path of the file.
      about: its plain data.

    Args:
      path: the file.
      kind: what it should be, for the message about another file.

    Raises:
      ConfigError: if it is no such file.
    """

    def __init__(self, path, kind: str):
        self.where = str(path)
        try:
            with np.load(path) as file:
                self._arrays = dict(file)
            text = self._arrays.pop("about").tobytes()
        except (*UNREADABLE, KeyError) as e:
            # numpy takes all else for pickled data, and tells how to load that.
            told = "it is no .npz archive" if isinstance(e, ValueError) else e
            raise ConfigError(f"{path}: not {kind} of moex ({told}).") from None
        self.about = parse_object(text, self.where, nan=True)

    def array(self, name: str) -> np.ndarray:
        """An array of numbers.

        Raises:
          ConfigError: if there is none of this name.
        """
        if name not in self._arrays or self._arrays[name].dtype.kind not in "iuf":
            raise ConfigError(f"{self.where}: has no array of numbers {name!r}.")
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def under(self, start: str, owner: Any) -> dict[str, Any]:
        """The arrays `start`/NAME for the fields of a dataclass that are arrays."""
        names = [f.name for f in dataclasses.fields(owner) if f.type is np.ndarray]
        return {name: self.array(f"{start}/{name}") for name in names}
