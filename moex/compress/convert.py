"""`moex convert`: a trained run with other experts, as a new run.

The new run starts at step 0 with a fresh optimizer and the same data from the start,
so it can be scored, sampled and trained on like any other. The mathematics is in
`latent.py`.

R copies of a layer · D model width
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from moex import config as configs
from moex.compress.calibrate import input_moments
from moex.compress.latent import Factoring, convert_experts
from moex.config import ConfigError, require
from moex.data.files import atomic_write
from moex.data.tokenizer import SavedTokenizer
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.run import check_run
from moex.sharding import MeshConfig
from moex.train import state as states
from moex.train.checkpoint import Checkpointer
from moex.train.job import (
    Job,
    load_config,
    load_run,
    make_job,
    save_config,
)
from moex.train.loop import Run
from moex.train.score import score_run

# So that the new run can be trained on: a config file that is the saved config.
CONFIG_FILE = '''\
"""The config of this run: moex train --config=THIS_FILE --workdir=ITS_FOLDER."""

import json
import pathlib

from moex.config import from_dict


def get_config(arg=""):
    saved = pathlib.Path(__file__).with_suffix(".json")
    return from_dict(json.loads(saved.read_text()))
'''


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLatent:
    """What `convert_run` makes: latent experts in every MoE layer.

    Attributes:
      group: experts that share a space, >= 1.
      latent: width Z of the shared spaces; None: the width of the experts.
      ops: which of "gate", "up", "down" are factored.
      rank: see `Factoring`.
      refit: see `Factoring`.
      calibration: training sequences whose second moments whiten the inputs of gate
        and up; 0: plain weights.
      sequences: held-out sequences that score the run before and after; 0: none.
    """

    group: int
    latent: int | None = None
    ops: tuple[str, ...] = ("gate", "up")
    rank: int | None = None
    refit: bool = False
    calibration: int = 0
    sequences: int = 256


@dataclasses.dataclass(frozen=True)
class Site:
    """One MoE of a model config.

    Attributes:
      path: of its module, as in the parameters.
      where: of its config, for messages.
      moe: its config; part of the model config, not a copy.
      number: of the layer in the first copy of its segment.
      stride: from copy to copy.
    """

    path: tuple[str, ...]
    where: str
    moe: MoE
    number: int
    stride: int


def convert_run(run, workdir, options: ToLatent, *, say=print) -> dict:
    """Write the newest checkpoint of `run` with latent experts to a new run directory.

    Router, shared experts, everything else and the state of routers stay as they are.

    Args:
      run: run directory.
      workdir: the new one; must not exist or be empty.
      options: `ToLatent`.
      say: called with each line of news.

    Returns:
      What is written to `workdir/convert.json`: sizes, losses, and the error of every
      layer, operator and group.

    Raises:
      ConfigError: for a user's mistake, before anything is computed.
      CheckpointError: if no checkpoint of `run` is intact.
    """
    run, workdir = pathlib.Path(run), pathlib.Path(workdir)
    cfg = load_config(run)
    _check_options(options)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--workdir={workdir}: must be new or an empty folder.")
    cfg.model = latent_model(cfg.model, options)
    check_run(cfg)
    loaded = load_run(run, warn=say)
    job = _job(run, cfg, say)
    moments = {}
    if options.calibration:
        say(f"second moments of {options.calibration} training sequences")
        moments = input_moments(loaded, job, options.calibration)
    params, errors = convert_params(loaded.params, cfg.model, options, moments)
    write_run(job, cfg, {"params": params, "state": loaded.state}, workdir)
    report = {
        "to": "latent",
        "from": str(run),
        "step": loaded.step,
        **dataclasses.asdict(options),
        "params": {"before": _size(loaded.spec), "after": _size(job.spec)},
        "expert_params": {
            "before": _size(loaded.spec, "experts"),
            "after": _size(job.spec, "experts"),
        },
        "loss": _losses(run, workdir, job, options.sequences),
        "errors": errors,
    }
    atomic_write(workdir / "convert.json", json.dumps(report, indent=1) + "\n")
    return report


def _check_options(options: ToLatent) -> None:
    for name in ("group", "latent", "rank"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name}", value, "at least 1")
    for name in ("calibration", "sequences"):
        value = getattr(options, name)
        require(value >= 0, f"--{name}", value, ">= 0")


def sites(model) -> list[Site]:
    """Every MoE of an `LM` config, in order, also inside `Chain` and `Narrow`."""
    found, number = [], 0
    for i, segment in enumerate(model.layers):
        stride = len(segment.pattern)
        for j, ffn in enumerate(segment.pattern):
            path: tuple[str, ...] = ("segments", str(i), "blocks", str(j), "ffn")
            where = f"config.model.layers[{i}].pattern[{j}]"
            while isinstance(ffn, Narrow):
                ffn, path, where = ffn.inner, (*path, "inner"), f"{where}.inner"
            if isinstance(ffn, Chain):
                ffn, where = ffn.moe, f"{where}.moe"
            if isinstance(ffn, MoE):
                found.append(Site(path, where, ffn, number + j, stride))
        number += segment.repeat * stride
    return found


def latent_model(model, options: ToLatent):
    """A copy of an `LM` config with latent experts.

    Raises:
      ConfigError: if there is no MoE, or one whose experts are not plain SwiGLU.
    """
    model = dataclasses.replace(model)  # nested configs are copied
    found = sites(model)
    if not found:
        raise ConfigError(
            "config.model: has no MoE layer; there is nothing to convert."
        )
    for site in found:
        experts: Any = site.moe.experts
        plain = isinstance(experts, Glu) and experts.activation == "silu"
        if not plain or experts.bias:
            raise ConfigError(
                f"{site.where}.experts = {experts!r}: must be Glu(activation='silu', "
                "bias=False); only plain SwiGLU experts become latent ones."
            )
        site.moe.experts = Latent(
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
      model: the new `LM` config.
      options: `ToLatent`.
      moments: {path of a layer: float64[R, D, D]}, or empty.

    Returns:
      The new nested dict, and one dict per layer, operator and group: {"layer", "op",
      "group", "error", "tail", "output_error"}.
    """
    errors = []
    for site in sites(model):
        latent: Any = site.moe.experts
        how = Factoring(
            latent=latent.latent,
            group=latent.group,
            rank=options.rank,
            refit=options.refit,
        )
        old = jax.device_get(_at(params, site.path)["experts"])
        moment_RDD = moments.get("/".join(site.path))
        layers = []
        for r in range(len(old["w_out_EFD"])):
            weights = {name: value[r] for name, value in old.items()}
            moment_DD = None if moment_RDD is None else moment_RDD[r]
            made, lost = convert_experts(weights, latent.ops, how, moment_DD)
            layers.append(made)
            errors += [
                {"layer": site.number + r * site.stride, "op": op, "group": g}
                | dataclasses.asdict(error)
                for op, by_group in lost.items()
                for g, error in enumerate(by_group)
            ]
        stacked = {name: np.stack([w[name] for w in layers]) for name in layers[0]}
        params = _with(params, (*site.path, "experts"), stacked)
    return params, sorted(errors, key=lambda row: row["layer"])


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _with(tree, path, value):
    """A nested dict with `value` at `path`; what is not on the path is shared."""
    if not path:
        return value
    return tree | {path[0]: _with(tree[path[0]], path[1:], value)}


def _job(run: pathlib.Path, cfg, say) -> Job:
    """The new run's job here: on the devices that there are, with the old tokenizer."""
    cfg = configs.from_dict(configs.to_dict(cfg))
    cfg.mesh = MeshConfig()
    tokenizer = SavedTokenizer(path=str(run / "tokenizer"))
    cfg.data = dataclasses.replace(cfg.data, tokenizer=tokenizer)
    return make_job(cfg, log=say)


def write_run(job: Job, cfg, arrays: dict, workdir: pathlib.Path) -> None:
    """Write a run directory at step 0 that training can go on in.

    Args:
      job: whose model, optimizer and tokenizer it has.
      cfg: the run config that is saved.
      arrays: {"params", "state"}; the optimizer starts afresh.
      workdir: made if there is none.
    """
    at = jax.tree.map(lambda a: a.sharding, job.abstract_state())
    params = jax.device_put(arrays["params"], at["params"])
    state = {
        "params": params,
        "state": jax.device_put(arrays["state"], at["state"]),
        "opt": jax.jit(job.tx.init, out_shardings=at["opt"])(params),
        "guard": jax.device_put(states.init_guard(), at["guard"]),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(workdir)
    try:
        # The loop's own save: what it writes and what it reads stay one thing.
        fresh: Any = {"cost": None, "log": None, "step": 0, "consumed": 0}
        Run(job, workdir, checkpointer, state=state, **fresh)._save()
        checkpointer.wait()
    finally:
        checkpointer.close()
    job.data.tokenizer.save(workdir / "tokenizer")
    atomic_write(workdir / "config.py", CONFIG_FILE)
    save_config(cfg, workdir)  # last: with it a folder is a run


def _size(spec, part="") -> int:
    """Parameters of a model, or of all modules named `part`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(spec.params)
    return sum(
        math.prod(leaf.shape)
        for path, leaf in leaves
        if not part or part in [k.key for k in path]
    )


def _losses(run, workdir, job: Job, sequences: int) -> dict | None:
    """Held-out nats per token before and after; None if nothing is or shall be held."""
    if not sequences or not job.holds_out:
        return None
    before, after = (
        score_run(folder, load_config(folder), sequences=sequences)
        for folder in (run, workdir)
    )
    return {"before": before["nll"], "after": after["nll"], "tokens": after["tokens"]}


def report_text(report: dict) -> str:
    """A conversion for people: a table of errors, sizes and losses."""
    white = bool(report["calibration"])
    lines = [f"{'layer':>5} {'op':<5} {'group':>5} {'error':>8}"]
    lines[0] += f" {'of outputs':>10}" if white else ""
    for row in report["errors"]:
        line = (
            f"{row['layer']:>5} {row['op']:<5} {row['group']:>5} {row['error']:>8.4f}"
        )
        if row["output_error"] is not None:
            line += f" {row['output_error']:>10.4f}"
        lines.append(line)
    for name, sizes in (("experts", "expert_params"), ("model", "params")):
        before, after = report[sizes]["before"], report[sizes]["after"]
        lines.append(
            f"parameters of the {name}: {before:,} -> {after:,} ({after / before:.3f})"
        )
    loss = report["loss"]
    if loss is None:
        lines.append("held-out loss: not scored")
    else:
        lines.append(
            f"held-out loss, nats per token: {loss['before']:.4f} -> "
            f"{loss['after']:.4f} ({loss['tokens']:,} tokens)"
        )
    return "\n".join(lines)
