"""Latent experts in a model: its config, and its parameters.

The mathematics of one layer is in `latent.py`; reading and writing runs in
`apply.py`.

R copies of a layer · D model width
"""

import dataclasses

import jax
import numpy as np

from moex.config.base import ConfigError
from moex.convert.kinds.latent import ToLatent
from moex.convert.latent import Factoring, convert_experts
from moex.model.layers import sites
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.progress import phase


def latent_model(model, options: ToLatent):
    """A copy of a `Model` config with latent experts.

    Raises:
      ConfigError: if there is no MoE, or one whose experts are not plain SwiGLU.
    """
    model = dataclasses.replace(model)  # nested configs are copied
    found = [site.sparse for site in sites(model) if site.sparse is not None]
    if not found:
        raise ConfigError(
            "config.model: has no MoE layer; there is nothing to convert. With "
            "--experts and --k its dense layers become MoE layers first."
        )
    for sparse in found:
        experts = sparse.moe.experts
        if not isinstance(experts, Glu) or experts != Glu(hidden=experts.hidden):
            raise ConfigError(
                f"{sparse.where}.experts = {experts!r}: must be Glu(activation='silu', "
                "bias=False); only plain SwiGLU experts become latent ones."
            )
        sparse.moe.experts = Latent(
            hidden=experts.hidden,
            latent=options.latent or experts.hidden,
            group=options.group,
            ops=tuple(options.ops),
        )
    return model


def convert_params(params, model, options: ToLatent, moments):
    """`(params, errors)` with the experts of every MoE of `model` as latent ones.

    Args:
      params: nested dict of arrays of the old model; not changed.
      moments: {path of a layer: float64[R, D, D]}, or empty.

    Returns:
      The new nested dict, and one dict per layer, operator and group: {"layer", "op",
      "group", "error", "tail", "output_error"}.
    """
    errors = []
    found = [(site, site.sparse) for site in sites(model) if site.sparse is not None]
    total = sum(site.repeat for site, _ in found)
    with phase("factoring experts", total, "layers") as at:
        for site, sparse in found:
            path = (*sparse.path.split("/"), "experts")
            old = jax.device_get(at_path(params, path))
            latent, moment_RDD = sparse.moe.experts, moments.get(sparse.path)
            new, lost = _factored(site, latent, old, options, moment_RDD, at.add)
            params = with_path(params, path, new)
            errors += lost
    return params, sorted(errors, key=lambda row: row["layer"])


def _factored(site, latent, old, options: ToLatent, moment_RDD, count):
    """`(experts, errors)` of the layers of a site; `count` counts each."""
    assert isinstance(latent, Latent)
    how = Factoring(
        latent=latent.latent,
        group=latent.group,
        rank=options.rank,
        refit=options.refit,
    )
    layers, errors = [], []
    for r, number in enumerate(site.numbers):
        weights = {name: value[r] for name, value in old.items()}
        moment_DD = None if moment_RDD is None else moment_RDD[r]
        made, lost = convert_experts(weights, latent.ops, how, moment_DD)
        layers.append(made)
        errors += [
            {"layer": number, "op": op, "group": g} | dataclasses.asdict(error)
            for op, by_group in lost.items()
            for g, error in enumerate(by_group)
        ]
        count()
    return {n: np.stack([w[n] for w in layers]) for n in layers[0]}, errors


def at_path(tree, path):
    """The value at `path` in a nested dict."""
    for key in path:
        tree = tree[key]
    return tree


def with_path(tree, path, value):
    """A nested dict with `value` at `path`; what is not on the path is shared."""
    if not path:
        return value
    return tree | {path[0]: with_path(tree[path[0]], path[1:], value)}
