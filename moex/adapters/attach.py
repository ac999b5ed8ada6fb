"""Attaching: which matrices of a model get adapters, and what is trained."""

import fnmatch
import math
from collections.abc import Iterable

from flax import nnx

from moex.config.base import ConfigError, nearest, require, require_choice
from moex.nn.lowered import lower, weight_sizes
from moex.nn.model import Layers, Model
from moex.nn.param import RouterState
from moex.nn.projection import AdapterConfig, Matrix, Projector, of_adapter
from moex.terminal import aligned

BASE_DTYPES = ("float32", "bfloat16", "int8")


def make_model(cfg: Model, rngs: nnx.Rngs) -> Layers:
    """The module of a model config, with its adapters if it has any."""
    model = cfg.make(rngs)
    if cfg.adapter is not None:
        attach(model, cfg.adapter, rngs)
        cfg.adapter.extend(model, cfg, rngs, "config.model.adapter")
    return model


def attach(model, cfg: AdapterConfig, rngs) -> None:
    """Give matrices their adapters, and mark every other parameter as frozen.

    Args:
      model: module; its parameters may have leading dims [repeat].
      cfg: kind of the adapters, and which matrices get one.
      rngs: `nnx.Rngs` with a `params` stream.

    Raises:
      ConfigError: for a pattern that matches no matrix, or one that takes no adapter.
    """
    path = "config.model.adapter"
    owners = {
        "/".join(map(str, where)): module
        for where, module in nnx.iter_modules(model, graph=False)
        if isinstance(module, Projector)
    }
    params = {
        "/".join(map(str, where)): variable
        for where, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    adaptable = {
        name: _matrix(name, variable)
        for name, variable in params.items()
        if name.rpartition("/")[0] in owners
        and name.rpartition("/")[2] in owners[name.rpartition("/")[0]].PROJECTED
    }
    allowed = "not empty: at least one pattern"
    require(bool(cfg.targets) or cfg.TARGETLESS, f"{path}.targets", (), allowed)
    chosen: dict[str, Matrix] = {}
    for pattern in cfg.targets:
        found = _matching(pattern, params, f"{path}.targets")
        _check_covered(pattern, found, params, adaptable, f"{path}.targets")
        chosen |= {name: adaptable[name] for name in found if name in adaptable}
    trained = {
        name
        for pattern in cfg.trained_too()
        for name in _matching(pattern, params, f"{path}.also_train")
    }
    for name, variable in params.items():
        if name not in trained:
            variable.set_metadata(frozen=True)
    require_choice(f"{path}.base_dtype", cfg.base_dtype, BASE_DTYPES)
    if cfg.base_dtype != "float32":
        for where, module in list(nnx.iter_modules(model, graph=False)):
            here = "/".join(map(str, where))
            for name in _weights(module, here, trained):
                whole_use = f"{here}/{name}".lstrip("/") not in adaptable
                lower(module, name, "bfloat16" if whole_use else cfg.base_dtype)
    by_owner: dict[str, dict] = {}
    for name, matrix in chosen.items():
        cfg.validate_matrix(matrix, path)
        owner, _, own = name.rpartition("/")
        by_owner.setdefault(owner, {})[own] = cfg.make(matrix, rngs)
    for owner, adapters in by_owner.items():
        owners[owner].adapters = nnx.Dict(adapters)
    # A bias that a rule has moved belongs to its router, so it is frozen with it.
    learning = {name.rpartition("/")[0] for name in trained} | {*by_owner}
    for where, state in nnx.to_flat_state(nnx.state(model, RouterState)):
        is_fixed = "/".join(map(str, where[:-1])) not in learning
        rule = state.get_metadata()["rule"]
        keeps = rule is None or rule.keeps_value
        state.set_metadata(frozen=is_fixed and keeps)


def _weights(module, path: str, trained: set[str]) -> list[str]:
    """The names of a module's frozen weights; routers have none."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param)
        and name.startswith("w_")
        and "/router" not in f"/{path}"
        and f"{path}/{name}".lstrip("/") not in trained
    ]


def _matching(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """The names that a pattern matches: all of it, or a part where it has no `*`."""
    names = list(names)
    require(bool(pattern.strip()), where, pattern, "a pattern; '*' is for all")
    found = fnmatch.filter(names, pattern if "*" in pattern else f"*{pattern}*")
    if not found:
        parts = {part for name in names for part in name.split("/")}
        words = ", ".join(sorted(part for part in parts if not part.isdigit()))
        raise ConfigError(
            f"{where}: pattern {pattern!r} matches no parameter."
            f"{nearest(pattern, parts)} Paths of parameters are made of {words}."
        )
    return found


def _check_covered(pattern, found, params, adaptable, where) -> None:
    """Check that a pattern means no matrix that would silently stay as it is."""
    missed = [n for n in found if n not in adaptable and _is_matrix(params[n])]
    if missed or not any(n in adaptable for n in found):
        bad = missed[0] if missed else found[0]
        can = ", ".join(sorted({n.rpartition("/")[2] for n in adaptable}))
        raise ConfigError(
            f"{where}: pattern {pattern!r} matches {bad!r}, which takes no adapter."
            f"{nearest(bad, adaptable)} Matrices that take one are {can}."
        )


def _is_matrix(variable) -> bool:
    return variable.get_metadata().get("matrix") is not None


def _matrix(name: str, variable) -> Matrix:
    """How an adapter sees a parameter: see `moex/nn/projection.py`."""
    metadata = variable.get_metadata()
    axes, rank = metadata["axes"], len(metadata["axes"])
    shape = variable.shape[-rank:]
    inputs, outputs = metadata.get("matrix") or ((0,), tuple(range(1, rank)))
    between = [d for d in range(rank) if d not in (*inputs, *outputs)]
    experts = shape[0] if axes[0] == "expert" else None
    if experts is not None:  # gate and up are one part, as in the files of PEFT
        outputs = (*(d for d in between if d != 0), *outputs)
        between = []

    def size(dims):
        return math.prod(shape[d] for d in dims)

    def axis(dims):
        return next((axes[d] for d in dims if axes[d] is not None), None)

    # Dims before the one that a mesh splits stay apart; those after it do not matter.
    split = next((i for i, d in enumerate(outputs) if axes[d] is not None), 0)
    groups = [*([d] for d in outputs[:split]), outputs[split:]]
    return Matrix(
        path=name,
        copies=tuple(variable.shape[:-rank]),
        experts=experts,
        inputs=size(inputs),
        parts=size(between),
        outer=tuple(map(size, groups)),
        input_axis=axis(inputs),
        outer_axes=tuple(map(axis, groups)),
    )


def adapter_table(cfg: AdapterConfig, params: dict, info: dict) -> str:
    """The table of the matrices that adapters change, and the share that is trained.

    Args:
      cfg: `Model.adapter`.
      params: `{path: array}` of the model; only shapes count.
      info: `{path: ParamInfo}`.
    """
    sizes = weight_sizes(params)
    own: dict[str, int] = {}
    for name, size in sizes.items():
        owner, found, rest = f"/{name}".rpartition("/adapters/")
        if found:
            matrix = f"{owner}/{rest.partition('/')[0]}".lstrip("/")
            own[matrix] = own.get(matrix, 0) + size
    lines = [("adapted matrix", "parameters", "added")]
    # Adapters of the whole model, such as prompts, change no matrix.
    lines += [(m, f"{sizes.get(m, 0):,}", f"{own[m]:,}") for m in own]
    trained = {n: v for n, v in sizes.items() if n in info and not info[n].frozen}
    also = [n for n in trained if not of_adapter(n)]
    total, learned = sum(sizes.values()), sum(trained.values())
    text = (
        f"{type(cfg).__name__}: {learned:,} of {total:,} parameters are trained "
        f"({100 * learned / total:.3g} %), {total - learned:,} are frozen"
    )
    if also:
        text += f";\nbesides the adapters: {', '.join(also)}"
    if cfg.about():
        text += f";\n{cfg.about()}"
    return f"{aligned(lines, (0,))}\n{text}"
