"""Sums over the tokens of a batch, on the devices: the parts of `record_sums.py`.

T tokens · E experts · K slots · P experts of a token's pool · R markers · G groups
"""

import jax
import jax.numpy as jnp

EXACT = jax.lax.Precision.HIGHEST


def chosen_slots(trace, logits_TE):
    """int32[T]: the slots of each token, from what a router chose."""
    if "token" not in trace:
        return jnp.sum(trace["keep"], axis=1, dtype=jnp.int32)
    chosen_T = jnp.zeros(len(logits_TE), jnp.int32)
    return chosen_T.at[trace["token"]].add(trace["keep"].astype(jnp.int32))


def slots_of(expert_TK, keep_TK, num_experts):
    """bool[T, K, E]: whether a kept slot is that of an expert."""
    of_TKE = expert_TK[:, :, None] == jnp.arange(num_experts)[None, None]
    return of_TKE & keep_TK[:, :, None]


def sums_of_slots(own, of_TKE, member_GT, marked_RT) -> dict:
    """The sums of slots, gates and norms."""
    gate_TK = jnp.where(own["keep"], own["gate"], 0.0)
    total_T1 = jnp.sum(gate_TK, axis=1, keepdims=True)
    gate_TK = jnp.where(total_T1 > 0, gate_TK / jnp.where(total_T1 > 0, total_T1, 1), 0)

    def of_experts(value_TK):
        return jnp.sum(jnp.where(of_TKE, value_TK[:, :, None], 0.0), axis=1)

    def by_group(value_TE):
        return jnp.dot(member_GT, value_TE, precision=EXACT)

    slot_TE = of_experts(jnp.ones(gate_TK.shape))
    counted = ("gt,rt,te->gre", member_GT, marked_RT, slot_TE)
    return {
        "count_GE": by_group(slot_TE),
        "gate_GE": by_group(of_experts(gate_TK)),
        "norm_GE": by_group(of_experts(own["norm"])),
        "gate_norm_GE": by_group(of_experts(gate_TK * own["norm"])),
        "marker_count_GRE": jnp.einsum(*counted, precision=EXACT),
    }


def top_expert(own, of_TKE):
    """float32[T, E]: 1 at the kept expert of greatest gate, the lowest of equals."""
    gate_TK = jnp.where(own["keep"], own["gate"], -jnp.inf)
    best_TK = (gate_TK == jnp.max(gate_TK, axis=1, keepdims=True)) & own["keep"]
    best_TE = jnp.any(of_TKE & best_TK[:, :, None], axis=1)
    first_TE = jnp.cumsum(best_TE, axis=1) == 1
    return (best_TE & first_TE).astype(jnp.float32)


def pool(logits_TE, chosen_T, slots: int, size: int | None):
    """The device form of `scores.pool`: (expert, logit, valid) [T, P]."""
    P = min(slots, logits_TE.shape[1]) if size is None else size
    logit_TP, expert_TP = jax.lax.top_k(logits_TE, P)
    if size is not None:
        return expert_TP, logit_TP, jnp.ones(logit_TP.shape, bool)
    return expert_TP, logit_TP, jnp.arange(P)[None] < chosen_T[:, None]


def pool_probs(logit_TP, valid_TP):
    """The device form of `scores.pool_probs`."""
    probs_TP = jax.nn.softmax(jnp.where(valid_TP, logit_TP, -1e30), axis=1)
    return jnp.where(valid_TP, probs_TP, 0.0)


def selection_scores(picked, member_GT, limit_G, logits_TE) -> dict:
    """The device form of `scores.score_sums`: TCESS and PEU of each group."""
    expert_TP, logit_TP, valid_TP = picked
    probs_TP = pool_probs(logit_TP, valid_TP)

    def sums(score_TP, counted_TP, member_GT):
        of_TPE = slots_of(expert_TP, counted_TP, logits_TE.shape[1])
        score_TE = jnp.sum(jnp.where(of_TPE, score_TP[:, :, None], 0.0), axis=1)
        return jnp.dot(member_GT, score_TE, precision=EXACT)

    def utility(limit_T1, member_GT):
        # By rounding, a mean of equal numbers may lie slightly above them.
        counted_TP = valid_TP & (probs_TP >= limit_T1 * (1 - 1e-6))
        return sums(
            jnp.maximum(logit_TP, jax.nn.sigmoid(logit_TP)), counted_TP, member_GT
        )

    # A token belongs to all tokens, and to one domain, whose threshold is another.
    of_domain_T1 = jnp.dot(limit_G[1:], member_GT[1:], precision=EXACT)[:, None]
    peu = [utility(limit_G[0], member_GT[:1]), utility(of_domain_T1, member_GT[1:])]
    return {
        "tcess_GE": sums(logit_TP, valid_TP, member_GT),
        "peu_GE": jnp.concatenate(peu),
    }
