"""Experts that the cores of the host compute from their rows in the bank.

A thread does it while the device gets other experts, with the kernels of this house for
CPUs; rows that are mapped into memory are read where they are. Where the device is the
CPU too, each has its own cores (`cores.py`).

Source: HybriMoE, arXiv:2504.05897.

T tokens · N rows of an expert, a power of two · D model width · E experts · K slots
"""

import functools
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moex.config.base import ConfigError
from moex.model.paths import nested
from moex.model.spec import merged
from moex.nn.context import Compute, Context
from moex.nn.param import split_params
from moex.offload.block import Routed
from moex.offload.cores import Cores, host_device, worker
from moex.offload.layout import Pool, inside, module_of
from moex.offload.slots import TRACED
from moex.sharding import MeshConfig


class HostExperts:
    """The cores of the host, as a device for experts.

    Attributes:
      count: experts that were computed here.
    """

    def __init__(
        self, module, pools: list[Pool], compute: Compute, cores: Cores | None = None
    ):
        """Take the experts of a model.

        Args:
          module: from `layout.abstract`, whole.
          pools: of the model.
          compute: how the device computes.
          cores: those of device and host; None: they are not divided.

        Raises:
          ConfigError: if experts need more than their own row.
        """
        self.count = 0
        self._graphs = {}
        for pool in pools:
            names = {part.name for part in pool.parts}
            for path in {module_of(layer) for layer in pool.layers}:
                experts = inside(module, path)
                kind = type(experts).__name__
                graphdef, *trees = split_params(experts)
                for tree in trees:
                    for own, _ in _flat(tree):
                        if own not in names:
                            raise ConfigError(
                                f"--offload-host: {kind} share {own}, "
                                "so that the host cannot compute one of them alone."
                            )
                self._graphs[path] = graphdef
        own = None if cores is None else cores.host
        self._worker = worker(own)
        mesh = MeshConfig(data=1).make([host_device(self._worker, own)])
        self._mesh, self._place = mesh, NamedSharding(mesh, PartitionSpec())
        kernels = compute.kernels if jax.default_backend() == "cpu" else None
        self._compute = Compute(dtype=compute.dtype, kernels=kernels)

    def forget(self) -> None:
        """Set the count to 0."""
        self.count = 0

    def begin(self, own: Routed, told: dict, number: int, experts: set[int]) -> Future:
        """Begin to compute experts of a round, from what `run_block` told."""
        self.count += len(experts)
        return self.submit(own, told["slots"][number], sorted(experts))

    def submit(self, own: Routed, part: dict, experts: list[int]) -> Future:
        """Begin `sums` in the thread of the host."""
        return self._worker.submit(self.sums, own, part, experts)

    def sums(self, own: Routed, part: dict, experts: list[int]) -> np.ndarray:
        """The gated sums of some experts, float32[T, D].

        Args:
          own: of the layer.
          part: x_TD, expert_TK, gate_TK and keep_TK of a round.
          experts: their ids.
        """
        part = {name: np.asarray(array) for name, array in part.items()}
        x_TD, answers = part["x_TD"], []
        with jax.set_mesh(self._mesh):
            for e in experts:
                at_TK = part["keep_TK"] & (part["expert_TK"] == e)
                token_N = np.flatnonzero(at_TK.any(axis=1))
                gate_N = np.sum(part["gate_TK"] * at_TK, axis=1)[token_N]
                room = 1 << max(len(token_N) - 1, 0).bit_length()
                x_ND = np.zeros((room, x_TD.shape[1]), x_TD.dtype)
                x_ND[: len(token_N)] = x_TD[token_N]
                row = own.slots.bank.row(own.layer.first + e)
                row, x_ND = jax.device_put((row, x_ND), self._place)
                graphdef = self._graphs[module_of(own.layer)]
                how = {"graphdef": graphdef, "compute": self._compute}
                y_ND = _answer(own.slots.split(row), x_ND, **how)
                answers.append((token_N, gate_N, y_ND))
            sum_TD = np.zeros(x_TD.shape, np.float32)
            for token_N, gate_N, y_ND in answers:
                y_ND = np.asarray(y_ND)[: len(token_N)].astype(np.float32)
                sum_TD[token_N] += gate_N[:, None] * y_ND
        return sum_TD

    def added(
        self, going: dict, number: int, experts: set[int], answer: Future
    ) -> dict:
        """The parts of `Context.offload` with the answer added, for which it waits."""
        done_E = np.zeros(going["done_RE"].shape[1], bool)
        done_E[list(experts)] = True
        return _added(going, answer.result(), done_E, np.int32(number))


def _flat(tree):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        yield "/".join(name for name in names if name != "value"), leaf


@functools.partial(jax.jit, static_argnames=("graphdef", "compute"))
def _answer(trees, x_ND, *, graphdef, compute):
    """The answers of one expert to its rows, [N, D]; rows of zeros fill up."""
    TRACED["host"] += 1
    one = [nested({n: a[None] for n, a in tree.items()}) for tree in trees]
    experts = merged(graphdef, *one)
    ctx = Context.of(x_ND[None], mode="decode", compute=compute)
    return experts(x_ND, jnp.array([len(x_ND)], jnp.int32), ctx)


@jax.jit
def _added(going, sum_TD, done_E, number):
    return going | {
        "done_RE": going["done_RE"].at[number].max(done_E),
        "sum_RTD": going["sum_RTD"].at[number].add(sum_TD),
    }
