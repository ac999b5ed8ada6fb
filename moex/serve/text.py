"""Generating text with a trained model: `moex generate`."""

import jax

from moex.config.base import ConfigError, require
from moex.data.chat import layout_of
from moex.nn.contract import not_causal
from moex.runs.directory import Place, RunDir
from moex.runs.open import load_run
from moex.tasks.base import require_token_ids
from moex.tasks.lm import continue_texts


def write_text(
    place: Place,
    prompts: list[str],
    *,
    max_new_tokens,
    seed,
    chat=False,
    warn=print,
    **sampling,
) -> list[str]:
    """Continue each prompt; returns prompt + continuation as text.

    With `chat` each prompt is a user's message, and the answers alone are returned.

    Raises:
      ConfigError: for a bad run directory or sampling parameter, or if there is no
        chat template.
    """
    require(len(prompts) >= 1, "--prompt", prompts, "given at least once")
    require_token_ids(RunDir.of(place).config(), "moex generate")
    layout = layout_of(RunDir.of(place).config().data) if chat else None
    if chat and not layout:
        raise ConfigError(
            f"--chat: {place} has no chat template: it was not trained on chats, and "
            "no model with one was imported."
        )
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
            sampling["chat"] = layout
            return continue_texts(run, arrays, run.tokenizer, prompts, **sampling)
    except ValueError as e:
        raise ConfigError(str(e)) from None
