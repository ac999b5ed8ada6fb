"""Experts as U V + S (MC-SMoE): the factors, and the rows of S that are stored.

Source: arXiv:2310.01334 section 3.3. In float64 on the host.

E experts · D model width · F expert width · R rank · I, O stored rows
"""

import dataclasses

import jax
import numpy as np

from moex.config.base import ConfigError
from moex.convert.to_latent import at_path, with_path
from moex.model.layers import sites
from moex.moe.experts.glu import Glu
from moex.moe.experts.lowrank_glu import LowRankGlu
from moex.progress import phase


def check_experts(model, *, compact: bool) -> None:
    """Check that all MoE layers of a `Model` config have experts to convert.

    Args:
      compact: rows of residuals are to be dropped; else U V + S is to be made.

    Raises:
      ConfigError: naming the experts that do not fit.
    """
    found = _sparse(model)
    if not found:
        raise ConfigError(
            "config.model: has no MoE layer; there is nothing to convert."
        )
    for _, sparse in found:
        experts = sparse.moe.experts
        where = f"{sparse.where}.experts = {experts!r}"
        if compact:
            if not isinstance(experts, LowRankGlu) or experts.rows is not None:
                raise ConfigError(
                    f"{where}: has no whole residuals; --compact is for LowRankGlu of "
                    "--to=lowrank, after training with optim.prune."
                )
        elif not isinstance(experts, Glu) or experts.bias:
            raise ConfigError(
                f"{where}: must be Glu(bias=False) to become U V + S"
                + ("; drop rows of S with --compact." * isinstance(experts, LowRankGlu))
            )


def _sparse(model) -> list:
    """The pairs (site, its sparse part) of a `Model` config that have experts."""
    return [(site, site.sparse) for site in sites(model) if site.sparse is not None]


def lowrank_model(model, rank: int):
    """A copy of a `Model` config with `LowRankGlu` experts of whole residuals."""
    model = dataclasses.replace(model)  # nested configs are copied
    check_experts(model, compact=False)
    for _, sparse in _sparse(model):
        glu = sparse.moe.experts
        most = min(glu.hidden, sparse.width)
        if rank > most:
            raise ConfigError(
                f"--factor-rank={rank}: must be at most {most}, the smaller side of "
                f"the matrices of {sparse.where}."
            )
        sparse.moe.experts = LowRankGlu(
            hidden=glu.hidden, rank=rank, activation=glu.activation
        )
    return model


def factors(w_ION, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [.., I, R] and V [.., R, O] with the singular values halved, and the rest.

    The product is nearest in the Frobenius norm (Eckart and Young 1936).

    Args:
      w_ION: matrices [.., I, O].
      rank: R.
    """
    w = np.asarray(w_ION, np.float64)
    left, values, right = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(values[..., :rank])
    a, b = left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]
    return a, b, w - a @ b


def stable_rank(w_IO) -> float:
    """The sum of the squared singular values over the largest one squared."""
    values = np.linalg.svd(np.asarray(w_IO, np.float64), compute_uv=False)
    return float(np.sum(values**2) / values[0] ** 2) if values[0] else 0.0


def factored(params, model) -> tuple[dict, list[dict]]:
    """The parameters of `model`, from those with `Glu` experts, and what is in S.

    Returns:
      (nested dict, errors): {"layer", "op", "error", "stable_rank"} of each layer and
      operator; "error" is |S| / |W| over all experts, "stable_rank" their mean.
    """
    errors, found = [], _sparse(model)
    total = sum(site.repeat for site, _ in found)
    with phase("factoring experts", total, "layers") as at:
        for site, sparse in found:
            path = (*sparse.path.split("/"), "experts")
            old = jax.device_get(at_path(params, path))
            rank, made = sparse.moe.experts.rank, []
            for r, number in enumerate(site.numbers):
                w_in_EDF = np.moveaxis(old["w_in_ED2F"][r], 2, 0)  # gate, up
                ops = {
                    "gate": w_in_EDF[0],
                    "up": w_in_EDF[1],
                    "down": old["w_out_EFD"][r],
                }
                own = {op: factors(w, rank) for op, w in ops.items()}
                made.append(_experts(own))
                errors += [
                    {
                        "layer": number,
                        "op": op,
                        "error": _ratio(own[op][2], w),
                        "stable_rank": float(np.mean([stable_rank(e) for e in w])),
                    }
                    for op, w in ops.items()
                ]
                at.add()
            stacked = {n: np.stack([m[n] for m in made]) for n in made[0]}
            params = with_path(params, path, stacked)
    return params, sorted(errors, key=lambda row: row["layer"])


def _ratio(rest, w) -> float:
    norm = float(np.linalg.norm(w))
    return float(np.linalg.norm(rest)) / norm if norm else 0.0


def _experts(own: dict) -> dict[str, np.ndarray]:
    """The arrays of `LowRankGlu` experts of one layer, float32."""
    pair = [own["gate"], own["up"]]
    arrays = {
        "a_in_ED2R": np.stack([a for a, _, _ in pair], 2),
        "b_in_E2RF": np.stack([b for _, b, _ in pair], 1),
        "residual_in_ED2F": np.stack([s for _, _, s in pair], 2),
        "a_out_EFR": own["down"][0],
        "b_out_ERD": own["down"][1],
        "residual_out_EFD": own["down"][2],
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


# Dropping the rows that are 0.

RESIDUALS = ("residual_in_ED2F", "residual_out_EFD")


def _rows(residual) -> np.ndarray:
    """The residuals [.., E, inputs, rows] of a layer, with gate and up side by side."""
    array = np.asarray(residual)
    return array.reshape(*array.shape[:3], -1)


def stored_rows(params, model) -> dict[str, tuple[int, int]]:
    """The most rows that are not 0 in an expert's residuals, by the place of a layer.

    Args:
      params: nested dict of arrays, with whole residuals.
      model: `Model` config.
    """
    found = {}
    for _, sparse in _sparse(model):
        own = at_path(params, (*sparse.path.split("/"), "experts"))
        most = [
            int(
                np.max(np.count_nonzero(np.any(_rows(own[name]) != 0, axis=2), axis=-1))
            )
            for name in RESIDUALS
        ]
        found[sparse.where] = (most[0], most[1])
    return found


def compact_model(model, rows: dict[str, tuple[int, int]]):
    """A copy of a `Model` config whose experts store these rows of their residuals."""
    model = dataclasses.replace(model)
    for _, sparse in _sparse(model):
        own = tuple(rows[sparse.where])
        sparse.moe.experts = dataclasses.replace(sparse.moe.experts, rows=own)
    return model


def compact_arrays(params, state, model) -> tuple[dict, dict]:
    """Parameters and state of a model of `compact_model`, from whole residuals."""
    for _, sparse in _sparse(model):
        path = (*sparse.path.split("/"), "experts")
        own = dict(jax.device_get(at_path(params, path)))
        index = {}
        names = (("rows_in_EDI", "index_in_EI"), ("rows_out_EFO", "index_out_EO"))
        for name, count, (values, places) in zip(
            RESIDUALS, sparse.moe.experts.rows, names, strict=True
        ):
            whole = _rows(own.pop(name))
            zero = np.all(whole == 0, axis=2)
            # A stable sort: rows that are not 0 come first, in their order.
            index[places] = np.argsort(zero, axis=-1, kind="stable")[..., :count]
            at = index[places][:, :, None]
            own[values] = np.take_along_axis(whole, at, axis=-1)
            index[places] = index[places].astype(np.int32)
        params = with_path(params, path, own)
        state = _with_state(state, path, index)
    return params, state


def _with_state(tree, path, value):
    """A nested dict with `value` at `path`, whose dicts need not be there."""
    if not path:
        return tree | value
    inner = _with_state(tree.get(path[0], {}), path[1:], value)
    return tree | {path[0]: inner}
