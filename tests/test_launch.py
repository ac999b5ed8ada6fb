"""The recipes of launch/: syntax, and their loops with programs that only pretend."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])
ARGS = ["--config=configs/a.py:x=1,y=2", "--config.model.layers[0].repeat=2"]


def test_the_recipes_are_there():
    assert {path.stem for path in SCRIPTS} == {
        *("gke_xpk", "queued_resources", "slurm", "ssh")
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax_and_the_parts_of_a_recipe(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "moex train" in text
    for part in ("# Environment: ", "# Resume: ", "RESTARTS"):
        assert part in text, part


def test_slurm_reads_its_options_before_any_command():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options == list(range(1, len(options) + 1))  # below #! and without a gap
    given = {}
    for i in options:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", lines[i])
        assert match, lines[i]
        given[match[1]] = match[2]
    assert given["ntasks-per-node"] == given["gpus-per-node"]  # one process each
    assert re.fullmatch(r"B:USR1@\d+", given["signal"])
    assert "requeue" in given and given["open-mode"] == "append"


def pretend(folder, **programs):
    """An environment with these shell scripts on the PATH; each logs its arguments."""
    for name, body in programs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        token = 'echo "NAME $MOEX_JOB_TOKEN" >>"$CALLS.tokens"'
        token = token.replace("NAME", name)  # in one line: programs run at once
        text = f'#!/bin/bash\necho {name} "$@" >>"$CALLS"\n{token}\n{body}\n'
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    return os.environ | {
        "CALLS": str(folder / "calls"),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(folder),
    }


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def tokens(folder):
    """The name of each program that ran, and the secret that it was given."""
    lines = (folder / "calls.tokens").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ")) for line in lines]


def has_a_secret(folder, *programs):
    """Whether the processes of moex that were started had one secret, and no other."""
    (token,) = {token for name, token in tokens(folder) if name in programs}
    return re.fullmatch("[0-9a-f]{32}", token) is not None


def token_in(folder):
    """The secret of a job: the last one that a program was given."""
    return [token for _, token in tokens(folder) if token][-1]


@pytest.mark.parametrize(
    ("code", "restarts", "exit_code", "requeued"),
    [(0, 0, 0, False), (2, 0, 2, False), (1, 0, 0, True), (137, 10, 137, False)],
)
def test_slurm_queues_again_what_failed(tmp_path, code, restarts, exit_code, requeued):
    env = pretend(tmp_path, srun=f"exit {code}", scontrol="", scancel="")
    env["SLURM_RESTART_COUNT"] = str(restarts)
    script = ROOT / "launch" / "slurm.sbatch"
    done = subprocess.run(["bash", script, *ARGS], env=env, timeout=30)
    assert done.returncode == exit_code
    srun, *rest = calls(tmp_path)
    assert srun == " ".join(["srun --kill-on-bad-exit=1 moex train", *ARGS])
    assert rest == (["scontrol requeue 7"] if requeued else [])
    assert has_a_secret(tmp_path, "srun")


def test_slurm_trains_one_point_of_a_sweep_in_each_job_of_an_array(tmp_path):
    env = pretend(tmp_path, srun="", scontrol="", scancel="")
    env["SLURM_ARRAY_TASK_ID"] = "3"
    script = ROOT / "launch" / "slurm.sbatch"
    done = subprocess.run(["bash", script, "--sweep", "seed=0,1"], env=env, timeout=30)
    assert done.returncode == 0
    assert calls(tmp_path) == [
        "srun --kill-on-bad-exit=1 moex train --sweep seed=0,1 --sweep-index=3"
    ]


def test_slurm_saves_and_queues_again_when_the_time_is_up(tmp_path):
    wait = "echo $$ >step; trap 'exit 0' TERM; for ((;;)); do sleep 0.1; done"
    env = pretend(tmp_path, srun=wait, scancel="kill -TERM $(cat step)", scontrol="")
    env["SLURM_RESTART_COUNT"] = "99"  # the limit is about failures
    process = subprocess.Popen(
        ["bash", ROOT / "launch" / "slurm.sbatch", *ARGS], env=env
    )
    try:
        for _ in range(200):
            if (tmp_path / "step").is_file() and (tmp_path / "step").read_text():
                break
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
    assert calls(tmp_path)[1:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]


SSH = 'while [ "$1" = -o ]; do shift 2; done\nexport NODE=$1; shift; eval "$@"'


@pytest.mark.parametrize(
    ("moex", "code", "starts"),
    [
        ("exit 0", 0, 2),
        ("exit 2", 2, 2),
        # One host fails once, and the other ends because of it.
        ("[ -e once.$NODE ] || { touch once.$NODE; exit 1; }", 0, 4),
        ("exit 3", 3, 4),
    ],
)
def test_ssh_starts_one_process_on_each_host(tmp_path, moex, code, starts):
    env = pretend(tmp_path, ssh=SSH, sleep="", **{".venv/bin/moex": moex})
    env |= {"HOSTS": "a b", "FOLDER": str(tmp_path), "RESTARTS": "1", "PORT": "81"}
    env |= {"HOME": str(tmp_path)}
    env.pop("MOEX_JOB_TOKEN", None)
    args = [*ARGS, "--workdir=a b"]
    done = subprocess.run(
        ["bash", ROOT / "launch" / "ssh.sh", *args], env=env, timeout=60
    )
    assert done.returncode == code
    started = [c for c in calls(tmp_path) if c.startswith(".venv/bin/moex")]
    assert len(started) == starts
    assert has_a_secret(tmp_path, ".venv/bin/moex")
    assert not any(token_in(tmp_path) in call for call in calls(tmp_path))
    assert sorted(started[:2]) == [
        f".venv/bin/moex train {' '.join(args)} --coordinator=a:81 --num-processes=2 "
        f"--process-id={i}"
        for i in range(2)
    ]


STOPPED = "echo stopped at step 4 of 9: checkpoint saved"


@pytest.mark.parametrize(("restarts", "code", "starts"), [(1, 0, 4), (0, 143, 2)])
def test_ssh_starts_again_what_was_asked_to_stop(tmp_path, restarts, code, starts):
    """A host got SIGTERM: all save and exit with 0, which is no end of the run."""
    moex = f'[ -e once.$NODE ] || {{ touch once.$NODE; [ "$NODE" = b ] || {STOPPED}; }}'
    env = pretend(tmp_path, ssh=SSH, sleep="", **{".venv/bin/moex": moex})
    env |= {"HOSTS": "a b", "FOLDER": str(tmp_path), "RESTARTS": f"{restarts}"}
    env |= {"HOME": str(tmp_path)}
    script = ["bash", ROOT / "launch" / "ssh.sh", *ARGS]
    done = subprocess.run(script, env=env, timeout=60)
    assert done.returncode == code
    assert sum(c.startswith(".venv/bin/moex") for c in calls(tmp_path)) == starts


# What a pod of xpk runs with its --command.
XPK = """
[ "$2" = create ] || exit 0
for word in "$@"; do
  case "$word" in --command=*) command=${word#--command=} ;; esac
done
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
eval "($command) & PID=\\$!;"
while kill -0 $PID 2>/dev/null;
    do sleep 0.1;
done;
wait $PID;
"""
WAITS = "trap 'exit {}' TERM; touch started; for ((;;)); do /bin/sleep 0.1; done"


@pytest.mark.parametrize(
    ("moex", "stop", "code"),
    [
        *((f"exit {code}", False, code) for code in (0, 1, 2, 10)),
        *((WAITS.format(0), True, 42), (WAITS.format(3), True, 3)),
    ],
)
def test_a_pod_that_was_asked_to_stop_is_started_again(tmp_path, moex, stop, code):
    env = pretend(tmp_path, xpk=XPK, moex=moex)
    env |= {"CLUSTER": "c", "TYPE": "v5e-16", "IMAGE": "i"}
    process = subprocess.Popen(
        ["bash", ROOT / "launch" / "gke_xpk.sh", "first", *ARGS], env=env, cwd=tmp_path
    )
    try:
        while stop and not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        if stop:
            process.send_signal(signal.SIGTERM)  # the script has become xpk
        assert process.wait(timeout=20) == code
    finally:
        process.kill()
    delete, create, train = calls(tmp_path)
    assert delete.startswith("xpk workload delete --cluster=c --workload=first")
    # Beside 42 and 127 to 255: of an error, and of the others when a host is lost.
    assert "--restart-on-exit-codes=1 " in create
    assert train == f"moex train --distributed {' '.join(ARGS)}"
    assert has_a_secret(tmp_path, "moex")


# One slice, in the state that the file says; `ssh` runs the command here.
GCLOUD = """
case "$*" in
  *describe*) cat state ;;
  *create*) echo ACTIVE >state ;;
  *delete*) rm state ;;
  *ssh*) for word in "$@"; do
           case "$word" in --command=*) eval "${word#--command=}" ;; esac
         done ;;
esac
"""


@pytest.mark.parametrize(
    ("setups", "code", "starts"),
    [
        ("ok", 0, 1),
        ("bad", 1, 0),  # the first time: a mistake
        # Stopped, preempted while it is prepared, and then a new one.
        ("ok bad ok", 0, 2),
    ],
)
def test_a_slice_that_goes_while_it_is_prepared_is_replaced(
    tmp_path, setups, code, starts
):
    (tmp_path / "moex" / ".venv" / "bin").mkdir(parents=True)
    stops = len(setups.split()) > 1
    moex = f"[ -e ../once ] || {{ touch ../once; {STOPPED if stops else 'true'}; }}"
    env = pretend(tmp_path, gcloud=GCLOUD, sleep="")
    pretend(tmp_path / "moex", **{".venv/bin/moex": moex})
    (tmp_path / "setups").write_text("\n".join(setups.split()) + "\n")
    setup = "now=$(head -1 setups); sed -i 1d setups; [ $now = ok ] || rm -f state; "
    env |= {"HOME": str(tmp_path), "SETUP": setup + "[ $now = ok ]", "NAME": "n"}
    env |= {"ZONE": "z", "TYPE": "t", "WORKDIR": "w"}
    script = ["bash", ROOT / "launch" / "queued_resources.sh", *ARGS]
    done = subprocess.run(script, env=env, cwd=tmp_path, timeout=60)
    assert done.returncode == code
    trained = [c for c in calls(tmp_path) if c.startswith(".venv/bin/moex")]
    assert len(trained) == starts
    assert not starts or has_a_secret(tmp_path, ".venv/bin/moex")
