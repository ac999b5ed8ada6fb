"""`moex convert`: a trained run with other feed-forwards, as a new run.

The new run starts at step 0 with a fresh optimizer and the same data from the start,
so it can be scored, sampled and trained on like any other. What changes in a model is
said by a `Conversion` (`base.py`).
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moex.config import base as configs
from moex.config.base import ConfigError, require
from moex.convert.base import Conversion
from moex.data.files import atomic_write
from moex.data.tokenizer import SavedTokenizer
from moex.json_files import dump_json
from moex.model import spec as states
from moex.optim import flat_paths
from moex.runs.checkpoint import HOST_BYTES, Checkpointer
from moex.runs.checksums import all_finite
from moex.runs.consumed import Consumed
from moex.runs.keys import check_run
from moex.runs.workdir import new_run
from moex.sharding import MeshConfig
from moex.train.job import (
    Job,
    LoadedRun,
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

import pathlib

from moex.train.job import load_config


def get_config(arg=""):
    return load_config(pathlib.Path(__file__).parent)
'''


def convert_run(
    run, workdir, conversions: Sequence[Conversion], *, sequences: int = 256, say=print
) -> dict:
    """Write the newest checkpoint of `run` with other layers to a new run directory.

    Everything that the conversions do not name stays as it is, the state of routers
    too.

    Args:
      run: run directory.
      workdir: the new one; must not exist or be empty.
      conversions: at least one; each is applied to what the one before it made.
      sequences: held-out sequences that score the run before and after; 0: none.
      say: called with each line of news.

    Returns:
      What is written to `workdir/convert.json`: the options, sizes and losses;
      "errors" of every layer, operator and group, and what else conversions found.

    Raises:
      ConfigError: for a user's mistake, before anything is computed.
      CheckpointError: if no checkpoint of `run` is intact.
    """
    run, workdir = pathlib.Path(run), pathlib.Path(workdir)
    cfg = load_config(run)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--workdir={workdir}: must be new or an empty folder.")
    require(sequences >= 0, "--sequences", sequences, ">= 0")
    report: dict[str, Any] = {"to": conversions[-1].kind, "from": str(run)}
    for conversion in conversions:
        conversion.check()
        report |= dataclasses.asdict(conversion)
        cfg.model = conversion.model(cfg.model)
    report |= {"sequences": sequences, "errors": []}
    check_run(cfg, to_train=False)
    with new_run(workdir, f"--workdir={workdir}", say) as made:
        old = new = load_run(run, MeshConfig(), warn=say)  # as the job below
        job = _job(run, cfg, say)
        for conversion in conversions:
            new, found = _applied(conversion, new, job, say)
            report |= found
        write_run(job, cfg, {"params": new.params, "state": new.state}, made)
    report |= {
        "step": old.step,
        "params": {"before": _size(old.spec), "after": _size(job.spec)},
        "expert_params": {
            "before": _size(old.spec, "experts"),
            "after": _size(job.spec, "experts"),
        },
        "loss": _losses(run, workdir, job, sequences),
    }
    atomic_write(workdir / "convert.json", dump_json(report, indent=1) + "\n")
    return report


def _applied(conversion, run: LoadedRun, job: Job, say) -> tuple[LoadedRun, dict]:
    """A model after a conversion, and what the conversion reports."""
    params, state, found = conversion.arrays(run, job, say)
    cfg = configs.from_dict(configs.to_dict(run.cfg))
    cfg.model = conversion.model(cfg.model)
    spec = states.model_spec(cfg.model)
    new = dataclasses.replace(run, cfg=cfg, spec=spec, params=params, state=state)
    return new, found


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
      arrays: {"params", "state"}; the optimizer starts afresh. Beside them, one at a
        time is on the host.
      workdir: made if there is none.
    """
    at = jax.tree.map(lambda a: a.sharding, job.abstract_state())
    params = jax.device_put(arrays["params"], at["params"])
    state = {
        "params": params,
        "state": jax.device_put(arrays["state"], at["state"]),
        "guard": jax.device_put(states.init_guard(), at["guard"]),
    }
    if not all_finite((params, state["state"])):
        trees = flat_paths({"params": params, "state": state["state"]})
        bad = next(name for name, array in trees.items() if not all_finite(array))
        raise ConfigError(
            f"{bad}: has numbers that are not finite; nothing is written."
        )
    if not _starts_at_zero(job.tx, params):
        state["opt"] = jax.jit(job.tx.init, out_shardings=at["opt"])(params)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(workdir, host_bytes=HOST_BYTES)
    try:
        # The loop's own save: what it writes and what it reads stay one thing.
        fresh: Any = {"cost": None, "log": None, "step": 0, "consumed": Consumed()}
        Run(job, workdir, checkpointer, state=state, **fresh)._save()
        checkpointer.wait()
    finally:
        checkpointer.close()
    job.data.tokenizer.save(workdir / "tokenizer")
    atomic_write(workdir / "config.py", CONFIG_FILE)
    save_config(cfg, workdir)  # last: with it a folder is a run


@functools.partial(jax.jit, static_argnums=0)
def _starts_at_zero(tx, params):
    """Whether a fresh optimizer state is zeros, as moments are; it is not kept."""
    leaves = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tx.init(params))]
    return ~jnp.any(jnp.array(leaves, bool))


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


def report_text(report: dict, conversions: Sequence[Conversion]) -> str:
    """What was converted, for people: lines of each conversion, sizes and losses."""
    lines = [line for c in conversions for line in c.lines(report)]
    for name, sizes in (("experts", "expert_params"), ("model", "params")):
        before, after = report[sizes]["before"], report[sizes]["after"]
        ratio = f" ({after / before:.3f})" if before else ""
        lines.append(f"parameters of the {name}: {before:,} -> {after:,}{ratio}")
    loss = report["loss"]
    if loss is None:
        lines.append("held-out loss: not scored")
    else:
        lines.append(
            f"held-out loss, nats per token: {loss['before']:.4f} -> "
            f"{loss['after']:.4f} ({loss['tokens']:,} tokens)"
        )
    return "\n".join(lines)
