"""A user's own router, experts and source in a folder of their own, with every verb."""

import importlib
import json
import math
import re
import sys

import numpy as np
import pyarrow.parquet
import pytest

from moex import cli, load_run
from moex.config.flags import load_config
from moex.model.paths import flat_paths
from moex.runs.directory import RunDir, given_config
from moex.train import charts
from tests import documented, runs

FILES = ("mlp.py", "pages.py", "relu.py", "usage.py")
CHANGES = {
    "from moex.data.sources import Text": (
        "from mlp import Mlp\nfrom pages import Pages\nfrom relu import Relu"
    ),
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
    forget()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for name in FILES:
        (folder / name).write_text(documented.files()[name], encoding="utf-8")
    text = runs.CONFIG
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    corpus = runs.write_corpus(folder / "corpus.txt")
    text = text.replace("CORPUS", repr(str(corpus)))
    (folder / "config.py").write_text(text, encoding="utf-8")
    return folder


def forget():
    """Nothing of the user's is imported, as in a new process."""
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def moex(*args):
    """A command as of a new process."""
    forget()
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


@pytest.mark.thorough
def test_it_trains_and_resumes_and_its_own_loss_is_logged(run):
    lines = runs.records(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss/l1"] > 0 and line["moe/l1_loss"] > 0 for line in lines)
    saved = (run / "config.json").read_text(encoding="utf-8")
    assert saved.count('"relu.Relu"') == 2
    routing = (run / "routing.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(routing[-1])["layers"]["002"]["l1_loss"] > 0


@pytest.mark.thorough
def test_the_functions_of_the_page_look_into_a_run_and_change_it(
    run, project, monkeypatch, tmp_path
):
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    usage = importlib.import_module("usage")
    told = dict(usage.entropies(run))
    assert [path[-3:] for path in told] == ["ffn"] * 2
    for entropy_R, experts in zip(told.values(), (4, 2), strict=True):
        assert entropy_R.shape == (1,) and 0 < entropy_R[0] <= math.log(experts)
    half = tmp_path / "half"
    usage.halve_routers(run, half)
    old, new = (
        flat_paths(load_run(place).params) for place in (run, tmp_path / "half")
    )
    for path, array in old.items():
        factor = 0.5 if "router" in path else 1.0
        assert np.array_equal(array * factor, new[path]), path
    assert given_config([f"--config={half}"]).steps == RunDir(run).config().steps


def test_its_own_loss_has_a_chart(project):
    forget()
    cfg = load_config([f"--config={project / 'config.py'}"])
    page = charts.layout(cfg, 1)["MoE: routers"]
    assert page["Router's own loss l1, mean of layers (before its coefficient)"][1] == [
        "moe_routers/l1_loss_mean$"
    ]


@pytest.mark.slow
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
    said = r"'(mlp|pages|relu)\.[A-Z]\w+' is not a config class of moex"
    assert (found := re.search(said, error))
    assert f"give the folder with {found[1]} as --project=FOLDER" in error


def test_what_no_family_has_is_refused_by_export(run, project, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        moex("export-hf", run, "--out", tmp_path / "hf", f"--project={project}")
    assert end.value.code == 2
    assert "no family of transformers has this model" in capsys.readouterr().err
