"""`moex trace`: run held-out data through a trained model and write where it went.

B batch · L length · T = B * L tokens · N tokens without padding · R copies of a layer ·
C slots per expert · K slots per token · E experts
"""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np

from moex.adapters.figures import gate_figures, gate_record
from moex.analysis.header import Header, LayerInfo
from moex.analysis.trace import Slots, Tokens
from moex.analysis.writer import TraceWriter, check_new
from moex.config import base as configs
from moex.config.base import ConfigError
from moex.data.files import naming
from moex.model.layers import Routed, label, routers, site_at, sites
from moex.model.losses import adapter_reports, moe_layers
from moex.model.steering import Steering
from moex.moe.routing import ExpertRouting
from moex.progress import phase
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun
from moex.runs.program import Evaluated
from moex.runs.score import run_with_data, steering_for
from moex.sharding import shard_batch


def trace_run(
    place: Place, cfg, out, *, tokens=None, step=None, logits=False, steering=None
) -> dict:
    """Write the routing of held-out data by a trained model to `out`.

    The model computes as in `moex eval`: no noise, and a layer with a capacity drops
    slots. A trace has what the router chose, before that.

    Args:
      cfg: run config, as `run_with_data` takes it; every held-out token is traced once,
        whatever `cfg.eval.overlap` says.
      out: the file; must not exist.
      tokens: the most tokens to trace, from sequences of all sources; None: all.
      logits: record the logits of all experts, not of the chosen ones only.
      steering: `Steering`: how experts are steered; None: as trained.

    Returns:
      {"tokens", "layers", "step", "bytes"}: what was written.

    Raises:
      ConfigError: for a bad run, bad data, an `out` that exists, or a model without MoE
        layers.
      CheckpointError: if no checkpoint is intact.
    """
    out = check_new(out)
    run, program = open_traced(place, cfg, step)
    return write_trace(
        run, program, out, tokens=tokens, logits=logits, steering=steering
    )


def open_traced(place: Place, cfg, step) -> tuple[LoadedRun, Evaluated]:
    """Load a run and held-out data, each token of it once, as for `trace_run`."""
    if jax.process_count() > 1:
        raise ConfigError("moex trace: runs in one process; start it on one host.")
    folder = RunDir.of(place)
    if not layer_infos(folder.config().model):
        raise ConfigError(f"{folder}: the model has no MoE layers to trace.")
    cfg.eval.overlap = 0
    run, program = run_with_data(folder, cfg, step=step)
    if not program.holds_out:
        raise ConfigError("config.data: no data is held out; raise holdout.")
    return run, program


def write_trace(
    run: LoadedRun, program: Evaluated, out, *, tokens, logits, steering
) -> dict:
    """Write the trace of a loaded run; see `trace_run`."""
    cfg, steer = program.cfg, steering_for(run.folder, steering)
    limit = None if tokens is None else -(-tokens // cfg.seq_len)
    header = _header(run, cfg, program.data.domains, logits, steering)
    routed = jax.jit(_routed_step(program, logits))
    counter = TokenCounter(tokens, token_ids=cfg.task.TOKEN_IDS)
    written, gates = 0, None
    with jax.set_mesh(run.mesh), TraceWriter(out, header) as writer:
        for batch in program.eval_batches(limit, "tracing"):
            shards = shard_batch(batch, run.mesh)
            with phase("compiling the trace") if not written else nullcontext():
                arrays = jax.device_get(routed(run.params, run.state, shards, steer))
            arrays, sums = arrays
            if gates is not None:
                sums = jax.tree.map(np.add, gates, sums)
            gates = sums
            valid_T, found = counter(batch)
            with naming(out):
                writer.write(found, slots_by_layer(run.cfg.model, arrays, valid_T))
            written += len(found)
        own = {path: gate_figures(sums) for path, sums in (gates or {}).items()}
        writer.gates = gate_record(jax.device_get(own))
    return {
        "tokens": written,
        "layers": len(header.layers),
        "step": run.step,
        "bytes": out.stat().st_size,
    }


def layer_infos(model) -> tuple[LayerInfo, ...]:
    """Every router of a `Model` config, in the order of its layers.

    Layers are numbered from 0 with the dense ones, rounds of a chain from 1.
    """
    return tuple(map(_info, routers(model)))


def _info(routed: Routed) -> LayerInfo:
    router, choices = routed.router, routed.moe.num_choices()
    return LayerInfo(
        layer=routed.layer,
        round=routed.round,
        num_experts=routed.moe.num_experts,
        num_choices=choices,
        slots=router.slots(choices),
        router=type(router).__name__,
        causal=router.causal,
        capacity_factor=routed.moe.capacity_factor,
    )


def _header(run: LoadedRun, cfg, domains, logits: bool, steering) -> Header:
    return dataclasses.replace(
        header_of(run.folder, run.cfg, run.step),
        domains=tuple(domains),
        data=read_data(cfg, steering),
        logits=logits,
    )


def header_of(folder: RunDir, cfg, step: int = 0) -> Header:
    """The header of the traces of a run, without what is in them."""
    tokenizer = folder.tokenizer() if cfg.task.TOKEN_IDS else None
    told = None
    if tokenizer is not None:
        told = {"fingerprint": tokenizer.fingerprint, "doc_id": tokenizer.doc_id}
    return Header(
        run=str(folder),
        step=step,
        layers=layer_infos(cfg.model),
        tokenizer=told,
        vocabulary=() if tokenizer is None else tuple(tokenizer.pieces()),
        domains=(),
        data={},
    )


def read_data(cfg, steering: Steering | None) -> dict:
    """Plain data on the held-out data that a config reads, and how it is read."""
    steered = {} if steering is None else {"steering": steering.where}
    return steered | {
        "split": "held out",
        "seq_len": cfg.seq_len,
        "batch_size": cfg.eval.batch_size,
        "config": configs.to_dict(cfg.data),
    }


def _routed_step(program: Evaluated, logits: bool):
    """`(params, state, batch, steer) -> {path: {round: arrays}}`: `routed_layers`."""

    task, compute = program.cfg.task, program.compute(train=False)

    def step(params, state, batch, steer):
        ctx = task.context(
            batch, mode="eval", collect=True, compute=compute, steer=steer
        )
        _, aux = task.run(program.spec.merge(params, state), ctx, batch)
        reports = adapter_reports(aux)
        gates = {path: report["sums"] for path, report in reports.items()}
        return routed_layers(aux, logits=logits), gates

    return step


def routed_layers(aux, *, logits: bool = False) -> dict:
    """The slots of every MoE layer of a model that ran with `Context(collect=True)`.

    Returns:
      {path of a layer: {round, 0 where there is no chain: {"expert", "keep", "gate",
      "logit", "prob": [R, T, K], and "logits": [R, T, E] if asked for}}}. Padding has
      no kept slots. Routers in which experts choose are given by token.
    """
    found = {}
    for path, layer in moe_layers(aux):
        trace, scores = layer["trace"], layer["scores"]
        rounds = {0: (trace, scores)}
        if "gate" not in trace:  # a chain: one trace for each round
            rounds = {
                int(t) + 1: (own, jax.tree.map(lambda a, t=t: a[:, int(t)], scores))
                for t, own in trace.items()
            }
        slots = jax.vmap(_slots)
        found["/".join(path)] = {
            t: slots(*pair) | ({"logits": pair[1]["logits"]} if logits else {})
            for t, pair in rounds.items()
        }
    return found


def _slots(trace, scores) -> dict:
    if "token" in trace:
        by_expert = ExpertRouting(
            token_EC=trace["token"],
            gate_EC=trace["gate"],
            keep_EC=trace["keep"],
            logits_TE=scores["logits"],
            probs_TE=scores["probs"],
        )
        trace = by_expert.by_token().trace()

    def chosen(value_TE):
        return jnp.take_along_axis(value_TE, trace["expert"], axis=-1)

    return trace | {"logit": chosen(scores["logits"]), "prob": chosen(scores["probs"])}


def slots_by_layer(model, layers: dict, valid_T) -> dict[str, Slots]:
    """The slots that `routed_layers` found, as `TraceWriter.write` takes them.

    Args:
      layers: numpy arrays from `routed_layers`.
      valid_T: bool[T], the tokens to take.
    """
    names, places, found = {"logits": "logits_NE"}, sites(model), {}
    for path, rounds in layers.items():
        numbers = site_at(places, path).numbers
        for t, arrays in rounds.items():
            for copy, number in enumerate(numbers):
                own = {
                    names.get(name, f"{name}_NK"): value[copy][valid_T]
                    for name, value in arrays.items()
                }
                found[label(number, t)] = Slots(**own)
    return found


class TokenCounter:
    """Chooses the tokens of a batch that are traced, and numbers them.

    Args:
      limit: the most tokens that are traced; None: all.
      token_ids: whether tokens have ids; without any the id is 0.
    """

    def __init__(self, limit: int | None = None, *, token_ids: bool = True):
        self._limit, self._tokens, self._token_ids = limit, 0, token_ids
        self._examples = self._documents = 0

    def __call__(self, batch) -> tuple[np.ndarray, Tokens]:
        """`(valid_T, tokens)` of the next batch from the data pipeline."""
        segment_BL = np.asarray(batch["segment"])
        valid_BL = segment_BL > 0
        if self._limit is not None:
            place_BL = self._tokens + np.cumsum(valid_BL).reshape(valid_BL.shape)
            valid_BL &= place_BL <= self._limit
        rows = np.arange(len(segment_BL), dtype=np.int32)[:, None]
        last_B = segment_BL.max(axis=1)
        first_B = self._documents + np.cumsum(last_B) - last_B
        domain_BL = np.broadcast_to(batch["domain"][:, None], segment_BL.shape)
        columns = {
            "example": np.broadcast_to(self._examples + rows, segment_BL.shape),
            "position": batch["position"],
            "document": first_B[:, None] + segment_BL - 1,
            "token": batch["tokens"] if self._token_ids else 0 * segment_BL,
            "domain": domain_BL,
        }
        self._tokens += int(valid_BL.sum())
        self._examples += len(segment_BL)
        self._documents += int(last_B.sum())
        chosen = {f"{n}_N": v[valid_BL].astype(np.int32) for n, v in columns.items()}
        return valid_BL.reshape(-1), Tokens(**chosen)
