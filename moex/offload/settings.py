"""The settings of `--offload` and of the flags beside it."""

import dataclasses
import math
import re
from collections.abc import Sequence

from moex.config.base import ConfigError, nearest
from moex.offload.layout import Pool
from moex.offload.policies import Lfu, Lru, Mrs, Policy, Predicted

POLICIES = {"lru": Lru, "lfu": Lfu, "mrs": Mrs, "predicted": Predicted}
BANKS = ("disk", "pinned")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(%|[A-Za-z]+)?")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How experts are offloaded.

    Attributes:
      size: of the slots: experts of a layer on average ("8"), a share of all experts
        ("25%"), or bytes ("2GiB").
      policy: which expert leaves: one of `POLICIES`.
      bank: where experts wait: on the "disk", or in "pinned" memory of the host.
      prefetch: load what the next layer would need now, while a layer computes.
      host: let the cores of the host compute experts where that is quicker.
    """

    size: str
    policy: str = "lru"
    bank: str = "disk"
    prefetch: bool = False
    host: bool = False

    def __post_init__(self):
        self._parsed()
        for flag, value, names in (
            ("--offload-policy", self.policy, [*POLICIES]),
            ("--offload-bank", self.bank, [*BANKS]),
        ):
            if value not in names:
                told = f"{flag} = {value!r}: must be one of {', '.join(names)}."
                raise ConfigError(f"{told}{nearest(value, names)}")

        if self.policy == "predicted" and not self.prefetch:
            raise ConfigError(
                "--offload-policy=predicted: needs --offload-prefetch, which predicts."
            )

    def _parsed(self) -> tuple[float, str]:
        """The pair (number, unit); the unit is "", "%" or one of `UNITS`."""
        found = NUMBER.fullmatch(self.size.strip())
        number, unit = (float(found[1]), found[2] or "") if found else (0.0, "")
        whole = unit != "" or number == int(number)
        known = unit in ("", "%") or unit in UNITS
        if not known or not whole or number <= 0 or (unit == "%" and number > 100):
            raise ConfigError(
                f"--offload = {self.size!r}: must be experts of a layer on average, "
                "such as 8, a share of all up to 100%, such as 25%, or bytes, such as "
                f"2GiB (units: {', '.join(UNITS)}), and more than 0."
            )
        return number, unit

    def slots(self, pools: Sequence[Pool]) -> list[int]:
        """The slots of each pool.

        Raises:
          ConfigError: if there is no room for one expert of each pool.
        """
        number, unit = self._parsed()
        if unit == "":
            return [min(int(number) * len(p.layers), p.num_rows) for p in pools]
        if unit == "%":
            return [math.ceil(number / 100 * p.num_rows) for p in pools]
        total = sum(p.num_rows * p.row_bytes for p in pools)
        share = min(number * UNITS[unit] / total, 1.0)
        found = [math.floor(share * p.num_rows) for p in pools]
        if 0 in found:
            least = max(math.ceil(total / p.num_rows) for p in pools)
            raise ConfigError(
                f"--offload = {self.size!r}: has no room for an expert of each kind, "
                f"which needs {least:,} bytes."
            )
        return found

    def make_policy(self, pool: Pool, most_slots: int) -> Policy:
        """The policy of a pool.

        Args:
          pool: `Pool`.
          most_slots: the most experts K of a token.
        """
        shape = len(pool.layers), pool.most_experts
        if self.policy == "mrs":
            return Mrs(*shape, top=2 * most_slots)
        return POLICIES[self.policy](*shape)
