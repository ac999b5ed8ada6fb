"""The recipe of a loss of all MoE layers: two files of moex, and it is everywhere."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from moex.moe.losses import LOSSES
from tests import documented, runs

NAMES = [loss.name for loss in LOSSES if loss.is_trained and loss.name != "entropy"]
TOUCHED = {"moex/moe/losses.py", "moex/runs/keys.py"}
USE = """
import json

import jax
import jax.numpy as jnp
import numpy as np

from moex.config.base import ConfigError, check
from moex.moe.metrics import documentation
from moex.nn.stack import Segment
from moex.runs.keys import Log, Loss
from moex.train.charts import layout
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.test_run import run_config

model = tiny_lm(Segment(pattern=(tiny_moe(4),)))
spec, params, state = built(model)
batch = random_batch(2, 8)
coefs = Loss(mutual_information=0.5)


@jax.jit
def step(params):
    ctx = TASK.context(batch, compute=XLA)
    return TASK.loss(spec.merge(params, state), ctx, batch, coefs, num_domains=2)[1]


sums = step(params)
((path, stats),) = sums["layers"].items()
P = np.asarray(stats["prob_sum_E"][0], np.float64) / float(stats["num_tokens"][0])
entropy = float(stats["entropy_sum"][0] / stats["num_tokens"][0])
figures = TASK.figures(sums)["layers"][path]
try:
    check(Loss(mutual_information=-1.0), "config.loss")
except ConfigError as e:
    said = str(e)
charts = layout(run_config(model=model, log=Log()), num_domains=1)["MoE: routers"]
told = {
    "expected": entropy + float(np.sum(P * np.log(P))),
    "figure": float(figures["mutual_information"][0]),
    "weighted": float(sums["weighted"]["mutual_information"]),
    "said": said,
    "charts": list(charts),
    "table": documentation(),
}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Facts about the loss of the documentation, from a copy of moex that has it."""
    copy = tmp_path_factory.mktemp("copy")
    for package in ("moex", "kernels_pallas", "configs"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(runs.ROOT / package, copy / package, ignore=skip)
    skip = shutil.ignore_patterns("__pycache__", "fixtures", "stored_run", "robustness")
    shutil.copytree(runs.ROOT / "tests", copy / "tests", ignore=skip)
    code = documented.files()["mutual.py"].partition("\n\n\n")[2]
    row = "LOSSES: tuple[RoutingLoss, ...] = (\n"
    edit(copy / "moex/moe/losses.py", row, f"{code}\n\n{row}    MutualInformation(),\n")
    field = "    importance: float | Schedule = 0.0"
    own = "    mutual_information: float | Schedule = 0.0"
    edit(copy / "moex/runs/keys.py", field, f"{own}\n{field}")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        encoding="utf-8",
        env=runs.environment() | {"PYTHONPATH": str(copy)},
        cwd=copy,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(f"\n{old}") == 1
    path.write_text(text.replace(f"\n{old}", f"\n{new}"), encoding="utf-8")


@pytest.mark.thorough
def test_a_new_loss_is_trained_on_with_its_coefficient(told):
    assert told["expected"] < -1e-4
    assert told["figure"] == pytest.approx(told["expected"], rel=1e-3)
    assert told["weighted"] == pytest.approx(0.5 * told["figure"], rel=1e-5)


def test_its_coefficient_is_checked(told):
    where = "config.loss.mutual_information"
    assert told["said"].startswith(f"{where} = -1.0: must be >= 0")


def test_it_has_a_chart_and_a_row_in_the_documentation(told):
    title = "Mutual-information loss"
    row = f"| `mutual_information` | {title} | before its coefficient |"
    assert f"{title}, mean of layers (before its coefficient)" in told["charts"]
    assert row in told["table"]


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_moex_is_named_in_two_files(name):
    """The entropy of a router is a figure of its own as well, with a row there."""
    found = {
        path.relative_to(runs.ROOT).as_posix()
        for path in (runs.ROOT / "moex").rglob("*.py")
        if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
    }
    assert found == TOUCHED
