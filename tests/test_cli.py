"""The command line: help, one clear line per mistake, and what the verbs print."""

import io
import json
import pathlib
import re
import shutil
import sys
import types
import warnings

import pytest

from moex import __version__, cli, commands, process
from moex.config.base import ConfigWarning, to_dict
from moex.moe.routers.expert_choice import ExpertChoice
from moex.runs import score
from moex.serve import text as serve_text
from moex.train.job import Job
from tests import runs


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    runs.write_trained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return folder / "run"


@pytest.fixture
def moex(folder, capsys):
    """`moex(*args)` with `--config` last where asked; the output."""

    def moex(*args, cfg=False):
        capsys.readouterr()
        extra = [f"--config={folder / 'tiny.py'}"] if cfg else []
        cli.main([str(a) for a in args] + extra)
        return capsys.readouterr().out

    return moex


@pytest.fixture
def mistake(moex, capsys, monkeypatch):
    """The one line of an error, without its `moex: error:`; nothing may be built."""

    def never(*args, **kwargs):
        raise AssertionError("reached the part that compiles")

    for owner, name in ((Job, "init_state"), (Job, "train_step"), (score, "eval_step")):
        monkeypatch.setattr(owner, name, never)

    def mistake(*args, code=2, cfg=True):
        with pytest.raises(SystemExit) as stop:
            moex(*args, cfg=cfg)
        assert stop.value.code == code
        err = capsys.readouterr().err
        assert err.startswith("moex: error: "), err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err.removeprefix("moex: error: ").strip()

    return mistake


# Help.


@pytest.mark.parametrize("verb", commands.names())
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "train": ("--workdir", "--dry-run", "--config.a.b=value", "SIGTERM", "--sweep"),
        "config": ("--json", "--config=FILE"),
        "params": ("--json", "--like", "--match", "--config=FILE"),
        "plan": ("--topology", "--compile", "--json", "--config=FILE"),
        "compare": ("--json", "--out", "--assert-equal", "95 % intervals"),
        "report": ("--trace", "--compare-trace", "--token", "--out", "no network"),
        "eval": (
            "run directory",
            "--sequences",
            "--json",
            "--config.data...",
            "--data",
        ),
        "trace": ("--out", "--tokens", "--step", "--logits", "--config.d", "--data"),
        "analyse": ("--compare", "--token", "--out", "--json"),
        "generate": ("--prompt", "--temperature", "--top-k", "--top-p", "--seed"),
        "convert": ("--to", "--workdir", "--group", "--latent", "--ops", "--whiten"),
        "import-hf": ("--out", "--tokenizer", "--doc-token", "--config.a.b=value"),
        "export-hf": ("--out", "--dtype", "names the difference"),
        "data": ("prepare", "inspect", "--example", "--config=FILE"),
    }
    for word in expected.get(verb, ()):
        assert word in text, word


def test_help_lists_all_verbs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {verb}\s", text, re.M) for verb in commands.names())


# Mistakes in a config: the field, its value, what is allowed, the nearest name.

MOE = "config.model.layers[1].pattern[0]"
FIELDS = [
    ("config.step=3", "config.step: no such field. Did you mean 'steps'?"),
    ("config.optim.lrr=1", "config.optim.lrr: no such field. Did you mean 'lr'?"),
    (
        "config.model.layer[0].repeat=2",
        "config.model.layer: no such field. Did you mean 'layers'? ",
    ),
    (
        f"{MOE}.router.kk=1",
        f"router.kk: no such field. Did you mean 'k'? {MOE}.router (TopK) has k, ",
    ),
    (
        f"{MOE}.router.bias_rat=1",
        "router.bias_rat: no such field. Did you mean 'bias_rate'? ",
    ),
    ("config.loss.z=big", "config.loss.z = 'big': must be float or Schedule."),
    (f"{MOE}.router.bias_rate=-1", f"{MOE}.router.bias_rate = -1.0: must be >= 0."),
    ("config.loss.balance_scope=steps", "Did you mean 'step'?"),
    ("config.model.layers[1].residual=relased", "Did you mean 'released'?"),
    (
        "config.log.sample_prompts[0]=x",
        "one value of a tuple cannot be set alone; set all of it, such as --config.lo",
    ),
    ("config.model.layers[7].repeat=2", "config.model.layers[7]: no such entry;"),
    ("config.steps.every=2", "config.steps.every: no such field. config.steps has no"),
    ("config.steps=3.5", "config.steps = '3.5': must be int."),
    ("config.steps=many", "config.steps = 'many': must be int."),
    ("config.optim.lr=fast", "config.optim.lr = 'fast': must be float."),
    ("config.optim.lr=nan", "config.optim.lr = nan: must be"),
    ("config.optim.lr=inf", "config.optim.lr = inf: must be finite"),
    ("config.optim.clip=0", "config.optim.clip = 0.0: must be above 0, or None"),
    ("config.model.tied_embeddings=maybe", "embeddings = 'maybe': must be bool."),
    ("config.optim=fast", "config.optim = 'fast': is a whole config; set one of its"),
    ("config.steps=None", "config.steps = 'None': must be int."),
    ("config.steps=0", "config.steps = 0: must be at least 1."),
    ("config.seed=-1", "config.seed = -1: must be in [0, 2**31)."),
    ("config.batch_size=-4", "config.batch_size = -4: must be at least 1."),
    ("config.grad_accum=3", "batch_size = 4: must be a multiple of grad_accum = 3"),
    ("config.seq_len=0", "config.seq_len = 0: must be at least 1."),
    ("config.eval.overlap=32", "config.eval.overlap = 32: must be below seq_len = 32."),
    ("config.optim.warmup_steps=9", "warmup_steps = 9: must be at most steps = 8."),
    ("config.precision=float8", "must be one of 'auto', 'float32', 'bfloat16'."),
    ("config.optim.schedule=cosin", "Did you mean 'cosine'?"),
    ("config.remat=all", "config.remat = 'all': must be one of 'none', 'dots', 'full'"),
    ("config.scan_layers=maybe", "config.scan_layers = 'maybe': must be bool."),
    ("config.kernels=cuda", "config.kernels = 'cuda': must be one of 'auto', "),
    ("config.kernels=triton", "config.kernels = 'triton': must be 'auto' or have one"),
    ("config.mesh.fsdp=3", "config.mesh: the axes (data=-1, fsdp=3, expert=1, "),
    (f"{MOE}.num_experts=0", f"{MOE}.num_experts = 0: must be at least 1."),
    (
        f"{MOE}.router.k=5",
        f"{MOE}.router.k = 5: must be at most num_experts = 4; lower k",
    ),
    (
        "config.model.dim=33",
        "config.model.attention.heads = 2: must be so many that dim = 33 is heads",
    ),
    ("config.model.vocab=100", "config.model.vocab = 100: must be at least the vocabu"),
    ("config.loss.z=-1", "config.loss.z = -1.0: must be >= 0."),
    (
        "config.optim.lr_factors=(('ruoter',0.1),)",
        "pattern 'ruoter' matches no parameter. Did you mean 'router'?",
    ),
    # What the last step would stop at.
    ("config.log.sample_tokens=10000000", "generate needs max_new_tokens <= 131,072"),
    ("config.init_from=", "--config.init_from = '': must name a file or folder"),
    ("config.init_from=/nowhere", "config.init_from = '/nowhere': /nowhere: not a run"),
]


@pytest.mark.parametrize(("override", "message"), FIELDS, ids=[f for f, _ in FIELDS])
def test_a_field_that_is_wrong(mistake, tmp_path, override, message):
    workdir = tmp_path / "run"
    assert message in mistake("train", f"--workdir={workdir}", f"--{override}")
    assert not (workdir / "config.json").exists()


def test_samples_of_no_prompt_are_refused_before_training(mistake):
    overrides = ("--config.log.sample_prompts=()", "--config.log.sample_tokens=2")
    said = mistake("train", "--dry-run", *overrides)
    assert "config.log.sample_prompts = (), sample_tokens = 2: " in said
    assert "at least one prompt" in said and "= 0 writes no samples" in said


@pytest.mark.parametrize("verb", ["config", "data prepare", "train --dry-run"])
def test_every_verb_checks_fields(mistake, verb):
    error = mistake(*verb.split(), "--config.sed=1")
    assert error.startswith("config.sed: no such field. Did you mean 'seed'?")


# Mistakes in data.


def data_of(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    return f"--config.data.sources[0].paths=({str(path)!r},)"


def test_an_empty_file(mistake, tmp_path):
    error = mistake("train", f"--workdir={tmp_path / 'run'}", data_of(tmp_path, b""))
    assert "config.data.sources[0].paths: the file" in error
    assert "text.txt is empty" in error


def test_a_file_that_is_missing(mistake, tmp_path):
    missing = f"--config.data.sources[0].paths=('{tmp_path}/*.text',)"
    error = mistake("train", f"--workdir={tmp_path / 'run'}", missing)
    assert (
        f"config.data.sources[0].paths[0] = '{tmp_path}/*.text': no such file" in error
    )


def test_a_file_that_is_not_utf8(mistake, tmp_path):
    bad = data_of(tmp_path, b"good text\n\nbad \xff text")
    error = mistake("train", f"--workdir={tmp_path / 'run'}", bad)
    assert "text.txt is not UTF-8 text: byte 0xff at offset 15" in error


def test_a_file_shorter_than_a_sequence(mistake, tmp_path):
    short = data_of(tmp_path, b"short")
    error = mistake(
        "train",
        f"--workdir={tmp_path / 'run'}",
        short,
        "--config.data.sources[0].holdout=0.0",
    )
    assert "config.data.sources[0] ('text'): seq_len=32 is longer than the" in error


def test_an_option_that_the_chosen_router_does_not_have(mistake, folder, tmp_path):
    path = tmp_path / "other.py"
    text = (folder / "tiny.py").read_text()
    text = text.replace("TopK(k=2, bias_rate=0.01)", "TopP(p=0.5, kmax=2)")
    path.write_text(text.replace(".topk import TopK", ".topp import TopP"))
    error = mistake("config", f"--config={path}", cfg=False)
    assert "TopP has no field 'kmax'. Did you mean 'k_max'? It has p, k_max, " in error


def test_a_caution_is_one_line_and_no_error(folder, tmp_path, capsys):
    path = tmp_path / "other.py"
    text = (folder / "tiny.py").read_text()
    text = text.replace("TopK(k=2, bias_rate=0.01)", "TopP(p=0.5)")
    path.write_text(text.replace(".topk import TopK", ".topp import TopP"))
    with warnings.catch_warnings():
        warnings.simplefilter("default", ConfigWarning)
        cli.main(["train", f"--config={path}", "--dry-run"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moex: warning: config.model.layers[1].pattern[0].router.k_")


def test_generation_with_expert_choice(mistake, folder, tmp_path, monkeypatch):
    cfg = runs.config(folder)
    cfg.model.layers[1].pattern[0].router = ExpertChoice(k=1.0)
    loaded = types.SimpleNamespace(cfg=cfg)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(cfg)))
    monkeypatch.setattr(serve_text, "load_run", lambda *args, **options: loaded)
    error = mistake("generate", str(tmp_path), "--prompt=a", cfg=False)
    assert (
        "layers[1].pattern[0].router is ExpertChoice, which chooses tokens by" in error
    )


def with_tokenizer(folder, tmp_path, kind, argument):
    """`--config` of the tiny run with another tokenizer."""
    body = (folder / "tiny.py").read_text()
    call = f"{kind}({argument})"
    body += f"\n\nfrom moex.data.tokenizer import {kind}\n_tiny = get_config\n\n\n"
    body += "def get_config(arg=''):\n    cfg = _tiny()\n"
    body += f"    cfg.data.tokenizer = {call}\n    return cfg\n"
    path = tmp_path / "other.py"
    path.write_text(body)
    return f"--config={path}"


def test_a_tokenizer_that_is_missing(mistake, folder, tmp_path):
    other = with_tokenizer(folder, tmp_path, "TokenizerFile", "path='/no/such.json'")
    error = mistake("train", f"--workdir={tmp_path / 'run'}", other, cfg=False)
    assert error == "config.data.tokenizer.path = '/no/such.json': no such file."


# Mistakes on the command line.

CFG = "--config=configs/quickstart.py"
LINES = [
    (("trian",), "'trian': no such command. Did you mean 'train'? Commands are"),
    (("--verbose",), "the following arguments are required: COMMAND"),
    (("train", "--worksdir=x"), "--worksdir=x. Did you mean '--workdir'? See `moex"),
    (("train", "--steps=3"), "unrecognized arguments: --steps=3. See `moex train"),
    (("train", CFG, "--steps=3"), "--steps=3. Did you mean '--config.steps'? See"),
    (("train", "quickstart"), "quickstart. Did you mean '--config=quickstart'? See"),
    (("params", "nothing"), "unrecognized arguments: nothing. See `moex params"),
    (("train", CFG, "--lr=3"), "--lr=3. Did you mean '--config.optim.lr'? See"),
    (("eval", "/nowhere", CFG, "--zzz"), "unrecognized arguments: --zzz. See `moex"),
    (("train",), "--workdir: missing; give a folder, such as runs/first."),
    (("train", "--workdir=x"), "such as --config=quickstart. Configs of moex are deep"),
    (("config", "--list", "--config=quickstart"), "--list: takes no --config=quickst"),
    (("config", "--config=quikstart:router=topp"), "Did you mean 'quickstart'? Config"),
    (("config", "--config=regression:a=1"), ":a=1: this config takes no argument."),
    (("config", "--config=base"), "there is no file and no config of moex of this na"),
    (("config", "--config=here/quickstart.py"), "Did you mean 'quickstart'?"),
    (("config", "--config"), "--config: a value is missing; write --config=VALUE."),
    (("config", "--config=a.py", "--config=b.py"), "--config is given 2 times"),
    (("config", "--config=configs/quikstart.py"), "Did you mean 'quickstart.py'?"),
    (("eval",), "the following arguments are required: run"),
    (("eval", "/nowhere"), "/nowhere: not a run directory (there is no /nowhere/con"),
    (("eval", "/nowhere", "--limit=5"), "--limit: is for --tasks."),
    (("eval", "/nowhere", "--sequences=0"), "--sequences: must be at least 1, not 0"),
    (("generate", "/nowhere"), "/nowhere: not a run directory"),
    (("generate", "/nowhere", "--top-k=few"), "--top-k: must be a whole number"),
    (("generate", "/nowhere", "--config.steps=1"), "generate takes the config of the"),
    (("generate", "/nowhere", "--seed=-1"), "--seed = -1: must be in [0, 2**31)"),
    (("data", "show"), "invalid choice: 'show'"),
]


@pytest.mark.parametrize(
    ("args", "message"), LINES, ids=[" ".join(a) for a, _ in LINES]
)
def test_a_command_that_is_wrong(mistake, monkeypatch, args, message):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert message in mistake(*args, cfg=False)


def test_the_command_alone_prints_help_and_its_version(capsys, monkeypatch):
    for owner, name in ((warnings, "showwarning"), (sys, "unraisablehook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for args, said in (
        ([], "usage: moex"),
        (["--version"], f"moex {__version__}\n"),
        (["--print-completion=zsh"], "#compdef moex"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        assert ended.value.code == 0 and said in capsys.readouterr().out


def test_a_prompt_from_standard_input_is_utf8(mistake, monkeypatch, tmp_path):
    (tmp_path / "prompt").write_bytes(b"the \xff")
    with open(tmp_path / "prompt", encoding="ascii") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        said = mistake("generate", "/nowhere", cfg=False)
    assert "--prompt: standard input is not UTF-8 text: byte 0xff at offset 4" in said


def test_lines_do_not_fail_in_a_terminal_of_another_encoding(monkeypatch):
    for owner, name in ((warnings, "showwarning"), (sys, "unraisablehook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    process.quiet()
    print("caf\u00e9 \udcff", flush=True)
    assert stream.buffer.getvalue() == b"caf\\xe9 \\udcff\n"


def get_config(body):
    return f"def get_config(arg=''):\n    {body}\n"


BROKEN = {
    get_config("return {}[1]"): "KeyError: 1",
    get_config("return 3"): "get_config must return an ml_collections.ConfigDict, not",
    get_config("return int(None)"): "TypeError: int() argument must be a string",
    get_config("from moex.nn.mlp import Dense; return Dense()"): (
        "Dense needs a value for 'hidden' (broken.py, line"
    ),
    get_config("open('/no/such')"): "No such file or directory: '/no/such'",
    "import nothing_of_that_name\n": "No module named 'nothing_of_that_name'",
    "def get_config(:\n": "SyntaxError",
    "x = 1\n": "AttributeError: module",
}


@pytest.mark.parametrize("body", BROKEN)
def test_a_config_file_that_is_broken(mistake, tmp_path, monkeypatch, body):
    # ml_collections loads every config file under this name, and on top of the last.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    path = tmp_path / "broken.py"
    path.write_text(body)
    error = mistake("config", f"--config={path}", cfg=False)
    assert error.startswith(f"--config={path}: ")
    assert BROKEN[body] in error


def test_the_argument_of_a_config_file(mistake):
    file = f"{runs.ROOT}/configs/moe_1b.py:data=stdlb"
    assert mistake("config", f"--config={file}", cfg=False) == (
        f"--config={file}: config argument 'data=stdlb': must be one of text, stdlib. "
        "Did you mean 'stdlib'?"
    )


def test_a_folder_that_cannot_be_written(mistake, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file / "run", file, pathlib.Path("/proc/run")):
        error = mistake("train", f"--workdir={workdir}")
        assert error.startswith(f"--workdir={workdir}: cannot be written (")


@pytest.mark.parametrize("arg", ["--workdir={new}", "--dry-run"])
def test_nothing_to_train_on(mistake, tmp_path, arg):
    scored = "--config.data.sources[0].holdout=1"
    error = mistake("train", arg.format(new=tmp_path / "run"), scored)
    assert error.startswith("config.data.sources[0].holdout = 1.0: must be below 1 for")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Mistakes with a run that is there.


@pytest.mark.parametrize("verb", ["eval", "trace --out={new}"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data={no}"], "--data[0] = '{no}': no such file"),
        (["--data={text}", "--data={no}"], "--data[1] = '{no}': no such file"),
        (["--data={empty}"], "--data: the file {empty} is empty; remove it."),
        (["--data={text}", "--data={text}"], "--data = '{text}': is given twice."),
        (
            ["--data={text}", "--config.data.sources[0].holdout=0.5"],
            "--config.data.sources[0].holdout: --data takes the place of config.data",
        ),
        (["--data={text}", "--config={cfg}"], "--config: --data takes the place of"),
    ],
)
def test_given_data_that_is_wrong(
    mistake, trained, folder, tmp_path, verb, args, message
):
    names = {n: str(tmp_path / f"{n}.txt") for n in ("text", "empty", "no")}
    names |= {"new": str(tmp_path / "new.parquet"), "cfg": str(folder / "tiny.py")}
    for name, text in (("text", "some text"), ("empty", "")):
        (tmp_path / f"{name}.txt").write_text(text)
    verb, *out = verb.format(**names).split()
    args = [arg.format(**names) for arg in args]
    error = mistake(verb, trained, *out, *args, cfg=False)
    assert error.startswith(message.format(**names))
    assert not (tmp_path / "new.parquet").exists()


def test_given_data_and_tasks(mistake, trained):
    error = mistake("eval", trained, "--tasks=a.yaml", "--data=a.txt", cfg=False)
    assert error == "--data: --tasks takes the config of the run; see --limit."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "config.model.layers[1].pattern[0].num_experts=8",
            "config.model.layers[1].pattern[0].num_experts = 4, not 8; use another",
        ),
        ("config.model.layers[0].repeat=2", "model.layers[0].repeat = 1, not 2"),
        ("config.optim.rule.b1=0.8", "config.optim.rule.b1 = 0.9, not 0.8"),
    ],
)
def test_a_run_of_another_architecture(mistake, trained, override, message):
    error = mistake("train", f"--workdir={trained}", f"--{override}")
    assert error.startswith(f"{trained} holds a run with config.")
    assert message in error
    assert f"--config.init_from={trained}" in error


def test_a_run_of_another_vocabulary(mistake, folder, trained, tmp_path):
    other = with_tokenizer(folder, tmp_path, "Bpe", "vocab=300")
    error = mistake("train", f"--workdir={trained}", other, cfg=False)
    assert "another tokenizer (vocabulary 257, here 300)" in error
    branch = f"--config.init_from={trained}"
    error = mistake("train", f"--workdir={tmp_path / 'run'}", other, branch, cfg=False)
    assert "has another tokenizer (vocabulary 257, here 300)" in error


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_run_without_a_checkpoint(mistake, trained, tmp_path, verb):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    options = ["--prompt=a"] if verb == "generate" else []
    shutil.rmtree(workdir / "checkpoints")
    error = mistake(verb, workdir, *options, cfg=False)
    assert error == f"{workdir}: the run has no checkpoint yet."
    (workdir / "config.json").write_text("{")
    assert "config.json: is not JSON: Expecting" in mistake(
        verb, workdir, *options, cfg=False
    )


# Paths that are empty: they would mean the current folder.

EMPTY = (
    ("train", "--workdir="),
    ("train", "--workdir", " "),
    ("train", "--workdir=x", "--config.data.sources[0].paths=('',)"),
    ("eval", ""),
    ("generate", ""),
    ("report", ""),
    ("report", "x", "--out="),
    ("compare", "x", ""),
    ("compare", "x", "y", "--out="),
    ("trace", "x", "--out="),
    ("analyse", ""),
    ("place", ""),
    ("place", "x", "--devices=2", "--out="),
    ("convert", "x", "--to=moe", "--workdir="),
    ("import-hf", "", "--out=x"),
    ("import-hf", "x", "--out="),
    ("import-hf", "x", "--out=y", "--tokenizer="),
    ("export-hf", "x", "--out="),
)


@pytest.mark.parametrize("args", EMPTY, ids=" ".join)
def test_an_empty_path_is_refused(mistake, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    error = mistake(*args, cfg=args[0] == "train")
    assert "must name a file or folder; the one you are in is '.'" in error
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_place_on_a_network_is_refused(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = mistake("train", "--workdir=gs://bucket/run")
    assert "--workdir: must be on this machine" in error and "gs://bucket/run" in error
    assert not (tmp_path / "gs:").exists()
