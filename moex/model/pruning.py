"""Pruning of whole rows while training: more and more rows of chosen matrices are 0.

A row is an output neuron: its numbers stand along the matrix's input dims.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moex.config.base import Config, ConfigError, nearest, require
from moex.model.paths import flat_paths, matching, nested, path_name


@dataclasses.dataclass(kw_only=True, slots=True)
class PruneRows(Config):
    """The rows of least sensitivity are 0, fewer and fewer are kept.

    The sensitivity of a row is the mean of |w dL/dw| over its numbers, smoothed over
    steps; one threshold holds for the rows of all matrices. A row that is 0 can come
    back, as it gets gradients. Source: MC-SMoE, arXiv:2310.01334, and its code
    (the rule of LoSparse without uncertainty).
    """

    pattern: str = "*residual_*"  # of parameter paths, as in lr_factors
    keep: float = 0.1  # share of the numbers that are kept in the end, in (0, 1]
    warmup: int = 50  # w: all are kept before it, and `keep` in the last 4 w steps
    decay: float = 0.85  # of the smoothed sensitivity, in [0, 1)

    def validate(self, path):
        require(0 < self.keep <= 1, f"{path}.keep", self.keep, "in (0, 1]")
        require(self.warmup >= 0, f"{path}.warmup", self.warmup, ">= 0")
        require(0 <= self.decay < 1, f"{path}.decay", self.decay, "in [0, 1)")

    def validate_steps(self, steps: int, path: str) -> None:
        """Check that the steps between the first w and the last 4 w are some."""
        allowed = f"below steps / 5 = {steps / 5:g}"
        require(5 * self.warmup < steps, f"{path}.warmup", self.warmup, allowed)

    def kept(self, step, steps: int):
        """The share of the numbers that is kept after update `step`, from 0, float32.

        Args:
          step: int32 scalar.
          steps: updates of the whole run.
        """
        done = (step + 1 - self.warmup) / (steps - 5 * self.warmup)
        left = 1 - jnp.clip(done, 0.0, 1.0)
        return self.keep + (1 - self.keep) * left**3


class PruneState(NamedTuple):
    """The optimizer's state: its own, the updates done, and smoothed sensitivities.

    `sensitivity` has for each pruned parameter float32, in its shape without its input
    dims.
    """

    inner: Any
    done: jax.Array
    sensitivity: dict[str, Any]  # nested as the parameters are


def prune_rows(tx, cfg: PruneRows, steps: int, params, info, frozen, path: str):
    """Wrap an optimizer so that its updates leave pruned rows at 0.

    Args:
      tx: optax transformation.
      cfg: `PruneRows`.
      steps: optimizer steps of the whole run.
      params: nested dict of arrays or `ShapeDtypeStruct`s.
      info: `{path: ParamInfo}` with the matrix dims of each parameter.
      frozen: paths of the parameters that are not trained.
      path: of the config, for errors.

    Raises:
      ConfigError: if the pattern matches nothing, or a parameter that is no matrix or
        is not trained.
    """
    names = flat_paths(params)
    chosen = matching(cfg.pattern, names)
    if not chosen:
        parts = {part for name in names for part in name.split("/")}
        raise ConfigError(
            f"{path}.pattern = {cfg.pattern!r}: matches no parameter."
            f"{nearest(cfg.pattern, parts)} LowRankGlu has residuals to prune."
        )
    for name in chosen:
        if info[name].matrix is None:
            raise ConfigError(f"{path}.pattern = {cfg.pattern!r}: {name} is no matrix.")
        if name in frozen:
            raise ConfigError(f"{path}.pattern = {cfg.pattern!r}: {name} is frozen.")
    axes = {n: tuple(d - len(info[n].axes) for d in info[n].matrix[0]) for n in chosen}

    def rows_of(value, name):
        return jnp.mean(value.astype(jnp.float32), axis=axes[name])

    def init(params):
        own = flat_paths(params)
        zeros = nested({n: jnp.zeros_like(rows_of(own[n], n)) for n in chosen})
        return PruneState(tx.init(params), jnp.zeros((), jnp.int32), zeros)

    def update(grads, state, params=None):
        updates, inner = tx.update(grads, state.inner, params)
        own, slopes = flat_paths(params), flat_paths(grads)
        before = flat_paths(state.sensitivity)
        smooth = {
            n: cfg.decay * before[n]
            + (1 - cfg.decay) * rows_of(jnp.abs(own[n] * slopes[n]), n)
            for n in chosen
        }
        sizes = {n: own[n].size // smooth[n].size for n in chosen}
        stays = kept_rows(smooth, sizes, cfg.kept(state.done, steps))

        def pruned(path, change, value):
            name = path_name(path)
            if name not in stays:
                return change
            mask = jnp.expand_dims(stays[name], axes[name])
            return jnp.where(mask, change, -value)

        updates = jax.tree_util.tree_map_with_path(pruned, updates, params)
        return updates, PruneState(inner, state.done + 1, nested(smooth))

    return optax.GradientTransformation(init, update)


def kept_rows(values: dict, sizes: dict[str, int], share) -> dict:
    """The mask of the rows with the largest values that hold a share of all numbers.

    Ties go to the row that comes first, by name and then by place.

    Args:
      values: {name: float array}, a number for each row.
      sizes: {name: numbers in each of its rows}.
      share: of all numbers, in [0, 1].

    Returns:
      {name: bool array}; the rows hold at most that share, or all for a share of 1.
    """
    names = sorted(values)
    flat = jnp.concatenate([values[n].reshape(-1) for n in names])
    numbers = [jnp.full(values[n].size, float(sizes[n])) for n in names]
    size_N = jnp.concatenate(numbers)
    order_N = jnp.argsort(-flat, stable=True)
    held_N = jnp.cumsum(size_N[order_N]) / jnp.sum(size_N)
    # Sums of float32 sizes are exact up to 2**24 only: a little above the share counts.
    stays_N = jnp.zeros(len(flat), bool).at[order_N].set(held_N <= share + 1e-6)
    stays_N |= jnp.asarray(share >= 1)
    found, at = {}, 0
    for n in names:
        part = stays_N[at : at + values[n].size]
        found[n] = part.reshape(values[n].shape)
        at += values[n].size
    return found
