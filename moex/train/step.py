"""One optimizer step: pure functions to be jitted once.

A step gets its whole batch; gradient accumulation splits it into microbatches inside
the program.

B batch · L length · E experts
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moex.config.base import ConfigError
from moex.config.schedule import is_always_zero, points_of, value_at
from moex.model.accounting import param_group
from moex.model.losses import step_counts
from moex.model.optim import path_factors
from moex.model.paths import apart, flat_paths, of_trained, path_name, together

# This many updates must be accepted before a high norm can be called a spike.
SPIKE_WARMUP = 50
GRAD_NORM_DECAY = 0.99
# After this many skips in a row, high norms are a new level and no longer spikes.
SPIKES_IN_ROW = 3


def make_train_step(
    task, spec, tx, coefs, *, grad_accum, num_domains, optim, compute, teacher=None
):
    """Make `(train_state, step, key, batch) -> (train_state, metrics)` to be jitted.

    With a teacher the function takes its arrays, {"params", "state"}, after the batch.

    Args:
      coefs: `run.Loss`.
      grad_accum: microbatches per step.
      optim: `Optim`; its `spike_factor` guards the update.
      compute: `Compute`.
      teacher: `ModelSpec` of the model that the task learns from, or None.
    """
    factors = path_factors(optim, spec.params, spec.info)
    trains = {path: not is_always_zero(factor) for path, factor in factors.items()}
    kinds = {path: i.trained_by for path, i in spec.info.items() if i.trained_by}
    update = make_update(task, spec, tx, trains, optim.spike_factor)

    def loss_fn(params, state, batch, key, counts, step, load_before, taught):
        extra = {} if teacher is None else {"teacher": teacher.merge(**taught)}
        model = spec.merge(params, state)
        ctx = task.context(batch, step=step, key=key, mode="train", compute=compute)
        return task.loss(
            model,
            ctx,
            batch,
            coefs,
            step=step,
            counts=counts,
            num_microbatches=grad_accum,
            num_domains=num_domains,
            load_before=load_before,
            **extra,
        )

    def train_step(train_state, step, key, batch, taught=None):
        own_loss, trained = of_trained(loss_fn, train_state["params"], trains)
        grad_fn = jax.value_and_grad(own_loss, has_aux=True)
        counts = step_counts(batch)
        key = jax.random.fold_in(key, step)

        def micro(args, before):
            """Add the loss, sums and gradients of a microbatch to `before`."""
            i, microbatch = args
            key_i = jax.random.fold_in(key, i)
            load_before = None
            if before is not None and coefs.balance_scope == "step":
                (_, sums), _ = before
                load_before = {k: v["load_E"] for k, v in sums["layers"].items()}
            return grad_fn(
                *(trained, train_state["state"], microbatch),
                *(key_i, counts, step, load_before, taught),
            )

        (loss, sums), grads = _accumulate(micro, batch, grad_accum)
        # A parameter whose schedule is at 0 does not count in the norm.
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g: _unless_frozen(g, factors[path_name(path)], step), grads
        )
        learns = {}
        if kinds:
            here = task.kinds(batch)
            learns = {path: here[kind] for path, kind in kinds.items()}
            grads = of_learning(grads, jax.tree.map(jnp.zeros_like, grads), learns)
        with jax.named_scope("optimizer"):
            new, taken = update(train_state, step, grads, loss, sums, learns)
        figures = task.figures(sums)
        for name in {figure.name for figure in task.FIGURES} - set(figures):
            told = f"{type(task).__name__}.losses gave no sum {name!r}"
            raise ConfigError(f"{told}, which its FIGURES name.")
        return new, figures | {"loss": loss, "weighted": sums["weighted"]} | taken

    return train_step


def make_update(task, spec, tx, trains: dict[str, bool], spike_factor):
    """Make the second half of a step: from gradients to the next train state.

    Args:
      task, spec, tx: as for `make_train_step`.
      trains: the answer for each path of a parameter whether it is trained.
      spike_factor: `Optim.spike_factor`.

    Returns:
      `(train_state, step, grads, loss, sums, learns) -> (train_state, metrics)`, with
      the gradients, the loss and the sums of the whole step; learns: see `of_learning`.
    """

    def update(train_state, step, grads, loss, sums, learns):
        trained, frozen = apart(train_state["params"], trains)
        grad_norm, group_norms = gradient_norms(grads)
        # The optimizer has no state for frozen parameters, and ignores these zeros.
        nothing = jax.tree.map(lambda _: jnp.zeros(()), frozen)
        updates, opt = tx.update(
            together(grads, nothing), train_state["opt"], together(trained, nothing)
        )
        new = {
            "params": optax.apply_updates(trained, apart(updates, trains)[0]),
            "state": update_state(spec, train_state["state"], sums["layers"], step),
            "opt": opt,
        }
        lost = lost_rows(sums["layers"])
        ok, guard = guard_update(
            train_state["guard"],
            loss,
            grad_norm,
            spike_factor,
            lost,
            sums[task.score] > 2 * sums["guess"],
        )
        old = {name: train_state[name] for name in new} | {"params": trained}
        new = of_learning(new, old, learns)
        new = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        new["params"] = together(new["params"], frozen)
        return new | {"guard": guard}, {
            "grad_norm": grad_norm,
            "grad_norms": group_norms,
            "lost_rows": lost,
            "skipped": guard["skipped"],
            "skipped_in_row": guard["skipped_in_row"],
        }

    return update


def of_learning(new, old, learns: dict[str, Any]):
    """`new`, but `old` for all that belongs to a parameter which does not learn now.

    Args:
      new, old: equal trees; a leaf belongs to the parameter whose path ends its own.
      learns: bool scalars by path; other parameters learn.
    """
    if not learns:
        return new

    def choose(path, n, o):
        keys = [str(getattr(k, "key", "")) for k in path]
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        own = next((learns[end] for end in ends if end in learns), True)
        return jnp.where(own, n, o)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def _unless_frozen(gradient, factor, step):
    """The gradient, or 0 where the learning-rate factor is 0 at this step."""
    if points_of(factor) is None:
        return gradient
    return jnp.where(value_at(factor, step) == 0, 0.0, gradient)


def gradient_norms(grads) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The norm of all gradients, and of each of `accounting.GROUPS` in the model.

    Both come from the same squares, one sum per parameter; clipping uses them too.
    """
    squares = {path: jnp.sum(g**2) for path, g in flat_paths(grads).items()}
    groups: dict[str, Any] = {}
    for path, square in squares.items():
        group = param_group(path)
        groups[group] = groups.get(group, 0.0) + square
    total = jnp.sqrt(sum(squares.values(), jnp.zeros(())))
    return total, {name: jnp.sqrt(square) for name, square in groups.items()}


def _accumulate(micro, batch, num):
    """Sum `micro((i, microbatch), sum before)` over `num` microbatches of `batch`.

    Microbatch i takes every `num`-th row from row i on, so that a batch split over
    devices stays where it is.
    """
    if num == 1:
        return micro((0, batch), None)
    parts = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(-1, num, *a.shape[1:]), 0, 1), batch
    )
    # Start from zeros, not from the first microbatch, to compile the model only once.
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
        info = spec.info[name]
        if info.frozen or info.rule is None:
            return value
        return info.rule(value, router_sums(layers, name), step)

    return jax.tree_util.tree_map_with_path(update, state)


def router_sums(layers, name) -> dict:
    """The sums of the router that the state variable `name` belongs to.

    `<layer>/router/x` belongs to the only router of its layer: in a chain it routes
    every round, so rounds are added. `<layer>/routers/t/x` belongs to that of round t.
    """
    layer, _, rest = name.rpartition("/router")
    stats = layers[layer]
    if rest.startswith("s/"):
        t = int(rest.split("/")[1])
        return {k: v[:, t] for k, v in stats.items()}
    if stats["num_tokens"].ndim == 2:
        return {k: jnp.sum(v, axis=1) for k, v in stats.items()}
    return stats


def lost_rows(layers):
    """The number of rows of all layers that found no room on their way to experts."""
    return sum((jnp.sum(v["num_lost"]) for v in layers.values()), jnp.zeros(()))


def guard_update(guard, loss, grad_norm, spike_factor, lost=0.0, hopeless=False):
    """Decide whether an update is taken; count taken and skipped updates.

    It is skipped if the loss or the gradient norm is not finite, if rows were lost on
    their way to the experts, or if the gradient norm exceeds `spike_factor` times its
    running mean (once `SPIKE_WARMUP` updates were accepted).

    Norms that stay high are a new level: a schedule trains more parameters or changes a
    coefficient, or the run was resumed with another batch. The mean follows it: from
    skip number `SPIKES_IN_ROW` in a row on, it moves up to where the norm would just
    have been accepted, and then on as it does after an accepted update. So the first
    norm that is no higher than the one before is accepted. Norms that grow faster than
    a running mean can follow are never accepted: parameters do not change while updates
    are skipped, so norms that still grow without a limit are a divergence.

    Args:
      guard: a guard as `state.init_guard` makes it.
      loss, grad_norm: float32 scalars of this step.
      spike_factor: `Optim.spike_factor`.
      lost: rows that found no room on their way to the experts.
      hopeless: whether the loss is twice that of a model that knows nothing. High norms
        are then no new level, as the parameters are spoiled.

    Returns:
      (ok bool scalar, new guard).
    """
    sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (lost == 0)
    ok, mean = sound, guard["grad_norm_mean"]
    base, moves = mean, sound
    # The mean is a plain one at first, then an exponential one.
    count = guard["accepted"].astype(jnp.float32) + 1
    rate = jnp.where(mean > 0, jnp.maximum(1 - GRAD_NORM_DECAY, 1 / count), 1.0)
    if spike_factor is not None:
        # A norm cannot be judged before enough updates were accepted.
        started = (guard["accepted"] >= SPIKE_WARMUP) & (mean > 0)
        ok &= ~started | (grad_norm <= spike_factor * mean)
        again = guard["skipped_in_row"] + 1 >= SPIKES_IN_ROW
        level = sound & ~ok & again & jnp.logical_not(hopeless)
        base = jnp.where(level, grad_norm / spike_factor, mean)
        moves = ok | level
    skip = (~ok).astype(jnp.int32)
    return ok, {
        # A norm of 0 means that all parameters are frozen: do not count it.
        "accepted": guard["accepted"] + (ok & (grad_norm > 0)).astype(jnp.int32),
        "grad_norm_mean": jnp.where(
            moves & (grad_norm > 0), base + rate * (grad_norm - base), mean
        ),
        "skipped": guard["skipped"] + skip,
        "skipped_in_row": (guard["skipped_in_row"] + 1) * skip,
    }
