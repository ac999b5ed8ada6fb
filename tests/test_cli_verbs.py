"""What the verbs do with a trained run."""

import json

import numpy as np
import pytest

from moex import cli
from moex.config import base as config
from moex.runs import sweep
from moex.runs.directory import RunDir
from moex.runs.keys import RUN_KEYS
from moex.runs.open import load_run
from moex.serve.likelihood import continuation_scores
from moex.train.job import make_job
from tests import runs


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    runs.write_trained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return folder / "run"


@pytest.fixture
def moex(capsys):
    """`moex(*args)`: what it prints."""

    def moex(*args):
        capsys.readouterr()
        cli.main([str(a) for a in args])
        return capsys.readouterr().out

    return moex


def final(workdir):
    return runs.records(workdir, "eval")[-1]


# config.


def test_config_prints_every_field(moex, folder):
    text = moex("config", f"--config={folder / 'tiny.py'}", "--config.optim.lr=0.5")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "config:"
    assert "lr = 0.5" in lines
    assert "num_experts = 4" in lines
    assert "bias_rate = 0.01" in lines
    for key in RUN_KEYS:
        assert any(line.startswith((f"{key} =", f"{key}:")) for line in lines), key


def test_config_as_json_is_the_config(moex, folder):
    overrides = ("optim.lr_factors=(('router',0.1),)", "eval.sequences=None")
    text = moex(
        "config",
        "--json",
        f"--config={folder / 'tiny.py'}",
        *(f"--config.{o}" for o in overrides),
    )
    made = config.from_dict(json.loads(text))
    expected = runs.config(folder, *overrides)
    assert set(made) == set(RUN_KEYS)
    for key in RUN_KEYS:
        assert made[key] == expected[key], key
    assert made.eval.sequences is None


def test_the_saved_config_is_the_resolved_one(folder, trained):
    saved = RunDir(trained).config()
    job = make_job(runs.config(folder), log=lambda line: None)
    assert config.to_dict(saved) == config.to_dict(job.cfg)
    assert saved.model.vocab == 257


# data.


@pytest.mark.thorough
def test_a_run_on_own_files_goes_on_with_them(moex, folder, tmp_path):
    """By the same command, by its folder alone, and by its config without --data."""
    own, run = runs.write_corpus(tmp_path / "own.txt", seed=1), tmp_path / "run"
    config = f"--config={folder / 'tiny.py'}"
    options = (f"--workdir={run}", "--config.data.sources.0.holdout=0.1")
    flags = (config, f"--data={own}")
    moex("train", *flags, *options, "--config.steps=2")
    (source,) = RunDir(run).config().data.sources
    assert (source.paths, source.holdout) == ((str(own),), 0.1)
    for steps, given in enumerate([flags, (), (config,)], start=3):
        kept = options if given == flags else options[:1]
        said = moex("train", *given, *kept, f"--config.steps={steps}")
        assert f"resuming {run} after step {steps - 1}" in said
        assert "changed config: config.data" not in said
        told = f"goes on with the data that it was started with: --data={own}"
        assert (told in said) == (given == (config,))
        assert RunDir(run).config().data.sources == (source,)
    scored = json.loads(moex("eval", run, "--json"))
    assert list(scored["domains"]) == ["own"] and scored["bytes"] > 500


def test_a_sweep_on_own_files(moex, folder, tmp_path, monkeypatch):
    """Its points get the flag, and its sweep.json has the files."""
    own, made = runs.write_corpus(tmp_path / "own.txt"), tmp_path / "sweep"
    commands = []
    monkeypatch.setattr(
        sweep.Runner, "run", lambda self, points, flags: commands.append(flags) or {}
    )
    config = f"--config={folder / 'tiny.py'}"
    moex(
        *("train", config, f"--data={own}", f"--workdir={made}", "--sweep", "seed=1,2")
    )
    ((*_, last),) = commands
    assert last == f"--data={own}"
    base = json.loads((made / "sweep.json").read_text())["config"]
    assert base["data"]["given"] == [str(own)]


def test_data_prepare_and_inspect(moex, folder):
    arg = f"--config={folder / 'tiny.py'}"
    moex("data", "prepare", arg)
    again = moex("data", "prepare", arg)  # it is there
    assert again.startswith("data: ") and "is prepared: sequences: " in again
    assert len(again.splitlines()) == 1
    text = moex("data", "inspect", arg, "--example=0")
    assert "corpus" in text
    assert "tokenizer: 257 tokens" in text
    assert "training sequence 0" in text
    assert "      1         0      1      1  <doc> -> " in text


# eval.


def test_eval_gives_the_final_figure_of_the_training(moex, trained):
    result = json.loads(moex("eval", trained, "--json"))
    expected = final(trained)
    assert result["step"] == 8
    for name in ("nll", "bits_per_byte", "tokens", "bytes"):
        assert result[name] == expected[name]
    assert result["perplexity"] == pytest.approx(np.exp(expected["nll"]))
    assert result["domains"] == {"corpus": pytest.approx(expected["nll"], rel=1e-6)}


def test_eval_for_people(moex, trained):
    text = moex("eval", trained)
    assert f"loss           {final(trained)['nll']:.4f} nats per token" in text
    assert f"bits per byte  {final(trained)['bits_per_byte']:.4f}" in text
    assert "held-out tokens" in text


def test_eval_of_part_of_the_data(moex, trained):
    part = json.loads(moex("eval", trained, "--json", "--sequences=6"))
    assert part["tokens"] == 6 * 32
    assert runs.records(trained, "eval")[0]["tokens"] == 6 * 32


def test_eval_on_other_data(moex, trained, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"{i} QUITE OTHER TEXT {i * i}" for i in range(200)))
    paths = f"--config.data.sources[0].paths=({str(other)!r},)"
    result = json.loads(moex("eval", trained, "--json", paths))
    assert list(result["domains"]) == ["other"]
    assert result["nll"] > final(trained)["nll"] + 1
    whole = json.loads(
        moex("eval", trained, "--json", paths, "--config.data.sources[0].holdout=0.9")
    )
    assert whole["bytes"] > 5 * result["bytes"]


@pytest.mark.thorough
def test_eval_of_given_files_scores_all_of_them(moex, trained, tmp_path):
    """Every token and the end of each document, against the decoder's own figures."""
    texts = {"web": "the cat sees some bread.\n" * 5, "code": "x = [é for é in y]\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    files = [f"--data={tmp_path / name}.txt" for name in texts]
    result = json.loads(moex("eval", trained, *files, "--json"))
    run, nll = load_run(trained), {}
    for name, text in texts.items():
        doc = run.tokenizer.doc_id
        ids = [doc, *run.tokenizer.encode(text), doc]
        starts = range(0, len(ids) - 1, 32)  # a sequence sees nothing before its start
        pairs = [(ids[at : at + 1], ids[at + 1 : at + 33]) for at in starts]
        nll[name] = [-score for score, _ in continuation_scores(run, pairs)]
        texts[name] = len(ids) - 1
    assert result["tokens"] == sum(texts.values())
    for name, found in result["domains"].items():
        assert found == pytest.approx(sum(nll[name]) / texts[name], rel=1e-5)
    total = sum(map(sum, nll.values()))
    assert result["nll"] == pytest.approx(total / result["tokens"], rel=1e-5)
    said = moex("eval", trained, *files[:1])
    assert f"{texts['web']:,} tokens of {tmp_path / 'web'}.txt:" in said


def test_eval_with_more_context(moex, trained):
    """Every held-out target still counts once; only its context grows."""
    result = json.loads(moex("eval", trained, "--json", "--config.eval.overlap=16"))
    assert result["tokens"] == final(trained)["tokens"]
    assert result["bytes"] == final(trained)["bytes"]
    assert result["nll"] != final(trained)["nll"]


# generate.

SHORT = ("--max-new-tokens=12",)


def split(text):
    return text.removesuffix("\n").split("\n--------\n")


@pytest.mark.thorough
def test_generate_continues_prompts_of_any_length(moex, trained):
    prompts = ["the ", "the cat sees the red house.\nthe", "", "ünïcode"]
    args = [f"--prompt={p}" for p in prompts]
    together = split(moex("generate", trained, *SHORT, "--temperature=0", *args))
    assert len(together) == 4
    for prompt, text in zip(prompts, together, strict=True):
        assert text.startswith(prompt)
    alone = moex("generate", trained, *SHORT, "--temperature=0", args[0])
    assert alone == together[0] + "\n"


def test_generate_is_a_function_of_its_seed(moex, trained):
    args = ("generate", trained, *SHORT, "--prompt=the ")
    texts = [moex(*args, f"--seed={s}") for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_reads_standard_input(moex, trained, monkeypatch, tmp_path):
    prompt = tmp_path / "prompt"
    prompt.write_text("the ")
    with prompt.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        text = moex("generate", trained, *SHORT, "--seed=0")
    assert text == moex("generate", trained, *SHORT, "--seed=0", "--prompt=the ")


@pytest.mark.thorough
def test_the_likeliest_token_alone_is_greedy(moex, trained):
    args = ("generate", trained, *SHORT, "--prompt=the ")
    greedy = moex(*args, "--temperature=0")
    assert moex(*args, "--top-k=1", "--top-p=0.5", "--seed=3") == greedy


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--temperature=-1", "needs a finite temperature >= 0; got -1.0"),
        ("--temperature=nan", "needs a finite temperature >= 0; got nan"),
        ("--top-k=-2", "needs top_k >= 0; got -2"),
        ("--top-p=0", "needs 0 < top_p <= 1; got 0.0"),
        ("--top-p=1.5", "needs 0 < top_p <= 1; got 1.5"),
        ("--max-new-tokens=0", "--max-new-tokens: must be at least 1, not 0"),
    ],
)
def test_sampling_that_is_impossible(trained, capsys, arg, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", str(trained), "--prompt=a", arg])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("moex: error: ")
    assert err.count("\n") == 1
    assert message in err
