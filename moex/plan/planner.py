"""`plan(cfg, topology)`: what a job needs and moves on devices that need not be there.

Everything is read off the abstract model and its shardings: no array is made.
"""

import dataclasses
from typing import Any

import jax

from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.plan.memory import Memory, memory
from moex.plan.topology import Topology
from moex.plan.traffic import Traffic, traffic
from moex.runs.keys import check_run
from moex.runs.program import check_devices, check_kernels
from moex.train.job import Training


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of one run on a topology."""

    topology: Topology  # the devices
    mesh: dict[str, int]  # sizes of the axes
    # num_params, active_params: all parameters, and those that one token uses.
    num_params: int
    active_params: int
    tokens: int  # tokens per optimizer step
    flops_per_token: float  # forward and backward, without recomputation
    recompute_flops: float  # those per token that recomputation adds
    setting: dict  # how it is computed: dtype, remat, kernels
    memory: Memory  # the memory of one device
    carried: tuple[Traffic, ...]  # the traffic of the axes, per optimizer step

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within a device's memory; None where that is unknown."""
        limit = self.topology.chip.memory
        return None if limit is None else self.memory.peak <= limit

    @property
    def compute_seconds(self) -> float | None:
        """Seconds of one step's matmuls at the peak rate, recomputation included."""
        peak = self.topology.peak_flops
        if peak is None:
            return None
        work = (self.flops_per_token + self.recompute_flops) * self.tokens
        return work / peak / self.topology.num_devices

    @property
    def update_seconds(self) -> float | None:
        """Seconds of the optimizer: state read and written once, gradients read."""
        rate = self.topology.chip.memory_rate
        if rate is None:
            return None
        return (2 * self.memory.state + self.memory.params) / rate

    def axis_seconds(self) -> dict[str, float] | None:
        """Seconds by axis; None if any speed is not known."""
        sums: dict[str, float] = {}
        for row in self.carried:
            if row.seconds is None:
                return None
            sums[row.axis] = sums.get(row.axis, 0.0) + row.seconds
        return sums

    def step_seconds(self) -> tuple[float, float] | None:
        """(least, most): with all traffic behind the matmuls, and with none.

        The update comes after both. None if any speed is not known.
        """
        axes = self.axis_seconds()
        compute, update = self.compute_seconds, self.update_seconds
        if axes is None or compute is None or update is None:
            return None
        most = sum(axes.values())
        return max(compute, *axes.values(), 0.0) + update, compute + most + update

    def mfu(self) -> tuple[float, float] | None:
        """(highest, lowest) share of the peak rate that the step times allow."""
        seconds, peak = self.step_seconds(), self.topology.peak_flops
        if seconds is None or peak is None:
            return None
        ideal = self.flops_per_token * self.tokens / peak / self.topology.num_devices
        return ideal / seconds[0], ideal / seconds[1]

    def to_dict(self) -> dict:
        """The plan as plain data."""
        seconds, mfu = self.step_seconds(), self.mfu()
        return {
            "topology": self.topology.name,
            "device": self.topology.chip.device_kind,
            "num_devices": self.topology.num_devices,
            "mesh": self.mesh,
            "setting": self.setting,
            "num_params": self.num_params,
            "active_params": self.active_params,
            "tokens_per_step": self.tokens,
            "flops_per_token": self.flops_per_token,
            "recompute_flops_per_token": self.recompute_flops,
            "memory": self.memory.to_dict(),
            "memory_limit": self.topology.chip.memory,
            "fits": self.fits,
            "traffic": [
                dataclasses.asdict(row) | {"received": int(row.received)}
                for row in self.carried
            ],
            "compute_seconds": self.compute_seconds,
            "update_seconds": self.update_seconds,
            "step_seconds": None if seconds is None else list(seconds),
            "mfu": None if mfu is None else list(mfu),
        }


def check(cfg, topology: Topology):
    """Check a config on a topology; returns its abstract program.

    Raises:
      ConfigError: for any mistake in the config, or where it does not fit the devices.
    """
    check_run(cfg)
    cfg.task.fill(cfg)
    mesh: Any = topology.mesh(cfg.mesh)  # an abstract mesh is enough for a program
    check_devices(cfg, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        check_kernels(cfg)
        return Training(cfg=cfg, mesh=mesh, spec=model_spec(cfg.model, mesh))


def plan(cfg, topology: Topology) -> Plan:
    """Plan what a run needs and moves; fills in the vocabulary.

    Raises:
      ConfigError: for the same reasons as `check`.
    """
    program = check(cfg, topology)
    sizes = dict(program.mesh.shape)
    held = memory(program, topology)
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        compute = program.compute(train=True)
        rows = traffic(program)
    cost = model_cost(cfg.model, program.spec, cfg.seq_len)
    carried = []
    for row in rows:
        seconds = topology.seconds(row.axis, sizes, row.received, row.exchange)
        carried.append(dataclasses.replace(row, seconds=seconds))
    again = sum(
        b.repeat
        * {"none": 0.0, "dots": b.score_flops, "full": b.forward_flops()}[cfg.remat]
        for b in cost.blocks
    )
    return Plan(
        topology=topology,
        mesh=sizes,
        num_params=cost.num_params,
        active_params=cost.num_active,
        tokens=cfg.batch_size * cfg.seq_len,
        flops_per_token=cost.train_flops,
        recompute_flops=again,
        setting=dataclasses.asdict(compute)
        | {"batch_size": cfg.batch_size, "grad_accum": cfg.grad_accum}
        | {"seq_len": cfg.seq_len, cfg.model.SIZE: cfg.model.num_outputs},
        memory=held,
        carried=tuple(carried),
    )
