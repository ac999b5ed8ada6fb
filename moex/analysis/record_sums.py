"""Recording of sums: run a text through a trained model and add up what `Sums` holds.

The text is read twice: the adaptive thresholds of PEU are means over all of it. Sums of
a batch are made on the devices, where the model is, in float32; batches are added up on
the host in 64 bits.

B batch · L length · T = B * L tokens · N tokens without padding · E experts · K slots ·
P experts of a token's pool · R markers · D width · G groups: all tokens, and then each
domain
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moex.analysis import device_sums as device
from moex.analysis.markers import Marker, MarkerFinder
from moex.analysis.record import (
    TokenCounter,
    layer_infos,
    open_traced,
    read_data,
    write_trace,
)
from moex.analysis.sums import LayerSums, Sums
from moex.analysis.writer import check_new
from moex.config.base import ConfigError
from moex.model.layers import label, site_at, sites
from moex.model.losses import moe_layers
from moex.model.steering import Steering
from moex.runs.base import Base, base_hash
from moex.runs.directory import Place
from moex.runs.open import LoadedRun
from moex.runs.score import steering_for
from moex.sharding import shard_batch

Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """Choices of what is added up."""

    markers: tuple[Marker, ...] = ()  # positions at which slots are counted apart
    by_domain: bool = False  # sums of each domain too
    # Experts of a token that TCESS and PEU look at, those of greatest logits; None: as
    # many as the token chose.
    pool: int | None = None


def record_sums(
    run: LoadedRun,
    batches: Batches,
    *,
    domains: Sequence[str],
    data: dict[str, Any],
    tokens: int | None = None,
    steer: dict | None = None,
    recorded: Recorded = Recorded(),
) -> Sums:
    """The sums of a text in a trained model, which computes as in `moex eval`.

    Args:
      run: the model.
      batches: gives the batches of the text; it is called twice. Batches divide over
        the mesh of the run.
      domains: names of the domains of the batches.
      data: plain data on what they are.
      tokens: the most tokens to count; None: all.
      steer: `Context.steer`.
      recorded: what is added up.

    Raises:
      ConfigError: for a model without MoE layers, no token at all, a pool larger than
        the experts of a layer, or a marker that is no token or does not occur.
    """
    infos = layer_infos(run.cfg.model)
    if not infos:
        raise ConfigError(f"{run.folder}: the model has no MoE layers.")
    for info in infos:
        if recorded.pool is not None and not 1 <= recorded.pool <= info.num_choices:
            raise ConfigError(
                f"pool = {recorded.pool}: layer {info.label} allows 1 to "
                f"{info.num_choices}."
            )
    reader = _Reader(run, batches, tokens, recorded.markers)
    groups = 1 + (len(domains) if recorded.by_domain else 0)
    step = _Step(run, {info.label: info.slots for info in infos}, groups, recorded.pool)
    with jax.set_mesh(run.mesh):
        first = _added(reader, step.first, run, steer)
        reader.check()
        count_G = np.maximum(first.pop("tokens_G"), 1)
        threshold = {name: total_G / count_G for name, total_G in first.items()}
        found = _added(reader, step.second, run, steer, threshold)
    tokens_G = found.pop("tokens_G")
    markers_RG = found.pop("markers_RG")

    def layers(g: int) -> dict[str, LayerSums]:
        made = {}
        for info in infos:
            own = {k: v[g] for k, v in found[info.label].items() if "G" in k}
            whole = {k: v for k, v in found[info.label].items() if "G" not in k}
            made[info.label] = LayerSums(
                info=info,
                tokens=round(tokens_G[g]),
                marker_total_R=_whole(markers_RG[:, g]),
                threshold=float(threshold[info.label][g]),
                **{k.replace("G", "", 1): v for k, v in own.items()},
                **(whole if g == 0 else {}),
            )
        return made

    return Sums(
        run=str(run.folder),
        step=run.step,
        digest=Base.of(run.folder, run.step).digest,
        base=base_hash(run.cfg.model),
        data=data,
        domains=tuple(domains),
        markers=recorded.markers,
        pool=recorded.pool,
        layers=layers(0),
        by_domain={n: layers(g) for g, n in enumerate(domains, 1) if groups > 1},
    )


def trace_with_sums(
    place: Place,
    cfg,
    out,
    *,
    trace: bool = True,
    tokens: int | None = None,
    step: int | None = None,
    logits: bool = False,
    steering: Steering | None = None,
    recorded: Recorded = Recorded(),
) -> tuple[dict | None, pathlib.Path, Sums]:
    """Write the sums of held-out data, and before that a trace of it.

    Args:
      out: the file of the trace; that of the sums is `sums_file(out)`. Without a trace
        it is that of the sums.
      trace: whether a trace is written.
      recorded: what is added up.
      place, cfg, tokens, step, logits, steering: as for `record.trace_run`.

    Returns:
      (what `trace_run` returns, or None; the file of the sums; the sums).
    """
    out = check_new(out)
    file = check_new(sums_file(out)) if trace else out
    run, program = open_traced(place, cfg, step)
    made = None
    if trace:
        options = {"tokens": tokens, "logits": logits, "steering": steering}
        made = write_trace(run, program, out, **options)
    limit = None if tokens is None else -(-tokens // cfg.seq_len)
    sums = record_sums(
        run,
        lambda: program.eval_batches(limit, "adding up"),
        domains=program.data.domains,
        data=read_data(program.cfg, steering),
        tokens=tokens,
        steer=steering_for(place, steering),
        recorded=recorded,
    )
    sums.save(file)
    return made, file, sums


def sums_file(trace) -> pathlib.Path:
    """The file of the sums beside a trace."""
    return pathlib.Path(trace).with_suffix(".sums.npz")


def _whole(array) -> np.ndarray:
    return np.rint(array).astype(np.int64)


class _Reader:
    """Reads the batches, and finds the tokens that count and the markers in them."""

    def __init__(self, run, batches: Batches, tokens, markers):
        self._batches, self._tokens, self._markers = batches, tokens, markers
        self._ids = run.cfg.task.TOKEN_IDS
        self._vocabulary = run.tokenizer.pieces() if markers and self._ids else ()
        self._where = run.folder
        self._counted, self._marked_R = 0, np.zeros(len(markers), np.int64)

    def check(self) -> None:
        """Check that there were tokens, and each of the markers.

        Raises:
          ConfigError: if not.
        """
        if self._counted == 0:
            raise ConfigError("config.data: the text has no tokens to count.")
        for marker, total in zip(self._markers, self._marked_R, strict=True):
            if total == 0:
                raise ConfigError(f"{str(marker)!r}: does not occur in the text.")

    def __iter__(self):
        """Yield batches with `markers`, bool[B, L, R]; all else is padding."""
        counter = TokenCounter(self._tokens, token_ids=self._ids)
        finder = MarkerFinder(self._markers, self._vocabulary, self._where)
        for batch in self._batches():
            valid_T, found = counter(batch)
            marked_TR = np.zeros((len(valid_T), len(self._markers)), bool)
            marked_TR[valid_T] = finder(found.token_N, found.document_N)[0].T
            self._counted += len(found)
            self._marked_R += marked_TR.sum(axis=0)
            segment_BL = np.where(
                valid_T.reshape(batch["segment"].shape), batch["segment"], 0
            )
            marked_BLR = marked_TR.reshape(*segment_BL.shape, len(self._markers))
            yield dict(batch) | {"segment": segment_BL, "markers": marked_BLR}


def _added(reader: _Reader, step, run: LoadedRun, *rest) -> dict[str, Any]:
    """The sums of all batches, in 64 bits; counts are whole numbers."""
    total: Any = None
    for batch in reader:
        shards = shard_batch(batch, run.mesh)
        sums = jax.device_get(step(run.params, run.state, shards, *rest))
        sums = jax.tree.map(np.float64, sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise ConfigError("config.data: no data is held out; raise holdout.")
    for name, own in total.items():
        if isinstance(own, dict):
            counts = {k: _whole(v) for k, v in own.items() if k in COUNTS}
            total[name] = own | counts
    return total


COUNTS = ("count_GE", "marker_count_GRE", "transitions_AB")


class _Step:
    """The two compiled passes over a batch.

    Args:
      slots: K of each router by label.
      groups: G.
      pool: as in `Recorded`.
    """

    def __init__(self, run: LoadedRun, slots: dict[str, int], groups: int, pool):
        self._run, self._slots, self._groups, self._pool = run, slots, groups, pool
        self._places = sites(run.cfg.model)
        self.first = jax.jit(self._first, out_shardings=run.whole)
        self.second = jax.jit(self._second, out_shardings=run.whole)

    def _routers(
        self, params, state, batch, steer, *, measure: bool
    ) -> dict[str, dict]:
        """The arrays of every router, by label and in the order of the model."""
        run = self._run
        ctx = run.cfg.task.context(
            batch,
            mode="eval",
            collect=True,
            measure=measure,
            steer=steer,
            compute=run.compute(train=False),
        )
        _, aux = run.cfg.task.run(run.spec.merge(params, state), ctx, batch)
        found = {}
        for path, layer in moe_layers(aux):
            logits, name = layer["scores"]["logits"], "answers" if measure else "trace"
            rounds = {0: (layer[name], logits)}
            if "gate" not in layer[name]:  # a chain: one dict for each round
                rounds = {
                    int(t) + 1: (own, logits[:, int(t)])
                    for t, own in layer[name].items()
                }
            numbers = site_at(self._places, "/".join(path)).numbers
            for t, (own, logits_RTE) in rounds.items():
                for copy, number in enumerate(numbers):
                    arrays = {k: v[copy] for k, v in own.items()}
                    found[label(number, t)] = arrays | {"logits": logits_RTE[copy]}
        return {name: found[name] for name in self._slots}

    def _members(self, batch):
        """float32[G, T]: 1 where a token counts in a group, else 0."""
        group_G11 = jnp.arange(-1, self._groups - 1)[:, None, None]
        of_GB1 = (group_G11 < 0) | (batch["domain"][None, :, None] == group_G11)
        members_GBL = of_GB1 & (batch["segment"] > 0)[None]
        return members_GBL.reshape(self._groups, -1).astype(jnp.float32)

    def _first(self, params, state, batch, steer):
        """Tokens of each group, and by router the sums of the greatest probability."""
        member_GT = self._members(batch)
        sums = {"tokens_G": jnp.sum(member_GT, axis=1)}
        routers = self._routers(params, state, batch, steer, measure=False)
        for name, own in routers.items():
            chosen_T = device.chosen_slots(own, own["logits"])
            picked = device.pool(own["logits"], chosen_T, self._slots[name], self._pool)
            top_T = jnp.max(device.pool_probs(*picked[1:]), axis=1)
            sums[name] = jnp.dot(member_GT, top_T, precision=device.EXACT)
        return sums

    def _second(self, params, state, batch, steer, threshold):
        """The sums of `LayerSums` by router, [G, ...] where they are by group."""
        member_GT = self._members(batch)
        marked_TR = batch["markers"].reshape(member_GT.shape[1], -1)
        marked_RT = marked_TR.T.astype(jnp.float32)
        routers = self._routers(params, state, batch, steer, measure=True)
        found: dict[str, Any] = {"tokens_G": jnp.sum(member_GT, axis=1)}
        found["markers_RG"] = jnp.dot(marked_RT, member_GT.T, precision=device.EXACT)
        tops: dict[str, Any] = {}
        for name, own in routers.items():
            of_TKE = device.slots_of(own["expert"], own["keep"], own["logits"].shape[1])
            sums = device.sums_of_slots(own, of_TKE, member_GT, marked_RT)
            logits_TE = own["logits"] * member_GT[0][:, None]
            picked = device.pool(
                own["logits"], own["chosen_T"], self._slots[name], self._pool
            )
            limit_G = threshold[name].astype(jnp.float32)
            sums |= device.selection_scores(picked, member_GT, limit_G, logits_TE)
            sums["logit_GE"] = jnp.dot(member_GT, logits_TE, precision=device.EXACT)
            sums["gram_EE"] = jnp.dot(logits_TE.T, logits_TE, precision=device.EXACT)
            sums["output_ED"] = own["sum_ED"]
            found[name] = sums
            tops[name] = device.top_expert(own, of_TKE) * member_GT[0][:, None]
        for a, b in zip(list(tops), list(tops)[1:], strict=False):
            pairs_AB = jnp.dot(tops[a].T, tops[b], precision=device.EXACT)
            found[a]["transitions_AB"] = pairs_AB
        return found
