"""What the losses weigh: the one place where coefficients meet losses.

B batch · L length · V vocabulary
"""

import jax
import jax.numpy as jnp

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


def lm_loss(model, ctx, batch, coefs, *, num_tokens, num_microbatches, num_domains):
    """The loss whose gradient trains the model, and the sums that metrics need.

    Args:
      model: `(ctx) -> (logits_BLV, aux)`.
      ctx: `Context` of the microbatch.
      batch: microbatch of the data pipeline.
      coefs: `run.Loss`.
      num_tokens: float32, scored targets in the whole optimizer step, so that
        microbatches with unequal counts add up to the full batch.
      num_microbatches: int, over which per-microbatch losses are averaged.
      num_domains: int, sources of the data.

    Returns:
      (float32 scalar, sums): sums add over microbatches.
    """
    logits_BLV, aux = model(ctx)
    mask_BL = batch["loss_mask"]
    nll_BL, z_BL = token_losses(logits_BLV, batch["targets"])
    nll_sum = jnp.sum(nll_BL * mask_BL)
    z_sum = jnp.sum(z_BL * mask_BL)
    loss = (nll_sum + coefs.z * z_sum) / num_tokens
    layers = list(moe_layers(aux))
    for _, layer in layers:
        routing = coefs.load_balance * jnp.sum(layer["losses"]["load_balance"])
        routing += coefs.router_z * jnp.sum(layer["losses"]["router_z"])
        loss += routing / num_microbatches
    domain_B = jax.nn.one_hot(batch["domain"], num_domains, dtype=jnp.float32).T
    sums = {
        "nll": nll_sum,
        "z": z_sum,
        "bytes": jnp.sum(batch["num_bytes"] * mask_BL),
        "tokens": jnp.sum(mask_BL),
        "domain_nll": domain_B @ jnp.sum(nll_BL * mask_BL, axis=1),
        "domain_tokens": domain_B @ jnp.sum(mask_BL, axis=1),
        "layers": {
            "/".join(path): {"losses": layer["losses"], "stats": layer["stats"]}
            for path, layer in layers
        },
    }
    return loss, sums
