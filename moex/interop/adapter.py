"""Adapters as folders apart from their base: `export-hf --adapter` and back.

LoRA is written as PEFT does (`peft.py`); `moex_adapter.json` beside it has what PEFT
has no field for. Any other kind is in a layout of our own: the same file, and
`moex_adapter.safetensors` with our names. See docs/adapters.md.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moex.adapters.lora import LoRA, factors
from moex.config import base as configs
from moex.config.base import ConfigError, nearest, require
from moex.config.flags import load_config
from moex.data.chat import keep_layout
from moex.data.files import atomic_write
from moex.data.pipeline import unread
from moex.data.tokenizer import SavedTokenizer
from moex.interop import peft
from moex.interop.card import CARD
from moex.interop.closest_family import NoFamily
from moex.interop.export import description
from moex.interop.families import FAMILIES
from moex.interop.folder import stored_tensors
from moex.interop.peft_names import Site, sites
from moex.interop.writing import Tensor, write
from moex.json_files import dump_json, field, read_object
from moex.model.optim import make_optimizer
from moex.model.paths import flat_paths, nested
from moex.model.spec import ModelSpec, model_spec
from moex.nn.lowered import SCALES, VALUES
from moex.nn.projection import AdapterConfig
from moex.runs.base import Base, base_hash, has_base, with_base
from moex.runs.claim import new_folder, new_run
from moex.runs.directory import Place, RunDir
from moex.runs.keys import check_run
from moex.runs.open import LoadedRun, as_base, differences, load_run
from moex.runs.program import Program, mesh_here
from moex.runs.write import write_run
from moex.tasks.base import require_token_ids

ABOUT = "moex_adapter.json"
TENSORS = "moex_adapter.safetensors"
FORMAT = 1
RECORD = "adapter.json"  # in `RUN/hf`: the types of the tensors that came in


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """An adapter that was read from a folder, for one base."""

    config: AdapterConfig
    arrays: dict[str, np.ndarray]  # all that the run of it keeps, by path
    dtypes: dict[str, str]  # {tensor of PEFT: its type}


def export_adapter(place: Place, out, *, say=print) -> None:
    """Write the adapters of a run as a folder, without its base.

    Args:
      place: run directory.
      out: the folder; must not exist or be empty.
      say: called with each line of news.

    Raises:
      ConfigError: if the run has no adapters, or PEFT has no form for its LoRA.
    """
    run = RunDir.of(place)
    if jax.process_count() > 1:
        raise ConfigError("export-hf: runs in one process; all shards must be here.")
    cfg = run.config()
    adapter = cfg.model.adapter
    if adapter is None:
        raise ConfigError(f"--adapter: {run} has no adapters; export it without.")
    target = new_folder(out, f"--out={out}")
    loaded = load_run(run, warn=say)
    arrays = _own_arrays(loaded)
    adapter = _with_trained_before(loaded, arrays, say)
    about = {
        "format": FORMAT,
        "adapter": configs.to_dict(adapter),
        "base": base_hash(cfg.model),
        "step": loaded.step,
    }
    files: dict[str, Any] = {ABOUT: dump_json(about, indent=1) + "\n"}
    values, name, form = arrays, TENSORS, "moex, as PEFT has no such adapter"
    if isinstance(adapter, LoRA) and not adapter.also_train:
        try:
            values, name = _peft_files(loaded, arrays, files), peft.TENSORS
            form = "PEFT"
        except NoFamily as error:
            say(str(error))
            form = "moex, as PEFT knows no such base"

    def tensor(key, value) -> Tensor:
        return Tensor(key, value.shape, value.dtype, lambda: value)

    made = [tensor(*item) for item in values.items()]
    write(target, made, single=name, max_shard_bytes=1 << 62, files=files)
    size = sum(math.prod(t.shape) for t in made)
    say(f"{out}: {len(made)} tensors, {size:,} parameters, in the layout of {form}")


def _own_arrays(run: LoadedRun) -> dict[str, np.ndarray]:
    """Arrays that a base has not, or not so: adapters, trained ones, router states.

    The base is the first of the runs that the run goes on from: each of them may have
    trained other parameters.
    """
    names, params = _beyond_base(run.spec, run.cfg.model), flat_paths(run.params)
    trained = {name: np.asarray(params[name]) for name in sorted(names)}
    if not has_base(run.cfg):
        return trained
    base = _first_base(run.folder)
    before = load_run(base.folder, step=base.step, warn=lambda line: None)
    old = flat_paths(as_base(run, before.params)) | flat_paths(before.state)
    moved = {
        name: np.asarray(array)
        for name, array in (params | flat_paths(run.state)).items()
        if name not in old or not np.array_equal(array, old[name])
    }
    return trained | moved


def _with_trained_before(run: LoadedRun, arrays, say) -> AdapterConfig:
    """The adapters of a run as a run of all of its arrays would have them.

    It trains too what a run before trained: so these arrays are its own.
    """
    adapter, ours = run.cfg.model.adapter, _beyond_base(run.spec, run.cfg.model)
    more = sorted(arrays.keys() - ours - flat_paths(run.spec.state).keys())
    for name in more:
        if name.endswith((VALUES, SCALES)):
            raise ConfigError(
                f"export-hf --adapter: a run before trained {name.rpartition('/')[0]}, "
                "which this one has in int8: it would lose it."
            )
        arrays[name] = arrays[name].astype(np.float32)
        say(f"trained by a run before, so trained by a run of the folder: {name}")
    if not more:
        return adapter
    return dataclasses.replace(adapter, also_train=(*adapter.also_train, *more))


def _first_base(run: RunDir) -> Base:
    """The base of a run, or of the first of the runs with adapters before it."""
    base = Base.read(run)
    while has_base(base.folder.config()):
        base = Base.read(base.folder)
    return base


def _beyond_base(spec: ModelSpec, model) -> set[str]:
    """The paths of parameters that are trained, or that the model alone has not."""
    plain = flat_paths(model_spec(dataclasses.replace(model, adapter=None)).params)

    def is_base(name: str) -> bool:  # a weight in int8 has parts
        own = name in plain or name.rpartition("/")[0] in plain
        return own and spec.info[name].frozen

    return {name for name in flat_paths(spec.params) if not is_base(name)}


def _peft_files(run: LoadedRun, arrays, files: dict[str, Any]):
    """The tensors of PEFT by name; its other files are added to `files`."""
    base = _first_base(run.folder).folder if has_base(run.cfg) else run.folder
    for name in sorted(arrays.keys() & flat_paths(run.spec.state).keys()):
        raise ConfigError(
            f"export-hf --adapter: training moved {name}, which files of PEFT cannot "
            "hold; fold the adapters in (moex convert --to=folded) and export that."
        )
    every = family_sites(base, run.cfg.model)
    values, adapted = peft.tensors_of(arrays, every)
    kept, dtypes = run.folder.imported, {}
    settings = peft.settings_of(run.cfg.model.adapter, adapted, every)
    files[peft.SETTINGS] = json.dumps(settings, indent=2) + "\n"
    if (kept / RECORD).is_file():
        where = str(kept / RECORD)
        dtypes = field(read_object(kept / RECORD), "dtypes", dict[str, str], where)
        came = read_object(kept / peft.SETTINGS)
        in_ranks, _ = peft.tensors_of(arrays, every, came)
        if dtypes.keys() == in_ranks.keys():
            values = in_ranks
            files[peft.SETTINGS] = kept / peft.SETTINGS
            if run.step == 0 and (kept / CARD).is_file():
                files[CARD] = kept / CARD
    kinds = {name: np.dtype(dtypes.get(name, "float32")) for name in values}
    return {name: value.astype(kinds[name]) for name, value in values.items()}


def family_sites(base: RunDir, model) -> list[Site]:
    """All that PEFT can adapt in a model whose base is a run.

    Raises:
      ConfigError: if no family of transformers has the base.
    """
    cfg = base.config()
    cfg.model = dataclasses.replace(model, adapter=None)
    config, *_ = description(base, cfg)
    return list(sites(cfg.model, FAMILIES[config["model_type"]].names))


def read_adapter(folder, base: RunDir) -> AdapterFiles:
    """Read the folder of an adapter for a base.

    Args:
      folder: of PEFT, or as `export_adapter` writes it.
      base: the run whose model it is for.

    Raises:
      ConfigError: if it is for another base, or is broken.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--adapter={folder}: there is no such folder.")
    model = base.config().model
    if model.adapter is not None:
        raise ConfigError(
            f"{base}: has adapters itself; fold them in with moex convert {base} "
            "--to=folded --workdir=RUN, and give that run."
        )
    about = {}
    if (path / ABOUT).is_file():
        about = _about(path / ABOUT, base, model)
    if (path / peft.SETTINGS).is_file():
        return _read_peft(path, base, model, about.get("adapter"))
    if not about:
        raise ConfigError(f"{path}: has neither {peft.SETTINGS} nor {ABOUT}.")
    arrays, spec = {}, model_spec(dataclasses.replace(model, adapter=about["adapter"]))
    stored = stored_tensors(path / TENSORS)
    wanted = flat_paths(spec.params) | flat_paths(spec.state)
    trained = _beyond_base(spec, model)
    known = trained | flat_paths(spec.state).keys()
    for name in sorted(stored.keys() - known):
        told = f"{path / TENSORS}: tensor {name!r} is of no adapter of {ABOUT}."
        raise ConfigError(f"{told}{nearest(name, known - stored.keys())}")
    for name in sorted(trained | stored.keys()):
        if name not in stored:
            raise ConfigError(f"{path / TENSORS}: tensor {name!r} is missing.")
        if stored[name].shape != wanted[name].shape:
            raise ConfigError(
                f"{path / TENSORS}: tensor {name!r} has shape "
                f"{list(stored[name].shape)}; {ABOUT} makes it "
                f"{list(wanted[name].shape)}."
            )
        peft.check_type(name, stored[name], (wanted[name].dtype.name,))
        arrays[name] = peft.finite(name, stored[name])
    return AdapterFiles(about["adapter"], arrays, {})


def _about(file: Path, base: RunDir, model) -> dict[str, Any]:
    """The fields of our JSON file, with the adapter as a config."""
    data, where = read_object(file), str(file)
    form = field(data, "format", int, where)
    if form != FORMAT:
        told = f"{where}: format = {form}: must be {FORMAT}; a newer moex wrote it."
        raise ConfigError(told)
    if field(data, "base", str, where) != base_hash(model):
        raise ConfigError(
            f"{where}: the adapter is for another base than {base}: names or shapes of "
            "parameters differ."
        )
    adapter = configs.from_dict(
        field(data, "adapter", dict, where), f"{where}: adapter"
    )
    if not isinstance(adapter, AdapterConfig):
        raise ConfigError(
            f"{where}: adapter is {type(adapter).__name__}, which is none."
        )
    return data | {"adapter": adapter}


def _read_peft(path: Path, base: RunDir, model, given) -> AdapterFiles:
    every = family_sites(base, model)
    config, stored = peft.read_peft(path, every, base)
    if isinstance(given, LoRA):  # its patterns, which PEFT has no place for
        named = dataclasses.replace(given, shared=False)
        if (named.rank, named.alpha) == (config.rank, config.alpha):
            config = named
    shapes = model_spec(dataclasses.replace(model, adapter=config)).shapes()
    arrays = {
        name: np.zeros(shape, np.float32)
        for name, shape in shapes.items()
        if "/adapters/" in f"/{name}"
    }
    for site, pair in stored.items():
        if not arrays.keys() >= set(factors(site.path)):
            raise ConfigError(
                f"{path / ABOUT}: adapter.targets match no {site.path}, which "
                f"{peft.SETTINGS} targets."
            )
        a, b = (arrays[name] for name in factors(site.path))
        site.fill(a, b, *(peft.finite(*t).astype(np.float32) for t in pair.items()))
    dtypes = {
        name: tensor.dtype.name
        for pair in stored.values()
        for name, tensor in pair.items()
    }
    return AdapterFiles(config, arrays, dtypes)


def adapted_run(read: AdapterFiles, base: LoadedRun) -> LoadedRun:
    """The model of a base with an adapter; arrays of the base are shared."""
    cfg = configs.from_dict(configs.to_dict(base.cfg))
    cfg.model = dataclasses.replace(cfg.model, adapter=read.config)
    spec = model_spec(cfg.model, base.mesh)
    own = {n: jnp.asarray(array) for n, array in read.arrays.items()}
    params = nested({n: a for n, a in own.items() if n in flat_paths(spec.params)})
    state = nested({n: a for n, a in own.items() if n in flat_paths(spec.state)})
    program = Program(cfg=cfg, mesh=base.mesh, spec=spec)
    return dataclasses.replace(
        base,
        cfg=cfg,
        spec=spec,
        params=with_base(params, as_base(program, base.params)),
        state=with_base(state, base.state),
    )


def _keep_peft(folder: Path, dtypes: dict[str, str], kept: Path) -> None:
    """Keep what an export of an imported run of a PEFT folder writes again."""
    kept.mkdir(parents=True)
    for name in (peft.SETTINGS, CARD):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)
    record = {"from": str(folder), "dtypes": dtypes}
    atomic_write(kept / RECORD, json.dumps(record, indent=1) + "\n")


def import_adapter(
    base_place: Place,
    folder,
    out,
    config_args: list[str] = (),  # type: ignore[assignment]
    *,
    say=print,
) -> None:
    """Write a run that has the adapters of a folder on a base, at step 0.

    Args:
      base_place: run directory of the base, which the new run names as its own.
      folder: of PEFT, or as `export_adapter` writes it.
      out: the new run directory; must not exist or be empty.
      config_args: `--config.a.b=value` on the run config, such as the learning rate.
      say: called with each line of news.

    Raises:
      ConfigError: for a user's mistake or a folder that does not fit the base.
    """
    base, out = RunDir.of(base_place), new_folder(out, f"--out={out}")
    if jax.process_count() > 1:
        raise ConfigError(
            "import-hf: runs in one process; a job of several reads its run directory."
        )
    if any(base.path.glob("*.safetensors")):
        raise ConfigError(
            f"{base}: is a checkpoint folder; with --adapter it must be a run. Import "
            f"it first: moex import-hf {base} --out RUN"
        )
    require_token_ids(base.config(), "moex import-hf")
    read = read_adapter(folder, base)
    cfg = base.config()
    cfg.model = dataclasses.replace(cfg.model, adapter=read.config)
    shapes = model_spec(cfg.model).shapes()
    cfg.init_from = str(base.path.absolute())
    own = cfg.init_from
    cfg = load_config(list(config_args), base=cfg)
    told = f"{own!r}, the run that the adapters are for"
    require(cfg.init_from == own, "config.init_from", cfg.init_from, told)
    check_run(cfg)
    for name, new, old in differences(model_spec(cfg.model).shapes(), shapes):
        raise ConfigError(
            f"--config.model...: changes {name}, of shape {old} in the folder, to {new}"
            " (None: there is none)."
        )
    mesh = mesh_here(cfg)
    program = Program(cfg=cfg, mesh=mesh, spec=model_spec(cfg.model, mesh))
    loaded = load_run(base, cfg.mesh, warn=say)
    whole = adapted_run(read, loaded)
    tx, _ = make_optimizer(cfg.optim, cfg.steps, program.spec.params, program.spec.info)
    data = unread(cfg.data, cfg.seq_len, base.tokenizer())
    with new_run(out, f"--out={out}", say) as temporary:
        if read.dtypes:
            _keep_peft(Path(folder).expanduser(), read.dtypes, temporary.imported)
        cfg.data = dataclasses.replace(
            cfg.data, tokenizer=SavedTokenizer(path=str(RunDir(out).tokenizer_folder))
        )
        keep_layout(base.imported, temporary.imported)
        Base.of(base, loaded.step).save(temporary)
        arrays = {"params": whole.params, "state": whole.state}
        write_run(temporary, cfg, program, tx, data, arrays)
    size = sum(array.size for array in read.arrays.values())
    say(f"{out}: adapters of {size:,} parameters on step {loaded.step} of {base}")
