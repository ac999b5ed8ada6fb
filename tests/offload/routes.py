"""Routes of random numbers or of a few experts that are written out."""

import numpy as np

from moex.offload.routes import Routes


def routes_of(expert_NRK, *, example=None, logits=None, layer_R=None, experts=None):
    """Routes of these experts; without `example` they are one sequence."""
    expert_NRK = np.asarray(expert_NRK, np.int32)
    num_tokens, num_routers, num_slots = expert_NRK.shape
    example_N = np.zeros(num_tokens, np.int32)
    example_N = example_N if example is None else np.asarray(example, np.int32)
    starts = np.flatnonzero(np.diff(example_N, prepend=-1))
    experts = int(expert_NRK.max()) + 1 if experts is None else experts
    return Routes(
        expert_NRK=expert_NRK,
        prob_NRK=np.where(expert_NRK >= 0, 1 / num_slots, 0).astype(np.float32),
        logits_NRE=logits,
        layer_R=tuple(range(num_routers)) if layer_R is None else layer_R,
        experts_R=(experts,) * num_routers,
        example_N=example_N,
        index_N=np.arange(num_tokens) - starts[example_N],
        document_N=example_N,
        token_N=np.zeros(num_tokens, np.int32),
    )


def random_routes(seed=0, *, examples=6, length=9, layers=3, experts=8, slots=2):
    """Tokens whose experts are often those of the token before; with logits."""
    rng = np.random.default_rng(seed)
    num_tokens = examples * length
    logits = rng.normal(size=(num_tokens, layers, experts))
    for n in range(1, num_tokens):
        logits[n] += 0.8 * logits[n - 1]
    ids = np.argsort(-logits, axis=2)[:, :, :slots]
    example_N = np.arange(num_tokens) // length
    return routes_of(
        ids, example=example_N, logits=logits.astype(np.float32), experts=experts
    )
