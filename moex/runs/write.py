"""Writing a run directory: the metadata of a step, and a new run of given arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moex.config import base as configs
from moex.config.base import ConfigError
from moex.data.batches import Datasets
from moex.model.paths import flat_paths
from moex.model.spec import init_guard, opt_shardings
from moex.runs.checkpoint import HOST_BYTES, Checkpointer
from moex.runs.checksums import all_finite
from moex.runs.consumed import Consumed
from moex.runs.directory import RunDir
from moex.runs.program import Program


def about_step(
    step: int, cfg, identity: dict[str, str], final: dict | None = None
) -> dict:
    """Describe a step and its run: the `meta` of `Checkpointer.save`.

    Args:
      final: the figures of a run that is complete.
    """
    return {
        "step": step,
        **identity,
        "model": configs.to_dict(cfg.model),
        "jax": jax.__version__,
        "final": final,
    }


def write_run(
    run: RunDir, cfg, program: Program, tx, data: Datasets, arrays: dict
) -> None:
    """Write a run directory at step 0, in which training can go on.

    Args:
      run: the run directory; made if there is none.
      program: the same model, on the mesh that its arrays go to.
      arrays: {"params", "state"}. One further array at a time is on the host.

    Raises:
      ConfigError: if there are numbers that are not finite.
    """
    at = jax.tree.map(lambda a: a.sharding, Program.abstract_state(program))
    params = jax.device_put(arrays["params"], at["params"])
    state = {
        "params": params,
        "state": jax.device_put(arrays["state"], at["state"]),
        "guard": jax.device_put(init_guard(), at["guard"]),
    }
    if not all_finite((params, state["state"])):
        trees = flat_paths({"params": params, "state": state["state"]})
        bad = next(name for name, array in trees.items() if not all_finite(array))
        raise ConfigError(
            f"{bad}: has numbers that are not finite; nothing is written."
        )
    if not _starts_at_zero(tx, params):
        opt = opt_shardings(tx, program.spec, at["params"], program.mesh)
        state["opt"] = jax.jit(tx.init, out_shardings=opt)(params)
    run.path.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(run, host_bytes=HOST_BYTES)
    try:
        position = dataclasses.asdict(Consumed())
        meta = about_step(0, cfg, cfg.task.identity(data))
        checkpointer.save(0, program.saved(state), data=position, meta=meta)
        checkpointer.wait()
    finally:
        checkpointer.close()
    cfg.task.save(data, run)
    run.save_config(cfg)  # last, as it makes the folder a run


@functools.partial(jax.jit, static_argnums=0)
def _starts_at_zero(tx, params):
    """Whether a fresh optimizer state is all zeros; then it need not be saved."""
    leaves = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tx.init(params))]
    return ~jnp.any(jnp.array(leaves, bool))
