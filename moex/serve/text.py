"""Generating text with a trained model: `moex generate`."""

import jax

from moex.config.base import ConfigError, require
from moex.nn.contract import not_causal
from moex.runs.directory import Place, RunDir
from moex.runs.open import load_run
from moex.tasks.base import require_token_ids
from moex.tasks.lm import continue_texts


def write_text(
    place: Place, prompts: list[str], *, max_new_tokens, seed, warn=print, **sampling
) -> list[str]:
    """Continue each prompt; returns prompt + continuation as text.

    Raises:
      ConfigError: for a bad run directory or sampling parameter.
    """
    require(len(prompts) >= 1, "--prompt", prompts, "given at least once")
    require_token_ids(RunDir.of(place).config(), "moex generate")
    run = load_run(place, warn=warn)
    where = not_causal(run.cfg.model)
    if where is not None:
        raise ConfigError(
            f"{place}: {where} is ExpertChoice, which chooses tokens by those that "
            "follow: the model cannot generate."
        )
    try:
        with jax.set_mesh(run.mesh):
            arrays = {"params": run.params, "state": run.state}
            sampling |= {"max_new_tokens": max_new_tokens, "seed": seed}
            return continue_texts(run, arrays, run.tokenizer, prompts, **sampling)
    except ValueError as e:
        raise ConfigError(str(e)) from None
