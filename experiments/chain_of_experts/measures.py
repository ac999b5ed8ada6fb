"""Measures beside training: a teacher that is a chain, memory, transitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moex import Chain, Context, Glu, MoE, TopK
from moex.analysis.record import trace_run
from moex.analysis.trace import Trace
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.plan.planner import check
from moex.plan.rehearsal import compile_step
from moex.plan.topology import parse

WIDTH, EXPERTS = 24, 8
# rounds, k, routers, whether a round adds to its input
STUDENTS = {
    "moe_k4": (1, 4, "independent", True),
    "moe_k8": (1, 8, "independent", True),
    "coe_k2c2": (2, 2, "independent", True),
    "coe_k2c2_shared_router": (2, 2, "shared", True),
    "coe_k2c2_without_inner": (2, 2, "independent", False),
}


class Layer(nnx.Module):
    """A layer with its residual: the released block, or z + M(M(z)) without inner."""

    def __init__(self, rounds, k, routers, inner, rngs):
        moe = MoE(
            num_experts=EXPERTS,
            router=TopK(k=k, normalize="none"),
            experts=Glu(hidden=WIDTH),
        )
        chain = Chain(moe=moe, iterations=rounds, routers=routers, inner_residual=inner)
        self.chain = chain.make(WIDTH, rngs)

    def __call__(self, x_ND):
        y_BLD, _ = self.chain(x_ND[None], Context.of(x_ND[None], mode="train"))
        return y_BLD[0]


def teacher(*, seed, folder, others, student, steps, batch=256, lr=3e-3):
    """Learn a random chain of two rounds, k = 2, on fresh inputs of norm sqrt(width).

    Returns:
      "error": the squared error on new inputs, as a share of the teacher's output.
    """
    del folder, others
    keys = jax.random.split(jax.random.key(seed), 3)
    target = Layer(*STUDENTS["coe_k2c2"], nnx.Rngs(keys[0]))
    # Experts change their input by little as they are initialised; a teacher must not.
    target_def, target_state = nnx.split(target)
    target_state = jax.tree.map(lambda a: 2.0 * a, target_state)
    graphdef, params = nnx.split(Layer(*STUDENTS[student], nnx.Rngs(keys[1])))
    schedule = optax.cosine_decay_schedule(lr, steps)
    tx = optax.adam(schedule)

    def inputs(key, count):
        x_ND = jax.random.normal(key, (count, WIDTH))
        norm_N1 = jnp.linalg.norm(x_ND, axis=-1, keepdims=True)
        return x_ND / norm_N1 * WIDTH**0.5

    def error(params, x_ND):
        want_ND = nnx.merge(target_def, target_state)(x_ND)
        got_ND = nnx.merge(graphdef, params)(x_ND)
        return jnp.sum((got_ND - want_ND) ** 2) / jnp.sum(want_ND**2)

    def step(carry, key):
        params, opt = carry
        grads = jax.grad(error)(params, inputs(key, batch))
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), None

    @jax.jit
    def learn(params, key):
        keys_S = jax.random.split(key, steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys_S)
        return error(params, inputs(jax.random.fold_in(key, steps), 20_000))

    return {"error": float(learn(params, keys[2]))}


def memory(*, seed, folder, others, size, arm):
    """Bytes of training, without training it: the step of an arm is compiled.

    Returns:
      "arithmetic_mib": 16 for each parameter, as in the paper (weight, gradient, two
      moments); "peak_mib": of the compiled step, activations included;
      "temporary_mib": the part of it that is not state.
    """
    del folder, others
    from experiments.chain_of_experts import config  # which imports this file

    chosen = config.SIZES[size]
    cfg = config.config(chosen, **config.arms(chosen)[arm])
    cfg.seed = seed
    topology = parse("cpu:1")
    check(cfg, topology)
    compiled = compile_step(cfg, topology)
    params = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len).num_params
    return {
        "arithmetic_mib": 16 * params / 2**20,
        "peak_mib": compiled.peak_bytes / 2**20,
        "temporary_mib": compiled.temp_bytes / 2**20,
    }


def count_pairs(trace: Trace) -> np.ndarray:
    """The experts of a token in the first and the second round, int64[L, E, E]."""
    infos = trace.header.layers
    layers = sorted({info.layer for info in infos})
    labels = {(info.layer, info.round): info.label for info in infos}
    E = infos[0].num_choices
    pairs_LEE = np.zeros((len(layers), E, E), np.int64)
    for chunk in trace.chunks(values=()):
        for at, layer in enumerate(layers):
            hot_RNE = []
            for number in (1, 2):
                slots = chunk.layers[labels[layer, number]]
                hot_NKE = np.eye(E, dtype=np.int64)[slots.expert_NK]
                hot_RNE.append((hot_NKE * slots.keep_NK[..., None]).sum(axis=1))
            pairs_LEE[at] += hot_RNE[0].T @ hot_RNE[1]
    return pairs_LEE


def transitions(*, seed, folder, others, run, tokens):
    """Count which experts of the second round follow on those of the first.

    Returns:
      "same": the share of pairs (expert of round 1, expert of round 2) of a token that
      are one expert; "same_by_chance": that share if rounds were independent, with the
      same loads; "information": mutual information of the pair, nats; "matrix": the
      pairs of the last layer, counts.
    """
    del seed
    folder.path.mkdir(parents=True, exist_ok=True)
    file = folder.path / "trace.parquet"
    file.unlink(missing_ok=True)
    source = others[run]
    trace_run(source, source.config(), file, tokens=tokens)
    pairs_LEE = count_pairs(Trace.open(file))
    p_LEE = pairs_LEE / pairs_LEE.sum(axis=(1, 2), keepdims=True)
    first_LE1, second_L1E = p_LEE.sum(2, keepdims=True), p_LEE.sum(1, keepdims=True)
    chance_LEE = first_LE1 * second_L1E
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_LEE = np.where(p_LEE > 0, p_LEE * np.log(p_LEE / chance_LEE), 0.0)
    return {
        "same": float(np.trace(p_LEE, axis1=1, axis2=2).mean()),
        "same_by_chance": float(np.trace(chance_LEE, axis1=1, axis2=2).mean()),
        "information": float(terms_LEE.sum(axis=(1, 2)).mean()),
        "matrix": pairs_LEE[-1].astype(int).tolist(),
    }
