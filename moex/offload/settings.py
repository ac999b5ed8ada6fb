"""The settings of `--offload` and of the flags beside it."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from moex.analysis.trace import Trace
from moex.config.base import ConfigError, require, require_choice
from moex.offload.cache import allocate
from moex.offload.layout import Pool
from moex.offload.policies import Lfu, Lru, Mrs, Policy, Predicted, Static
from moex.offload.routes import Routes, read_routes

PREFETCH = ("router", "impact", "predictor")
ALLOCATE = ("shared", "equal", "demand")
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
      prefetch: what is loaded before it is needed, while a layer computes: what the
        "router" of the next layer names, what of it saves most time ("impact"), or what
        a predictor names: that of the run ("predictor"), or a file; None: nothing.
      ahead: so many layers; None: 1 for "router", 3 for "impact", else all.
      allocate: slots of layers with equal experts: "shared" by all of them, "equal", or
        by the "demand" of the trace; None: equal if there is one for each, else shared.
      host: let the cores of the host compute experts where that is quicker.
      trace: for the static policy and slots by demand, of which experts are used.
      weights: keep matrices in fewer bytes: see `model_spec`; None: as trained.
    """

    size: str
    policy: str = "lru"
    bank: str = "disk"
    prefetch: str | None = None
    ahead: int | None = None
    allocate: str | None = None
    host: bool = False
    trace: pathlib.Path | None = None
    weights: str | None = None

    def __post_init__(self):
        self._parsed()
        for flag, value, names in (
            ("--offload-policy", self.policy, [*POLICIES]),
            ("--offload-bank", self.bank, [*BANKS]),
            ("--offload-allocate", self.allocate or ALLOCATE[0], [*ALLOCATE]),
        ):
            require_choice(flag, value, names)
        if self.ahead is not None:
            require(self.ahead >= 1, "--offload-ahead", self.ahead, "1 or more")
            if self.prefetch is None:
                raise ConfigError(
                    "--offload-ahead: is for --offload-prefetch; give both."
                )
        if self.policy == "predicted" and not self.prefetch:
            raise ConfigError(
                "--offload-policy=predicted: needs --offload-prefetch, which predicts."
            )
        asked = self.policy == "static" or self.allocate == "demand"
        if asked != (self.trace is not None):
            raise ConfigError(
                "--offload-trace: goes with --offload-policy=static or "
                "--offload-allocate=demand; give both."
            )

    def measures(self) -> bool:
        """Tell whether the machine's times are measured first, by writing text."""
        return self.host or self.prefetch == "impact"

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

    def per_layer(
        self, pool: Pool, slots: int, routes: Routes | None
    ) -> list[int] | None:
        """The slots of each layer of a pool; None: all layers share them.

        Args:
          pool: `Pool`.
          slots: of the pool.
          routes: from `routes`.

        Raises:
          ConfigError: if they are too few to have one for each.
        """
        layers = pool.layers
        if self.allocate == "shared" or (self.allocate is None and slots < len(layers)):
            return None
        if slots < len(layers):
            raise ConfigError(
                f"--offload-allocate={self.allocate}: needs a slot for each of "
                f"{len(layers)} layers, and --offload={self.size} gives {slots}; take "
                "shared."
            )
        demand_L = np.ones(len(layers))
        if self.allocate == "demand":
            assert routes is not None
            demand_L = routes.demand()[[layer.routed for layer in layers]]
        return allocate(demand_L, slots, [layer.experts for layer in layers])

    def routes(self, pools: Sequence[Pool]) -> Routes | None:
        """The routes of the trace; None without one.

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
        return routes

    def make_policy(self, pool: Pool, routes: Routes | None = None) -> Policy:
        """The policy of a pool.

        Args:
          pool: `Pool`.
          routes: from `routes`.
        """
        shape = len(pool.layers), pool.most_experts
        match self.policy:
            case "static":
                assert routes is not None
                routed = [layer.routed for layer in pool.layers]
                return Static(routes.counts()[routed, : pool.most_experts])
            case "mrs":
                most = max(layer.most_slots() for layer in pool.layers)
                return Mrs(*shape, top=2 * most)
            case "lfu":
                return Lfu(*shape)
            case "predicted":
                return Predicted(*shape)
        return Lru(*shape)
