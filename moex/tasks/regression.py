"""Regression of numeric series: predict the next token of numbers from all before it.

B batch · L length · P time steps per token · C columns
"""

import dataclasses

import jax.numpy as jnp

from moex.config.base import require
from moex.data.series import Series, prepare
from moex.nn.series import SeriesModel
from moex.tasks.base import Figure, Task

NAIVE = "of repeating the last step"


@dataclasses.dataclass(kw_only=True, slots=True)
class Regression(Task):
    """Squared error in units of each column's variance; the model predicts changes."""

    MODEL = SeriesModel
    DATA = Series
    FIGURES = (
        Figure("mse", "MSE", "MSE"),
        Figure("mae", "MAE", "MAE"),
        Figure("naive_mse", f"MSE {NAIVE}", f"MSE {NAIVE}"),
        Figure("naive_mae", f"MAE {NAIVE}", f"MAE {NAIVE}"),
    )
    FIXED = ("data.columns", "data.patch", "data.scale")

    def like(self, cfg, run):
        """Read the columns of the run in the units that its model learned."""
        own = run.config().data
        same = {name: getattr(own, name) for name in ("columns", "patch", "scale")}
        cfg.data = dataclasses.replace(cfg.data, **same)

    def prepare(self, cfg, *, log=print, scoring=False):
        options = {"overlap": cfg.eval.overlap, "scoring": scoring, "log": log}
        return prepare(cfg.data, cfg.seq_len, where="config.data", **options)

    def fill(self, cfg, data=None):
        """Fill in the count of numbers in a token: columns times steps."""
        if data is not None or cfg.model.numbers is None:
            numbers = cfg.data.num_columns("config.data") * cfg.data.patch
            given, cfg.model.numbers = cfg.model.numbers, numbers
            allowed = f"{numbers}, columns of the data times patch, or None to take it"
            require(given in (None, numbers), "config.model.numbers", given, allowed)

    def given(self, data, paths, *, train=False):
        own = {} if train else {"holdout": 1.0}
        return dataclasses.replace(data, paths=tuple(paths), given=tuple(paths), **own)

    def fields(self, cfg):
        shape = (cfg.seq_len, cfg.data.patch, cfg.model.numbers // cfg.data.patch)
        own = (shape, "float32")
        return Task.fields(self, cfg) | {"values": own, "targets": own}

    def run(self, model, ctx, batch):
        """Add the change that the model predicts to the last step."""
        value_BLPC = batch["values"]
        change_BLN, aux = model(value_BLPC.reshape(*value_BLPC.shape[:2], -1), ctx)
        return value_BLPC[:, :, -1:] + change_BLN.reshape(value_BLPC.shape), aux

    def losses(self, outputs, batch):
        def errors(told_BLPC):
            off_BLPC = told_BLPC - batch["targets"]
            squared_BL = jnp.mean(off_BLPC**2, axis=(2, 3))
            return squared_BL, jnp.mean(jnp.abs(off_BLPC), axis=(2, 3))

        loss_BL, mae_BL = errors(outputs)
        naive_BL = errors(batch["values"][:, :, -1:])
        mean_BL, _ = errors(0.0)  # errors of a model that always predicts the mean
        values = (mae_BL, *naive_BL, mean_BL)
        names = ("mae", "naive_mse", "naive_mae", "guess")
        mask_BL = batch["loss_mask"]
        return loss_BL, {
            name: jnp.sum(value_BL * mask_BL)
            for name, value_BL in zip(names, values, strict=True)
        }
