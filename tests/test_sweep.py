"""Sweeps: the grid, the folders, the checks; one small sweep is trained."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from moex import cli
from moex.config.base import ConfigError
from moex.runs import grid, sweep
from moex.runs.directory import RunDir, given_config
from tests import runs

K = "model.layers[1].pattern[0].router.k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    runs.write_config(folder)
    return folder


@pytest.fixture
def made(folder):
    """`made(*texts, base=overrides)`: the sweep of some `--sweep` texts."""

    def made(*texts, base=()):
        overrides = [f"--config.{o}" for o in base]
        return grid.make_sweep(texts, [f"--config={folder / 'tiny.py'}", *overrides])

    return made


@pytest.fixture
def mistake(folder, capsys):
    """The one line of an error of `moex train` with the tiny config."""

    def mistake(*args, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", f"--config={folder / 'tiny.py'}", *map(str, args)])
        assert stop.value.code == code
        err = capsys.readouterr().err
        assert err.startswith("moex: error: "), err
        assert err.count("\n") == 1, err
        return err.removeprefix("moex: error: ").strip()

    return mistake


# The grid.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.1,0.2", ["0.1", "0.2"]),
        ("(0.9,0.99),(0.9,0.95)", ["(0.9,0.99)", "(0.9,0.95)"]),
        ("(('router',0.1),),()", ["(('router',0.1),)", "()"]),
        ("'a,b',\"c,(\",d", ["'a,b'", '"c,("', "d"]),
        ("wsd", ["wsd"]),
        ("a,", ["a", ""]),
    ],
)
def test_values_are_split_outside_of_brackets(text, parts):
    assert grid.split_top(text) == parts


@pytest.mark.parametrize("text", ["(1,2", "'a,b", "[(1,2],3"])
def test_a_bracket_that_is_not_closed(text):
    with pytest.raises(ConfigError, match="is missing"):
        grid.split_top(text)


def test_points_are_all_combinations(made):
    found = made("optim.lr=0.1,0.2", "config.seed=0,1,2")
    assert found.grid == {"optim.lr": ("0.1", "0.2"), "seed": ("0", "1", "2")}
    assert [point.name for point in found.points] == [
        f"optim.lr={lr},seed={seed}" for lr in (0.1, 0.2) for seed in range(3)
    ]
    args = found.points[4].config_args
    assert args[1:] == ("--config.optim.lr=0.2", "--config.seed=1")


def quickstart(*texts, arg="", **options):
    file = runs.ROOT / "configs/quickstart.py"
    return grid.make_sweep(texts, [f"--config={file}{arg}"], **options)


def kinds(point):
    (ffn,) = given_config(list(point.config_args)).model.layers[0].pattern
    moe = getattr(ffn, "moe", ffn)
    return type(ffn).__name__, type(moe.router).__name__


def test_a_sweep_varies_kinds_by_the_argument_of_the_config():
    found = quickstart("config:router=topk,topp", "config:chain=1,2", "seed=3")
    assert {point.name: kinds(point) for point in found.points} == {
        "chain=1,router=topk,seed=3": ("MoE", "TopK"),
        "chain=2,router=topk,seed=3": ("Chain", "TopK"),
        "chain=1,router=topp,seed=3": ("MoE", "TopP"),
        "chain=2,router=topp,seed=3": ("Chain", "TopP"),
    }
    more = quickstart("config:router=topk,topp", arg=":chain=2")
    assert [kinds(point) for point in more.points] == [
        *(("Chain", "TopK"), ("Chain", "TopP"))
    ]


def test_whole_configs_are_an_axis(folder, tmp_path):
    first = runs.ROOT / "configs/quickstart.py"
    axis = f"config=quickstart:router=topp,chain=2|{folder / 'tiny.py'}"
    found = grid.make_sweep([axis, "seed=0,1"], ["--config.log.every=1"])
    assert [given_config(list(p.config_args)).model.dim for p in found.points] == [
        *(128, 128, *[runs.config(folder).model.dim] * 2)
    ]
    assert [point.name.endswith("tiny,seed=0") for point in found.points] == [
        *(False, False, True, False)
    ]
    # It may grow by a config; another base of one that is there is refused.
    sweep.claim(grid.make_sweep([axis], []), tmp_path)
    sweep.claim(grid.make_sweep([f"{axis}|{first}"], []), tmp_path)
    with pytest.raises(ConfigError, match=r"log\.every = 10, not 7"):
        sweep.claim(
            grid.make_sweep([f"{axis}|{first}"], ["--config.log.every=7"]), tmp_path
        )


def test_names_of_configs_are_short():
    chosen = {"config": "configs/quickstart.py:chain=2,router=topp", "seed": "1"}
    assert grid.point_name(chosen) == "config=quickstart_chain=2,router=topp,seed=1"
    assert grid.point_name({"config:router": "topp"}) == "router=topp"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["config:routr=topk,topp"], "Did you mean 'router'?"),
        (["config:router=topk,toppp"], "router=toppp: --config="),
        (
            ["config=a.py|b.py"],
            "--sweep config: gives the configs; leave out --config=",
        ),
    ],
)
def test_mistakes_in_kinds(texts, message):
    with pytest.raises(ConfigError) as error:
        quickstart(*texts)
    assert message in str(error.value)


def test_bars_split_values_of_any_field(made):
    assert made("seed=0|1").grid == {"seed": ("0", "1")}
    field, values = grid.parse_axis("log.sample_prompts=('a|b',)")
    assert values == ("('a|b',)",)


def test_steps_may_be_swept(made):
    assert [point.steps for point in made("steps=4,6").points] == [4, 6]


def name(**chosen):
    return grid.point_name(chosen)


def test_names_are_safe_for_file_systems_and_shells():
    assert grid.point_name({K: "4"}) == "model.layers.1.pattern.0.router.k=4"
    assert name(seed="1", lr="0.1") == name(lr="0.1", seed="1") == "lr=0.1,seed=1"
    assert name(rates="(('router', 0.1),)") == "rates=router,0.1,"
    assert name(paths="('a/b c.txt',)") == "paths=a_bc.txt,"
    assert name(paths="ünï*?") == "paths=_n___"
    assert name(init_from="../../etc") == "init_from=.._.._etc"
    long = [name(paths="x" * 300 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(each) == 200 and "/" not in each for each in long)


THOUSAND = ",".join(map(str, range(1, 1001)))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optim.lr"], "--sweep optim.lr: must be FIELD=V1,V2, as in seed=0,1."),
        (["=1,2"], "--sweep =1,2: must be FIELD=V1,V2"),
        (["optim.lr=0.1,"], "--sweep optim.lr=0.1,: a value is missing."),
        (["seed=1,2,1"], "--sweep seed=1,2,1: 1 is given twice."),
        (["seed=1", "config.seed=2"], "--sweep seed: is given twice; give all values"),
        (["optim.lr=0.01,1e-2"], "optim.lr=0.01 and optim.lr=1e-2 would be one run."),
        (
            ["seed=0", "optim.lrr=1"],
            "--sweep, optim.lrr=1,seed=0: config.optim.lrr: no such field. "
            "Did you mean 'lr'?",
        ),
        (["optim.lr=0.1,fast"], "config.optim.lr = 'fast': must be float."),
        # Only this combination is wrong, and only as a whole.
        ([f"{K}=2,5"], "router.k = 5: must be at most num_experts = 4"),
        (["log.sample_prompts=('a,b'"], "--sweep ...=('a,b': ) is missing."),
        (
            [f"{name}={THOUSAND}" for name in ("seed", "steps", "eval.every")],
            "--sweep = 1000000000: must be at most 10,000 runs.",
        ),
        ([f"seed={','.join(map(str, range(10**5)))}"], "= 100000: must be at most 10,"),
    ],
    ids=range(12),
)
def test_mistakes_in_a_grid_come_before_any_run(mistake, tmp_path, texts, message):
    flags = [f"--sweep={text}" for text in texts]
    assert message in mistake(f"--workdir={tmp_path / 'sweep'}", *flags)
    assert not (tmp_path / "sweep").exists()


def test_mistakes_of_the_command(mistake, tmp_path):
    workdir = f"--workdir={tmp_path / 'sweep'}"
    assert "--workdir: missing" in mistake("--sweep=seed=0,1")
    error = mistake(workdir, "--sweep-index=0")
    assert error == "--sweep-index: is for --sweep; give both."
    error = mistake(workdir, "--sweep=seed=0,1", "--profile=1:2")
    assert error == "--profile: is for one run, not for a --sweep."
    error = mistake(workdir, "--sweep=seed=0,1", "--sweep-index=2")
    assert error == "--sweep-index = 2: must be in 0 to 1."
    (tmp_path / "file").write_text("")
    error = mistake(f"--workdir={tmp_path / 'file'}", "--sweep=seed=0,1")
    assert f"{tmp_path / 'file'}: cannot be written (" in error


def test_dry_run_lists_the_points(folder, tmp_path, capsys):
    (tmp_path / "seed=1" / "checkpoints" / "8").mkdir(parents=True)
    cli.main(
        ["train", f"--config={folder / 'tiny.py'}", "--dry-run"]
        + ["--sweep", "seed=0,1", f"--workdir={tmp_path}"]
    )
    assert capsys.readouterr().out.splitlines() == [
        *("   0  seed=0", "   1  seed=1  (finished)")
    ]
    assert not (tmp_path / sweep.FILE).exists()


# The folder of a sweep.


def test_a_grid_may_grow_and_nothing_else(made, tmp_path):
    workdir = tmp_path / "sweep"
    sweep.claim(made("seed=0,1", "optim.lr=0.1"), workdir)
    sweep.claim(made("optim.lr=0.1,0.2", "seed=1,0"), workdir)
    saved = json.loads((workdir / sweep.FILE).read_text())
    assert saved["grid"] == {"optim.lr": ["0.1", "0.2"], "seed": ["1", "0"]}
    assert saved["config"]["steps"] == 8
    for texts, base, message in [
        (["seed=0,1", "optim.lr=0.1"], (), "holds a sweep with optim.lr = 0.2 too; a"),
        (["seed=0,1"], (), "holds a sweep of optim.lr, seed, not of seed."),
        (
            ["seed=0,1", "optim.lr=0.1,0.2"],
            ["batch_size=2"],
            "holds a sweep with config.batch_size = 4, not 2; use another --workdir.",
        ),
    ]:
        with pytest.raises(ConfigError) as error:
            sweep.claim(made(*texts, base=base), workdir)
        assert str(error.value).startswith(f"--workdir={workdir}: ")
        assert message in str(error.value)
    # What the base says of a swept field is not used.
    sweep.claim(made("seed=0,1", "optim.lr=0.1,0.2", base=["seed=7"]), workdir)


def test_a_run_is_no_folder_for_a_sweep(made, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a run; a sweep needs a folder of its"):
        sweep.claim(made("seed=0,1"), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must be a JSON object, not a list"),
        ("{}", "has no field 'config'"),
        ('{"config": {}, "grid": {"seed": "0"}}', "must be mapping of str to list of"),
        ('{"config": {}, "grid": {"seed": [0]}}', "must be mapping of str to list of"),
        ("{", "is not JSON"),
    ],
)
def test_a_damaged_sweep_file_is_refused(made, tmp_path, text, said):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        sweep.claim(made("seed=0,1"), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'sweep.json'}: ")
    assert said in str(error.value)


# Running, with a process that only pretends to be `moex train`.

PRETEND = """
import pathlib, signal, sys, time

args = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
run = pathlib.Path(args["workdir"])
run.mkdir(parents=True, exist_ok=True)
seed = int(args["config.seed"])
if seed == 1:
    sys.exit(3)
if seed == 2:  # asked to stop, it saves and leaves
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (run / "up").touch()
    time.sleep(60)
(run / "checkpoints" / "8").mkdir(parents=True)
"""


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Points are run by `PRETEND`."""
    script = tmp_path / "pretend.py"
    script.write_text(PRETEND)
    start = subprocess.Popen

    def popen(command, **options):
        if command[1:4] == ["-m", "moex.cli", "train"]:
            command = [sys.executable, str(script), *command[4:]]
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


def run_points(made, workdir, text):
    said = []
    runner = sweep.Runner(workdir, said.append)
    return runner, runner.run(made(text).points, []), said


def test_a_run_that_fails_does_not_stop_the_others(made, pretend, tmp_path):
    _, failed, said = run_points(made, tmp_path, "seed=0,1,3")
    assert failed == {"seed=1": 3}
    assert said == [
        *("sweep: 1/3 seed=0", "sweep: 2/3 seed=1"),
        *("sweep: 2/3 seed=1 failed with exit code 3", "sweep: 3/3 seed=3"),
    ]
    _, failed, said = run_points(made, tmp_path, "seed=0,1,3")
    assert failed == {"seed=1": 3}
    assert said[0] == "sweep: 1/3 seed=0 is finished"
    assert said[-1] == "sweep: 3/3 seed=3 is finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_run_save_and_ends_the_sweep(made, pretend, tmp_path, number):
    before = signal.getsignal(number)
    wait = 'for i in {1..999}; do [ -e "$0" ] && break; sleep 0.02; done'
    up = str(tmp_path / "seed=2" / "up")
    command = ["bash", "-c", f"{wait}; kill -{int(number)} $PPID", up]
    killer = subprocess.Popen(command)
    runner, failed, said = run_points(made, tmp_path, "seed=2,0")
    killer.wait()
    assert (failed, runner.asked) == ({}, number)
    assert said == ["sweep: 1/2 seed=2"]  # and the second never started
    assert signal.getsignal(number) is before


def test_the_exit_code_names_what_failed(mistake, pretend, tmp_path):
    args = (f"--workdir={tmp_path}", "--sweep=seed=0,1,3")
    error = mistake(*args, code=1)
    assert error == "1 of 3 runs of the sweep failed: seed=1 (exit code 3)"
    # A job of an array fails as its run does.
    assert "1 of 1 runs" in mistake(*args, "--sweep-index=1", code=3)


# The whole.


@pytest.mark.slow
def test_a_sweep_is_trained_and_then_skipped(folder, tmp_path, capfd, monkeypatch):
    for key, value in runs.environment().items():
        monkeypatch.setenv(key, value)
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(runs.ROOT)
    workdir = tmp_path / "sweep"
    args = (f"--config={folder / 'tiny.py'}", "--config.eval.every=0")
    args += (f"--workdir={workdir}", "--sweep", "seed=0,1")

    def out_of(*argv):
        capfd.readouterr()
        cli.main(argv)
        return capfd.readouterr().out

    out = out_of("train", *args)
    folders = [workdir / f"seed={seed}" for seed in (0, 1)]
    first, *_, last = out.splitlines()
    array = first.removeprefix("as a Slurm array job: ")
    assert shlex.split(array) == [
        *("sbatch", "--array=0-1", "launch/slurm.sbatch", *args[:3]),
        "--sweep=seed=0,1",
    ]
    command = shlex.split(last.removeprefix("compare: "))
    assert command == ["moex", "compare", str(workdir)]
    for seed, run in enumerate(folders):
        assert RunDir(run).config().seed == seed
        assert runs.records(run)[-1]["step"] == 8
        assert sweep.is_finished(run, 8) and not sweep.is_finished(run, 9)

    assert out_of("train", *args).splitlines()[1:-1] == [
        f"sweep: {i}/2 {run.name} is finished" for i, run in enumerate(folders, 1)
    ]

    row = out_of(*command[1:]).splitlines()[1].split()
    assert row[:3] == ["seed=0,", "seed=1", "2"]  # runs, and their number
    assert row.count("±") >= 5  # of the losses
