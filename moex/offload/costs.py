"""The time that experts take: on the host's cores, on the device, and on the way there.

Three curves describe a machine: the host computes in a time that grows with the rows of
an expert, the device in one time for each expert, and a move takes one time too.
"""

import dataclasses
import math
from typing import Any, Self

from moex.config.base import ConfigError, require
from moex.data.files import atomic_write
from moex.json_files import check_names, dump_json, field, read_object

MOST = 1e12  # the most time in a file; sums of them stay finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, or any one unit; infinite ones stand for a resource that is not there.

    Attributes:
      cpu_first: of the host, once in each pass through a layer in which it computes.
      cpu_row: of the host, for each row: one token of one expert.
      device: of the device, for each expert.
      move: of the link, for each expert that is moved to the device.
      layer: of all else in a layer, such as attention, before its experts are known.
      again: of a layer that runs again once what it missed is there, as real decoding
        does (`executor.py`); for each time that something is loaded. Above 0 moves
        begin when residents have computed, and experts compute when all have arrived.
    """

    cpu_first: float = 0.0
    cpu_row: float = math.inf
    device: float = math.inf
    move: float = math.inf
    layer: float = 0.0
    again: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"costs: {name}", value, "0 or more")  # NaN is neither
        for name in ("cpu_first", "layer", "again"):
            value = getattr(self, name)
            require(math.isfinite(value), f"costs: {name}", value, "finite")
        somewhere = math.isfinite(self.cpu_row) or math.isfinite(self.device)
        require(somewhere, "costs: device", self.device, "finite, if cpu_row is not")

    def cpu(self, rows: float) -> float:
        """The time of the host for rows of any experts; 0 for none."""
        return self.cpu_first + self.cpu_row * rows if rows else 0.0

    def save(self, file, about: dict[str, Any] | None = None) -> None:
        """Write them as JSON.

        Args:
          file: its path.
          about: how they were measured; plain data, for people.
        """
        known = {k: v for k, v in dataclasses.asdict(self).items() if v < math.inf}
        atomic_write(file, dump_json(known | {"about": about or {}}) + "\n")

    @classmethod
    def read(cls, file) -> Self:
        """Read what `save` or a person wrote; a missing field has its default.

        Raises:
          ConfigError: naming the file and the field.
        """
        where, data = str(file), read_object(file)
        check_names(data, (*(f.name for f in dataclasses.fields(cls)), "about"), where)
        field(data, "about", dict, where, {})
        values = {}
        for own in dataclasses.fields(cls):
            if own.name in data:
                value = float(field(data, own.name, float, where))
                allowed = f"from 0 to {MOST:g}"
                require(0 <= value <= MOST, f"{where}: {own.name}", value, allowed)
                values[own.name] = value
        if not {"device", "cpu_row"} & set(values):
            raise ConfigError(f"{where}: has no field 'device' and no 'cpu_row'.")
        return cls(**values)
