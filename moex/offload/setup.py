"""Opening a run whose experts stay in a bank."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from moex.analysis.record import header_of
from moex.config import base as configs
from moex.config.base import ConfigError, nearest
from moex.model.paths import flat_paths, nested
from moex.model.spec import ModelSpec, model_spec
from moex.nn.context import Compute
from moex.nn.lowered import SCALES, VALUES, lowered
from moex.offload.bank import Bank, FileBank, PinnedBank, bank_files, write_bank
from moex.offload.cores import Cores, divide
from moex.offload.executor import Executor, in_bank
from moex.offload.host import HostExperts
from moex.offload.layout import abstract, pools
from moex.offload.predictor import Predictor
from moex.offload.prefetch import ByImpact, ByRouters, ByText, layers_of_routers
from moex.offload.profile import profile
from moex.offload.settings import PREFETCH, Settings
from moex.offload.slots import Slots
from moex.progress import counted, phase
from moex.runs.base import check_no_adapters
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun, saved_with
from moex.runs.program import compute_of
from moex.runs.rows import Rows
from moex.runs.weights import read_as
from moex.sharding import MeshConfig
from moex.tasks.base import require_token_ids


@dataclasses.dataclass(frozen=True)
class Offloaded:
    """A run whose experts are in a bank.

    Attributes:
      run: the run; its `params` and `state` have no arrays with a row for each expert.
      executor: computes with it.
    """

    run: LoadedRun
    executor: Executor


def open_offloaded(place: Place, settings: Settings, wanted=None) -> Offloaded:
    """Open the newest checkpoint of a run with offloaded experts, on one device.

    Args:
      place: run directory.
      settings: how.
      wanted: a run config that says how to compute; None: that of the run.

    Raises:
      ConfigError: if it is no run, or one that cannot be offloaded.
      CheckpointError: if the checkpoint is damaged.
    """
    cores = divide() if settings.host else None
    folder = RunDir.of(place)
    check_no_adapters(folder, "--offload")
    cfg = configs.from_dict(configs.to_dict(folder.config()))
    if settings.measures():
        require_token_ids(cfg, "--offload-host and --offload-prefetch=impact")
    if jax.process_count() > 1:
        raise ConfigError("--offload: is for one process, and this job has several.")
    cfg.mesh = MeshConfig(data=1)
    mesh = cfg.mesh.make(jax.devices()[:1])
    spec = model_spec(cfg.model, mesh, settings.weights)
    module = abstract(cfg.model, settings.weights)
    compute = compute_of(cfg if wanted is None else wanted, train=False)
    found = pools(cfg.model, spec, module, compute.dtype)
    slots = settings.slots(found)  # before anything is read
    predictor = predictor_of(settings, folder)
    rows = Rows(folder)
    saved_with(cfg, cfg.task.saved_identity(folder))(rows.step, rows.meta)
    files = bank_files(folder, rows, found)
    banks: list[Bank] = [FileBank(*pair) for pair in zip(found, files, strict=True)]
    if settings.bank == "pinned":
        device = mesh.devices.flat[0]
        banks = [PinnedBank(bank.pool, bank, device) for bank in banks]
    params, state = _outside(spec, rows)
    made = assemble(
        *(cfg.model, module, params, state, banks, slots, settings, mesh, compute),
        predictor=predictor,
        cores=cores,
    )
    run = LoadedRun(
        cfg=cfg,
        mesh=mesh,
        spec=spec,
        folder=folder,
        step=rows.step,
        params=params,
        state=state,
    )
    return Offloaded(run, made)


def predictor_of(settings: Settings, folder: RunDir) -> Predictor | None:
    """The predictor that the settings name; None if they name none.

    Raises:
      ConfigError: if there is none, or it is for another model or vocabulary.
    """
    if settings.prefetch in (None, "router", "impact"):
        return None
    file = folder.predictor
    if settings.prefetch != "predictor":
        file = pathlib.Path(settings.prefetch)
    try:
        predictor = Predictor.read(file)
        predictor.about.check(header_of(folder, folder.config()), str(file))
    except ConfigError as e:
        told = f"--offload-prefetch: {e}"
        if settings.prefetch != "predictor" and not file.exists():
            hint = nearest(settings.prefetch, PREFETCH)
            told += f" It may also be one of {', '.join(PREFETCH)}.{hint}"
        raise ConfigError(told) from None
    return predictor


def _outside(spec: ModelSpec, rows: Rows) -> tuple[dict, dict]:
    """Read the arrays that are in no bank: (params, state), on the host."""
    found = []
    for item, tree in (("params", spec.params), ("state", spec.state)):
        places = {n: a for n, a in flat_paths(tree).items() if not in_bank(n)}
        arrays: dict[str, np.ndarray] = {}
        doing = f"reading {item} that stay on the device"
        for path in counted(places, doing, len(places), "arrays"):
            if path.endswith(SCALES):
                continue
            name = path.removesuffix(VALUES)
            names = [p for p in (path, name + SCALES) if p in places]
            wanted = [places[p] for p in names]
            parts = read_as(rows, item, name, wanted, "--offload")
            arrays |= dict(zip(names, parts, strict=True))
        found.append(nested(arrays))
    return found[0], found[1]


def assemble(
    model,
    module,
    params,
    state,
    banks: list[Bank],
    slots,
    settings: Settings,
    mesh,
    compute: Compute,
    *,
    predictor: Predictor | None = None,
    cores: Cores | None = None,
) -> Executor:
    """Make the executor of a model.

    Args:
      model: `Model` config.
      module: from `layout.abstract`; it is used up.
      params, state: arrays that are in no bank, nested.
      banks: of its pools.
      slots: of each pool.
      settings: how.
      mesh: of one device.
      compute: how to compute.
      predictor: of `Settings.prefetch`, if it names one.
      cores: those of host and device; None: they are not divided.
    """
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = [bank.pool for bank in banks]
    made, routes = [], settings.routes(found)
    for bank, count in zip(banks, slots, strict=True):
        policy = functools.partial(settings.make_policy, bank.pool, routes)
        per_layer = settings.per_layer(bank.pool, count, routes)
        made.append(Slots(bank, count, policy, place, per_layer))
    host = HostExperts(module, found, compute, cores) if settings.host else None
    executor = Executor(model, module, params, state, made, mesh, settings)
    if settings.measures():
        with jax.set_mesh(mesh), phase("measuring host and device"):
            executor.costs = profile(executor, model, compute, host)
    executor.host = host
    executor.ahead = prefetch_of(executor, model, predictor)
    return executor


def prefetch_of(executor: Executor, model, predictor: Predictor | None):
    """The `Prefetch` of an executor's settings, or None.

    Raises:
      ConfigError: if the predictor names other experts than those that are stored.
    """
    settings = executor.settings
    match settings.prefetch:
        case None:
            return None
        case "router":
            return ByRouters(executor, settings.ahead or 1)
        case "impact":
            return ByImpact(executor, settings.ahead or 3)
    assert predictor is not None
    layer_R = layers_of_routers(model)
    stored = {a.routed: a.experts for own in executor.slots for a in own.pool.layers}
    here = [stored[number] for number in layer_R]
    if list(predictor.about.experts) != here:
        raise ConfigError(
            f"--offload-prefetch: the predictor is for routers of "
            f"{list(predictor.about.experts)} experts; this model keeps {here} sets of "
            "weights."
        )
    return ByText(executor, predictor, layer_R, settings.ahead)


def of_arrays(
    model,
    params,
    state,
    folder: pathlib.Path,
    settings: Settings,
    compute: Compute = Compute(),
    predictor: Predictor | None = None,
) -> Executor:
    """Make the executor of a model whose arrays are in memory, on the first device.

    Args:
      model: `Model` config.
      params, state: nested dicts of all arrays.
      folder: where files of the banks are written.
      settings: how.
      compute: how to compute.
      predictor: of `Settings.prefetch`, if it names one.
    """
    flat = {"params": flat_paths(params), "state": flat_paths(state)}

    def read(item, path, index):
        return np.asarray(flat[item][path.removeprefix("state/")])[index]

    def piece(item, path):
        return flat[item][path.removeprefix("state/")].shape

    mesh = MeshConfig(data=1).make(jax.devices()[:1])
    spec = model_spec(model, mesh, settings.weights)
    module = abstract(model, settings.weights)
    found = pools(model, spec, module, compute.dtype)
    banks: list[Bank] = []
    for i, pool in enumerate(found):
        write_bank(folder / f"{i}.rows", pool, read, piece)
        banks.append(FileBank(pool, folder / f"{i}.rows"))
    rest = []
    for item, tree in (("params", spec.params), ("state", spec.state)):
        outside = {path: a for path, a in flat[item].items() if not in_bank(path)}
        rest.append(nested(lowered(outside, flat_paths(tree))))
    slots = settings.slots(found)
    params, state = rest
    return assemble(
        *(model, module, params, state, banks, slots, settings, mesh, compute),
        predictor=predictor,
    )
