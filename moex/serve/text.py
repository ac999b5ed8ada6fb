"""Generating text with a trained model: `moex generate`."""

import functools
import math
from pathlib import Path

import jax
import numpy as np

from moex.config.base import ConfigError, require
from moex.data.chat import layout_of
from moex.model.steering import Steering
from moex.nn.contract import not_causal
from moex.offload import decode
from moex.offload.settings import Settings
from moex.offload.setup import open_offloaded
from moex.progress import tell
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun, load_run
from moex.runs.score import steering_for
from moex.runs.weights import load_lowered
from moex.serve import adapters
from moex.serve.experts import load_experts
from moex.tasks.base import require_token_ids
from moex.tasks.lm import continue_texts, prompt_ids


def write_text(
    place: Place,
    prompts: list[str],
    *,
    max_new_tokens,
    seed,
    chat=False,
    adapter=(),
    use=(),
    steering: Steering | None = None,
    visual=None,
    experts: str | None = None,
    offload: Settings | None = None,
    weights: str | None = None,
    warn=print,
    **sampling,
) -> list[str]:
    """Continue each prompt; returns prompt + continuation as text.

    With `chat` each prompt is a user's message, and the answers alone are returned.
    With adapters the run is their base; the prompts of one adapter are one batch.

    Args:
      place: run directory.
      prompts: texts.
      max_new_tokens, seed, sampling: as for `model.decode.generate`.
      chat: see above.
      adapter: folders of adapters, as NAME=FOLDER or FOLDER.
      use: the name of the adapter for each prompt; see `adapters.chosen`.
      steering: how experts are steered; the largest residual is told then.
      visual: a file of visual tokens; see `read_visual`.
      experts: which experts are read: see `experts.load_experts`; None: all.
      offload: how experts wait on the host; their figures are told; None: they do not.
      weights: as for `load_lowered`; None: as trained.
      warn: as for `load_run`.

    Raises:
      ConfigError: for a bad run directory or sampling parameter, or if there is no
        chat template.
    """
    require(len(prompts) >= 1, "--prompt", prompts, "given at least once")
    require_token_ids(RunDir.of(place).config(), "moex generate")
    names = adapters.named(list(adapter))
    if use and not names:
        raise ConfigError("--use: needs --adapter, which gives the names.")
    uses = adapters.chosen([*names], list(use), len(prompts)) if names else []
    features = read_visual(visual, len(prompts)) if visual else None
    if not names:  # before anything is read
        _layout(RunDir.of(place).config(), place, chat)
    steer, plan = steering_for(place, steering), None
    flags: dict = {"--offload": offload, "--weights": weights}
    others = [f for f, v in {"--adapter": names, "--experts": experts}.items() if v]
    for flag, value in flags.items():
        if value and others:
            raise ConfigError(f"{flag}: cannot be used together with {others[0]}.")
    if offload is not None:
        _check_causal(RunDir.of(place).config().model, place)
        opened = open_offloaded(place, offload)
        run = opened.run
        sampling["write"] = functools.partial(
            decode.generate, opened.executor, run.cfg.model
        )
    elif weights is not None:
        run = load_lowered(place, weights, warn=warn)
    elif experts is None:
        run = load_run(place, warn=warn)
    else:
        folder = RunDir.of(names.get(uses[0], place) if uses else place)
        folder = folder if folder.is_run() else RunDir.of(place)
        layout = _layout(folder.config(), folder, chat)
        ids = prompt_ids(RunDir.of(place).tokenizer(), prompts[0], layout)
        how: dict = {"steering": steering, "say": tell, "warn": warn}
        run, plan, steer = load_experts(place, experts, ids, **how)
    if steer is not None:
        sampling |= {"steer": steer, "on_peak": _tell_peak}
    _check_causal(run.cfg.model, place)
    sampling |= {"max_new_tokens": max_new_tokens, "seed": seed}
    if not names:
        texts = _texts(run, prompts, chat, sampling | {"visual": features})
        if offload is not None:
            tell(opened.executor.report())
        return texts
    models = adapters.load_adapted(run, names, warn, plan)
    texts = [""] * len(prompts)
    for name in dict.fromkeys(uses):
        rows = [i for i, own in enumerate(uses) if own == name]
        asked = [prompts[i] for i in rows]
        own = {"visual": None if features is None else features[rows]}
        made = _texts(models[name], asked, chat, sampling | own)
        for i, text in zip(rows, made, strict=True):
            texts[i] = text
    return texts


def _check_causal(model, place: Place) -> None:
    where = not_causal(model)
    if where is not None:
        raise ConfigError(
            f"{place}: {where} is ExpertChoice, which chooses tokens by those that "
            "follow: the model cannot generate."
        )


def _tell_peak(peak: float) -> None:
    text = f"largest |residual| of the steered model: {peak:.4g}"
    if not math.isfinite(peak):
        text += "; it overflowed: lower the scale in the steering file"
    tell(text)


def read_visual(file, prompts: int) -> np.ndarray:
    """Read visual tokens from a .npy file: float32 [prompts, tokens, width].

    Args:
      file: numbers of this shape, or [tokens, width] for all prompts.
      prompts: the number of prompts.

    Raises:
      ConfigError: if they are anything else.
    """
    where = f"--visual={file}"
    try:
        array = np.load(Path(file).expanduser(), allow_pickle=False)
        array = array.astype(np.float32)
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as e:
        told = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(f"{where}: is no .npy file of numbers ({told}).") from None
    array = np.stack([array] * prompts) if array.ndim == 2 else array
    if array.ndim != 3 or len(array) != prompts:
        raise ConfigError(
            f"{where}: has the shape {list(array.shape)}; it must be [tokens, width] "
            f"for all prompts, or [{prompts}, tokens, width] for each."
        )
    if not np.all(np.isfinite(array)):
        raise ConfigError(f"{where}: has a number that is not finite.")
    return array


def _texts(run: LoadedRun, prompts: list[str], chat: bool, sampling) -> list[str]:
    """Continue prompts with one model."""
    try:
        with jax.set_mesh(run.mesh):
            arrays = {"params": run.params, "state": run.state}
            own = sampling | {"chat": _layout(run.cfg, run.folder, chat)}
            return continue_texts(run, arrays, run.tokenizer, prompts, **own)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _layout(cfg, place: Place, chat: bool) -> dict[str, str] | None:
    """How a run lays out chats; None: prompts are no chats."""
    layout = layout_of(cfg.data) if chat else None
    if chat and not layout:
        raise ConfigError(
            f"--chat: {place} has no chat template: it was not trained on chats, and "
            "no model with one was imported."
        )
    return layout
