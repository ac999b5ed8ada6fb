"""A user's own router, experts and source in a folder of their own, with every verb."""

import json
import sys

import pyarrow.parquet
import pytest

from moex import cli
from moex.config.flags import load_config
from moex.train import tensorboard
from tests import runs

PARTS = '''
"""Kinds of my own."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas import grouped_matmul
from moex.config.base import require
from moex.data.contract import Document, FileSource
from moex.data.files import read_text
from moex.moe.contract import Experts, ExpertsConfig, Router, RouterConfig
from moex.moe.routing import Routing, replayed, router_logits
from moex.nn.param import param


@dataclasses.dataclass(kw_only=True, slots=True)
class Relu(RouterConfig):
    """ReLU routing (ReMoE, arXiv:2412.14711): the experts whose score is above 0."""

    l1: float = 0.01  # coefficient of the mean of the gates, >= 0

    def validate(self, path):
        require(self.l1 >= 0, f"{path}.l1", self.l1, ">= 0")

    def expected_slots(self, num_experts):
        return num_experts / 2

    def losses(self):
        return {"l1": self.l1}

    def make(self, dim, num_experts, rngs):
        return ReluRouter(dim, num_experts, rngs)


class ReluRouter(Router):
    def __init__(self, dim, num_experts, rngs):
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=0.1)

    def __call__(self, x_TD, ctx):
        logits_TE = router_logits(x_TD, self.w_DE[...])
        gate_TE = jax.nn.relu(logits_TE)
        ids_E = jnp.arange(logits_TE.shape[1], dtype=jnp.int32)
        expert_TE = jnp.broadcast_to(ids_E[None], logits_TE.shape)
        expert_TE, keep_TE = replayed(ctx, "expert", expert_TE, gate_TE > 0)
        return Routing(
            expert_TK=expert_TE,
            gate_TK=jnp.where(keep_TE, gate_TE, 0.0),
            keep_TK=keep_TE,
            logits_TE=logits_TE,
            probs_TE=jax.nn.softmax(logits_TE),
            losses={"l1": jnp.mean(gate_TE, axis=1)},
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class Mlp(ExpertsConfig):
    """Experts W_out relu(W_in x)^2."""

    hidden: int

    def make(self, dim, num_experts, rngs):
        return MlpExperts(self.hidden, dim, num_experts, rngs)


class MlpExperts(Experts):
    def __init__(self, F, dim, E, rngs):
        self.w_in_EDF = param(rngs, (E, dim, F), ("expert", "embed", "mlp"), fan_in=dim)
        self.w_out_EFD = param(rngs, (E, F, dim), ("expert", "mlp", "embed"), fan_in=F)

    def __call__(self, x_ND, group_sizes_E, ctx):
        def matmul(rows, w):
            w = w[...].astype(rows.dtype)
            return grouped_matmul(rows, w, group_sizes_E, implementation=ctx.kernels)

        return matmul(jax.nn.relu(matmul(x_ND, self.w_in_EDF)) ** 2, self.w_out_EFD)


@dataclasses.dataclass(kw_only=True, slots=True)
class Pages(FileSource):
    """A document between two lines of its own kind."""

    def read(self, where):
        for file in self.files(where):
            for i, text in enumerate(read_text(file, where).split("\\n\\n")):
                yield Document(f"{file.name} {i}", text)
'''
CHANGES = {
    "from moex.data.sources import Text": "from own_parts import Mlp, Pages, Relu",
    'Text(paths=(CORPUS,), delimiter="\\n\\n", holdout=0.1)': (
        "Pages(paths=(CORPUS,), holdout=0.1)"
    ),
    "Segment(pattern=(moe,))": (
        "Segment(pattern=(moe, MoE(num_experts=2, router=Relu(l1=0.5), "
        "experts=Mlp(hidden=8))))"
    ),
    "router=TopK(k=2, bias_rate=0.01)": "router=Relu()",
    "tensorboard=False": "tensorboard=True",
}


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "own_parts.py").write_text(PARTS, encoding="utf-8")
    text = runs.CONFIG
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    corpus = runs.write_corpus(folder / "corpus.txt")
    text = text.replace("CORPUS", repr(str(corpus)))
    (folder / "config.py").write_text(text, encoding="utf-8")
    return folder


def moex(*args):
    """A command as of a new process: nothing of the user's is imported before."""
    sys.modules.pop("own_parts", None)
    path = list(sys.path)
    try:
        cli.main([str(a) for a in args])
    finally:
        sys.path[:] = path


@pytest.fixture(scope="module")
def run(project, tmp_path_factory):
    """Trained in two parts."""
    workdir = tmp_path_factory.mktemp("runs") / "own"
    config = f"--config={project / 'config.py'}"
    for steps in (2, 4):
        moex("train", config, f"--workdir={workdir}", f"--config.steps={steps}")
    return workdir


def test_it_trains_and_resumes_and_its_own_loss_is_logged(run):
    lines = runs.records(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss/l1"] > 0 and line["moe/l1_loss"] > 0 for line in lines)
    saved = (run / "config.json").read_text(encoding="utf-8")
    assert saved.count('"own_parts.Relu"') == 2
    routing = (run / "routing.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(routing[-1])["layers"]["002"]["l1_loss"] > 0


def test_its_own_loss_has_a_chart(project):
    sys.modules.pop("own_parts", None)
    cfg = load_config([f"--config={project / 'config.py'}"])
    charts = tensorboard.layout(cfg, 1)["MoE: routers"]
    assert charts["Router's own loss l1 (before its coefficient)"][1] == [
        "moe/l1_loss(_worst)?$"
    ]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")
def test_trace_report_convert_and_generate_find_the_kinds(
    run, project, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(project)
    moex("trace", run, "--out", tmp_path / "t.parquet", "--tokens=64")
    assert pyarrow.parquet.read_metadata(tmp_path / "t.parquet").num_rows == 128
    monkeypatch.chdir(tmp_path)
    own = f"--project={project}"
    moex("report", run, own, f"--out={tmp_path / 'r.html'}")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Router's own loss l1" in page and "Relu" in page
    capsys.readouterr()
    moex("generate", run, own, "--prompt=the cat", "--max-new-tokens=4")
    assert "the cat" in capsys.readouterr().out
    more = ("--to=moe", "--experts=2", "--k=1", f"--workdir={tmp_path / 'moe'}")
    moex("convert", run, own, *more)
    moex("eval", tmp_path / "moe", own)
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["trace", "report", "generate", "eval", "convert"])
def test_from_another_folder_the_advice_is_one_line(
    run, verb, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    extra = {
        "trace": ["--out=t.parquet"],
        "generate": ["--prompt=the cat"],
        "convert": ["--to=moe", "--experts=2", "--k=1", "--workdir=new"],
    }
    with pytest.raises(SystemExit) as end:
        moex(verb, run, *extra.get(verb, []))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "'own_parts." in error and "is not a config class of moex" in error
    assert "give the folder with own_parts as --project=FOLDER" in error


def test_what_no_family_has_is_refused_by_export(run, project, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        moex("export-hf", run, "--out", tmp_path / "hf", f"--project={project}")
    assert end.value.code == 2
    assert "no family of transformers has this model" in capsys.readouterr().err
