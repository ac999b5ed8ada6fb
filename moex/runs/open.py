"""Opening a run to use its model: its program, its tokenizer and its parameters."""

import contextlib
import dataclasses
import functools

import jax
from jax.sharding import Mesh

from moex import sharding
from moex.config import base as configs
from moex.config.base import ConfigError
from moex.data.tokenizer import Tokenizer
from moex.model.paths import flat_paths, nested, path_name
from moex.model.spec import ModelSpec, check_mesh, model_spec, shardings
from moex.nn.lowered import lowered
from moex.nn.projection import of_adapter
from moex.runs.base import Base, has_base, with_base
from moex.runs.checkpoint import HOST_BYTES, Checkpointer
from moex.runs.directory import Place, RunDir
from moex.runs.program import Program


@dataclasses.dataclass(kw_only=True)
class LoadedRun(Program):
    """A trained model from a run directory."""

    folder: RunDir
    step: int  # the step of the checkpoint
    params: dict
    state: dict

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, whose task must have token ids."""
        return self.folder.tokenizer()


def load_run(
    place: Place, mesh_cfg=None, *, warn=print, step=None, whole=True
) -> LoadedRun:
    """Read the newest intact parameters of a run directory, or those of one step.

    Args:
      place: the run directory, a path or a `RunDir`.
      mesh_cfg: `MeshConfig`; None: that of the run where it fits the devices of this
        job, otherwise one that keeps a copy of the model on each device.
      warn: called with one line per damaged checkpoint, and if the mesh does not fit.
      step: the step of the checkpoint; None: the newest that is intact.
      whole: False: of a run with adapters on a base, only what it keeps itself.

    Raises:
      ConfigError: if it is not a run directory or has no (such) checkpoint.
      CheckpointError: if no checkpoint is intact.
    """
    run = RunDir.of(place)
    cfg, spec = run.config(), saved_spec(run)
    if mesh_cfg is None:
        mesh = mesh_here(cfg, spec, warn)
    else:
        mesh = mesh_cfg.make()
        check_mesh(spec, mesh)
    return _load(run, Program(cfg=cfg, mesh=mesh, spec=spec), warn, step, whole)


def load_onto(base: LoadedRun, run: RunDir, where: str, *, warn=print) -> LoadedRun:
    """Read a run with adapters whose base is loaded: they share the arrays of the base.

    Args:
      base: the run that `run` was trained on.
      run: the run directory.
      where: names it in errors.
      warn: as for `load_run`.

    Raises:
      ConfigError: if it has another base.
    """
    own = Base.read(run)
    same = own.folder.path.resolve() == base.folder.path.resolve()
    if not same or own.step != base.step:
        raise ConfigError(
            f"{where}: its base is step {own.step} of {own.folder}, not step "
            f"{base.step} of {base.folder}."
        )
    program = Program(cfg=run.config(), mesh=base.mesh, spec=saved_spec(run))
    check_base(program, base.cfg, base.spec, f"{where}: the base")
    loaded = _load(run, program, warn, None, whole=False)
    rest = as_base(program, base.params)
    return dataclasses.replace(loaded, params=with_base(loaded.params, rest))


def base_params(run: RunDir, program: Program, warn=print) -> dict:
    """Read the parameters of the base of a run with adapters, on the mesh of the run.

    Raises:
      ConfigError: if the base is not there, has changed, or is of another model.
    """
    base = Base.read(run)
    cfg, spec = base.folder.config(), saved_spec(base.folder)
    check_base(program, cfg, spec, f"the base of {run}, {base.folder},")
    other = Program(cfg=cfg, mesh=program.mesh, spec=spec)
    loaded = _load(base.folder, other, warn, base.step)
    return as_base(program, loaded.params)


def continued(program: Program, before, params: dict) -> dict:
    """The parameters of a run as another run that begins from them has them.

    Args:
      program: the program of the run that begins.
      before: config of the run that has the parameters.
      params: nested dicts, on the mesh of the program.
    """
    return _placed(program, _continued(program, before, params))


def as_base(program: Program, params: dict) -> dict:
    """The parameters of the base of a run as the run has them.

    Args:
      program: that of the run, which has all of its adapters itself.
      params: nested dicts, on the mesh of the program.
    """
    return _placed(program, _fitted(program, params))


def _placed(program: Program, params: dict) -> dict:
    places, _ = shardings(program.spec, program.mesh)
    flat = flat_paths(places)

    def placed(path, array):  # arrays may be other ones now
        place = flat.get(path_name(path))
        return array if place is None else jax.device_put(array, place)

    return jax.tree_util.tree_map_with_path(placed, params)


def _continued(program: Program, before, params: dict) -> dict:
    adapter = program.cfg.model.adapter
    if adapter is not None:
        old = before.model.adapter
        params = adapter.continued(old, params, "config.model.adapter")
    return _fitted(program, params)


def _fitted(program: Program, params: dict) -> dict:
    """The parameters of a base in the types that a model has them in."""
    if program.cfg.model.adapter is None:
        return params
    return nested(lowered(flat_paths(params), flat_paths(program.spec.params)))


def check_base(
    program: Program, before, spec: ModelSpec, where: str, *, begins: bool = False
) -> None:
    """Check that a base has all parameters that the adapters of a model leave to it.

    Args:
      program: the program of the run that has the base.
      before: config of the base.
      spec: that of the model of the base.
      where: names the base in errors.
      begins: the run begins, and its adapters go on from those of the base; else it
        has all of its adapters itself.

    Raises:
      ConfigError: naming the first parameter that differs.
    """

    def carried(params):
        if begins:
            return _continued(program, before, params)
        return _fitted(program, params)

    own, params = program.spec, jax.eval_shape(carried, spec.params)
    arrays = flat_paths(params) | flat_paths(spec.state)
    counts = {n for n in {**arrays, **own.shapes()} if begins or not of_adapter(n)}
    there = {name: array.shape for name, array in arrays.items() if name in counts}
    kept = {
        name: shape
        for name, shape in own.shapes().items()
        if name in there or (name in counts and own.info[name].frozen)
    }
    for name, mine, its in differences(kept, there):
        raise ConfigError(
            f"{where} has another architecture: {name} has shape {its} there, "
            f"{mine} here (None: there is none)."
        )


def _load(run: RunDir, program: Program, warn, step, whole=True) -> LoadedRun:
    cfg = program.cfg
    nothing = ConfigError(f"{run}: the run has no checkpoint yet.")
    if not run.checkpoints.is_dir():
        raise nothing
    abstract = program.saved(program.abstract_state())
    # Orbax refuses an array above its limit, and may read all of it to get one part.
    largest = max(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    limit = max(HOST_BYTES, 2 * largest)
    checkpointer = Checkpointer(run, read_only=True, host_bytes=limit)
    with contextlib.closing(checkpointer):
        found = checkpointer.restore(
            abstract,
            items=("params", "state"),
            warn=warn,
            step=step,
            check=saved_with(cfg, cfg.task.saved_identity(run)),
        )
    if found is None:
        raise nothing
    step, arrays, _, _ = found
    model = {name: arrays[name] for name in ("params", "state")}
    if whole and has_base(cfg):
        model["params"] = with_base(model["params"], base_params(run, program, warn))
    return LoadedRun(**vars(program), folder=run, step=step, **model)


def saved_spec(run: RunDir) -> ModelSpec:
    """Build the abstract model of a run that was started.

    Raises:
      ConfigError: if it is no run directory, or its config leaves the model size open.
    """
    model = run.config().model
    if model.num_outputs is None:
        raise ConfigError(
            f"{run.config_file}: config.model.{model.SIZE} = None: training fills it "
            "in; was the file edited?"
        )
    return model_spec(model)


def mesh_here(cfg, spec: ModelSpec, warn) -> Mesh:
    """The mesh of a run where it fits the devices here, or one of whole copies."""
    try:
        mesh = cfg.mesh.make()
        check_mesh(spec, mesh)
    except ConfigError as e:  # it was trained on another number of devices
        mesh = sharding.MeshConfig().make()
        warn(f"the mesh of the run does not fit here ({e}); every device has a copy")
        check_mesh(spec, mesh)
    return mesh


def saved_with(cfg, identity: dict[str, str]):
    """Make `check(step, meta)`: does a checkpoint have this model and task identity?

    If not, it raises a `ConfigError` that names the first field that differs.
    """
    model = configs.to_dict(cfg.model)

    def check(step: int, meta: dict) -> None:
        where = f"the checkpoint of step {step}"
        for name, own in identity.items():
            if meta.get(name, own) != own:
                raise ConfigError(
                    f"{where} was trained with another {name} than the one that the "
                    f"run directory has now; put the folder {name} back."
                )
        if "model" not in meta:
            return
        try:  # fields that were added since get their defaults
            saved = configs.to_dict(configs.from_dict(meta["model"]))
        except ConfigError:
            return  # a field has another name now; only the arrays are compared
        for key, here, there in differences(model, saved, "model"):
            raise ConfigError(
                f"config.{key} = {here!r}, but {where} was trained with {there!r}; put "
                "config.json of the run back."
            )

    return check


def differences(new, old, path: str = ""):
    """Yield `(path, new value, old value)` where two results of `to_dict` differ.

    A value that one of them lacks is None; paths are sorted.
    """
    here, there = configs.flat(new, path), configs.flat(old, path)
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            yield key, here.get(key), there.get(key)
