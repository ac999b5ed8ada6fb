"""`python -m benchmarks.device`: dry run, a kill in the middle, rows of the README."""

import json
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks import tune
from benchmarks.device import __main__ as command
from benchmarks.device import kernels, readme, runner
from benchmarks.device.steps import STEPS, Process, Run, Step
from kernels_pallas import tuned
from kernels_pallas.grouped_matmul.shapes import LayerShape

ROOT = pathlib.Path(__file__).parents[1]
DRY = [step.name for step in STEPS if step.dry]


def start(*args) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.device", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, encoding="utf-8"
    )


def result(folder, step):
    return json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))


@pytest.mark.thorough
def test_the_dry_run_does_every_step_and_its_results_make_rows(tmp_path):
    """In one process, which saves the imports; the kill below has one for each step."""
    process = start("--dry-run", "--in-process", f"--out={tmp_path}")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    for name in DRY:
        data = result(tmp_path, name)
        assert data["status"] == "done" and data["versions"]["jax"], name
        assert all(run["figures"] for run in data["runs"].values()), name
        (step,) = (step for step in STEPS if step.name == name)
        (measured, *_) = readme.row(step, data).split("**owed**")
        assert data["device"] in readme.row(step, data)
        assert len(measured) > len(step.title) + 8, measured
    assert (tmp_path / "tilings.json").exists()


@pytest.mark.slow
def test_a_kill_keeps_what_was_done_and_leaves_nothing_running(tmp_path):
    args = ("--dry-run", "--steps=ceiling,loads", f"--out={tmp_path}")
    archive = tmp_path / "all.tar.gz"
    process = start(*args, f"--pack={archive}")
    events = tmp_path / "partial" / "loads.jsonl"
    while not events.exists():  # the ceiling is done, the next step has begun
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    children = children_of(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    before = (tmp_path / "ceiling.json").read_bytes()
    assert result(tmp_path, "ceiling")["status"] == "done" and children
    assert not (tmp_path / "loads.json").exists()
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["ceiling.json"]
    wait_for(lambda: not any(map(alive, children)))

    again = start(*args)
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert "ceiling: dry" not in said and "loads: dry" in said
    assert (tmp_path / "ceiling.json").read_bytes() == before
    assert result(tmp_path, "loads")["status"] == "done"
    assert not list((tmp_path / "partial").iterdir())


def children_of(pid: int) -> list[int]:
    text = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, encoding="utf-8"
    ).stdout
    return [int(word) for word in text.split()]


def alive(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def table(monkeypatch):
    """Puts two steps of two runs in the place of the table."""
    runs = [Run(name, "none", ()) for name in ("a", "b", "c")]
    steps = (
        Step("kernels", "first", "", (Process("p", 50, 20, tuple(runs[:2])),), ()),
        Step("loads", "second", "", (Process("q", 50, 20, (runs[2],)),), ()),
    )
    monkeypatch.setattr(runner, "STEPS", steps)
    return steps


def launcher(outcomes, calls):
    """A `launch` whose runs end as `outcomes` says; others never begin."""

    def launch(out, step, process, runs, *, limit, dry_run):
        calls.append((step.name, tuple(runs), round(limit)))
        folder = out / "partial"
        folder.mkdir(exist_ok=True)
        with open(folder / f"{step.name}.jsonl", "w", encoding="utf-8") as f:
            for name in filter(outcomes.get, runs):
                f.write(json.dumps({"run": name, "event": "started"}) + "\n")
                if outcomes[name] != "timed out":
                    event = {"run": name, "event": outcomes[name], "seconds": 1}
                    f.write(json.dumps(event) + "\n")
            f.write('{"run": ')  # a line that was cut
        figures = folder / f"{step.name}.{runs[0]}.json"
        figures.write_text('{"x": 1}', encoding="utf-8")
        over = "timed out" in map(outcomes.get, runs)
        return ("timed out" if over else "ended"), "the end"

    return launch


def run(out, launch, seconds=600):
    return runner.run_all(out, ["kernels", "loads"], seconds=seconds, launch=launch)


def test_what_failed_is_tried_again_after_what_was_never_tried(table, tmp_path):
    calls: list = []
    first = launcher({"a": "failed", "b": "done"}, calls)
    assert run(tmp_path, first)["kernels"] == "failed"
    (tmp_path / "loads.json").unlink()  # as if the time had been over before it
    calls.clear()
    status = run(tmp_path, launcher(dict.fromkeys("abc", "done"), calls))
    assert status == {"kernels": "done", "loads": "done"}
    assert [call[:2] for call in calls] == [("loads", ("c",)), ("kernels", ("a",))]


def test_a_run_that_is_cut_keeps_its_figures_and_the_next_is_still_to_do(
    table, tmp_path
):
    calls: list = []
    status = run(tmp_path, launcher({"a": "timed out", "c": "done"}, calls))
    assert status == {"kernels": "timed out", "loads": "done"}
    runs = result(tmp_path, "kernels")["runs"]
    assert runs["a"]["figures"] == {"x": 1} and runs["a"]["status"] == "timed out"
    assert runs["b"]["status"] == "skipped" and "no time" in runs["b"]["reason"]
    assert result(tmp_path, "kernels")["output"] == {"p": "the end"}
    calls.clear()
    run(tmp_path, launcher({"a": "done", "b": "done"}, calls))
    assert [call[1] for call in calls] == [("b",), ("a",)]


@pytest.mark.parametrize(("seconds", "limits"), [(600, [50, 50]), (40, [35, 35])])
def test_a_process_gets_its_limit_or_what_is_left(table, tmp_path, seconds, limits):
    calls: list = []
    run(tmp_path, launcher(dict.fromkeys("abc", "done"), calls), seconds)
    assert [call[2] for call in calls] == limits


def test_without_the_least_time_a_step_says_so_and_stays_to_do(table, tmp_path):
    calls: list = []
    status = run(tmp_path, launcher({}, calls), seconds=24)
    assert set(status.values()) == {"skipped"} and not calls
    assert result(tmp_path, "loads")["runs"]["c"]["reason"] == "19 s left, 20 s needed"
    run(tmp_path, launcher(dict.fromkeys("abc", "done"), calls))
    assert len(calls) == 2


@pytest.mark.thorough
def test_a_process_is_ended_at_its_limit_with_all_that_it_started(
    monkeypatch, tmp_path
):
    program = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen(['sleep', '600'])\n"
        "print('started', p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(script))
    step, process = STEPS[0], Process("p", 1, 1, ())
    outcome, text = runner.isolated(
        tmp_path, step, process, ["x"], limit=2.0, dry_run=True
    )
    assert outcome == "timed out"
    wait_for(lambda: not alive(int(text.split()[-1])))


def test_a_folder_of_a_dry_run_takes_no_figures(table, tmp_path):
    run(tmp_path, launcher(dict.fromkeys("abc", "done"), []))
    with pytest.raises(runner.OtherKind, match="has figures in kernels.json"):
        runner.Results(tmp_path, table[0], {}, True)


@pytest.mark.parametrize("wrong", ["--steps=tile", "--minutes=1"])
def test_wrong_arguments_are_one_line(monkeypatch, capsys, wrong):
    monkeypatch.setattr("sys.argv", ["device", wrong])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert "none of kernels" in (said := capsys.readouterr().err) or "--out" in said


def test_the_smallest_failing_layer_is_found():
    """One that fails wherever D > 20 and there are 3 experts or more."""
    noted: list = []
    tried: list = []

    def fails(shape):
        tried.append(shape)
        return shape.dim > 20 and shape.num_experts >= 3

    found = kernels.shrink(LayerShape(300, 2, 64, 192, 8), fails, noted.append)
    assert found == (1, 1, 32, 1, 3) and noted[-1] == found
    assert len(tried) < 60


def test_a_failing_case_is_made_smaller_in_processes_that_may_die(monkeypatch):
    """Errors of another kind are another fault; a lost process has a successor."""
    answers = {8: "not equal: dx", 4: "not equal: dw_in", 2: "ValueError: no", 7: None}

    class Worker:
        def __init__(self, *case):
            assert case == ("triton", "bfloat16")

        def error_of(self, shape):
            return answers.get(shape.dim)

        def close(self):
            pass

    monkeypatch.setattr(kernels, "Worker", Worker)
    noted: list = []
    case = ("triton", "bfloat16", LayerShape(1, 1, 8, 1, 1))
    kernels.reduce(case, time.monotonic() + 60, noted.append)
    assert noted[-1]["shape_TKDFE"] == (1, 1, 4, 1, 1)
    assert noted[-1]["error"] == "not equal: dx"


def test_cases_are_found_by_the_names_of_the_tests():
    name = "tests/test_gpu.py::test_experts_equal_the_definition_with_poisoned_tail"
    found = kernels.case_of(f"{name}[triton-bfloat16-prime]")
    assert found == ("triton", "bfloat16", kernels.SHAPES["prime"])
    assert kernels.case_of("tests/test_gpu.py::test_training[float32]") is None
    text = (ROOT / kernels.TESTS).read_text(encoding="utf-8")
    assert f"def {name.rpartition('::')[2]}(implementation, dtype, shape)" in text


def figures_of(status, figures=None):
    record = {"status": status, "device": "NVIDIA H200, 580, 1", "commit": "abc"}
    record["versions"] = {"jax": "0.11.2"}
    return record | ({} if figures is None else {"figures": figures})


def train_figures(tokens):
    return {
        "tokens_per_s": tokens,
        "mfu": 0.31,
        "compile_s": 20.0,
        "environment": {"allocator": "default"},
    }


def test_rows_of_a_cut_run_say_what_is_there_and_what_is_owed(tmp_path):
    runs = {
        "triton dots": figures_of("done", train_figures(250_000)),
        "triton none": figures_of("timed out"),
        "mosaic dots": figures_of("failed"),
        "xla dots": {"status": "skipped", "reason": "3 s left, 30 s needed"},
    }
    data = {"step": "train", "runs": runs}
    (tmp_path / "train.json").write_text(json.dumps(data), encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in
             readme.table(tmp_path).splitlines()}  # fmt: skip
    assert len(lines) == len(STEPS) + 2
    (train,) = (line for title, line in lines.items() if "moe_100m" in title)
    assert "triton dots: 250,000 tokens/s, MFU 31.0 %" in train
    assert "host allocator: default" in train
    assert (
        "**owed**: triton none, triton full, mosaic dots, xla dots (failed, timed out)"
    ) in train
    assert "| NVIDIA H200, JAX 0.11.2, abc |" in train
    assert (
        "| **owed** | H100 or H200 | `python -m benchmarks.device --steps=loads"
        in (lines["loads W0 to W7 at H1, to be 1.15 times balanced at most"])
    )


def test_a_wrong_kernel_is_in_the_row_with_its_smallest_layer():
    figures = {
        "tests": {
            "tests/test_gpu.py::a[triton-float32-prime]": {"outcome": "failed"},
            "tests/test_gpu.py::b": {"outcome": "passed"},
            "tests/test_gpu.py::c": {"outcome": "skipped"},
        },
        "reduced": {
            "implementation": "triton",
            "dtype": "float32",
            "shape_TKDFE": [1, 1, 4, 1, 1],
            "error": "not equal: dx is off",
        },
    }
    line = readme.row(STEPS[0], {"runs": {"tests": figures_of("done", figures)}})
    assert "1 right, 1 wrong, 1 not possible; wrong: `a[triton-float32-prime]`" in line
    assert "smallest: triton, float32, T,K,D,F,E = 1,1,4,1,1: not equal" in line


def test_the_rows_of_the_page_are_those_of_the_results():
    page = readme.PAGE.read_text(encoding="utf-8")
    there = page.split(readme.MARKS[0])[1].split(readme.MARKS[1])[0].strip()
    assert there == readme.table(readme.RESULTS), "python -m benchmarks.device --readme"


def test_wheels_are_named_by_the_version_that_this_project_pins():
    text = (ROOT / "benchmarks/device/wheels.txt").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in text.splitlines() if line and not line.startswith("#")]
    later = {line.partition(" ;")[0] for line in pins if "< " not in line}
    assert len(found) == 8 and set(found) <= later


def test_the_script_starts_where_what_the_wheels_bring_is_missing():
    program = (
        "import sys\n"
        "for name in ('grain', 'ml_collections', 'flax', 'array_record', 'jax'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.device.__main__\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_only_wheels_that_are_missing_and_fit_are_taken(tmp_path, monkeypatch):
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    names = {
        "grain-0.2.18-py3-none-any.whl": "0.2.18",
        "flax-0.12.12-py3-none-any.whl": "0.5.0",
        "newt-1.0-py3-none-any.whl": None,
        f"olm-1.0-{tag}-{tag}-win_amd64.whl": None,
    }
    for name in names:
        (tmp_path / name).touch()
    there = {name.split("-")[0]: version for name, version in names.items()}

    def version(name):
        if there[name] is None:
            raise command.importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(command.importlib.metadata, "version", version)
    found = [file.name.split("-")[0] for file in command.needed(tmp_path)]
    assert found == ["flax", "newt"]


def test_entries_of_a_table_of_tiles_move_to_the_one_of_the_kernels(
    tmp_path, monkeypatch
):
    sizes = {"operation": "up", "M": 1, "K": 2, "N": 3, "G": 4, "dtype": "bfloat16"}
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    other = sizes | {"K": 5, "us": 1.0}
    tables = {"A": {"triton": [sizes | {"us": 2.0}, other]}}
    old.write_text(json.dumps(tables), encoding="utf-8")
    new.write_text(
        json.dumps({"A": {"triton": [sizes | {"us": 1.5}]}, "B": {"mosaic": [other]}}),
        encoding="utf-8",
    )
    monkeypatch.setattr(tuned, "PATH", old)
    assert tune.merge(new) == 2
    merged = json.loads(old.read_text(encoding="utf-8"))
    assert [e["us"] for e in merged["A"]["triton"]] == [1.5, 1.0]
    assert merged["B"] == {"mosaic": [other]}


def test_what_a_table_of_tiles_has_is_not_measured_again(monkeypatch):
    args = ["tune", "--shapes=H1,H5", "--implementations=triton", "--operations=up"]
    monkeypatch.setattr("sys.argv", args)
    parsed, shapes = tune.parsed()
    T, K, D, F, E = shapes["H1"]
    entry = dict(zip(tune.KEY, ("up", T * K, D, F, E, "bfloat16"), strict=True))
    (left,) = tune.work_of(parsed, shapes, {"triton": [entry]})
    assert left[0] == "H5"


def test_a_signal_ends_the_script_and_its_process(tmp_path):
    process = start("--dry-run", "--steps=ceiling", f"--out={tmp_path}")
    wait_for((tmp_path / "logs").exists, 60)
    wait_for(lambda: children_of(process.pid), 60)
    children = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 1 and "stopped by SIGTERM" in said
    wait_for(lambda: not any(map(alive, children)))
    assert result(tmp_path, "ceiling")["status"] == "cut"
