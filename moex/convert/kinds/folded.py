"""Folding in: the changes of LoRA become part of the matrices that they change."""

import dataclasses

from moex.config.base import ConfigError
from moex.convert.base import Conversion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded(Conversion):
    """W + (alpha / rank) A B in place of W and its adapter, in float32."""

    kind = "folded"
    about = "LoRA adapters become part of the matrices of their base"
    of_adapters = keeps_family = True

    def check(self):
        pass  # it has no options

    def model(self, model):
        from moex.adapters.lora import LoRA
        from moex.model.spec import model_spec

        adapter = model.adapter
        if adapter is None:
            raise ConfigError("--to=folded: the run has no adapters.")
        if type(adapter) is not LoRA:
            raise ConfigError(
                f"--to=folded: what {type(adapter).__name__} adds depends on the "
                "input, so no matrix does the same; only LoRA can be folded in."
            )
        tied = model.used_again()
        for name in model_spec(model).shapes():
            if any(name.startswith(f"adapters/{own}/") for own in tied):
                raise ConfigError(
                    f"--to=folded: {name} changes the embeddings, but not the logits, "
                    "which are of the same matrix (tied_embeddings); one matrix "
                    "cannot do both."
                )
        return dataclasses.replace(model, adapter=None)

    def arrays(self, run, job, say):
        from moex.adapters.lora import factors
        from moex.model.paths import flat_paths, nested
        from moex.model.spec import model_spec
        from moex.nn.lowered import SCALES, VALUES, from_int8

        scale = run.cfg.model.adapter.alpha / run.cfg.model.adapter.rank
        old, params = flat_paths(run.params), {}
        names = flat_paths(model_spec(self.model(run.cfg.model)).params)
        folded = 0
        for name in names:
            a, b = factors(name)
            if name in old:
                params[name] = old[name].astype("float32")
            else:
                params[name] = from_int8(old[name + VALUES], old[name + SCALES])
            if a in old:
                params[name] = _changed(params[name], old[a], old[b], scale)
                folded += 1
        say(f"folded in the adapters of {folded} parameters")
        return nested(params), run.state, {"folded": folded}


def _changed(w, a, b, scale):
    """A matrix, or a stack of them, with the change of its adapter."""
    import jax.numpy as jnp

    b = b.reshape(*b.shape[: a.ndim - 1], -1)
    change = jnp.einsum("...inr,...nro->...ino", a, b, precision="highest")
    if change.size != w.size:  # all experts share it; they come after the copies
        change = jnp.expand_dims(change, change.ndim - 3)
        stack = w.shape[: change.ndim - 3]
        change = jnp.broadcast_to(change, (*stack, *change.shape[-3:]))
    return w + scale * change.reshape(w.shape)
