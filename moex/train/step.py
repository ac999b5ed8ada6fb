"""One optimizer step and one evaluation step: pure functions to be jitted once.

The batch of a step is all of it; gradient accumulation splits it into microbatches
inside the program.

B batch · L length · E experts
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moex.accounting import param_group
from moex.moe.metrics import layer_metrics
from moex.optim import flat_paths, path_factors, path_name
from moex.schedule import is_always_zero, points_of, value_at
from moex.train.losses import lm_loss, make_context

# Updates that must be accepted before a spike can be told from a start.
SPIKE_WARMUP = 50
GRAD_NORM_DECAY = 0.99


def make_train_step(spec, tx, coefs, *, grad_accum, num_domains, optim, static):
    """`(train_state, step, key, batch) -> (train_state, metrics)`; jit with donation.

    Args:
      spec: `ModelSpec`.
      tx: optax transformation.
      coefs: `run.Loss`.
      grad_accum: microbatches per step.
      num_domains: sources of the data.
      optim: `Optim`; its `spike_factor` guards the update.
      static: static fields of `Context` (dtype, kernels, remat).
    """

    def loss_fn(params, state, batch, key, num_tokens, step, load_before):
        model = spec.merge(params, state)
        ctx = make_context(batch, key=key, mode="train", **static)
        return lm_loss(
            model,
            ctx,
            batch,
            coefs,
            step=step,
            num_tokens=num_tokens,
            num_microbatches=grad_accum,
            num_domains=num_domains,
            load_before=load_before,
        )

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    factors = path_factors(optim, spec.params)

    def train_step(train_state, step, key, batch):
        params, state = train_state["params"], train_state["state"]
        # A batch without one scored target has loss 0, not 0 / 0.
        num_tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
        key = jax.random.fold_in(key, step)

        def micro(args, before):
            """Loss, sums, gradients; `before` holds those of earlier microbatches."""
            i, microbatch = args
            key_i = jax.random.fold_in(key, i)
            load_before = None
            if before is not None and coefs.balance_scope == "step":
                (_, sums), _ = before
                load_before = {
                    k: v["stats"]["load_E"] for k, v in sums["layers"].items()
                }
            return grad_fn(
                params, state, microbatch, key_i, num_tokens, step, load_before
            )

        (loss, sums), grads = _accumulate(micro, batch, grad_accum)
        # Frozen parameters have no part in the norm; XLA drops gradients of constants.
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g: _unless_frozen(g, factors[path_name(path)], step), grads
        )
        with jax.named_scope("optimizer"):
            grad_norm, group_norms = gradient_norms(grads)
            updates, opt = tx.update(grads, train_state["opt"], params)
            new = {
                "params": optax.apply_updates(params, updates),
                "state": update_state(spec, state, sums["layers"], step),
                "opt": opt,
            }
            lost = lost_rows(sums["layers"])
            ok, guard = guard_update(
                train_state["guard"], loss, grad_norm, optim.spike_factor, lost
            )
            old = {k: train_state[k] for k in new}
            new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        metrics = figures(sums, grad_accum) | {
            "loss": loss,
            "grad_norm": grad_norm,
            "grad_norms": group_norms,
            "lost_rows": lost,
            "skipped": guard["skipped"],
            "skipped_in_row": guard["skipped_in_row"],
        }
        return new | {"guard": guard}, metrics

    return train_step


def _unless_frozen(gradient, factor, step):
    """0 where the learning-rate factor is 0, for good or at this step."""
    if is_always_zero(factor):
        return jnp.zeros_like(gradient)
    if points_of(factor) is None:
        return gradient
    return jnp.where(value_at(factor, step) == 0, 0.0, gradient)


def gradient_norms(grads) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The norm of all gradients, and of each of `accounting.GROUPS` that is there.

    Both are made of the same squares, one sum per parameter; clipping takes them too.
    """
    squares = {path: jnp.sum(g**2) for path, g in flat_paths(grads).items()}
    groups: dict[str, Any] = {}
    for path, square in squares.items():
        group = param_group(path)
        groups[group] = groups.get(group, 0.0) + square
    total = jnp.sqrt(sum(squares.values(), jnp.zeros(())))
    return total, {name: jnp.sqrt(square) for name, square in groups.items()}


def _accumulate(micro, batch, num):
    """Sum of `micro((i, microbatch), sum before)` over `num` microbatches of `batch`.

    Rows are dealt out in turn, not in runs, so that a batch split over devices stays
    where it is.
    """
    if num == 1:
        return micro((0, batch), None)
    parts = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(-1, num, *a.shape[1:]), 0, 1), batch
    )
    # Zeros, not the first microbatch: the model is then compiled once, not twice.
    first = (0, jax.tree.map(lambda a: a[0], parts))
    abstract = jax.eval_shape(lambda: micro(first, None))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)

    def add(total, args):
        return jax.tree.map(jnp.add, total, micro(args, total)), None

    return jax.lax.scan(add, zeros, (jnp.arange(num), parts))[0]


def update_state(spec, state, layers, step):
    """Move the state of each router by its rule, with the sums of the whole step."""

    def update(path, value):
        name = path_name(path)
        return spec.info[name].rule(value, router_sums(layers, name), step)

    return jax.tree_util.tree_map_with_path(update, state)


def router_sums(layers, name) -> dict:
    """Sums of the router that the state variable `name` belongs to.

    `<layer>/router/x` is the only router of its layer: in a chain it takes part in
    every round, so rounds are added. `<layer>/routers/t/x` is that of round t.
    """
    layer, _, rest = name.rpartition("/router")
    stats = layers[layer]["stats"]
    if rest.startswith("s/"):
        t = int(rest.split("/")[1])
        return {k: v[:, t] for k, v in stats.items()}
    if stats["num_tokens"].ndim == 2:
        return {k: jnp.sum(v, axis=1) for k, v in stats.items()}
    return stats


def lost_rows(layers):
    """float32: rows of all layers that found no room on their way to the experts."""
    return sum(
        (jnp.sum(v["stats"]["num_lost"]) for v in layers.values()), jnp.zeros(())
    )


def guard_update(guard, loss, grad_norm, spike_factor, lost=0.0):
    """Decide whether an update is taken, and count.

    It is skipped if the loss or the gradient norm is not finite, if rows were lost on
    their way to the experts, or if the gradient norm exceeds `spike_factor` times its
    running mean over accepted updates (once `SPIKE_WARMUP` were accepted).

    Returns:
      (ok bool scalar, new guard).
    """
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (lost == 0)
    mean = guard["grad_norm_mean"]
    if spike_factor is not None:
        started = guard["accepted"] >= SPIKE_WARMUP
        ok &= ~started | (grad_norm <= spike_factor * mean)
    # A plain mean at first, then an exponential one.
    count = guard["accepted"].astype(jnp.float32) + 1
    rate = jnp.maximum(1 - GRAD_NORM_DECAY, 1 / count)
    skip = (~ok).astype(jnp.int32)
    return ok, {
        "accepted": guard["accepted"] + 1 - skip,
        "grad_norm_mean": jnp.where(ok, mean + rate * (grad_norm - mean), mean),
        "skipped": guard["skipped"] + skip,
        "skipped_in_row": (guard["skipped_in_row"] + 1) * skip,
    }


def figures(sums, num_microbatches=1):
    """What is logged, from sums: nats per token, bits per byte, routing per layer."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    layers = {}
    for path, layer in sums["layers"].items():
        means = {k: v / num_microbatches for k, v in layer["losses"].items()}
        # Figures of all tokens come last: `entropy` is exact there.
        layers[path] = means | layer_metrics(layer["stats"])
    return {
        "nll": sums["nll"] / tokens,
        "z": sums["z"] / tokens,
        "bits_per_byte": sums["nll"] / jnp.maximum(sums["bytes"], 1.0) / jnp.log(2.0),
        "tokens": sums["tokens"],
        "bytes": sums["bytes"],
        "domain_nll": sums["domain_nll"] / jnp.maximum(sums["domain_tokens"], 1.0),
        "domain_tokens": sums["domain_tokens"],
        "layers": layers,
        "weighted": sums["weighted"],
    }


def make_eval_step(spec, coefs, *, num_domains, static):
    """`(params, state, batch) -> sums`; sums of all batches go to `figures`."""

    def eval_step(params, state, batch):
        model = spec.merge(params, state)
        ctx = make_context(batch, mode="eval", **static)
        _, sums = lm_loss(
            model,
            ctx,
            batch,
            coefs,
            num_tokens=1.0,
            num_microbatches=1,
            num_domains=num_domains,
        )
        return sums

    return eval_step
