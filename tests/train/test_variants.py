"""Every kind of layer in one model: it learns, resumes to the bit, and generates.

One model, because compiling is most of the time; experiments/variants trains each kind
alone.
"""

import shutil

import pytest

from moex.config.base import ConfigError, ConfigWarning
from moex.config.flags import load_config
from moex.config.schedule import Schedule
from moex.configs import quickstart
from moex.moe.balance import Controller
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.hash import Hash
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.contract import not_causal
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Loss, check_run
from moex.serve.text import write_text
from moex.train import training
from tests import runs

STEPS = 8
STEERED = MoE(
    num_experts=4,
    router=TopP(p=0.5, k_max=4, control=Controller(target=2.0)),
    experts=Latent(hidden=16, latent=8, group=4),
    zero=Zero(null=1, copy=1, constant=1),
    shared=Dense(hidden=16),
    shared_gate=True,
)
CHAINED = Chain(
    moe=MoE(
        num_experts=4,
        router=TopK(
            k=2,
            score="sigmoid",
            groups=Groups(num=2, keep=1, score="top2"),
            bias_rate=Schedule(points=((0, 1.0), (6, 0.0))),
            bias_rule="quantile",
            jitter=0.01,
            noise=0.1,
        ),
        experts=Glu(hidden=16, activation="gelu", bias=True),
    ),
    iterations=2,
    routers="shared",
)
HASHED = Narrow(
    latent=16, inner=MoE(num_experts=4, router=Hash(k=2), experts=LowRank(rank=4))
)


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


def config(folder, *overrides):
    cfg = runs.config(folder, *overrides)
    cfg.model.layers = (
        Segment(pattern=(STEERED, CHAINED)),
        Segment(pattern=(HASHED,), residual="released"),
    )
    cfg.loss = Loss(
        load_balance=Schedule(points=((0, 0.02), (STEPS - 1, 0.01))),
        entropy=1e-3,
        importance=0.01,
        balance_scope="step",
        balance_scale="count",
        over_layers="mean",
    )
    cfg.grad_accum = 2
    cfg.data.sources[0].holdout = 0.0  # nothing to score: one program less to compile
    return cfg


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    training.train(config(folder), workdir, say=lambda line: None)
    return workdir


@pytest.mark.slow
def test_it_learns_and_every_layer_reports(straight):
    records = runs.records(straight)
    assert len(records) == STEPS
    first, last = (r["nll"] for r in (records[0], records[-1]))
    assert last < first - 0.5
    for name in ("load_balance", "router_z", "entropy", "importance"):
        assert all(r[f"loss/{name}"] > 0 for r in records), name
        assert all(f"moe/{name}" in r for r in records), name
    assert records[-1]["moe/zero_frac"] > 0


@pytest.mark.slow
def test_resume_is_exact(folder, straight, tmp_path):
    """Controller, quantile bias, schedules and noise all go on where they were."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    for step in (6, STEPS):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    training.train(config(folder), tmp_path, say=lambda line: None)
    assert runs.records(tmp_path) == runs.records(straight)
    _, expected, _ = runs.saved_state_of(config(folder), straight)
    _, actual, _ = runs.saved_state_of(config(folder), tmp_path)
    runs.assert_same_arrays(actual, expected)


@pytest.mark.slow
def test_it_generates(straight):
    (text,) = write_text(straight, ["the cat"], max_new_tokens=6, seed=0)
    assert text.startswith("the cat")


def test_expert_choice_is_not_asked_to_generate(folder):
    cfg = config(folder)
    cfg.model.layers[0].pattern[0].router = ExpertChoice(k=1.0)
    where = "config.model.layers[0].pattern[0].router"
    assert not_causal(cfg.model) == where
    check_run_quietly(cfg)
    cfg.log.sample_tokens = 4
    with pytest.raises(ConfigError, match=r"sample_tokens = 4: must be 0: .*router"):
        check_run_quietly(cfg)


def check_run_quietly(cfg):
    with pytest.warns(ConfigWarning, match="ExpertChoice"):
        check_run(cfg)


VARIANTS = [
    *(f"router={name}" for name in quickstart.ROUTERS if name != "expert_choice"),
    *(f"experts={name}" for name in quickstart.EXPERTS),
    *("chain=2", "chain=3,residual=released", "zero=4", "narrow=64", "shared=gated"),
    *("ffn=dense", "router=topp,experts=latent,chain=2,zero=3,match=active"),
]


@pytest.mark.parametrize("arg", VARIANTS)
def test_quickstart_variants_are_good(arg):
    check_run(quickstart.get_config(arg))


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        (
            "router=top",
            r"'router=top': must be one of topk, .* Did you mean 'topp'|topk",
        ),
        ("rooter=topp", r"a key among ffn, router.*Did you mean 'router'"),
        ("chain=0", r"'chain=0': must be an integer from 1 to 8"),
        ("chain=2,chain=3", r"chain is given twice"),
        ("topp", r"'topp': must be KEY=VALUE"),
    ],
)
def test_quickstart_arguments_that_are_refused(arg, message):
    with pytest.raises(ConfigError, match=message):
        quickstart.get_config(arg)


ROUTER = "--config.model.layers[0].pattern[0].router"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        (f"{ROUTER}.p=0.5", lambda cfg: router(cfg).p == 0.5),
        (f"{ROUTER}.p=1", lambda cfg: isinstance(router(cfg).p, float)),
        (
            f"{ROUTER}.p=(.1,.2,.3,.4)",
            lambda cfg: router(cfg).p == (0.1, 0.2, 0.3, 0.4),
        ),
        ("--config.loss.z=1", lambda cfg: cfg.loss.z == 1.0),
        ("--config.loss.entropy=1e-3", lambda cfg: cfg.loss.entropy == 1e-3),
    ],
)
def test_a_field_of_several_types_takes_each(monkeypatch, override, found):
    monkeypatch.chdir(runs.ROOT)
    cfg = load_config(["--config=configs/quickstart.py:router=topp", override])
    assert found(cfg)
    check_run(cfg)


def router(cfg):
    return cfg.model.layers[0].pattern[0].router


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("p=(.1,.2)", r"router.p = \(0.1, 0.2\): must be one p per .*repeat = 4"),
        ("p=half", r"router.p = 'half': must be float or tuple of float or Schedule"),
        ("p=True", r"router.p = 'True': must be float or tuple"),
        ("p=1.5", r"router.p = 1.5: must be in \(0, 1\]"),
        ("k=2", r"router.k: no such field. Did you mean .*\(TopP\) has p, k_max"),
    ],
)
def test_fields_of_several_types_that_are_refused(monkeypatch, override, message):
    monkeypatch.chdir(runs.ROOT)
    with pytest.raises(ConfigError, match=message):
        check_run(
            load_config(
                ["--config=configs/quickstart.py:router=topp", f"{ROUTER}.{override}"]
            )
        )
