"""A check, before anything is compiled, that the devices of a mesh can hold a job.

It counts the train state and the logits of one microbatch: a lower bound. `moex plan`
says how much a job really needs, even on devices that are not here.
"""

from jax.sharding import Mesh

from moex import sharding
from moex.config.base import ConfigError
from moex.model.accounting import device_bytes, local_bytes


def check_room(cfg, mesh: Mesh, state) -> None:
    """Check that each device has enough memory for its part of the job.

    Raises:
      ConfigError: with both sizes, if it has not.
    """
    most = device_bytes(mesh.local_devices)
    held = local_bytes(state)
    if held > most:
        raise ConfigError(
            f"config.model: parameters and optimizer take {held / 2**30:,.1f} GiB of "
            f"each device, which has {most / 2**30:,.1f}; shard the model "
            "(config.mesh), make it smaller, or `moex plan` it for other devices."
        )
    rows = cfg.batch_size // cfg.grad_accum / sharding.batch_shards(mesh)
    parts = mesh.shape["seq"] * mesh.shape["tensor"]
    logits = 4 * rows * cfg.seq_len * cfg.model.num_outputs / parts
    if held + logits > most:
        raise ConfigError(
            f"config.batch_size = {cfg.batch_size}: the float32 logits of a microbatch "
            f"take {logits / 2**30:,.1f} GiB of each device, which has "
            f"{most / 2**30:,.1f}, {held / 2**30:,.1f} of them for parameters and "
            "optimizer; raise config.grad_accum, or lower batch_size or seq_len."
        )
