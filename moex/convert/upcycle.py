"""Upcycling: a dense feed-forward as experts that compute the same function.

Pure functions of numpy arrays and configs of one layer. Which layers of a model, and
its parameters: `to_moe.py`.

C copies of the feed-forward · g slices of a copy · E = C * g experts · D model width ·
F hidden width, of one expert F / g
"""

import numpy as np

from moex.config.base import require
from moex.convert.kinds.moe import Upcycle
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE, split_experts
from moex.moe.routers.topk import TopK
from moex.nn.mlp import Dense
from moex.numbers import exact


def moe_of_dense(dense: Dense, options: Upcycle, where: str) -> MoE:
    """The config of the layer that a dense one becomes.

    Raises:
      ConfigError: if `split` does not divide its width.
    """
    of = f"a divisor of {where}.hidden = {dense.hidden}"
    require(dense.hidden % options.split == 0, "--split", options.split, of)
    router, experts = TopK(k=options.k), Glu(hidden=dense.hidden)
    if options.scale == "gates":
        router.scale = float(options.split)
    moe = MoE(num_experts=options.experts, router=router, experts=experts)
    return split_experts(moe, options.split)


def layer_of_dense(weights: dict, options: Upcycle, number: int) -> dict:
    """Parameters of a `DenseLayer` as those of the layer of `moe_of_dense`.

    The order of the experts is copy by copy: expert c * g + s is slice s of copy c. A
    dense feed-forward is the sum of its slices, so the function is the same if every
    token gets k whole copies and the gates of the slices of one number sum to 1:

    - The slices of a copy have equal router weights (a virtual group), so they have
      equal logits, and a copy is chosen as a whole. Copies tie where their logits are
      equal, as for a token that is zero: ties go to the lowest expert, and in this
      order the lowest k * g experts are k whole copies.
    - The gates sum to 1 after selection, so those of the slices of one number sum to
      1 / g, whatever the router says of the copies. The factor g of `Upcycle.scale`
      makes this 1.

    So it is exact, up to the rounding of float32, for any router weights, k, split and
    input, without noise and drawn columns, and until the first optimizer step. With
    split > 1 there is one exception, of measure zero: a token for which two copies have
    logits closer than the rounding of a matrix product, but not equal, may get slices
    of both. After the first step slices of all copies are chosen freely. Padding is
    not routed: it gets 0, and no valid token looks at it.

    Drawn columns are another random subset in every expert, the same in gate, up and
    down; they are normal, with mean 0 and the standard deviation of the dense matrix.

    Args:
      weights: {"w_in_D2F", "w_out_FD"}.
      number: number of the layer in the model: every layer has its own random numbers,
        which do not depend on what other layers become.

    Returns:
      {"router": {"w_DE"}, "experts": {"w_in_ED2F", "w_out_EFD"}}, float32.

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055 (sparse upcycling); He et al.
    2024, arXiv:2410.07524 (virtual groups and scaling; their router normalises before
    selection); Nakamura et al. 2025, arXiv:2502.19261 (drop-upcycling).
    """
    w_in_D2F = np.asarray(weights["w_in_D2F"], np.float32)
    w_out_FD = np.asarray(weights["w_out_FD"], np.float32)
    C, g = options.experts, options.split
    D, _, F = w_in_D2F.shape
    w_in_gD2F = np.moveaxis(w_in_D2F.reshape(D, 2, g, F // g), 2, 0)
    w_in_ED2F = np.tile(w_in_gD2F, (C, 1, 1, 1))
    w_out_EFD = np.tile(w_out_FD.reshape(g, F // g, D), (C, 1, 1))
    std_21 = w_in_D2F.std(axis=(0, 2))[:, None]  # gate and up have one each
    std = w_out_FD.std()
    if options.noise:
        rng = np.random.default_rng((options.seed, number, 0))
        w_in_ED2F += options.noise * std_21 * _normal(rng, w_in_ED2F.shape)
        w_out_EFD += options.noise * std * _normal(rng, w_out_EFD.shape)
    if options.reinit:
        rng = np.random.default_rng((options.seed, number, 1))
        n = round(exact(options.reinit) * (F // g))
        for e in range(C * g):
            column_n = rng.choice(F // g, n, replace=False)
            w_in_ED2F[e][:, :, column_n] = std_21 * _normal(rng, (D, 2, n))
            w_out_EFD[e][column_n] = std * _normal(rng, (n, D))
    if options.scale == "weights":
        w_out_EFD *= g
    rng = np.random.default_rng((options.seed, number, 2))
    w_DC = TopK(k=1).init_std * _normal(rng, (D, C))
    return {
        "router": {"w_DE": np.repeat(w_DC, g, axis=1)},
        "experts": {"w_in_ED2F": w_in_ED2F, "w_out_EFD": w_out_EFD},
    }


def _normal(rng, shape):
    return rng.standard_normal(shape, np.float32)
