"""How the experts of a trained model are used: `merge.Used` of every MoE layer.

Either from training batches, or from a file of `moex trace --sums`.

B batch · L length · T = B * L tokens · S sampled tokens · R copies of a layer · C chain
rounds · E experts · D width
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from moex.analysis.sums import Sums
from moex.config.base import ConfigError
from moex.convert.alike import EXACT, aligned, gradient_grams, merge_errors
from moex.convert.kinds.merged import Merged
from moex.convert.merge import Used
from moex.convert.to_latent import at_path, with_path
from moex.convert.to_merged import mergeable
from moex.model.layers import sites
from moex.model.losses import moe_layers
from moex.moe.parallel import Rows, run_experts
from moex.moe.routing import Routing
from moex.progress import counted
from moex.runs.open import LoadedRun
from moex.sharding import shard_batch
from moex.train.job import Job

SAMPLED = 1024  # tokens of a batch for which all experts are computed


class Counter:
    """Reads training batches, and adds up how a model uses its experts.

    Args:
      run: the model; `used` takes other parameters for it.
      job: for its training batches, from the first on, and how to compute.
      sequences: the least number of sequences to read, in whole batches.
      options: only their layers are looked at, and their similarity says what else is
        added up; None: all layers, and nothing else.
    """

    def __init__(
        self, run: LoadedRun, job: Job, sequences: int, options: Merged | None = None
    ):
        self._run, self._job = run, job
        self._num_batches = -(-sequences // job.cfg.batch_size)
        self._sites = [
            (site, site.sparse)
            for site in sites(run.cfg.model)
            if site.sparse is not None
        ]
        self._asked: set[str] = set()
        if options is not None:
            self._asked, self._align = options.measured(), options.align != "none"
            chosen = mergeable(run.cfg.model, options).values()
            paths = {sparse.path for sparse, _ in chosen}
            self._sites = [own for own in self._sites if own[1].path in paths]
        self._step = jax.jit(self._sums)
        self._more = jax.jit(self._with_gradients, donate_argnums=0)

    def used(self, params) -> dict[int, Used]:
        """The sums of the MoE layers, by their numbers."""
        total: dict = {}
        paths = [sparse.path for _, sparse in self._sites]
        experts = {path: (*path.split("/"), "experts") for path in paths}
        if self._asked and self._align:
            for place in experts.values():
                params = aligned(params, place)
        by_gradients = "gradients" in self._asked
        gradients = {
            path: jax.tree.map(jnp.zeros_like, at_path(params, place))
            for path, place in experts.items()
            if by_gradients
        }
        with jax.set_mesh(self._job.mesh):
            batches = itertools.islice(self._job.batches(0), self._num_batches)
            doing = "reading training sequences"
            for batch in counted(batches, doing, self._num_batches, "batches"):
                batch = shard_batch(batch, self._job.mesh)
                sums = jax.device_get(self._step(params, self._run.state, batch))
                sums = jax.tree.map(np.float64, sums)
                total = jax.tree.map(np.add, total, sums) if total else sums
                if by_gradients:
                    gradients = self._more(gradients, params, self._run.state, batch)
            for path, own in gradients.items():
                gram_REE = jax.device_get(jax.jit(gradient_grams)(own))
                total[path]["gradient_gram_EE"] = np.float64(gram_REE)
        found = {}
        for site, sparse in self._sites:
            for r, number in enumerate(site.numbers):
                own = {k: v[r] for k, v in total[sparse.path].items()}
                found[number] = _used(own, number)
        return found

    def _sums(self, params, state, batch):
        task, run = self._job.cfg.task, self._run
        how = self._job.compute(train=False)
        ctx = task.context(batch, mode="eval", collect=True, compute=how)
        model = run.spec.merge(params, state)
        _, aux = task.run(model, ctx, batch)
        layers = {"/".join(path): layer for path, layer in moe_layers(aux)}
        found = {}
        for site, sparse in self._sites:
            path = sparse.path
            stack, copies = _module(model, path), []
            pairs = "mse" in self._asked
            for r in range(site.repeat):
                module = jax.tree.map(lambda a, r=r: a[r], stack)
                own = jax.tree.map(lambda a, r=r: a[r], layers[path])
                rounds = [_of_round(own, t) for t in range(len(sparse.routers))]
                sums = [_layer_sums(module, one, ctx, pairs=pairs) for one in rounds]
                copies.append(jax.tree.map(lambda *a: sum(a), *sums))
            found[path] = jax.tree.map(lambda *a: jnp.stack(a), *copies)
        return found

    def _with_gradients(self, total, params, state, batch):
        """Add the gradients of the summed loss of a batch's tokens, without others."""
        task, run, how = self._job.cfg.task, self._run, self._job.compute(train=True)
        ctx = task.context(batch, mode="eval", compute=how)

        def loss(own):
            new = params
            for path, value in own.items():
                new = with_path(new, (*path.split("/"), "experts"), value)
            model, domains = run.spec.merge(new, state), self._job.num_domains
            return task.sums(model, ctx, batch, num_domains=domains)[task.score]

        own = {p: at_path(params, (*p.split("/"), "experts")) for p in total}
        return jax.tree.map(jnp.add, total, jax.grad(loss)(own))


def _used(own: dict, number: int) -> Used:
    """The sums of a layer, for all batches."""
    _check_finite(own, number)
    sampled = max(own.pop("sampled"), 1.0)
    own["output_gram_EE"] /= sampled
    if "merge_error_EE" in own:
        own["merge_error_EE"] /= sampled
    own["count_E"] = np.rint(own["count_E"])
    # The norms are known for some of the tokens: their sum stands for all of them.
    own["gate_norm_E"] *= own["count_E"] / np.maximum(own.pop("sampled_E"), 1.0)
    return Used(
        tokens=round(float(own.pop("tokens"))),
        input_gram_EE=mean_gram(own.pop("input_ED"), own["count_E"]),
        **own,
    )


def mean_gram(sum_ED, count_E) -> np.ndarray:
    """The products of the means of every two experts; zeros are the mean of none."""
    mean_ED = sum_ED / np.maximum(count_E, 1)[:, None]
    return mean_ED @ mean_ED.T


def _module(model, path: str):
    for name in path.split("/"):
        model = model[int(name)] if name.isdecimal() else getattr(model, name)
    return model


def _of_round(layer: dict, t: int) -> tuple:
    """(trace, logits, input) of a round; a layer without a chain has one."""
    if str(t) in layer["trace"]:
        return layer["trace"][str(t)], layer["scores"]["logits"][t], layer["inputs"][t]
    return layer["trace"], layer["scores"]["logits"], layer["inputs"]


def _layer_sums(module, of_round, ctx, *, pairs: bool) -> dict:
    """The sums of one router over a batch, float32.

    Args:
      module: `SparseLayer`.
      of_round: from `_of_round`.
      ctx: `Context`.
      pairs: whether to merge every two experts.
    """
    trace, logits_TX, x_BLD = of_round
    valid_T, E = ctx.valid_BL.reshape(-1), module.num_experts
    gate_TX = _gates(module, trace, logits_TX, ctx)
    gate_TE = gate_TX[:, :E]
    logits_TE = jnp.where(valid_T[:, None], logits_TX[:, :E], 0.0)
    total_T1 = jnp.sum(gate_TX, axis=1, keepdims=True)  # zero-computation ones too
    share_TE = gate_TE / jnp.where(total_T1 > 0, total_T1, 1.0)
    stride = -(-valid_T.size // SAMPLED)  # every device keeps its rows
    seen = jnp.zeros(ctx.valid_BL.shape, bool).at[:, ::stride].set(True)
    x_SD = x_BLD[:, ::stride].reshape(-1, x_BLD.shape[-1])
    seen_S = ctx.valid_BL[:, ::stride].reshape(-1)
    share_SE = share_TE.reshape(*seen.shape, E)[:, ::stride].reshape(-1, E)

    def outputs(experts):
        y_ESD = _outputs(experts, x_SD, E, ctx)
        return jnp.where(seen_S[None, :, None], y_ESD, 0.0)

    y_ESD = outputs(module.experts)
    norm_SE = jnp.linalg.norm(y_ESD, axis=2).T
    uses_TE = (gate_TE > 0).astype(jnp.float32)
    uses_SE = (share_SE > 0).astype(jnp.float32)
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1]).astype(jnp.float32)
    more = {}
    if pairs:
        errors = merge_errors(outputs, module.experts, y_ESD, uses_SE.T)
        more["merge_error_EE"] = errors
    return more | {
        "tokens": jnp.sum(valid_T, dtype=jnp.float32),
        "sampled": jnp.sum(seen_S, dtype=jnp.float32),
        "count_E": jnp.sum(uses_TE, axis=0),
        "sampled_E": jnp.sum(uses_SE, axis=0),
        "input_ED": jnp.dot(uses_TE.T, x_TD, precision=EXACT),
        "gram_EE": jnp.dot(logits_TE.T, logits_TE, precision=EXACT),
        "gate_norm_E": jnp.sum(share_SE * norm_SE, axis=0),
        "gate_gram_EE": jnp.dot(gate_TE.T, gate_TE, precision=EXACT),
        "output_gram_EE": jnp.einsum("esd,fsd->ef", y_ESD, y_ESD, precision=EXACT),
    }


def _gates(module, trace, logits_TE, ctx):
    """The gate of every token and expert, 0 where it is not computed: float32[T, E]."""
    rows, columns = (jnp.arange(n)[:, None] for n in logits_TE.shape)
    zeros_TE = jnp.zeros(logits_TE.shape)
    if "token" in trace:
        gate_EC = jnp.where(trace["keep"], trace["gate"], 0.0)
        return zeros_TE.at[trace["token"], columns].add(gate_EC)
    arrays = {f"{name}_TK": trace[name] for name in ("expert", "gate", "keep")}
    routing = Routing(logits_TE=logits_TE, probs_TE=logits_TE, **arrays)
    kept = module.within_capacity(routing.keep_only(trace["keep"]), ctx)
    return zeros_TE.at[rows, kept.expert_TK].add(kept.gate_TK)


def _outputs(experts, x_SD, E, ctx):
    """The outputs of every expert for all tokens, float32[E, S, D]."""
    S = len(x_SD)

    def outputs(e):
        one = Routing(
            expert_TK=jnp.full((S, 1), e, jnp.int32),
            gate_TK=jnp.ones((S, 1)),
            keep_TK=jnp.ones((S, 1), bool),
            logits_TE=jnp.zeros((S, E)),
            probs_TE=jnp.zeros((S, E)),
        )
        y_SD, _ = run_experts(experts, x_SD, one, E, ctx, rows=Rows())
        return y_SD.astype(jnp.float32)

    return jax.lax.map(outputs, jnp.arange(E, dtype=jnp.int32))


def used_of_sums(sums: Sums) -> dict[int, Used]:
    """The same from recorded sums, without the gates of pairs.

    Outputs are compared by the mean of each expert over its own tokens.

    Raises:
      ConfigError: if a sum is not finite.
    """
    parts: dict[int, dict] = {}
    tokens: dict[int, int] = {}
    for own in sums.layers.values():
        E = own.info.num_experts
        assert own.gram_EE is not None and own.output_ED is not None
        one = {"count_E": own.count_E[:E], "gate_norm_E": own.gate_norm_E[:E]}
        one |= {"gram_EE": own.gram_EE[:E, :E], "output_ED": own.output_ED[:E]}
        before = parts.get(own.layer)  # another round of a chain
        parts[own.layer] = one if before is None else jax.tree.map(np.add, one, before)
        tokens[own.layer] = tokens.get(own.layer, 0) + own.tokens
    found = {}
    for number, one in parts.items():
        _check_finite(one, number)
        gram_EE = mean_gram(one.pop("output_ED"), one["count_E"])
        found[number] = Used(tokens=tokens[number], output_gram_EE=gram_EE, **one)
    return found


def _check_finite(parts: dict, number: int) -> None:
    for name, value in parts.items():
        if not np.isfinite(value).all():
            raise ConfigError(
                f"layer {number}: {name} is not finite: has the run diverged?"
            )
