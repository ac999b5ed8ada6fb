"""The settings of `--offload` and of the flags beside it."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from moex.analysis.trace import Trace
from moex.config.base import ConfigError, nearest
from moex.offload.layout import Pool
from moex.offload.policies import Lfu, Lru, Mrs, Policy, Predicted, Static
from moex.offload.routes import read_routes

POLICIES = ("lru", "lfu", "mrs", "predicted", "static")
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
      trace: for the static policy, from which it knows the experts that are used most.
      weights: keep matrices in fewer bytes: see `model_spec`; None: as trained.
    """

    size: str
    policy: str = "lru"
    bank: str = "disk"
    prefetch: bool = False
    host: bool = False
    trace: pathlib.Path | None = None
    weights: str | None = None

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
        if (self.policy == "static") != (self.trace is not None):
            raise ConfigError(
                "--offload-trace: goes with --offload-policy=static; give both."
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

    def counts(self, pools: Sequence[Pool]) -> np.ndarray | None:
        """How often the trace has each expert, [L, E]; None without a trace.

        Raises:
          ConfigError: if it is of another model.
        """
        if self.trace is None:
            return None
        routes = read_routes(Trace.open(self.trace))
        there = dict(zip(routes.layer_R, routes.experts_R, strict=True))
        here = {a.routed: a.experts for pool in pools for a in pool.layers}
        if there != here:
            raise ConfigError(
                f"--offload-trace={self.trace}: is of a model with {len(there)} layers "
                f"of {max(there.values())} experts; this one has {len(here)} of "
                f"{max(here.values())} sets of weights."
            )
        return routes.counts()

    def make_policy(self, pool: Pool, most_slots: int, counts_LE=None) -> Policy:
        """The policy of a pool.

        Args:
          pool: `Pool`.
          most_slots: the most experts K of a token.
          counts_LE: from `counts`.
        """
        shape = len(pool.layers), pool.most_experts
        match self.policy:
            case "static":
                routed = [layer.routed for layer in pool.layers]
                return Static(counts_LE[routed, : pool.most_experts])
            case "mrs":
                return Mrs(*shape, top=2 * most_slots)
            case "lfu":
                return Lfu(*shape)
            case "predicted":
                return Predicted(*shape)
        return Lru(*shape)
