"""Mixture of experts token by token in float64 numpy: the truth that tests trust.

T tokens · K slots per token · D model width · E experts · F expert hidden width
"""

import numpy as np


def route(
    x_TD, w_DE, *, k, score="softmax", normalize=True, scale=1.0, bias_E=None, **_
):
    """(expert_TK, gate_TK, logits_TE, probs_TE)."""
    rows = []
    for x_D in np.asarray(x_TD, np.float64):
        logit_E = x_D @ np.asarray(w_DE, np.float64)
        if score == "softmax":
            score_E = np.exp(logit_E - logit_E.max())
            score_E /= score_E.sum()
        else:
            score_E = 1 / (1 + np.exp(-logit_E))
        choice_E = score_E + (0 if bias_E is None else np.asarray(bias_E, np.float64))
        expert_K = sorted(range(len(choice_E)), key=lambda e: (-choice_E[e], e))[:k]
        gate_K = score_E[expert_K]
        if normalize:
            gate_K = gate_K / gate_K.sum()
        rows.append((expert_K, gate_K * scale, logit_E, score_E / score_E.sum()))
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def keep_within(capacity, expert_TK, keep_TK, num_experts):
    """Which slots find room: all first choices in order of tokens, then all second."""
    room_E = [capacity] * num_experts
    kept_TK = np.zeros(expert_TK.shape, bool)
    for j in range(expert_TK.shape[1]):
        for t in range(expert_TK.shape[0]):
            if keep_TK[t, j] and room_E[expert_TK[t, j]] > 0:
                room_E[expert_TK[t, j]] -= 1
                kept_TK[t, j] = True
    return kept_TK


def glu(x_D, w_in_D2F, w_out_FD):
    """W_out (silu(W_gate x) * W_up x)."""
    gate_F, up_F = x_D @ w_in_D2F[:, 0], x_D @ w_in_D2F[:, 1]
    return (gate_F / (1 + np.exp(-gate_F)) * up_F) @ w_out_FD


def moe(x_TD, valid_T, params, *, capacity=None, **router):
    """A whole layer.

    Args:
      x_TD: tokens.
      valid_T: False at padding.
      params: {"router": {"w_DE"}, "experts": {"w_in_ED2F", "w_out_EFD"}} and
        {"shared": {"w_in_D2F", "w_out_FD"}} if there is one.
      capacity: most rows of an expert, or None.
      **router: as for `route`.

    Returns:
      {"y_TD", "load_E" before capacity, "num_kept", "load_balance", "router_z"}.
    """
    x_TD = np.asarray(x_TD, np.float64)
    w_in_ED2F, w_out_EFD = (
        np.asarray(params["experts"][name], np.float64)
        for name in ("w_in_ED2F", "w_out_EFD")
    )
    E = len(w_in_ED2F)
    expert_TK, gate_TK, logits_TE, probs_TE = route(
        x_TD, params["router"]["w_DE"], **router
    )
    wanted_TK = np.broadcast_to(valid_T[:, None], expert_TK.shape)
    kept_TK = wanted_TK
    if capacity is not None:
        kept_TK = keep_within(capacity, expert_TK, wanted_TK, E)
    y_TD = np.zeros_like(x_TD)
    for t, j in np.argwhere(kept_TK):
        e = expert_TK[t, j]
        y_TD[t] += gate_TK[t, j] * glu(x_TD[t], w_in_ED2F[e], w_out_EFD[e])
    if "shared" in params:
        shared = {k: np.asarray(v, np.float64) for k, v in params["shared"].items()}
        for t in range(len(x_TD)):
            y_TD[t] += glu(x_TD[t], shared["w_in_D2F"], shared["w_out_FD"])
    load_E = np.array([(wanted_TK & (expert_TK == e)).sum() for e in range(E)])
    num_tokens, num_slots = max(valid_T.sum(), 1), max(load_E.sum(), 1)
    mean_prob_E = probs_TE[valid_T].sum(axis=0) / num_tokens
    z_T = np.log(np.exp(logits_TE[valid_T]).sum(axis=1)) ** 2
    return {
        "y_TD": y_TD,
        "load_E": load_E,
        "num_kept": kept_TK.sum(),
        "load_balance": E * np.sum(load_E / num_slots * mean_prob_E),
        "router_z": z_T.sum() / num_tokens,
    }


def slope(function, arguments, name, direction, step=1e-6):
    """Derivative of a float64 function of {name: array} along `direction`."""
    sides = []
    for sign in (1, -1):
        moved = np.asarray(arguments[name], np.float64) + sign * step * direction
        sides.append(function(arguments | {name: moved}))
    return (sides[0] - sides[1]) / (2 * step)
