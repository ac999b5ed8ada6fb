"""Distillation: language modelling that also follows a trained model.

B batch · L length · V vocabulary
"""

import dataclasses

import jax
import jax.numpy as jnp

from moex.config.base import require, require_choice
from moex.model.losses import step_counts
from moex.tasks.lm import LanguageModelling

OVER = ("tokens", "sequences")


@dataclasses.dataclass(kw_only=True, slots=True)
class Distillation(LanguageModelling):
    """Language modelling plus weight * KL(teacher || student).

    Both distributions are softmaxes of logits / temperature, without the factor
    temperature**2 that other papers have. The teacher computes without noise and has
    no gradient. Scores of held-out data are those of `LanguageModelling`. Source:
    "Merge, Then Compress", arXiv:2310.01334, and its code.
    """

    FIXED = ("task.teacher",)

    teacher: str  # directory of the run that teaches
    weight: float = 0.2  # of the divergence, >= 0
    temperature: float = 2.0  # above 0
    # "tokens": the mean over scored tokens. "sequences": summed over all positions that
    # are no padding, and divided by the sequences, as in the authors' code; it grows
    # with the length.
    over: str = "tokens"

    def validate(self, path):
        require(self.teacher != "", f"{path}.teacher", self.teacher, "a run directory")
        require(self.weight >= 0, f"{path}.weight", self.weight, ">= 0")
        require(
            self.temperature > 0, f"{path}.temperature", self.temperature, "above 0"
        )
        require_choice(f"{path}.over", self.over, OVER)

    def teacher_run(self) -> str:
        return self.teacher

    def alone(self):
        return LanguageModelling()

    def loss(self, model, ctx, batch, coefs, *, teacher=None, counts=None, **how):
        """Add the divergence from the teacher to the loss of `Task.loss`.

        Args:
          teacher: the module that teaches; it must be given.
        """
        assert teacher is not None, "the train step gives it"
        counts = step_counts(batch) if counts is None else counts
        alone = dataclasses.replace(ctx, mode="eval", key=None, step=None, forced=None)
        with jax.named_scope("teacher"):
            logits_BLV = jax.lax.stop_gradient(self.run(teacher, alone, batch)[0])
        batch = batch | {"teacher_logits": logits_BLV}
        # The method of the base by its name: `slots` makes a new class, which `super`
        # without arguments does not know.
        loss, sums = LanguageModelling.loss(
            self, model, ctx, batch, coefs, counts=counts, **how
        )
        count = "targets" if self.over == "tokens" else "sequences"
        told = self.weight * sums["divergence"] / counts[count]
        weighted = sums["weighted"] | {"distillation": told}
        return loss + told, sums | {"weighted": weighted}

    def losses(self, outputs, batch):
        """Add the summed divergence, where the batch has logits of the teacher."""
        nll_BL, sums = LanguageModelling.losses(self, outputs, batch)
        if "teacher_logits" in batch:
            scored_BL = batch["loss_mask"]
            if self.over == "sequences":
                scored_BL = (batch["segment"] > 0).astype(jnp.float32)
            kl_BL = divergence(batch["teacher_logits"], outputs, self.temperature)
            sums["divergence"] = jnp.sum(kl_BL * scored_BL)
        return nll_BL, sums


def divergence(teacher_BLV, student_BLV, temperature):
    """KL(teacher || student) in nats, float32[B, L], of softmax(logits / temperature).

    Args:
      teacher_BLV, student_BLV: float32 logits.
    """
    log_p_BLV = jax.nn.log_softmax(teacher_BLV / temperature)
    log_q_BLV = jax.nn.log_softmax(student_BLV / temperature)
    return jnp.sum(jnp.exp(log_p_BLV) * (log_p_BLV - log_q_BLV), axis=-1)
