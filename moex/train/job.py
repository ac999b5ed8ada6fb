"""A job: everything that a run config stands for, ready to be stepped."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moex import sharding
from moex.data import batches
from moex.model import optim
from moex.model.spec import abstract_opt, init_guard, init_params, model_spec
from moex.progress import phase
from moex.runs.program import Evaluated, Program, mesh_here
from moex.runs.room import check_room
from moex.train import step as steps
from moex.train.teacher import find_teacher

# Options for a program that runs once: of the 10 s for the quickstart's first state,
# LLVM took 7 to optimise; the arrays are the same to the bit (2 cores, JAX 0.10.2).
ONCE_ON_CPU = {"xla_backend_optimization_level": 1}
# By default libtpu's exchange of ragged rows is one operation, and nothing overlaps it.
# With this option it has a start and an end; the shared expert is computed in between
# (`tests/test_plan.py`, -m aot; both supported versions of JAX have the option).
ASYNC_EXCHANGE = {"xla_tpu_enable_async_ragged_all_to_all": True}


def compiler_options(mesh: Mesh) -> dict | None:
    """The options of XLA for training on this mesh that differ from its defaults."""
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return ASYNC_EXCHANGE if on_tpu and mesh.shape["expert"] > 1 else None


@dataclasses.dataclass(kw_only=True)
class Training(Program):
    """A program with an optimizer, without arrays or data."""

    tx: Any = dataclasses.field(init=False)  # optax transformation
    learning_rate: Any = dataclasses.field(init=False)  # of the optimizer step
    # The program of the run that the task learns from, or None.
    teacher: Program | None = dataclasses.field(init=False)

    def __post_init__(self):
        """Make the optimizer; a ConfigError if it does not fit the parameters."""
        self.teacher = find_teacher(self.cfg, self.mesh)
        kernels = None if self.cfg.kernels == "auto" else self.cfg.kernels
        self.tx, self.learning_rate = optim.make_optimizer(
            self.cfg.optim, self.cfg.steps, self.spec.params, self.spec.info, kernels
        )

    def train_step(self):
        """Make the jitted training step; it donates the train state."""
        step = steps.make_train_step(
            self.cfg.task,
            self.spec,
            self.tx,
            self.cfg.loss,
            grad_accum=self.cfg.grad_accum,
            num_domains=self.num_domains,
            optim=self.cfg.optim,
            compute=self.compute(train=True),
            teacher=None if self.teacher is None else self.teacher.spec,
        )

        def with_rate(train_state, number, key, batch):
            """Do a step and return its learning rate too, so that nobody waits for it.

            If the batch has `stop_N` (from `told_by_each`), "stop" tells all processes
            whether any of them was asked to stop. "teacher" are the arrays of the
            teacher, where there is one.
            """
            rows = {k: a for k, a in batch.items() if k not in ("stop_N", "teacher")}
            taught = batch.get("teacher")
            new, metrics = step(train_state, number, key, rows, taught)
            metrics["lr"] = jnp.float32(self.learning_rate(number))
            if "stop_N" in batch:
                metrics["stop"] = jnp.max(batch["stop_N"])
            return new, metrics

        # Fixed shardings: no step can move the state or leave figures on one device.
        state = jax.tree.map(lambda a: a.sharding, self.abstract_state())
        return jax.jit(
            with_rate,
            donate_argnums=0,
            out_shardings=(state, self.whole),
            compiler_options=compiler_options(self.mesh),
        )

    def init_state(self) -> dict:
        """Make a fresh train state, each array on its devices: no host holds the model.

        Returns:
          {"params", "state", "opt", "guard"}.
        """

        def init(key):
            params, state = init_params(self.cfg.model, key)
            own = {"params": params, "state": state}
            return own | {"opt": self.tx.init(params), "guard": init_guard()}

        places = jax.tree.map(lambda a: a.sharding, self.abstract_state())
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = ONCE_ON_CPU if on_cpu else None
        init = jax.jit(init, out_shardings=places, compiler_options=options)
        with phase("making the first parameters"):
            return init(jax.random.key(self.cfg.seed))

    def abstract_teacher(self) -> dict:
        """The part of a batch that the teacher is, as abstract arrays; {} for none."""
        if self.teacher is None:
            return {}
        arrays = self.teacher.abstract_state()
        return {"teacher": {name: arrays[name] for name in ("params", "state")}}

    def abstract_state(self) -> dict:
        """The train state as `ShapeDtypeStruct`s with shardings, for restoring."""
        opt = abstract_opt(self.tx, self.spec, self.mesh)
        return super().abstract_state() | {"opt": opt}


@dataclasses.dataclass(kw_only=True)
class Job(Training, Evaluated):
    """All that a training needs, except for its arrays."""

    def trace_step(self) -> None:
        """Trace the training step without compiling it, so that its errors show."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = self.cfg.task.batch_shapes(self.cfg, self.cfg.batch_size)
        batch |= self.abstract_teacher()
        number = jax.ShapeDtypeStruct((), jnp.int32)
        with jax.set_mesh(self.mesh), phase("tracing the train step"):
            jax.eval_shape(self.train_step(), self.abstract_state(), number, key, batch)

    def batches(self, start: int):
        """The training batches of this process, from sequence `start` of the job on."""
        return batches.train_iterator(
            self.data,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start=start,
            rows=sharding.process_rows(self.mesh, self.cfg.batch_size),
        )


def make_job(cfg, *, log=print, resumed=None) -> Job:
    """Check a run config, prepare its data and build its abstract model.

    Fills in what the config leaves to the data, such as the vocabulary.

    Args:
      cfg: run config.
      log: called with one line per step of the work.
      resumed: a folder; if it holds a run, the job is to go on with that.

    Raises:
      ConfigError: for any mistake of the user, before anything is compiled.
    """
    mesh = mesh_here(cfg)  # this does not check the schedules; `train` does
    given = cfg.data
    if resumed is not None and resumed.is_run():
        cfg.data = cfg.task.resumed(given, resumed)
    data = cfg.task.prepare(cfg, log=log)
    cfg.data = given
    cfg.task.fill(cfg, data)
    cfg.task.check_fields(cfg, data)
    if cfg.model.adapter is not None:
        cfg.model.adapter.validate_domains(data.domains, "config.model.adapter")
    job = Job(cfg=cfg, mesh=mesh, spec=model_spec(cfg.model, mesh), data=data)
    check_room(cfg, mesh, job.abstract_state() | job.abstract_teacher())
    return job
