"""The losses of MoE layers, before coefficients, and the counts that make means.

B batch · L length
"""

import jax.numpy as jnp

from moex.moe.losses import LOSSES, Share


def moe_layers(aux, path=()):
    """Yield `(path, aux)` of every MoE layer in an aux tree; arrays are [repeat, ...].

    Layers come in the order of the modules; "10" comes after "9".
    """
    if "load" in aux:
        yield path, aux
        return
    for key in sorted(aux, key=lambda k: (len(k), k)):
        if isinstance(aux[key], dict) and key != "adapters":
            yield from moe_layers(aux[key], (*path, key))


def adapter_reports(aux) -> dict:
    """The reports of all adapters in an aux tree, by the paths of their parameters."""
    found = dict(aux.get("adapters", {}))
    for key, value in aux.items():
        if isinstance(value, dict) and key != "adapters":
            found |= adapter_reports(value)
    return found


def adapter_losses(reports: dict, num_microbatches=1) -> dict:
    """The part that a microbatch adds to the weighted losses of the adapters.

    Args:
      reports: those of `adapter_reports`.
      num_microbatches: of the step; they have the same weight.

    Returns:
      float32 scalars by name, over all adapted matrices.
    """
    total: dict = {}
    for report in reports.values():
        for name, value in report["losses"].items():
            total[name] = total.get(name, 0.0) + jnp.sum(value) / num_microbatches
    return total


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
      layers: `{path: sums of a layer}`; every array has leading dims [repeat] or
        [repeat, C].
      coefs: `run.Loss`, for scope, scale and how layers are put together.
      counts, num_microbatches, load_before: as for `Task.loss`.

    Returns:
      float32 scalars by name, over all layers and chain rounds.
    """
    total: dict = {}
    count = 0
    for path, stats in layers.items():
        before_E = None if load_before is None else load_before[path]
        share = Share(coefs, counts, num_microbatches, before_E)
        for loss in LOSSES:
            if loss.is_trained:
                part = jnp.sum(loss.part(stats, share))
                total[loss.name] = total.get(loss.name, 0.0) + part
        count += stats["num_tokens"].size
    if coefs.over_layers == "mean":
        total = {name: value / count for name, value in total.items()}
    return total
