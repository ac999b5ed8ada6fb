"""The losses of MoE layers, before coefficients, and the counts that make means.

B batch · L length
"""

from typing import Any

import jax.numpy as jnp

from moex.moe.losses import load_balance_loss


def moe_layers(aux, path=()):
    """Yield `(path, aux)` of every MoE layer in an aux tree; arrays are [repeat, ...].

    Layers come in the order of the modules; "10" comes after "9".
    """
    if "load" in aux:
        yield path, aux
        return
    for key in sorted(aux, key=lambda k: (len(k), k)):
        if isinstance(aux[key], dict):
            yield from moe_layers(aux[key], (*path, key))


def step_counts(batch) -> dict:
    """The counts that losses are means over, in the whole batch of an optimizer step.

    They are float32, at least 1: a batch without scored targets has loss 0, not 0 / 0.
    """
    valid_BL = batch["segment"] > 0
    counts = {
        "targets": jnp.sum(batch["loss_mask"]),
        "tokens": jnp.sum(valid_BL, dtype=jnp.float32),
        "sequences": jnp.sum(jnp.any(valid_BL, axis=1), dtype=jnp.float32),
    }
    return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}


def routing_losses(
    layers, coefs, counts, num_microbatches=1, *, load_before=None
) -> dict:
    """The part that a microbatch adds to the routing losses of its step, unscaled.

    Args:
      layers: `{path: aux of a layer}`; every array has leading dims [repeat] or
        [repeat, C].
      coefs: `run.Loss`, for scope, scale and how layers are put together.
      counts, num_microbatches, load_before: as for `Task.loss`.

    Returns:
      float32 scalars by name, over all layers and chain rounds.
    """
    if not layers:
        return {}
    names = ("load_balance", "router_z", "entropy", "importance")
    total: dict[str, Any] = dict.fromkeys(names, 0.0)
    count = 0
    for path, layer in layers.items():
        own, stats = layer["losses"], layer["stats"]
        values = {
            "load_balance": own["load_balance"] / num_microbatches,
            "router_z": stats["z_sum"] / counts["tokens"],
            "entropy": stats["entropy_sum"] / counts["tokens"],
            "importance": own["importance"] / num_microbatches,
        }
        if coefs.balance_scope == "sequence":
            values["load_balance"] = stats["sequence_balance_sum"] / counts["sequences"]
        elif coefs.balance_scope == "step" and load_before is not None:
            so_far = load_balance_loss(
                stats["load_E"] + load_before[path],
                stats["prob_sum_E"],
                stats["num_tokens"],
            )
            values["load_balance"] = so_far / num_microbatches
        if coefs.balance_scale == "count":
            slots = stats["num_slots"] / jnp.maximum(stats["num_tokens"], 1.0)
            values["load_balance"] *= slots
        total = {name: total[name] + jnp.sum(values[name]) for name in total}
        count += own["load_balance"].size
    if coefs.over_layers == "mean":
        total = {name: value / count for name, value in total.items()}
    return total
