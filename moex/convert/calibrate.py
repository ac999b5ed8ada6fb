"""Second moments of the inputs of a trained model's experts.

B batch · L length · T = B * L tokens · C chain rounds · R copies of a layer · D width
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from moex.model.losses import moe_layers
from moex.progress import counted
from moex.runs.open import LoadedRun
from moex.sharding import shard_batch
from moex.train.job import Job


def input_moments(run: LoadedRun, job: Job, sequences: int) -> dict:
    """Second moments of the inputs of each MoE's experts, over valid tokens.

    Args:
      job: for its training batches, from the first on, and how to compute.
      sequences: the least number of sequences to read, in whole batches.

    Returns:
      {path of a layer: float64[R, D, D]}.
    """
    task, compute = job.cfg.task, job.compute(train=False)

    @jax.jit
    def moments(params, state, batch):
        ctx = task.context(batch, mode="eval", collect=True, compute=compute)
        _, aux = task.run(run.spec.merge(params, state), ctx, batch)
        return second_moments(aux, ctx.valid_BL)

    num_batches = -(-sequences // job.cfg.batch_size)
    total: dict[str, np.ndarray] = {}
    with jax.set_mesh(job.mesh):
        batches = itertools.islice(job.batches(0), num_batches)
        doing = "reading training sequences"
        for batch in counted(batches, doing, num_batches, "batches"):
            batch = shard_batch(batch, job.mesh)
            for path, value in moments(run.params, run.state, batch).items():
                total[path] = total.get(path, 0) + np.float64(value) / num_batches
    return total


def second_moments(aux, valid_BL) -> dict:
    """Mean of x^T x over the valid tokens of one batch, by path of a layer: [R, D, D].

    Every token counts once for all experts of its layer, and once per round of a chain.

    Args:
      aux: from a model that ran with `Context(collect=True)`.
      valid_BL: bool[B, L].
    """
    valid_T = valid_BL.reshape(-1).astype(jnp.float32)
    means = {}
    for path, layer in moe_layers(aux):
        x = layer["inputs"].astype(jnp.float32)  # [R, B, L, D], or [R, C, B, L, D]
        x_RCTD = x.reshape(x.shape[0], -1, valid_T.size, x.shape[-1])
        sum_RDD = jnp.einsum(
            "rctd,rcte,t->rde", x_RCTD, x_RCTD, valid_T, precision="highest"
        )
        means["/".join(path)] = sum_RDD / (x_RCTD.shape[1] * jnp.sum(valid_T))
    return means
