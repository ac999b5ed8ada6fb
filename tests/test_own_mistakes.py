"""Mistakes in a user's own kinds are one line, before anything is compiled."""

import dataclasses
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moex import cli, project
from moex.config.base import ConfigError
from moex.moe.contract import FixedK, Router, check_decision
from moex.moe.routing import ExpertRouting, Routing
from moex.nn.contract import check_output
from moex.nn.param import param
from tests import documented, runs

T, K, E = 6, 2, 4
WEIGHTS = (("spread", 0.1),)


def routing(**changes):
    fields = {
        "expert_TK": jnp.zeros((T, K), jnp.int32),
        "gate_TK": jnp.ones((T, K)),
        "keep_TK": jnp.ones((T, K), bool),
        "logits_TE": jnp.zeros((T, E)),
        "probs_TE": jnp.ones((T, E)),
        "losses": {"spread": jnp.zeros(T)},
    }
    return Routing(**fields | changes)


class Mine(Router):
    def __call__(self, x_TD, ctx):
        return routing()


def check(decision, router=None):
    check_decision(router or Mine(), decision, jnp.zeros((T, 3)), E, WEIGHTS)


def test_a_decision_that_is_right_passes():
    check(routing())
    check(routing(expert_TK=jnp.zeros((T, 0), jnp.int32), **no_slots()))
    slots = {"token_EC": jnp.zeros((E, 3), jnp.int32), "gate_EC": jnp.ones((E, 3))}
    rest = {"logits_TE": jnp.zeros((T, E)), "probs_TE": jnp.zeros((T, E))}
    losses = {"spread": jnp.zeros(T)}
    check(ExpertRouting(**slots, keep_EC=jnp.ones((E, 3), bool), **rest, losses=losses))


def no_slots():
    return {"gate_TK": jnp.ones((T, 0)), "keep_TK": jnp.ones((T, 0), bool)}


WRONG = {
    "gates for one slot": (
        {"gate_TK": jnp.ones((T, 1))},
        r"gate_TK = float32\[6, 1\]: must be float32\[6, 2\]",
    ),
    "ids for other tokens": (
        {"expert_TK": jnp.zeros((5, K), jnp.int32)},
        r"expert_TK = int32\[5, 2\]: must be int32\[6, 2\]",
    ),
    "ids without slots": (
        {"expert_TK": jnp.zeros(T, jnp.int32)},
        r"expert_TK = int32\[6\]: must be int32\[6, K\]",
    ),
    "ids that are floats": (
        {"expert_TK": jnp.zeros((T, K))},
        r"expert_TK = float32\[6, 2\]: must be int32\[6, 2\]",
    ),
    "slots kept by weight": ({"keep_TK": jnp.ones((T, K))}, r"keep_TK .* bool\[6, 2\]"),
    "gates in bfloat16": (
        {"gate_TK": jnp.ones((T, K), jnp.bfloat16)},
        r"gate_TK = bfloat16",
    ),
    "logits the wrong way": ({"logits_TE": jnp.zeros((E, T))}, r"float32\[6, 4\]"),
    "too few experts": ({"probs_TE": jnp.zeros((T, 2))}, r"probs_TE = float32\[6, 2\]"),
    "one loss for all": (
        {"losses": {"spread": jnp.float32(0)}},
        r"losses\['spread'\] = float32\[\]: must be float32\[6\]",
    ),
    "a loss by another name": (
        {"losses": {"sprad": jnp.zeros(T)}},
        r"the losses \['sprad'\]; .* \['spread'\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_decision_names_the_field_and_the_shape(name):
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"^Mine returned .*{message}"):
        check(routing(**changes))


def test_what_is_no_decision_or_no_router_is_named():
    with pytest.raises(ConfigError, match="^Mine returned a dict: must be a Routing"):
        check({})
    with pytest.raises(ConfigError, match="^object: must be a subclass of Router"):
        check(routing(), object())


def test_a_part_of_a_block_keeps_the_shape_of_its_input():
    check_output(Mine(), jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)))
    with pytest.raises(ConfigError, match=r"shape \[2, 1, 4\]: must be \[2, 3, 4\]"):
        check_output(Mine(), jnp.zeros((2, 1, 4)), jnp.zeros((2, 3, 4)))


@pytest.mark.parametrize("axes", [("embd", None), ("embed",)])
def test_axes_of_a_parameter_are_named(axes):
    with pytest.raises(ValueError, match="one for each dim, None or vocab, embed"):
        param(None, (2, 3), axes, value=0.0)


@dataclasses.dataclass(kw_only=True, slots=True)
class Half(FixedK):
    def validate(self, path):
        super().validate(f"{path} of Half")

    @property
    def double(self):
        return 2 * super().slots(8)

    def make(self, dim, num_experts, rngs):
        return Mine()


@dataclasses.dataclass(kw_only=True, slots=True)
class Quarter(Half):
    part: float = 0.25

    validate_experts = FixedK.validate_experts

    def validate(self, path):
        super().validate(f"{path} of Quarter")


def test_super_works_in_configs_with_slots():
    with pytest.raises(ConfigError, match="^r of Quarter of Half.k = 0: must be"):
        Quarter(k=0).validate("r")
    assert Half(k=3).double == 6 and Quarter(k=1).double == 2
    with pytest.raises(ConfigError, match=r"^r\.k = 9: must be at most"):
        Quarter(k=9).validate_experts(8, "r")


# The task of docs/extending.md with a mistake in it, as a user would run it.


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A function that makes a dry run of the task, with texts of it replaced."""
    rng = np.random.default_rng(0)
    target = np.arange(60) % 10
    np.savez(tmp_path / "digits.npz", images=rng.random((60, 8, 8)), target=target)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def dry_run(*changes, name="images.py"):
        for file in ("images.py", "run.py"):
            text = documented.files()[file]
            for old, new in changes if file == name else ():
                assert old in text, old
                text = text.replace(old, new)
            (tmp_path / file).write_text(text, encoding="utf-8")
        sys.path[:] = [p for p in sys.path if "pytest-of" not in p]
        sys.modules.pop("images", None)
        cli.main(["train", f"--config={tmp_path / 'run.py'}", "--dry-run"])

    with runs.one_device():
        yield dry_run
    sys.modules.pop("images", None)
    project.use(None)


MISTAKES = {
    "no mask": (
        '            "loss_mask": (place_L == place_L[-1]).astype(np.float32),\n',
        "",
        "the data of Classify has no field 'loss_mask'",
    ),
    "labels of another dtype": (
        "np.full_like(place_L, self.target[i])",
        "np.full(8, 1.0, np.float32)",
        "field 'label' = 'float32[8]': must be int32[8]",
    ),
    "a field that is not named": ('"rows": self', '"row": self', "field 'row' = "),
    "no guess": (
        '"guess": jnp',
        '"gues": jnp',
        "Classify.losses gave sums without 'guess'",
    ),
    "no accuracy": ('"accuracy": jnp', '"acuracy": jnp', "gave no sum 'accuracy'"),
    "a loss per image": (
        "return nll_BL, {",
        "return nll_BL[:, -1], {",
        "gave losses of shape [32]: must be [32, 8]",
    ),
    "no figures": (
        "FIGURES = (",
        "FIGURS = (",
        "Classify must set FIGURES",
    ),
    "no losses": (
        "def losses",
        "def loses",
        "instantiate abstract class Classify with",
    ),
    "a bug": ("nll_BL, {", "nl_BL, {", ", in losses: NameError"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_task_is_one_line_before_compiling(name, images, capsys):
    old, new, message = MISTAKES[name]
    with pytest.raises(SystemExit) as ended:
        images((old, new))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said and said.startswith("moex: error: ")
    assert said.count("\n") == 1


def test_the_task_itself_passes_the_dry_run(images, capsys):
    images()
    assert "dry run: the config is good" in capsys.readouterr().out


def test_the_whole_traceback_is_shown_where_it_is_asked_for(images, monkeypatch):
    monkeypatch.setitem(os.environ, "JAX_TRACEBACK_FILTERING", "off")
    with pytest.raises(NameError):
        images(("nll_BL, {", "nl_BL, {"))
