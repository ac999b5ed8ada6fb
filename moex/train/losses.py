"""What the losses weigh: the one place where coefficients meet losses.

B batch · L length · V vocabulary
"""

from typing import Any

import jax
import jax.numpy as jnp

from moex.moe.losses import load_balance_loss
from moex.nn.context import Context
from moex.schedule import value_at


def moe_layers(aux, path=()):
    """Yield `(path, aux)` of every MoE layer in an aux tree; arrays are [repeat, ...].

    Order is the order of the modules; "10" comes after "9".
    """
    if "load" in aux:
        yield path, aux
        return
    for key in sorted(aux, key=lambda k: (len(k), k)):
        if isinstance(aux[key], dict):
            yield from moe_layers(aux[key], (*path, key))


def token_losses(logits_BLV, targets_BL):
    """Cross-entropy and squared log-normaliser of each target, float32[B, L], nats."""
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return lse_BL - target_BL, lse_BL**2


def make_context(batch, **static) -> Context:
    """The `Context` of a batch from the data pipeline."""
    return Context(
        segment_BL=batch["segment"],
        position_BL=batch["position"],
        token_BL=batch["tokens"],
        **static,
    )


def lm_loss(
    model,
    ctx,
    batch,
    coefs,
    *,
    step=0,
    num_tokens,
    num_microbatches,
    num_domains,
    load_before=None,
):
    """The loss whose gradient trains the model, and the sums that metrics need.

    Args:
      model: `(ctx) -> (logits_BLV, aux)`.
      ctx: `Context` of the microbatch.
      batch: microbatch of the data pipeline.
      coefs: `run.Loss`.
      step: optimizer step, for coefficients that follow a schedule.
      num_tokens: float32, scored targets in the whole optimizer step, so that
        microbatches with unequal counts add up to the full batch.
      num_microbatches: int, over which per-microbatch losses are averaged.
      num_domains: int, sources of the data.
      load_before: `{layer path: load_E}` of earlier microbatches of the step, for
        `balance_scope="step"`; None: there are none.

    Returns:
      (float32 scalar, sums): sums add over microbatches.
    """
    logits_BLV, aux = model(ctx)
    mask_BL = batch["loss_mask"]
    nll_BL, z_BL = token_losses(logits_BLV, batch["targets"])
    nll_sum = jnp.sum(nll_BL * mask_BL)
    z_sum = jnp.sum(z_BL * mask_BL)
    layers = {"/".join(path): layer for path, layer in moe_layers(aux)}
    weighted = {"z": value_at(coefs.z, step) * z_sum / num_tokens}
    raw = routing_losses(layers, coefs, load_before)
    for name, value in raw.items():
        weighted[name] = value_at(getattr(coefs, name), step) * value / num_microbatches
    loss = nll_sum / num_tokens + sum(weighted.values())
    domain_B = jax.nn.one_hot(batch["domain"], num_domains, dtype=jnp.float32).T
    sums = {
        "nll": nll_sum,
        "z": z_sum,
        "bytes": jnp.sum(batch["num_bytes"] * mask_BL),
        "tokens": jnp.sum(mask_BL),
        "domain_nll": domain_B @ jnp.sum(nll_BL * mask_BL, axis=1),
        "domain_tokens": domain_B @ jnp.sum(mask_BL, axis=1),
        "layers": {
            path: {"losses": layer["losses"], "stats": layer["stats"]}
            for path, layer in layers.items()
        },
        "weighted": weighted,
    }
    return loss, sums


def routing_losses(layers, coefs, load_before=None) -> dict:
    """Unscaled routing losses of a microbatch, over all layers and chain rounds.

    Args:
      layers: `{path: aux of a layer}`; every array has leading dims [repeat] or
        [repeat, C].
      coefs: `run.Loss`, for scope, scale and how layers are put together.
      load_before: as for `lm_loss`.
    """
    if not layers:
        return {}
    names = ("load_balance", "router_z", "entropy", "importance")
    total: dict[str, Any] = dict.fromkeys(names, 0.0)
    count = 0
    for path, layer in layers.items():
        own, stats = layer["losses"], layer["stats"]
        values = {name: own[name] for name in total}
        if coefs.balance_scope == "sequence":
            values["load_balance"] = own["sequence_balance"]
        elif coefs.balance_scope == "step" and load_before is not None:
            values["load_balance"] = load_balance_loss(
                stats["load_E"] + load_before[path],
                stats["prob_sum_E"],
                stats["num_tokens"],
            )
        if coefs.balance_scale == "count":
            slots = stats["num_slots"] / jnp.maximum(stats["num_tokens"], 1.0)
            values["load_balance"] *= slots
        total = {name: total[name] + jnp.sum(values[name]) for name in total}
        count += own["load_balance"].size
    if coefs.over_layers == "mean":
        total = {name: value / count for name, value in total.items()}
    return total
