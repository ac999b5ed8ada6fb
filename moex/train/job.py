"""A job: everything that a run config stands for, ready to be stepped.

Made once by `make_job` for training, and by `load_run` for evaluation and generation
from a run directory.
"""

import dataclasses
import json
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.device import platform
from kernels_pallas.implementations import (
    INTERPRETED,
    Request,
    able,
    split_names,
    why_not,
)
from moex import optim, sharding
from moex.config import base as configs
from moex.config.base import ConfigError, ConfigWarning, caution, require, short
from moex.data import batches, pipeline
from moex.data.files import atomic_write
from moex.data.tokenizer import SavedTokenizer, Tokenizer
from moex.json_files import read_object
from moex.model import spec as states
from moex.runs.checkpoint import HOST_BYTES, Checkpointer
from moex.runs.keys import check_run
from moex.runs.room import check_room
from moex.serve.decode import check_request
from moex.train import step as steps

# By default libtpu's exchange of ragged rows is one operation that nothing runs beside.
# With this it is a start and an end, and the shared expert is computed in between
# (`tests/test_plan.py`, -m aot; both versions of JAX know it).
ASYNC_EXCHANGE = {"xla_tpu_enable_async_ragged_all_to_all": True}


def compiler_options(mesh: Mesh) -> dict | None:
    """What XLA is to be told beside its defaults for training on this mesh."""
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return ASYNC_EXCHANGE if on_tpu and mesh.shape["expert"] > 1 else None


@dataclasses.dataclass
class Program:
    """What one run computes: model, optimizer and mesh, without arrays or data."""

    cfg: Any  # the run config, checked, with the vocabulary filled in
    mesh: Mesh
    spec: states.ModelSpec
    tx: Any  # optax transformation
    learning_rate: Any  # learning rate as a function of the optimizer step

    def static(self, *, train: bool) -> dict:
        """Static fields of `Context`: how to compute, not what."""
        return static_options(self.cfg, train=train)

    def train_step(self):
        """The jitted training step; donates the train state."""
        step = steps.make_train_step(
            self.spec,
            self.tx,
            self.cfg.loss,
            grad_accum=self.cfg.grad_accum,
            num_domains=len(self.cfg.data.sources),
            optim=self.cfg.optim,
            static=self.static(train=True),
        )

        def with_rate(train_state, number, key, batch):
            """The learning rate too: outside, asking would wait for the device.

            A batch with `stop_N`, of `told_by_each`, has all know whether one asked.
            """
            rows = {name: a for name, a in batch.items() if name != "stop_N"}
            new, metrics = step(train_state, number, key, rows)
            metrics["lr"] = jnp.float32(self.learning_rate(number))
            if "stop_N" in batch:
                metrics["stop"] = jnp.max(batch["stop_N"])
            return new, metrics

        # Pinned, so that no step can move the state or leave figures on one device.
        state = jax.tree.map(lambda a: a.sharding, self.abstract_state())
        return jax.jit(
            with_rate,
            donate_argnums=0,
            out_shardings=(state, self.whole),
            compiler_options=compiler_options(self.mesh),
        )

    def eval_step(self):
        """The jitted evaluation step."""
        step = steps.make_eval_step(
            self.spec,
            num_domains=len(self.cfg.data.sources),
            static=self.static(train=False),
        )
        return jax.jit(step, out_shardings=self.whole)

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device holds in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    def init_state(self):
        """A fresh train state on the mesh."""
        key = jax.random.key(self.cfg.seed)
        return states.init_train_state(
            self.cfg.model, self.spec, self.tx, self.mesh, key
        )

    def abstract_state(self):
        """The train state as `ShapeDtypeStruct`s with shardings, for restoring."""
        spec, mesh = self.spec, self.mesh
        params, state = states.shardings(spec, mesh)
        opt = states.opt_shardings(self.tx, spec, params, mesh)
        guard = jax.eval_shape(states.init_guard)
        placed = {
            "params": (spec.params, params),
            "state": (spec.state, state),
            "opt": (jax.eval_shape(self.tx.init, spec.params), opt),
            "guard": (guard, jax.tree.map(lambda _: self.whole, guard)),
        }
        return {name: _with_shardings(*pair) for name, pair in placed.items()}


@dataclasses.dataclass
class Job(Program):
    """What one run needs beside its arrays."""

    data: pipeline.Prepared

    def batches(self, start: int):
        """Training batches of this process, from sequence `start` of the job on."""
        return batches.train_iterator(
            self.data,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start=start,
            rows=sharding.process_rows(self.mesh, self.cfg.batch_size),
        )

    @property
    def holds_out(self) -> bool:
        """Whether any data is held out that has something to score."""
        return self.data.holds_out

    def eval_batches(self, limit: int | None):
        """Held-out batches of this process."""
        batch_size = eval_batch_size(self.cfg)
        return batches.eval_batches(
            self.data,
            batch_size=batch_size,
            limit=limit,
            rows=sharding.process_rows(self.mesh, batch_size),
        )


def _with_shardings(tree, shards):
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shards
    )


def compute_dtype(cfg) -> str:
    """The dtype of matmuls: bfloat16 on accelerators, float32 on CPU, unless set."""
    if cfg.precision != "auto":
        return cfg.precision
    return "float32" if platform() == "cpu" else "bfloat16"


def static_options(cfg, *, train: bool) -> dict:
    """Static fields of `Context` from a run config."""
    kernels = None if cfg.kernels == "auto" else cfg.kernels
    if not train and not kernels_here(cfg):
        caution(f"config.kernels = {kernels!r} do not run here; 'auto' is used.")
        kernels = None
    return {
        "dtype": compute_dtype(cfg),
        "kernels": kernels,
        "remat": cfg.remat if train else "none",
        "scan_layers": cfg.scan_layers,
        "exchange": cfg.mesh.exchange,
        # What is scored must be exact, and keeps nothing for a backward pass.
        "exchange_buffer": cfg.mesh.exchange_buffer if train else None,
    }


def kernels_here(cfg) -> bool:
    """Whether one at least of the kernels that a run names can compute it here."""
    return cfg.kernels == "auto" or any(
        why_not(name, _experts_of(cfg), platform()) is None
        for name in split_names(cfg.kernels)
    )


def _experts_of(cfg) -> Request:
    """What experts ask of kernels, of sizes that no kernel refuses."""
    return Request("grouped_glu", compute_dtype(cfg), 1024, 1024, 8, "silu")


def eval_batch_size(cfg) -> int:
    """Sequences per evaluation step over the whole job."""
    return cfg.eval.batch_size or cfg.batch_size // cfg.grad_accum


def check_devices(cfg, mesh: Mesh) -> None:
    """Check that batches and sequences divide over the devices of a mesh.

    Raises:
      ConfigError: naming the field and the number it must be a multiple of.
    """
    shards = sharding.batch_shards(mesh)
    micro = cfg.batch_size // cfg.grad_accum
    require(
        micro % shards == 0,
        "config.batch_size",
        cfg.batch_size,
        f"a multiple of grad_accum * batch shards of the mesh = "
        f"{cfg.grad_accum} * {shards}",
    )
    check_eval_devices(cfg, mesh)


def check_eval_devices(cfg, mesh: Mesh) -> None:
    """What `check_devices` checks of an evaluation."""
    shards = sharding.batch_shards(mesh)
    parts = mesh.shape["seq"]
    require(
        cfg.seq_len % parts == 0,
        "config.seq_len",
        cfg.seq_len,
        f"a multiple of config.mesh.seq = {parts}",
    )
    require(
        parts == 1 or _platform(mesh) in ("cpu", "tpu"),
        "config.mesh.seq",
        parts,
        "1 on a GPU, whose attention is not split along the sequence; use fsdp",
    )
    require(
        eval_batch_size(cfg) % shards == 0,
        "config.eval.batch_size",
        eval_batch_size(cfg),
        f"a multiple of the batch shards of the mesh = {shards}",
    )


def _platform(mesh) -> str:
    """Of the devices of a mesh, or of those that an abstract one describes."""
    return mesh.abstract_mesh.abstract_device.platform


def check_kernels(cfg) -> None:
    """Check that the kernels that a run names can run on the platform of the mesh."""
    if kernels_here(cfg):
        return
    request, where = _experts_of(cfg), platform()
    can = [name for name in able(request, where) if not name.endswith(INTERPRETED)]
    reasons = (f"{n}: {why_not(n, request, where)}" for n in split_names(cfg.kernels))
    raise ConfigError(
        f"config.kernels = {cfg.kernels!r}: must be 'auto' or have one among "
        f"{', '.join(can)} on a {where} in {request.dtype}. {'; '.join(reasons)}."
    )


def make_program(cfg, mesh) -> Program:
    """The abstract model and optimizer of a checked config on a mesh, or abstract mesh.

    Raises:
      ConfigError: if the mesh does not divide a parameter, or for a mistake of
        `config.optim` that shows only beside the parameters.
    """
    spec = states.model_spec(cfg.model)
    states.check_mesh(spec, mesh)
    tx, learning_rate = optim.make_optimizer(
        cfg.optim, cfg.steps, spec.params, spec.info, cfg.kernels
    )
    return Program(cfg, mesh, spec, tx, learning_rate)


def make_job(cfg, *, log=print) -> Job:
    """Check a run config, prepare its data and build its abstract model.

    Fills in `cfg.model.vocab` from the tokenizer.

    Raises:
      ConfigError: for any mistake of the user, before anything is compiled.
    """
    check_run(cfg, to_train=False)  # `train` checks the schedules
    mesh = cfg.mesh.make()
    check_devices(cfg, mesh)
    check_kernels(cfg)
    data = pipeline.prepare(
        cfg.data, cfg.seq_len, overlap=cfg.eval.overlap, log=log, where="config.data"
    )
    vocab = data.tokenizer.vocab_size
    if cfg.model.vocab is None:
        cfg.model.vocab = vocab
    require(
        cfg.model.vocab >= vocab,
        "config.model.vocab",
        cfg.model.vocab,
        f"at least the vocabulary of the tokenizer, {vocab} (or None to take it)",
    )
    _check_samples(cfg, data.tokenizer)
    made = make_program(cfg, mesh)
    check_room(cfg, mesh, made.abstract_state())
    return Job(cfg, mesh, made.spec, made.tx, made.learning_rate, data)


def _check_samples(cfg, tokenizer: Tokenizer) -> None:
    """Check now that the text samples can be written, which the last step does."""
    if cfg.log.sample_tokens == 0:
        return
    try:
        prompts = [tokenizer.prompt(text) for text in cfg.log.sample_prompts]
        dtype = compute_dtype(cfg)
        check_request(cfg.model, prompts, cfg.log.sample_tokens, dtype)
    except ValueError as e:
        raise ConfigError(
            f"config.log.sample_prompts = {short(cfg.log.sample_prompts)}, "
            f"sample_tokens = {cfg.log.sample_tokens}: {e}"
        ) from None


# Changing these would make a checkpoint of the old config unusable.
FIXED_ON_RESUME = ("model", "optim.rule", "optim.lr_factors")


def check_resume(cfg, workdir: pathlib.Path, tokenizer: Tokenizer) -> list[str]:
    """Compare a config with the one that `workdir` was started with.

    Returns:
      One line per changed field that may change.

    Raises:
      ConfigError: if the directory holds a run of another architecture, optimizer
        rule or vocabulary.
    """
    saved = load_config(workdir)
    old, new = _flat(configs.to_dict(saved)), _flat(configs.to_dict(cfg))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    saved_tokenizer = Tokenizer.load(workdir / "tokenizer")
    if saved_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{workdir} holds a run with another tokenizer (vocabulary "
            f"{saved_tokenizer.vocab_size}, here {tokenizer.vocab_size}); use another "
            "--workdir, or the tokenizer of that run."
        )
    for key in changed:
        if key.startswith(FIXED_ON_RESUME):
            raise ConfigError(
                f"{workdir} holds a run with config.{key} = {old.get(key)!r}, not "
                f"{new.get(key)!r}; use another --workdir, or --config.init_from="
                f"{workdir} to start a new run from its parameters."
            )
    return [f"config.{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed]


def saved_with(cfg, tokenizer: Tokenizer):
    """`check(step, meta)`: that a checkpoint has the model and tokenizer of a config.

    It raises a `ConfigError` that names the first field that differs.
    """
    model = configs.to_dict(cfg.model)

    def check(step: int, meta: dict) -> None:
        where = f"the checkpoint of step {step}"
        if meta.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise ConfigError(
                f"{where} was trained with another tokenizer than the one that the "
                "run directory has now; put the folder tokenizer back."
            )
        if "model" not in meta:
            return
        try:  # fields that were added since get their defaults
            saved = configs.to_dict(configs.from_dict(meta["model"]))
        except ConfigError:
            return  # a field has another name now; the arrays are compared
        old, new = _flat(saved, "model"), _flat(model, "model")
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"config.{key} = {new.get(key)!r}, but {where} was trained with "
                    f"{old.get(key)!r}; put config.json of the run back."
                )

    return check


def check_init_from(job: Job) -> None:
    """Check that the run named by `init_from` has parameters for this model.

    Raises:
      ConfigError: if it is no run, or one of another architecture or vocabulary.
    """
    path = pathlib.Path(job.cfg.init_from)
    try:
        other, tokenizer = load_config(path), Tokenizer.load(path / "tokenizer")
    except ConfigError as e:
        raise ConfigError(f"config.init_from = {str(path)!r}: {e}") from None
    if tokenizer.fingerprint != job.data.tokenizer.fingerprint:
        raise ConfigError(
            f"config.init_from = {str(path)!r}: has another tokenizer (vocabulary "
            f"{tokenizer.vocab_size}, here {job.data.tokenizer.vocab_size}); use "
            f"SavedTokenizer(path='{path / 'tokenizer'}') as config.data.tokenizer."
        )
    spec = _saved_spec(other, path)
    old, new = (_shapes((s.params, s.state)) for s in (spec, job.spec))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"config.init_from = {str(path)!r}: has another architecture: {name} "
                f"has shape {old.get(name)} there, {new.get(name)} here (None: there "
                "is none)."
            )


def _shapes(trees) -> dict[str, tuple]:
    return {k: v.shape for tree in trees for k, v in optim.flat_paths(tree).items()}


def _flat(data, prefix="") -> dict:
    if isinstance(data, list):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def save_config(cfg, workdir: pathlib.Path) -> None:
    """Write the resolved config to `workdir/config.json`."""
    text = json.dumps(configs.to_dict(cfg), indent=1)
    atomic_write(workdir / "config.json", text + "\n")


def load_config(workdir: pathlib.Path):
    """The run config of a run directory.

    A saved tokenizer that is no longer where the config says (the folder was moved, or
    came from another machine) is the copy that every run directory has.

    Raises:
      ConfigError: if it is not a run directory, or its config.json is none that
        `check_run` accepts.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir}: not a run directory (there is no {path}).")
    data = read_object(path)
    try:
        cfg = configs.from_dict(data)
        with warnings.catch_warnings():  # they were shown when it was trained
            warnings.simplefilter("ignore", ConfigWarning)
            check_run(cfg, to_train=False)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    copy, tokenizer = path.with_name("tokenizer").absolute(), cfg.data.tokenizer
    saved = isinstance(tokenizer, SavedTokenizer)
    if saved and copy.is_dir() and not pathlib.Path(tokenizer.path).exists():
        cfg.data.tokenizer = SavedTokenizer(path=str(copy))
    return cfg


def _saved_spec(cfg, workdir: pathlib.Path) -> states.ModelSpec:
    """The abstract model of a run that was started, whose vocabulary is known."""
    if cfg.model.vocab is None:
        raise ConfigError(
            f"{workdir / 'config.json'}: config.model.vocab = None: training fills it "
            "in; was the file edited?"
        )
    return states.model_spec(cfg.model)


@dataclasses.dataclass
class LoadedRun:
    """A trained model from a run directory."""

    cfg: Any
    mesh: Mesh
    spec: states.ModelSpec
    tokenizer: Tokenizer
    step: int
    params: dict
    state: dict


def load_run(workdir, mesh_cfg=None, *, warn=print, step=None) -> LoadedRun:
    """Read the newest intact parameters of a run directory, or those of one step.

    Args:
      workdir: run directory.
      mesh_cfg: `MeshConfig`; None: that of the run where it fits the devices that there
        are, else copies of the model on all.
      warn: called with one line per damaged checkpoint, and if the mesh does not fit.
      step: of the checkpoint; None: the newest.

    Raises:
      ConfigError: if it is not a run directory or has no (such) checkpoint.
      CheckpointError: if no checkpoint is intact.
    """
    workdir = pathlib.Path(workdir)
    cfg = load_config(workdir)
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    spec = _saved_spec(cfg, workdir)
    if mesh_cfg is None:
        mesh = _mesh_here(cfg, spec, warn)
    else:
        mesh = mesh_cfg.make()
        states.check_mesh(spec, mesh)
    check = saved_with(cfg, tokenizer)
    arrays, step = restore_params(
        workdir, spec, mesh, warn=warn, step=step, check=check
    )
    return LoadedRun(
        cfg, mesh, spec, tokenizer, step, arrays["params"], arrays["state"]
    )


def _mesh_here(cfg, spec, warn) -> Mesh:
    try:
        mesh = cfg.mesh.make()
        states.check_mesh(spec, mesh)
    except ConfigError as e:  # trained on another number of devices
        mesh = sharding.MeshConfig().make()
        warn(f"the mesh of the run does not fit here ({e}); every device has a copy")
        states.check_mesh(spec, mesh)
    return mesh


def restore_params(workdir, spec, mesh, *, warn=print, step=None, check=None):
    """`({"params", "state"}, step)` of the newest intact checkpoint, or of `step`.

    `check` is that of `Checkpointer.restore`.
    """
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise ConfigError(f"{workdir}: the run has no checkpoint yet.")
    params, state = states.shardings(spec, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    guard = jax.eval_shape(states.init_guard)
    abstract = {
        "params": _with_shardings(spec.params, params),
        "state": _with_shardings(spec.state, state),
        "guard": _with_shardings(guard, jax.tree.map(lambda _: whole, guard)),
    }
    # Orbax refuses an array above its limit, and may read all to get one part.
    largest = max(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    limit = max(HOST_BYTES, 2 * largest)
    checkpointer = Checkpointer(workdir, read_only=True, host_bytes=limit)
    try:
        found = checkpointer.restore(
            abstract, items=("params", "state"), warn=warn, step=step, check=check
        )
    finally:
        checkpointer.close()
    if found is None:
        raise ConfigError(f"{workdir}: the run has no checkpoint yet.")
    step, arrays, _, _ = found
    return arrays, step
