"""A task: what a model learns and how it is scored. Training asks it for all of that.

`Task` says what a kind of task defines; the kinds stand beside this file. All data
has the fields that `data/batches.py` names, so losses are means over the positions
that `loss_mask` marks, and MoE layers see tokens, whatever these stand for.

B batch · L length · X domains
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moex.adapters.figures import gate_figures
from moex.config.base import Config, ConfigError, require, walk
from moex.config.schedule import is_always_zero, value_at
from moex.data.batches import Datasets, Reading
from moex.model.losses import (
    adapter_losses,
    adapter_reports,
    moe_layers,
    routing_losses,
    step_counts,
)
from moex.moe.losses import own_losses
from moex.moe.metrics import layer_metrics, mean
from moex.nn.context import Context
from moex.nn.contract import PartConfig
from moex.nn.model import Model


class Figure(NamedTuple):
    """A figure of a task: a mean over scored tokens that is lower for better models.

    Attributes:
      name: in figures and in the lines of metrics.jsonl, such as "nll".
      title: for people, such as "loss".
      unit: such as "nats per token"; the title again, where the title says it all.
      short: for the head of a column; "" stands for the name.
    """

    name: str
    title: str
    unit: str
    short: str = ""

    @property
    def axis(self) -> str:
        """The title and the unit, for the axis of a chart."""
        return self.title if self.unit == self.title else f"{self.title}, {self.unit}"

    @property
    def column(self) -> str:
        """The head of a column."""
        return self.short or self.name


@dataclasses.dataclass(kw_only=True, slots=True)
class Task(Config, abc.ABC):
    """The base of all tasks: the parts to define, and the parts that follow from them.

    A kind of task sets the class attributes and defines `prepare` and `losses`, and
    `run` where the model takes more than the context; the others have defaults.

    Attributes:
      MODEL, DATA: the kinds of `config.model` and `config.data`.
      FIGURES: figures to log, compare and report. The first is the mean of the
        losses: it is trained on, and `keep_best` keeps the checkpoints where it is
        lowest.
      COUNTS: numbers among the sums that are logged with evaluations.
      LOSSES: names of coefficients of `config.loss` whose losses `losses` sums up,
        besides those of the MoE layers.
      TOKEN_IDS: whether the tokens are ids of a tokenizer: then there is text.
      FIXED: paths in the config that may not change when a run is resumed.
    """

    MODEL: ClassVar[type[Model]]
    DATA: ClassVar[type[Reading]]
    FIGURES: ClassVar[tuple[Figure, ...]]
    COUNTS: ClassVar[tuple[str, ...]] = ("tokens",)
    LOSSES: ClassVar[tuple[str, ...]] = ()
    TOKEN_IDS: ClassVar[bool] = False
    FIXED: ClassVar[tuple[str, ...]] = ()

    # Before anything is computed.

    def check_run(self, cfg) -> None:
        """Check what this task needs of a whole run config.

        Raises:
          ConfigError: for a model, data or loss of another task.
        """
        task = type(self).__name__
        for name in ("MODEL", "DATA", "FIGURES"):
            if getattr(self, name, None) is None:
                raise ConfigError(f"config.task: {task} must set {name}.")
        for key, kind in (("model", self.MODEL), ("data", self.DATA)):
            given = type(cfg[key]).__name__
            ok = isinstance(cfg[key], kind)
            require(ok, f"config.{key}", given, f"{kind.__name__}, which {task} takes")
        for where, node in walk(cfg.model, "config.model"):
            needs = isinstance(node, PartConfig) and node.needs_token_ids
            allowed = f"another kind: {type(self).__name__} has no token ids"
            require(self.TOKEN_IDS or not needs, where, type(node).__name__, allowed)
        if "z" not in self.LOSSES:
            none = f"0: {type(self).__name__} has no such loss"
            require(is_always_zero(cfg.loss.z), "config.loss.z", cfg.loss.z, none)

    def like(self, cfg, run) -> None:
        """Make `cfg.data` be read in the units or the vocabulary of a run.

        Args:
          cfg: run config; its data is changed.
          run: `RunDir` of the run.
        """

    @abc.abstractmethod
    def prepare(self, cfg, *, log=print, scoring=False) -> Datasets:
        """Read the data of a run.

        Args:
          cfg: run config.
          log: called with one line per step of the work.
          scoring: only held-out data is read, so training data may be missing.

        Raises:
          ConfigError: for data that cannot be used.
        """

    def num_domains(self, cfg) -> int:
        """The number of domains, as far as it is known before the data is read."""
        return 1

    def fill(self, cfg, data: Datasets | None = None) -> None:
        """Fill in what the config leaves to the data, such as the size of the model.

        Args:
          cfg: run config.
          data: from `prepare`; None: find it out without preparing any data.

        Raises:
          ConfigError: if the data cannot tell, or contradicts the config.
        """

    def given(self, data, paths: list[str], *, train: bool = False):
        """The config `data` with files from the command line.

        Args:
          data: `config.data`.
          paths: files, folders or globs.
          train: train on them, but for a held-out share; else all of them are held out.
        """
        name = type(self).__name__
        raise ConfigError(f"--data: {name} takes its data from --config.data.")

    def resumed(self, data, run):
        """The config `data` to prepare for a run that goes on.

        Args:
          data: `config.data`.
          run: `RunDir` of that run.
        """
        return data

    # The task's files in a run directory (`RunDir`), besides its config.

    def save(self, data: Datasets, run) -> None:
        """Write what a model needs to be used, such as a tokenizer."""

    def opened(self, cfg, run) -> None:
        """Complete the config of a run directory that may have been moved."""

    def identity(self, data: Datasets) -> dict[str, str]:
        """Hashes of what `save` writes, by name; every checkpoint has them."""
        return {}

    def saved_identity(self, run) -> dict[str, str]:
        """The same hashes for the files that were written."""
        return {}

    def check_same(self, data: Datasets, run, where: str, *, resume: bool) -> None:
        """Check that a run was trained with what is in `data`.

        Args:
          data: from `prepare`.
          run: its `RunDir`.
          where: names the run in errors.
          resume: the run goes on; False: another run starts from its parameters.

        Raises:
          ConfigError: if it was trained with other data.
        """

    # Inside a step: pure functions that are compiled.

    def fields(self, cfg) -> dict[str, tuple[tuple[int, ...], str]]:
        """The fields of one sequence of the data, as `{name: (shape, dtype)}`."""
        own = ((cfg.seq_len,), "int32")
        adapter = cfg.model.adapter
        return ({} if adapter is None else adapter.fields()) | {
            "segment": own,
            "position": own,
            "loss_mask": ((cfg.seq_len,), "float32"),
            "domain": ((), "int32"),
            "example_id": ((), "int32"),
        }

    def check_fields(self, cfg, data: Datasets) -> None:
        """Check the first sequences of the data against `fields`.

        Raises:
          ConfigError: for a field that is missing, or has another shape or dtype.
        """
        wanted = {
            name: f"{dtype}{list(shape)}"
            for name, (shape, dtype) in self.fields(cfg).items()
        }
        for examples in (*data.train, *data.eval):
            first = examples[0] if len(examples) else {}
            for name, array in first.items():
                given = f"{array.dtype}{list(array.shape)}"
                where = f"the data of {type(self).__name__}, field {name!r}"
                allowed = wanted.get(name, f"one of {', '.join(wanted)}")
                require(given == allowed, where, given, allowed)
            for name in wanted.keys() - first.keys() if first else ():
                told = f"the data of {type(self).__name__} has no field {name!r}"
                raise ConfigError(f"{told}; `fields` names it.")

    def batch_shapes(self, cfg, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract batch of `batch_size` sequences."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.dtype(dtype))
            for name, (shape, dtype) in self.fields(cfg).items()
        }

    def context(self, batch, **fields) -> Context:
        """The `Context` of a batch with its other fields."""
        if fields.get("mode") != "decode":
            fields["domain_B"] = batch["domain"]
            fields["scored_BL"] = batch["loss_mask"] > 0
        return Context(
            segment_BL=batch["segment"],
            position_BL=batch["position"],
            visual_BMC=batch.get("visual"),
            has_visual_B=batch.get("has_visual"),
            **fields,
        )

    def teacher_run(self) -> str:
        """The directory of a run whose model training needs too; "": none.

        Then `loss` gets its module as `teacher`.
        """
        return ""

    def alone(self) -> "Task":
        """The task without that run, for work that trains nothing."""
        return self

    def kinds(self, batch) -> dict[str, Any]:
        """Which kind of batch it is, for parameters that only one kind trains.

        All sequences of a batch are of one kind: see `Reading.one_source`.
        """
        visual = jnp.any(batch["has_visual"] > 0)
        return {"visual": visual, "text": ~visual}

    def run(self, model, ctx: Context, batch) -> tuple[Any, dict]:
        """Run the model on a batch: returns (outputs, aux)."""
        return model(ctx)

    @abc.abstractmethod
    def losses(self, outputs, batch) -> tuple[jax.Array, dict]:
        """The loss of each token, and sums for `figures`.

        Args:
          outputs: from `run`.
          batch: batch of the data.

        Returns:
          (loss_BL float32, sums): sums have "guess", the loss of a model that knows
          nothing, the losses of `LOSSES` and the other figures of `FIGURES`. All are
          sums over tokens weighted with `loss_mask`.
        """

    @property
    def score(self) -> str:
        """The name of the figure that is trained and that ranks checkpoints."""
        return self.FIGURES[0].name

    def sums(self, model, ctx, batch, *, num_domains: int) -> dict:
        """The sums of one (micro)batch that losses and figures are made of.

        Args:
          model: the module.
          ctx: from `context`.
          batch: batch of the data.
          num_domains: X.
        """
        outputs, aux = self.run(model, ctx, batch)
        loss_BL, own = self.losses(outputs, batch)
        mask_BL = batch["loss_mask"]
        told, shape = f"{type(self).__name__}.losses", list(mask_BL.shape)
        if list(loss_BL.shape) != shape:
            given = list(loss_BL.shape)
            raise ConfigError(f"{told} gave losses of shape {given}: must be {shape}.")
        for name in {"guess", *self.LOSSES} - set(own):
            raise ConfigError(f"{told} gave sums without {name!r}: {sorted(own)}.")
        scored_BL = (mask_BL > 0).astype(jnp.int32)
        domain_BX = jax.nn.one_hot(batch["domain"], num_domains, dtype=jnp.int32)
        return own | {
            self.score: jnp.sum(loss_BL * mask_BL),
            "tokens": jnp.sum(scored_BL),
            "padding": jnp.sum(batch["segment"] == 0, dtype=jnp.int32),
            "domain_score": domain_BX.T.astype(jnp.float32)
            @ jnp.sum(loss_BL * mask_BL, 1),
            "domain_tokens": jnp.sum(
                domain_BX * jnp.sum(scored_BL, 1)[:, None], axis=0
            ),
            "layers": {"/".join(path): own["stats"] for path, own in moe_layers(aux)},
            "adapters": adapter_reports(aux),
        }

    def loss(
        self,
        model,
        ctx,
        batch,
        coefs,
        *,
        step=0,
        counts=None,
        num_microbatches=1,
        num_domains,
        load_before=None,
    ):
        """The loss whose gradient trains the model, and the sums that figures need.

        Means over tokens or sequences are over those of the whole step, so that
        microbatches with unequal counts add up to the full batch: the loss of the
        tokens, those of `LOSSES`, and the means among the losses of the MoE layers. In
        the others of these all microbatches have the same weight (`RoutingLoss.part`).

        Args:
          model: the module.
          ctx: `Context` of the microbatch.
          batch: microbatch of the data.
          coefs: `run.Loss`.
          step: optimizer step, for coefficients that follow a schedule.
          counts: `step_counts` of the whole optimizer step; None: the batch is all.
          num_microbatches: int, over which per-microbatch losses are averaged.
          num_domains: X.
          load_before: `{layer path: load_E}` of earlier microbatches of the step, for
            `balance_scope="step"`; None: there are none.

        Returns:
          (float32 scalar, sums): float32 sums and int32 counts that add over
          microbatches.
        """
        counts = step_counts(batch) if counts is None else counts
        sums = self.sums(model, ctx, batch, num_domains=num_domains)
        raw = {name: sums[name] / counts["targets"] for name in self.LOSSES}
        raw |= routing_losses(
            sums["layers"], coefs, counts, num_microbatches, load_before=load_before
        )
        weighted = {k: value_at(getattr(coefs, k), step) * v for k, v in raw.items()}
        weighted |= own_losses(sums["layers"], counts["tokens"], coefs.over_layers)
        weighted |= adapter_losses(sums["adapters"], num_microbatches)
        loss = sums[self.score] / counts["targets"] + sum(weighted.values())
        return loss, sums | {"weighted": weighted}

    def figures(self, sums) -> dict:
        """The logged figures from sums: those of `FIGURES`, counts, routing per layer,
        gates per adapted matrix.

        A mean over nothing is NaN. Counts stay as they are.
        """
        names = (*self.COUNTS, "padding", "domain_tokens")
        counts = {name: sums[name] for name in names}
        summed = [figure.name for figure in self.FIGURES if figure.name in sums]
        means = {name: mean(sums[name], sums["tokens"]) for name in summed}
        return (
            counts
            | means
            | {
                "domain_score": mean(sums["domain_score"], sums["domain_tokens"]),
                "layers": {
                    path: layer_metrics(stats) for path, stats in sums["layers"].items()
                },
                "adapters": {
                    path: gate_figures(report["sums"])
                    for path, report in sums["adapters"].items()
                },
            }
        )

    # The texts and numbers that people read.

    def result(self, figures: dict) -> dict[str, Any]:
        """The figures of held-out data that `moex eval` prints, as plain numbers."""
        means = {name: float(figures[name]) for name, *_ in self.FIGURES}
        return means | {name: int(figures[name]) for name in self.COUNTS}

    def score_lines(self, result: dict) -> list[tuple[str, str]]:
        """The pairs (title, value) for the lines of `moex eval`."""
        return [
            (title, f"{result[name]:.4f} {unit if unit != title else ''}".rstrip())
            for name, title, unit, _ in self.FIGURES
        ]

    def brief(self, values: dict) -> str:
        """The part of a training line that shows the figures of a step."""
        value = values[self.score]
        return "no target" if math.isnan(value) else f"{self.score} {value:.4f}"

    def conclusion(self, cfg, data: Datasets, result: dict, step: int, log) -> str:
        """The line at the end of training with the result on held-out data.

        Args:
          cfg: run config.
          data: the data that was scored.
          result: from `evaluate`.
          step: the last step.
          log: `RunLog`, for lines of other figures.
        """
        return f"held-out {self.FIGURES[0].axis}: {result[self.score]:.4f}"

    def samples(self, program, state, data: Datasets) -> list[str]:
        """Samples of the model as text, while it is trained; none by default."""
        return []

    def use_lines(self, cfg, run) -> list[str]:
        """Lines at the end of training about what can be done with the run."""
        return []


def require_token_ids(cfg, verb: str) -> None:
    """Check that the tokens of a run are ids, for verbs that need text.

    Raises:
      ConfigError: if it is not.
    """
    if not cfg.task.TOKEN_IDS:
        raise ConfigError(
            f"{verb}: needs a run whose tokens are text; this one learns "
            f"{type(cfg.task).__name__}."
        )
