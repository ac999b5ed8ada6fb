"""Mixture of experts token by token in float64 numpy: the truth that tests trust.

Reads configs for their numbers, and shares no code with the layers.

T tokens · D model width · E experts · F expert width · Z latent width · G groups
"""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


# Routers: (cfg, logits of one token, ...) -> chosen experts, and their gates.


def scores(logit_E, kind):
    """(score_E, prob_E)"""
    if kind == "softmax":
        return softmax(logit_E), softmax(logit_E)
    if kind == "sigmoid":
        score_E = 1 / (1 + np.exp(-logit_E))
    else:
        score_E = np.sqrt(np.log(1 + np.exp(logit_E)))
    return score_E, score_E / score_E.sum()


def best(value_E, k):
    """The k largest, ties to the lowest."""
    return sorted(range(len(value_E)), key=lambda e: (-value_E[e], e))[:k]


def gates_of(score_E, prob_E, chosen, normalize):
    values_E = prob_E if normalize == "before" else score_E
    total = sum(score_E[e] for e in chosen) if normalize == "after" else 1.0
    return {e: values_E[e] / total for e in chosen}


def topk(cfg, logit_E, bias_E, **_):
    score_E, prob_E = scores(logit_E, cfg.score)
    choice_E = score_E + bias_E
    if cfg.groups is not None:
        size = len(choice_E) // cfg.groups.num
        count = {"max": 1, "top2": 2}[cfg.groups.score]
        value_G = [
            sum(sorted(choice_E[g * size : (g + 1) * size])[-count:])
            for g in range(cfg.groups.num)
        ]
        allowed = best(value_G, cfg.groups.keep)
        choice_E = [
            c if e // size in allowed else -math.inf for e, c in enumerate(choice_E)
        ]
    gates = gates_of(score_E, prob_E, best(choice_E, cfg.k), cfg.normalize)
    return {e: g * cfg.scale for e, g in gates.items()}, prob_E


def topp(cfg, logit_E, p, **_):
    prob_E = softmax(logit_E)
    order = best(prob_E, cfg.k_max or len(prob_E))
    chosen, mass = [], 0.0
    for e in order:
        if len(chosen) >= cfg.k_min and mass > p and p < 1:
            break
        chosen.append(e)
        mass += prob_E[e]
    return gates_of(prob_E, prob_E, chosen, cfg.normalize), prob_E


def soft(cfg, logit_E, **_):
    _, prob_E = scores(logit_E, cfg.score)
    return dict(enumerate(prob_E)), prob_E


def forced(cfg, logit_E, t, **_):
    """ "balanced" and "adversarial" only; the others are random."""
    E = len(logit_E)
    prob_E = softmax(logit_E)
    base = {"balanced": E, "adversarial": cfg.k}[cfg.load]
    chosen = [(t * cfg.k + j) % base for j in range(cfg.k)]
    return gates_of(prob_E, prob_E, chosen, "after"), prob_E


def mixed(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def hashed(cfg, logit_E, token, **_):
    """In block 0 of the model and round 0 of a chain, or wherever there is neither."""
    E, seed = len(logit_E), cfg.seed
    if cfg.by_layer:
        seed = mixed(mixed(mixed(seed ^ 0x9E3779B9)))
    start = mixed(token ^ mixed(seed))
    value_E = [mixed((start + e * 0x9E3779B9) % 2**32) >> 8 for e in range(E)]
    chosen = best(value_E, cfg.k)
    return dict.fromkeys(chosen, 1 / cfg.k), np.bincount(chosen, minlength=E) / cfg.k


BY_TOKEN = {"TopK": topk, "TopP": topp, "Soft": soft, "Forced": forced, "Hash": hashed}


def route(cfg, x_TD, params, *, state=None, valid_T=None, token_T=None):
    """A whole batch through a router.

    Returns:
      (gates: one {expert: gate} per token, logits_TE, probs_TE); padding has no gates.
    """
    T = len(x_TD)
    E = params["num_experts"]
    state = {} if state is None else {k: np.asarray(v) for k, v in state.items()}
    valid_T = np.ones(T, bool) if valid_T is None else valid_T
    token_T = np.zeros(T, int) if token_T is None else np.asarray(token_T)
    w_DE = np.asarray(params.get("w_DE", np.zeros((x_TD.shape[1], E))), np.float64)
    logits_TE = np.asarray(x_TD, np.float64) @ w_DE
    if getattr(cfg, "logit_norm", False):
        centred_TE = logits_TE - logits_TE.mean(axis=1, keepdims=True)
        deviation_T1 = np.sqrt((centred_TE**2).mean(axis=1, keepdims=True) + 1e-6)
        logits_TE = np.asarray(params["logit_scale"]) * centred_TE / deviation_T1
    if type(cfg).__name__ == "ExpertChoice":
        return expert_choice(cfg, logits_TE, valid_T)
    p = getattr(cfg, "p", None)
    p = state.get("p", state.get("p_and_error", [p])[0])
    one = BY_TOKEN[type(cfg).__name__]
    gates, probs = [], []
    for t in range(T):
        chosen, prob_E = one(
            cfg,
            logits_TE[t],
            bias_E=state.get("bias_E", np.zeros(E)),
            p=p,
            t=t,
            token=int(token_T[t]),
        )
        gates.append(chosen if valid_T[t] else {})
        probs.append(prob_E)
    return gates, logits_TE, np.array(probs)


def expert_choice(cfg, logits_TE, valid_T):
    T, E = logits_TE.shape
    probs_TE = np.array([softmax(row) for row in logits_TE])
    gates = [{} for _ in range(T)]
    for e in range(E):
        wanted_T = np.where(valid_T, probs_TE[:, e], -1)
        for t in best(wanted_T, min(math.ceil(cfg.k * valid_T.sum() / E), T)):
            if valid_T[t]:
                gates[t][e] = probs_TE[t, e]
    return gates, logits_TE, probs_TE


def keep_within(capacity, gates, num_experts):
    """The gates that find room: all first choices in order of tokens, then all second.

    Zero-computation experts, with ids from `num_experts` on, have room for all.
    """
    room_E = [capacity] * num_experts
    kept = [{} for _ in gates]
    for j in range(max(map(len, gates), default=0)):
        for t, chosen in enumerate(gates):
            if j >= len(chosen):
                continue
            e = list(chosen)[j]
            if e >= num_experts or room_E[e] > 0:
                kept[t][e] = chosen[e]
                if e < num_experts:
                    room_E[e] -= 1
    return kept


# Experts: (cfg, row x_D, weights of all experts, e) -> y_D.


def glu(x_D, w_in_D2F, w_out_FD):
    """W_out (silu(W_gate x) * W_up x)."""
    return (silu(x_D @ w_in_D2F[:, 0]) * (x_D @ w_in_D2F[:, 1])) @ w_out_FD


def glu_expert(cfg, x_D, w, e):
    a = x_D @ w["w_in_ED2F"][e, :, 0]
    b = x_D @ w["w_in_ED2F"][e, :, 1]
    if cfg.bias:
        a, b = a + w["bias_in_E2F"][e, 0], b + w["bias_in_E2F"][e, 1]
    if cfg.activation == "silu":
        h = silu(a) * b
    elif cfg.activation == "gelu":
        h = a * np.array([(1 + math.erf(v / math.sqrt(2))) / 2 for v in a]) * b
    else:
        a, b = np.minimum(a, 7.0), np.clip(b, -7.0, 7.0)
        h = a / (1 + np.exp(-1.702 * a)) * (b + 1)
    y = h @ w["w_out_EFD"][e]
    return y + w["bias_out_ED"][e] if cfg.bias else y


def latent_expert(cfg, x_D, w, e):
    g = e // cfg.group

    def through(op, v):
        if op not in cfg.ops:
            return v @ w["w_down_EFD" if op == "down" else f"w_{op}_EDF"][e]
        if op == "down":
            return v @ w["a_down_EFZ"][e] @ w["b_down_GZD"][g]
        return v @ w[f"b_{op}_GDZ"][g] @ w[f"a_{op}_EZF"][e]

    return through("down", silu(through("gate", x_D)) * through("up", x_D))


def lowrank_expert(cfg, x_D, w, e):
    scale = 1.0 if cfg.alpha is None else cfg.alpha / cfg.rank
    return scale * (x_D @ w["a_EDR"][e] @ w["b_ERD"][e])


def lowrank_glu_expert(cfg, x_D, w, e):
    """U V + S of gate, up and down; stored rows are the first ones."""
    F, parts = cfg.hidden, []
    for i in range(2):
        matrix_DF = w["a_in_ED2R"][e][:, i] @ w["b_in_E2RF"][e][i]
        if cfg.rows is None:
            matrix_DF = matrix_DF + w["residual_in_ED2F"][e][:, i]
        else:
            for j in range(cfg.rows[0]):
                if j // F == i:
                    matrix_DF[:, j % F] += w["rows_in_EDI"][e][:, j]
        parts.append(x_D @ matrix_DF)
    out_FD = w["a_out_EFR"][e] @ w["b_out_ERD"][e]
    if cfg.rows is None:
        out_FD = out_FD + w["residual_out_EFD"][e]
    else:
        out_FD[:, : cfg.rows[1]] += w["rows_out_EFO"][e]
    return (silu(parts[0]) * parts[1]) @ out_FD


EXPERTS = {
    "Glu": glu_expert,
    "Latent": latent_expert,
    "LowRank": lowrank_expert,
    "LowRankGlu": lowrank_glu_expert,
}


def zero_expert(cfg, x_D, w, z):
    if z < cfg.null:
        return np.zeros_like(x_D)
    if z < cfg.null + cfg.copy:
        return x_D
    j = z - cfg.null - cfg.copy
    own, learned = softmax(x_D @ w["w_JD2"][j])
    return own * x_D + learned * w["v_JD"][j]


# Layers.


def moe(cfg, x_TD, params, *, shape, valid_T, token_T=None, state=None, capacity=None):
    """A whole layer: the routed experts and the shared one.

    Args:
      cfg: `MoE`.
      x_TD: tokens.
      params: nested dict of the layer's parameters.
      shape: (batch, length), for the loss by sequence.
      valid_T, token_T: padding is False; token ids.
      state: of the router.
      capacity: most rows of an expert, or None.

    Returns:
      {"y_TD", "load_E" before capacity, "num_kept", and each loss}.
    """
    y_TD, found = routed(
        cfg,
        cfg.router,
        x_TD,
        params | {"router": params.get("router", {})},
        shape=shape,
        valid_T=valid_T,
        token_T=token_T,
        state=state,
        capacity=capacity,
    )
    return found | {"y_TD": y_TD + shared(cfg, x_TD, params)}


def shared(cfg, x_TD, params):
    x_TD = np.asarray(x_TD, np.float64)
    y_TD = np.zeros_like(x_TD)
    if cfg.shared is None:
        return y_TD
    w = as_float64(params["shared"])
    for t, x_D in enumerate(x_TD):
        y_TD[t] = glu(x_D, w["w_in_D2F"], w["w_out_FD"])
        if cfg.shared_gate:
            logit = x_D @ np.asarray(params["w_shared_gate_D1"], np.float64)[:, 0]
            y_TD[t] /= 1 + np.exp(-logit)
    return y_TD


def as_float64(tree):
    return {
        k: as_float64(v) if isinstance(v, dict) else np.asarray(v, np.float64)
        for k, v in tree.items()
    }


def routed(
    cfg,
    router,
    x_TD,
    params,
    *,
    shape,
    valid_T,
    token_T=None,
    state=None,
    capacity=None,
):
    """(y_TD of the routed experts, counts and losses)."""
    x_TD = np.asarray(x_TD, np.float64)
    E = cfg.num_experts
    choices = E + (cfg.zero.count() if cfg.zero else 0)
    weights = as_float64(params["experts"])
    gates, logits_TE, probs_TE = route(
        router,
        x_TD,
        params["router"] | {"num_experts": choices},
        state=state,
        valid_T=valid_T,
        token_T=token_T,
    )
    kept = gates if capacity is None else keep_within(capacity, gates, E)
    stored_E = range(E) if cfg.stored_experts is None else state["stored_E"]
    y_TD = np.zeros_like(x_TD)
    for t, chosen in enumerate(kept):
        for e, gate in chosen.items():
            if e < E:
                one = EXPERTS[type(cfg.experts).__name__]
                y_TD[t] += gate * one(cfg.experts, x_TD[t], weights, int(stored_E[e]))
            else:
                w = as_float64(params.get("zero", {}))
                y_TD[t] += gate * zero_expert(cfg.zero, x_TD[t], w, e - E)
    return y_TD, figures(gates, kept, logits_TE, probs_TE, shape, valid_T, E)


def figures(gates, kept, logits_TE, probs_TE, shape, valid_T, num_experts):
    """Counts and losses of one routing, by their definitions."""
    B, L = shape
    chosen_TE = np.zeros(probs_TE.shape)
    for t, chosen in enumerate(gates):
        chosen_TE[t, list(chosen)] = 1

    def balance(tokens):
        """E sum f P over some tokens."""
        tokens = [t for t in tokens if valid_T[t]]
        if not tokens:
            return 0.0
        load_E = chosen_TE[tokens].sum(axis=0)
        share_E = load_E / max(load_E.sum(), 1)
        return len(load_E) * np.sum(share_E * probs_TE[tokens].mean(axis=0))

    rows = [range(b * L, (b + 1) * L) for b in range(B)]
    with_tokens = [row for row in rows if any(valid_T[t] for t in row)]
    valid = np.flatnonzero(valid_T)
    count = max(len(valid), 1)
    importance_E = probs_TE[valid].sum(axis=0)
    z_T = np.array([np.log(np.sum(np.exp(logits_TE[t]))) ** 2 for t in valid])
    safe_TE = np.where(probs_TE[valid] > 0, probs_TE[valid], 1.0)
    return {
        "load_E": chosen_TE.sum(axis=0),
        "num_kept": sum(e < num_experts for chosen in kept for e in chosen),
        "load_balance": balance(range(B * L)),
        "sequence_balance": sum(map(balance, rows)) / max(len(with_tokens), 1),
        "router_z": z_T.sum() / count,
        "entropy": -np.sum(safe_TE * np.log(safe_TE)) / count,
        "importance": importance_E.var() / max(importance_E.mean() ** 2, 1e-10),
    }


def chain(cfg, x_TD, params, **batch):
    """z_t = z_{t-1} + M_t(z_{t-1}); returns (z_C - z_0 or z_C, figures per round)."""
    z_TD, rounds = np.asarray(x_TD, np.float64), []
    start_TD = z_TD
    for t in range(cfg.iterations):
        if cfg.routers == "shared":
            router, own = cfg.moe.router, params["router"]
        else:
            router = cfg.moe.router if cfg.routers == "independent" else cfg.routers[t]
            own = params.get("routers", {}).get(t, {})
        y_TD, found = routed(cfg.moe, router, z_TD, params | {"router": own}, **batch)
        if t == 0 or not cfg.shared_once:
            y_TD = y_TD + shared(cfg.moe, z_TD, params)
        z_TD = z_TD + y_TD if cfg.inner_residual else y_TD
        rounds.append(found)
    return (z_TD - start_TD if cfg.inner_residual else z_TD), rounds


def slope(function, arguments, name, direction, step=1e-6):
    """Derivative of a float64 function of {name: array} along `direction`."""
    sides = []
    for sign in (1, -1):
        moved = np.asarray(arguments[name], np.float64) + sign * step * direction
        sides.append(function(arguments | {name: moved}))
    return (sides[0] - sides[1]) / (2 * step)
