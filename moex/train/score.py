"""What is done with a finished run: score data with it, write text with it."""

import dataclasses
import sys

import jax

from moex.config import ConfigError, require
from moex.data import pipeline
from moex.data.tokenizer import SavedTokenizer
from moex.run import check_run
from moex.serve.decode import generate
from moex.train.job import Job, check_devices, load_run, static_options
from moex.train.loop import evaluate


def score_run(workdir, cfg, *, sequences=None) -> dict:
    """Held-out loss, perplexity and bits per byte of a run on the data of `cfg`.

    The run's tokenizer is used whatever `cfg.data.tokenizer` says, so that the ids mean
    what the model learned.

    Args:
      workdir: run directory.
      cfg: run config whose data, seq_len, eval and precision are used.
      sequences: at most so many held-out sequences; None: all.

    Raises:
      ConfigError: for a bad run directory or bad data.
      CheckpointError: if no checkpoint is intact.
    """
    run = load_run(workdir, warn=_warn)
    cfg.model = run.cfg.model
    check_run(cfg)
    check_devices(cfg)
    tokenizer = SavedTokenizer(path=str(workdir / "tokenizer"))
    data_cfg = dataclasses.replace(cfg.data, tokenizer=tokenizer)
    data = pipeline.prepare(
        data_cfg, cfg.seq_len, overlap=cfg.eval.overlap, log=_warn, where="config.data"
    )
    job = Job(cfg, run.mesh, run.spec, None, None, data)
    state = {"params": run.params, "state": run.state}
    with jax.set_mesh(run.mesh):
        result = evaluate(job, state, job.eval_step(), sequences)
    result.pop("layers")
    return {"step": run.step} | result


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def write_text(workdir, prompts: list[str], *, max_new_tokens, seed, **sampling):
    """Continue each prompt; returns prompt + continuation as text.

    Raises:
      ConfigError: for a bad run directory or sampling parameter.
    """
    require(len(prompts) >= 1, "--prompt", prompts, "given at least once")
    run = load_run(workdir, warn=_warn)
    static = static_options(run.cfg, train=False)
    tokens = [[run.tokenizer.doc_id, *run.tokenizer.encode(p)] for p in prompts]
    try:
        outputs = generate(
            run.spec,
            run.cfg.model,
            run.params,
            run.state,
            tokens,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop_token=run.tokenizer.doc_id,
            dtype=static["dtype"],
            kernels=static["kernels"],
            **sampling,
        )
    except ValueError as e:
        raise ConfigError(str(e)) from None
    return [
        prompt + run.tokenizer.decode(out)
        for prompt, out in zip(prompts, outputs, strict=True)
    ]
