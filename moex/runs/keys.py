"""The keys of a run config, its sections that no other package owns, its checks.

A run config is an `ml_collections.ConfigDict` with exactly the keys of `RUN_KEYS`.
`configs/base.py` gives them their defaults. `tests/test_run.py` repeats the list, so
that nobody adds a key by accident.
"""

import dataclasses

import ml_collections

from moex.config import base as configs
from moex.config.base import (
    LARGEST,
    Config,
    ConfigError,
    nearest,
    require,
    require_choice,
    short,
)
from moex.config.schedule import Schedule, require_values
from moex.data.batches import Reading
from moex.model.optim import Optim
from moex.model.precision import PRECISIONS
from moex.nn.model import Model
from moex.nn.stack import REMAT
from moex.sharding import MeshConfig
from moex.tasks.base import Task


@dataclasses.dataclass(kw_only=True, slots=True)
class Eval(Config):
    """Scoring of held-out data while training; the last step scores all of it."""

    every: int = 500  # optimizer steps between evaluations; 0: only at the end
    sequences: int | None = 256  # sequences per evaluation, >= 1; None: all
    overlap: int = 0  # tokens of context repeated before each window, < seq_len
    batch_size: int | None = None  # sequences per eval step; None: as in a microbatch

    def validate(self, path):
        require(self.every >= 0, f"{path}.every", self.every, ">= 0")
        for name in ("sequences", "batch_size"):
            value = getattr(self, name)
            ok = value is None or value >= 1
            require(ok, f"{path}.{name}", value, ">= 1, or None")
        require(self.overlap >= 0, f"{path}.overlap", self.overlap, ">= 0")


@dataclasses.dataclass(kw_only=True, slots=True)
class Checkpoint(Config):
    """When to write checkpoints and which to keep; the last step is always saved."""

    every: int = 1000  # optimizer steps between checkpoints; 0: only at the end
    keep: int = 2  # latest checkpoints kept, >= 1
    keep_best: int = 1  # further checkpoints kept, of lowest held-out loss, >= 0

    def validate(self, path):
        require(self.every >= 0, f"{path}.every", self.every, ">= 0")
        require(self.keep >= 1, f"{path}.keep", self.keep, "at least 1")
        require(self.keep_best >= 0, f"{path}.keep_best", self.keep_best, ">= 0")


@dataclasses.dataclass(kw_only=True, slots=True)
class Log(Config):
    """The logs of a training: what is written, and how often."""

    every: int = 10  # optimizer steps between log lines and scalars, >= 1
    images_every: int = 100  # steps between routing heat maps; 0: never
    sample_every: int = 0  # steps between text samples; 0: only at the end
    sample_prompts: tuple[str, ...] = ("The ",)  # prompts of the text samples
    sample_tokens: int = 48  # new tokens per sample; 0: no samples
    tensorboard: bool = True  # write tb/ next to metrics.jsonl
    # "brief": means over MoE layers and the worst one, however many layers there are.
    # "detailed": series and histograms of every layer and chain round too.
    detail: str = "brief"
    compressors: bool = False  # at the end, compare with gzip, bz2 and lzma

    def validate(self, path):
        require(self.every >= 1, f"{path}.every", self.every, "at least 1")
        for name in ("images_every", "sample_every", "sample_tokens"):
            value = getattr(self, name)
            require(value >= 0, f"{path}.{name}", value, ">= 0")
        count = len(self.sample_prompts)
        require(count <= 1000, f"{path}.sample_prompts", count, "at most 1000 texts")
        require_choice(f"{path}.detail", self.detail, ("brief", "detailed"))


BALANCE_SCOPES = ("microbatch", "sequence", "step")


@dataclasses.dataclass(kw_only=True, slots=True)
class Loss(Config):
    """The weights of the losses added to that of the task; see `tasks/base.py`.

    Every coefficient is a number or a `Schedule` of the optimizer step.
    """

    # Squared log-normaliser of the logits of a language model, mean over tokens.
    z: float | Schedule = 0.0
    load_balance: float | Schedule = 0.01  # load-balance loss of MoE layers
    router_z: float | Schedule = 0.001  # router z-loss of MoE layers
    entropy: float | Schedule = 0.0  # entropy of the router probabilities
    importance: float | Schedule = 0.0  # squared CV of the summed probabilities
    # The tokens whose load is balanced: the whole "microbatch" (all devices), each
    # "sequence" by itself, or all microbatches of the "step" so far.
    balance_scope: str = "microbatch"
    # "share": the loss is 1 at uniform routing. "count": it is multiplied by the slots
    # per token, as in papers where f is a share of the tokens.
    balance_scale: str = "share"
    over_layers: str = "sum"  # "sum" or "mean" over MoE layers and chain rounds

    def validate(self, path):
        for name in COEFFICIENTS:
            value = getattr(self, name)
            require_values(lambda v: v >= 0, f"{path}.{name}", value, ">= 0")
        require_choice(f"{path}.balance_scope", self.balance_scope, BALANCE_SCOPES)
        require_choice(f"{path}.balance_scale", self.balance_scale, ("share", "count"))
        require_choice(f"{path}.over_layers", self.over_layers, ("sum", "mean"))


COEFFICIENTS = tuple(
    field.name for field in dataclasses.fields(Loss) if field.type == float | Schedule
)


RUN_KEYS = {
    "seed": int,
    "steps": int,
    "batch_size": int,
    "seq_len": int,
    "grad_accum": int,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "log": Log,
    "precision": str,
    "remat": str,
    "scan_layers": bool,
    "kernels": str,
    "nan_limit": int,
    "init_from": str,
    "task": Task,
    "model": Model,
    "optim": Optim,
    "data": Reading,
    "mesh": MeshConfig,
    "loss": Loss,
}


# The task of configs that name no task, such as those of runs before version 0.3.
DEFAULT_TASK = "moex.tasks.lm.LanguageModelling"


def check_run(cfg: ml_collections.ConfigDict, *, to_train: bool = True) -> None:
    """Check the whole run config, before anything is read, built or compiled.

    Fills in the task of a config that names none.

    Args:
      cfg: keys of `RUN_KEYS`.
      to_train: whether to call `check_schedules` too. A run that was trained is opened
        whatever its schedules were.

    Raises:
      ConfigError: one line with the field, its value and what is allowed.
    """
    if not isinstance(cfg, ml_collections.ConfigDict):
        raise ConfigError(
            f"config: must be a mapping of run keys, not {type(cfg).__name__}."
        )
    if "task" not in cfg:
        with cfg.unlocked():
            cfg.task = configs.from_dict({configs.TYPE_KEY: DEFAULT_TASK})
    for key in cfg:
        if key not in RUN_KEYS:
            raise ConfigError(
                f"config.{short(key)[1:-1]}: no such run key.{nearest(key, RUN_KEYS)} "
                f"Run keys are {', '.join(RUN_KEYS)}."
            )
    for key, kind in RUN_KEYS.items():
        if key not in cfg:
            raise ConfigError(f"config.{key}: missing; it must be {kind.__name__}.")
        is_bool = isinstance(cfg[key], bool)
        if not isinstance(cfg[key], kind) or is_bool != (kind is bool):
            raise ConfigError(
                f"config.{key} = {short(cfg[key])}: must be {kind.__name__}, "
                f"not {type(cfg[key]).__name__}."
            )
    configs.check(cfg)
    _check_values(cfg)
    if to_train:
        check_schedules(cfg)
        if cfg.model.adapter is not None:
            cfg.model.adapter.check_run(cfg, "config.model.adapter")


def _check_values(cfg):
    for key in ("steps", "batch_size", "seq_len", "grad_accum", "nan_limit"):
        require(cfg[key] >= 1, f"config.{key}", cfg[key], "at least 1")
    require(0 <= cfg.seed < 2**31, "config.seed", cfg.seed, "in [0, 2**31)")
    require_choice("config.precision", cfg.precision, PRECISIONS)
    require_choice("config.remat", cfg.remat, REMAT)
    for name in cfg.kernels.split(","):
        require_choice("config.kernels", name.strip(), kernel_names(cfg.kernels))
    size, where = cfg.batch_size, "config.batch_size"
    most = f"at most {LARGEST:,} tokens over seq_len = {cfg.seq_len}"
    require(size * cfg.seq_len <= LARGEST, where, size, most)
    of = f"a multiple of grad_accum = {cfg.grad_accum}"
    require(size % cfg.grad_accum == 0, where, size, of)
    cfg.task.check_run(cfg)
    overlap, below = cfg.eval.overlap, f"below seq_len = {cfg.seq_len}"
    require(overlap < cfg.seq_len, "config.eval.overlap", overlap, below)


def check_schedules(cfg) -> None:
    """Check that every schedule of the run ends within its steps.

    Raises:
      ConfigError: if warm-up and decay of the learning rate do not fit.
    """
    cfg.optim.validate_steps(cfg.steps, "config.optim")
    for where, node in configs.walk(cfg, "config"):
        if isinstance(node, Schedule):
            node.check_reached(cfg.steps, where)


def kernel_names(value: str) -> tuple[str, ...]:
    """Read `config.kernels`: "auto" alone, or names of implementations."""
    from kernels_pallas import IMPLEMENTATIONS

    return tuple(IMPLEMENTATIONS) if "," in value else ("auto", *IMPLEMENTATIONS)
