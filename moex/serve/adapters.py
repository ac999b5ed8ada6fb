"""Several adapters on one base, which is loaded once."""

from pathlib import Path

from moex.config.base import ConfigError, nearest
from moex.interop.adapter import adapted_run, read_adapter
from moex.runs.base import check_no_adapters, has_base
from moex.runs.directory import RunDir
from moex.runs.open import LoadedRun, load_onto

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


def load_adapted(base: LoadedRun, folders: dict[str, str], warn) -> dict:
    """The base and the model of each adapter by name; they share arrays of the base.

    Args:
      base: the run that all adapters are for.
      folders: by name: runs trained on that run, or folders of adapters for it.
      warn: as for `load_run`.

    Raises:
      ConfigError: if an adapter is for another base.
    """
    check_no_adapters(base.folder, "--adapter")
    models = {BASE: base}
    for name, folder in folders.items():
        run = RunDir(Path(folder).expanduser())
        if not run.is_run():
            models[name] = adapted_run(read_adapter(folder, base.folder), base)
            continue
        where = f"--adapter={folder}"
        if not has_base(run.config()):
            raise ConfigError(f"{where}: is no run with adapters on a base.")
        models[name] = load_onto(base, run, where, warn=warn)
    return models
