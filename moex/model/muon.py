"""Muon, as optax has it; on one CPU its orthogonalisation is computed in C.

The optimizer state is that of `optax.contrib.muon` in both cases.
"""

import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from kernels_pallas.dense import computes_in_c
from kernels_pallas.orthogonalise import orthogonalised_momentum

EPS = 1e-8  # added to the norm of a matrix, as in optax
LARGEST = 2**21  # floats of a matrix in C, where one thread computes all of it


def muon(lr, adam_lr, cfg, weight_decay, dims, kernels=None):
    """Make an optimizer: orthogonalised momentum for matrices, Adam for the rest.

    Args:
      lr, adam_lr: schedules of the two parts.
      cfg: `optim.Muon`.
      weight_decay: weight decay of the matrices.
      dims: function of a parameter tree: `MuonDimensionNumbers` of each matrix, counted
        from the right; None for parameters that use Adam.
      kernels: name of the matmul implementation, or None to choose.

    Returns:
      optax.GradientTransformation, which equals `optax.contrib.muon`.
    """

    def labels(params):
        return jax.tree.map(
            lambda _, d: "adam" if d is None else "muon", params, dims(params)
        )

    def scale_by_shape(updates, params=None):
        del params
        return jax.tree.map(_scaled, updates, dims(updates))

    matrices = optax.chain(
        _orthogonal_momentum(cfg, dims, kernels),
        optax.stateless(scale_by_shape),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(lr),
    )
    rest = optax.adamw(
        adam_lr, b1=cfg.b1, b2=cfg.b2, eps=EPS, weight_decay=0.0, nesterov=True
    )
    return optax.partition({"muon": matrices, "adam": rest}, labels)


def _orthogonal_momentum(cfg, dims, kernels):
    """The same as `optax.contrib.scale_by_muon`, computed in C where that can be."""
    plain = scale_by_muon(
        beta=cfg.momentum, ns_steps=cfg.ns_steps, eps=EPS, weight_dimension_numbers=dims
    )

    def update(grads, state, params=None):
        own = dims(grads)
        if not (computes_in_c(jnp.dtype("float32"), kernels) and _fit(grads, own)):
            return plain.update(grads, state, params)
        beta, count = cfg.momentum, optax.safe_increment(state.count)
        # Nesterov: take the momentum of the next step as if it had the same gradient.
        ahead = beta / (1 - beta ** optax.safe_increment(count))
        weights = jnp.stack([beta, 1 - beta, ahead, (1 - beta) / (1 - beta**count)])
        pairs = jax.tree.map(
            lambda g, mu, d: _step(g, mu, d, weights, state.ns_coeffs, cfg.ns_steps),
            grads,
            state.mu,
            own,
        )
        outer = jax.tree.structure(grads)
        updates, mu = jax.tree.transpose(outer, jax.tree.structure((0, 0)), pairs)
        return updates, MuonState(count=count, mu=mu, ns_coeffs=state.ns_coeffs)

    return optax.GradientTransformation(plain.init, update)


def _fit(grads, dims) -> bool:
    """Whether C takes every matrix: float32, and not too large for one thread."""
    takes = jax.tree.map(
        lambda x, d: x.dtype == jnp.float32 and math.prod(_sizes(x, d)) <= LARGEST,
        grads,
        dims,
    )
    return all(jax.tree.leaves(takes))


def _step(g, momentum, dims: MuonDimensionNumbers, weights, coefficients, steps):
    """The pair (update, new momentum) of every matrix of a parameter.

    Nothing is moved in memory if the rows of a matrix lie before its columns and the
    columns come last.
    """
    rows, columns = (_from_left(d, g.ndim) for d in dims)
    batch = [d for d in range(g.ndim) if d not in (*rows, *columns)]
    outer = [d for d in batch if d < min(rows)]
    order = (*outer, *rows, *(d for d in batch if d not in outer), *columns)
    R, C = _sizes(g, dims)
    S = math.prod(g.shape[d] for d in outer)
    g, momentum = (jnp.transpose(a, order) for a in (g, momentum))
    shape = (S, R, -1, C)
    made = orthogonalised_momentum(
        g.reshape(shape), momentum.reshape(shape), weights, coefficients, steps, EPS
    )
    back = sorted(range(g.ndim), key=order.__getitem__)
    return tuple(jnp.transpose(a.reshape(g.shape), back) for a in made)


def _scaled(update, dims: MuonDimensionNumbers):
    R, C = _sizes(update, dims)
    return math.sqrt(max(1, C / R)) * update


def _sizes(x, dims: MuonDimensionNumbers) -> tuple[int, int]:
    """The pair (rows, columns) of each matrix."""
    rows, columns = (_from_left(d, x.ndim) for d in dims)
    return tuple(math.prod(x.shape[d] for d in ds) for ds in (rows, columns))


def _from_left(dims, rank) -> tuple[int, ...]:
    return tuple(d % rank for d in dims)
