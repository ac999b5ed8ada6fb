"""What the losses weigh: the one place where coefficients meet losses.

B batch · L length · V vocabulary · X domains
"""

from typing import Any

import jax
import jax.numpy as jnp

from moex.config.schedule import value_at
from moex.moe.losses import load_balance_loss, own_losses
from moex.nn.context import Context


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


def step_counts(batch) -> dict:
    """The counts that losses are means over, in the whole batch of an optimizer step.

    float32, at least 1: a batch without one scored target has loss 0, not 0 / 0.
    """
    valid_BL = batch["segment"] > 0
    counts = {
        "targets": jnp.sum(batch["loss_mask"]),
        "tokens": jnp.sum(valid_BL, dtype=jnp.float32),
        "sequences": jnp.sum(jnp.any(valid_BL, axis=1), dtype=jnp.float32),
    }
    return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}


def lm_loss(
    model,
    ctx,
    batch,
    coefs,
    *,
    step=0,
    counts=None,
    num_microbatches=1,
    num_domains,
    load_before=None,
):
    """The loss whose gradient trains the model, and the sums that metrics need.

    Means over tokens or sequences are over those of the whole step, so that
    microbatches with unequal counts add up to the full batch: cross-entropy, z-loss,
    router z-loss, entropy, and the balance loss by sequence. The balance loss of a
    microbatch and the importance loss are no such means; microbatches count the same.

    Args:
      model: `(ctx) -> (logits_BLV, aux)`.
      ctx: `Context` of the microbatch.
      batch: microbatch of the data pipeline.
      coefs: `run.Loss`.
      step: optimizer step, for coefficients that follow a schedule.
      counts: `step_counts` of the whole optimizer step; None: the batch is all of it.
      num_microbatches: int, over which per-microbatch losses are averaged.
      num_domains: int, sources of the data.
      load_before: `{layer path: load_E}` of earlier microbatches of the step, for
        `balance_scope="step"`; None: there are none.

    Returns:
      (float32 scalar, sums): float32 sums and int32 counts that add over microbatches.
    """
    counts = step_counts(batch) if counts is None else counts
    sums = lm_sums(model, ctx, batch, num_domains=num_domains)
    weighted = {"z": value_at(coefs.z, step) * sums["z"] / counts["targets"]}
    raw = routing_losses(
        sums["layers"], coefs, counts, num_microbatches, load_before=load_before
    )
    for name, value in raw.items():
        weighted[name] = value_at(getattr(coefs, name), step) * value
    weighted |= own_losses(sums["layers"], counts["tokens"], coefs.over_layers)
    loss = sums["nll"] / counts["targets"] + sum(weighted.values())
    return loss, sums | {"weighted": weighted}


def lm_sums(model, ctx, batch, *, num_domains) -> dict:
    """The sums that losses and figures are made of; arguments as for `lm_loss`."""
    logits_BLV, aux = model(ctx)
    mask_BL = batch["loss_mask"]
    scored_BL = (mask_BL > 0).astype(jnp.int32)
    nll_BL, z_BL = token_losses(logits_BLV, batch["targets"])
    layers = {"/".join(path): layer for path, layer in moe_layers(aux)}
    domain_BX = jax.nn.one_hot(batch["domain"], num_domains, dtype=jnp.int32)
    return {
        "nll": jnp.sum(nll_BL * mask_BL),
        "z": jnp.sum(z_BL * mask_BL),
        # The loss of a model that knows nothing.
        "guess": jnp.log(float(logits_BLV.shape[-1])) * jnp.sum(mask_BL),
        "bytes": jnp.sum(batch["num_bytes"] * scored_BL),
        "tokens": jnp.sum(scored_BL),
        "padding": jnp.sum(batch["segment"] == 0, dtype=jnp.int32),
        "domain_nll": domain_BX.T.astype(jnp.float32) @ jnp.sum(nll_BL * mask_BL, 1),
        "domain_tokens": jnp.sum(domain_BX * jnp.sum(scored_BL, 1)[:, None], axis=0),
        "layers": {
            path: {"losses": layer["losses"], "stats": layer["stats"]}
            for path, layer in layers.items()
        },
    }


def routing_losses(
    layers, coefs, counts, num_microbatches=1, *, load_before=None
) -> dict:
    """The unscaled part of a microbatch in the routing losses of its step.

    Args:
      layers: `{path: aux of a layer}`; every array has leading dims [repeat] or
        [repeat, C].
      coefs: `run.Loss`, for scope, scale and how layers are put together.
      counts, num_microbatches, load_before: as for `lm_loss`.

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
