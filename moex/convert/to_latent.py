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
from moex.progress import counted


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
    found = [site for site in sites(model) if site.sparse is not None]
    for site in counted(found, "factoring experts", len(found), "layers"):
        path, latent = site.sparse.path.split("/"), site.sparse.moe.experts
        assert isinstance(latent, Latent)
        how = Factoring(
            latent=latent.latent,
            group=latent.group,
            rank=options.rank,
            refit=options.refit,
        )
        old = jax.device_get(at_path(params, path)["experts"])
        moment_RDD = moments.get(site.sparse.path)
        layers = []
        for r in range(len(old["w_out_EFD"])):
            weights = {name: value[r] for name, value in old.items()}
            moment_DD = None if moment_RDD is None else moment_RDD[r]
            made, lost = convert_experts(weights, latent.ops, how, moment_DD)
            layers.append(made)
            errors += [
                {"layer": site.numbers[r], "op": op, "group": g}
                | dataclasses.asdict(error)
                for op, by_group in lost.items()
                for g, error in enumerate(by_group)
            ]
        stacked = {name: np.stack([w[name] for w in layers]) for name in layers[0]}
        params = with_path(params, (*path, "experts"), stacked)
    return params, sorted(errors, key=lambda row: row["layer"])


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
