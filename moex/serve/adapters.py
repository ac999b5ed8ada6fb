"""Several adapters on one base, which is loaded once."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from moex.config import base as configs
from moex.config.base import ConfigError, nearest
from moex.convert.plans import Plan
from moex.convert.to_pruned import Pruned
from moex.interop.adapter import adapted_run, read_adapter
from moex.model.spec import model_spec
from moex.runs.base import check_no_adapters, has_base, with_base
from moex.runs.directory import RunDir
from moex.runs.open import LoadedRun, as_base, load_onto, saved_spec
from moex.runs.program import Program

BASE = "base"  # the name of the base without adapters


def named(given: list[str]) -> dict[str, str]:
    """The folders of `--adapter` by name: NAME=FOLDER, or the name of the folder.

    Raises:
      ConfigError: for a name that is there twice, or is that of the base.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals:
            name, folder = Path(text).expanduser().absolute().name, text
        if name in found or name in ("", BASE):
            raise ConfigError(
                f"--adapter={text}: the name {name!r} is taken; write NAME={folder}."
            )
        found[name] = folder
    return found


def chosen(names: list[str], use: list[str], prompts: int) -> list[str]:
    """The name of the adapter for each prompt.

    Args:
      names: of all adapters.
      use: the values of `--use`; none are needed for one adapter.
      prompts: the number of prompts.

    Raises:
      ConfigError: if they are too few or too many, or a name is unknown.
    """
    every = [BASE, *names]
    if not use and len(names) == 1:
        use = names
    if len(use) == 1:
        use = use * prompts
    if len(use) != prompts:
        raise ConfigError(
            f"--use: given {len(use)} times for {prompts} prompts; give it once for "
            f"all, or for each prompt in order: {', '.join(every)}."
        )
    for name in use:
        if name not in every:
            told = f"--use={name}: must be one of {', '.join(every)}."
            raise ConfigError(f"{told}{nearest(name, every)}")
    return list(use)


def load_adapted(
    base: LoadedRun, folders: dict[str, str], warn, plan: Plan | None = None
) -> dict:
    """The base and the model of each adapter by name; they share arrays of the base.

    Args:
      base: the run that all adapters are for.
      folders: by name: runs trained on that run, or folders of adapters for it.
      warn: as for `load_run`.
      plan: the experts that were read of the base; None: all.

    Raises:
      ConfigError: if an adapter is for another base.
    """
    check_no_adapters(base.folder, "--adapter")
    models, whole = {BASE: base}, base
    if plan is not None:  # adapters are for the model with all experts
        own = {"cfg": base.folder.config(), "spec": saved_spec(base.folder)}
        whole = dataclasses.replace(base, params={}, state={}, **own)
    for name, folder in folders.items():
        run, where = RunDir(Path(folder).expanduser()), f"--adapter={folder}"
        if run.is_run() and not has_base(run.config()):
            raise ConfigError(f"{where}: is no run with adapters on a base.")
        if run.is_run():
            made = load_onto(whole, run, where, warn=warn)
        else:
            made = adapted_run(read_adapter(folder, base.folder), whole)
        models[name] = made if plan is None else _of_kept(made, base, plan, where)
    return models


def _of_kept(own: LoadedRun, base: LoadedRun, plan: Plan, where: str) -> LoadedRun:
    """The model of an adapter, with the experts that its base has.

    Args:
      own: has the arrays of the adapter alone, for all experts.
      base: has the experts of the plan.
      where: names the adapter in errors.
    """
    pruned = Pruned.of(own.cfg.model, plan)
    pruned.check_adapters(where)
    cfg = configs.from_dict(configs.to_dict(own.cfg))
    cfg.model = pruned.model
    program = Program(cfg=cfg, mesh=base.mesh, spec=model_spec(cfg.model, base.mesh))
    params = jax.tree.map(jnp.asarray, pruned.arrays(own.params))
    state = jax.tree.map(jnp.asarray, pruned.arrays(own.state))
    params = with_base(params, as_base(program, base.params))
    state = with_base(state, base.state)
    return dataclasses.replace(
        own, cfg=cfg, spec=program.spec, params=params, state=state
    )
