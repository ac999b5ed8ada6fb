"""What is done with a model: score held-out data, write text.

The loop does both while training; the command line does both with a run directory.
"""

import dataclasses
import sys

import jax
import numpy as np

from moex.config.base import ConfigError, require
from moex.data import pipeline
from moex.data.tokenizer import SavedTokenizer
from moex.runs.directory import Place, RunDir
from moex.runs.keys import check_run, not_causal
from moex.runs.open import LoadedRun, load_run
from moex.runs.program import (
    Evaluated,
    Program,
    check_eval_devices,
    eval_batch_size,
    static_options,
)
from moex.serve.decode import generate
from moex.sharding import batch_shards, shard_batch
from moex.terminal import printable
from moex.train.step import figures, make_eval_step


def eval_step(program: Program):
    """The jitted evaluation step of a program."""
    step = make_eval_step(
        program.spec,
        num_domains=len(program.cfg.data.sources),
        static=program.static(train=False),
    )
    return jax.jit(step, out_shardings=program.whole)


def evaluate(program: Evaluated, state: dict, step, limit: int | None) -> dict:
    """Held-out figures: nats per token, bits per byte, perplexity, per domain, routing.

    They are made of the sums of all batches, so the batch size does not change them. A
    mean over nothing is NaN.

    Args:
      program: with the held-out data that is scored.
      state: {"params", "state"}.
      step: from `eval_step`.
      limit: sequences to score; None: all.

    Raises:
      ConfigError: if nothing is held out.
    """
    total, running = None, None
    for batch in program.eval_batches(limit):
        batch = shard_batch(batch, program.mesh)
        # One step at a time, while the next batch is read. Nothing orders two of them
        # (the next does not read what this one makes), and processes that start their
        # collectives in different orders wait for each other for ever.
        total = _add(total, running)
        running = step(state["params"], state["state"], batch)
    total = _add(total, running)
    if total is None:
        raise ConfigError("config.data: no data is held out; raise holdout.")
    result = jax.device_get(figures(total))
    return {
        "nll": float(result["nll"]),
        "perplexity": float(np.exp(result["nll"])),
        "bits_per_byte": float(result["bits_per_byte"]),
        "tokens": int(total["tokens"]),
        "bytes": int(total["bytes"]),
        "domains": domain_losses(program.data.domains, result),
        "layers": result["layers"],
    }


def _add(total, sums):
    """`total` with the sums of one more batch (None: of none), which is waited for.

    They are added in 64 bits: float32 loses counts above 2**24.
    """
    if sums is None:
        return total
    sums = jax.tree.map(np.float64, jax.device_get(sums))
    return sums if total is None else jax.tree.map(np.add, total, sums)


def domain_losses(domains, metrics) -> dict[str, float]:
    """Nats per token of the domains that have any tokens, from `step.figures`."""
    named = zip(domains, metrics["domain_nll"], metrics["domain_tokens"], strict=True)
    return {name: float(nll) for name, nll, tokens in named if tokens > 0}


def score_run(place: Place, cfg, *, sequences=None) -> dict:
    """Held-out loss, perplexity and bits per byte of a run on the data of `cfg`.

    Args:
      place: run directory.
      cfg: as `run_with_data` takes it.
      sequences: at most so many held-out sequences; None: all.

    Raises:
      ConfigError: for a bad run directory or bad data.
      CheckpointError: if no checkpoint is intact.
    """
    run, program = run_with_data(place, cfg)
    state = {"params": run.params, "state": run.state}
    with jax.set_mesh(run.mesh):
        result = evaluate(program, state, eval_step(program), sequences)
    if result["tokens"] == 0:
        raise ConfigError("config.data: what is held out has no target to score.")
    result.pop("layers")
    return {"step": run.step} | result


def run_with_data(place: Place, cfg, *, step=None) -> tuple[LoadedRun, Evaluated]:
    """A trained model, and its program with the held-out data of `cfg`.

    The run's tokenizer is used whatever `cfg.data.tokenizer` says, so that the ids mean
    what the model learned.

    Args:
      place: run directory.
      cfg: run config whose data, seq_len, eval, precision and mesh are used; its model
        and eval.batch_size are filled in.
      step: of the checkpoint; None: the newest.

    Raises:
      ConfigError: for a bad run directory or bad data.
      CheckpointError: if no checkpoint is intact.
    """
    # On the run's own mesh if it fits the devices that there are, or on the one given.
    folder = RunDir.of(place)
    given = None if cfg.mesh == folder.config().mesh else cfg.mesh
    run = load_run(folder, given, warn=_warn, step=step)
    cfg.model = run.cfg.model
    check_run(cfg, to_train=False)
    shards = batch_shards(run.mesh)
    rows = -(-eval_batch_size(cfg) // shards) * shards  # the last batch is filled up
    cfg.eval = dataclasses.replace(cfg.eval, batch_size=rows)
    check_eval_devices(cfg, run.mesh)
    tokenizer = SavedTokenizer(path=str(folder.tokenizer_folder))
    data_cfg = dataclasses.replace(cfg.data, tokenizer=tokenizer)
    data = pipeline.prepare(
        data_cfg,
        cfg.seq_len,
        overlap=cfg.eval.overlap,
        scoring=True,
        log=_warn,
        where="config.data",
    )
    return run, Evaluated(cfg=cfg, mesh=run.mesh, spec=run.spec, data=data)


def _warn(line: str) -> None:
    print(printable(line), file=sys.stderr)


def write_text(place: Place, prompts: list[str], *, max_new_tokens, seed, **sampling):
    """Continue each prompt; returns prompt + continuation as text.

    Raises:
      ConfigError: for a bad run directory or sampling parameter.
    """
    require(len(prompts) >= 1, "--prompt", prompts, "given at least once")
    run = load_run(place, warn=_warn)
    where = not_causal(run.cfg.model)
    if where is not None:
        raise ConfigError(
            f"{place}: {where} is ExpertChoice, which chooses tokens by those that "
            "follow: the model cannot generate."
        )
    try:
        with jax.set_mesh(run.mesh):
            return continue_texts(
                run.cfg,
                run.spec,
                {"params": run.params, "state": run.state},
                run.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                seed=seed,
                **sampling,
            )
    except ValueError as e:
        raise ConfigError(str(e)) from None


def continue_texts(cfg, spec, state, tokenizer, prompts, **sampling) -> list[str]:
    """Each prompt with its continuation, up to the first of the stop tokens.

    Args:
      cfg: run config, for the model and the compute dtype.
      spec: `ModelSpec`.
      state: {"params", "state"}.
      tokenizer: of the run.
      prompts: texts.
      **sampling: arguments of `serve.decode.generate`.
    """
    static = static_options(cfg, train=False)
    outputs = generate(
        spec,
        cfg.model,
        state["params"],
        state["state"],
        [tokenizer.prompt(p) for p in prompts],
        stop_tokens=tokenizer.stop_ids,
        dtype=static["dtype"],
        kernels=static["kernels"],
        **sampling,
    )
    return [tokenizer.continued(p, o) for p, o in zip(prompts, outputs, strict=True)]
