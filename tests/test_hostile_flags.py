"""Command lines that nobody means: one line with the flag, exit code 2."""

import pytest

from moex import cli, process
from moex.commands import config
from moex.config.base import ConfigError
from tests import runs

LONG = "9" * 5000
FILE = "--config=FILE"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("flags"))


@pytest.fixture
def refusal(config_file, capsys):
    """`refusal(*args)`: the line that is printed; FILE is a good config."""

    def run(*args):
        with pytest.raises(SystemExit) as exit_, runs.one_device():
            cli.main([arg.replace("FILE", str(config_file)) for arg in args])
        assert exit_.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("moex: error: ")
        assert said.count("\n") == 1
        assert len(said) < 2100
        return said

    return run


OVERRIDES = {
    "model.dim=": "config.model.dim = '': must be int",
    "model.dim=64.5": "config.model.dim = '64.5': must be int",
    f"model.dim={LONG}": "config.model.dim = '999",
    "steps=9223372036854775808": "must be at most 2,147,483,647",
    "model.dim=2147483648": "model.dim = 2147483648: must be at most",
    "model.layers[1].pattern[0].num_experts=9223372036854775808": "must be at most",
    "model.layers[99].repeat=2": "config.model.layers[99]: no such entry",
    "model.layers[-99].repeat=2": "config.model.layers[-99]: no such entry",
    "model.layers[1.repeat=2": "config.model.layers[1.repeat: not a field path",
    "model.layers[].repeat=2": "config.model.layers[].repeat: not a field path",
    "model..dim=3": "config.model.",
    "=3": "config.",
    "model.adapter=LoRa(rank=2)": "there is no config 'LoRa'. Did you mean 'LoRA'?",
    "optim.rule=AdamW(0.9)": "give each field its name, such as AdamW(b1=...).",
    "task=Distillation()": "config.task: Distillation needs a value for 'teacher'",
    "optim.rule=AdamW(b3=0.9)": "AdamW has no field 'b3'. It has b1, b2, eps.",
    "optim.rule=AdamW(b1=AdamW)": "config.optim.rule = 'AdamW': must be a literal or",
    "optim.rule=TopK(k=2)": "config.optim.rule = 'TopK': must be AdamW(...) or Muon(",
    "optim.rule=open('x')": "there is no config 'open'.",
    "optim.rule=().__class__()": "config.optim.rule = '().__class__()': is a whole co",
    f"optim.rule=AdamW(b1={'(' * 3000}": "is a whole config; set one of its fields",
    "model.layers.1.pattern.0.router=AdamW()": "router = 'AdamW': must be a router co",
    "optim.lr=nan": "config.optim.lr = nan: must be finite",
    "optim.lr=1e308": "config.optim.lr = 1e+308: must be 0, or between 1e-30 and 1e+30",
    "optim.lr=5e-324": "config.optim.lr = 5e-324: must be 0, or between",
    "optim.lr_factors=((('a',1)": "config.optim.lr_factors = ",
    "optim.lr_factors=" + "(" * 3000: "config.optim.lr_factors = ",
    "optim.lr_factors=(('a','b'),)": "must be tuple of tuple of str, float or Schedule",
    f"log.sample_prompts=({'1,' * 5000})": "must be tuple of str",
    "log.sample_tokens=10000000": "generate needs max_new_tokens <= 131,072",
    "log.tensorboard=maybe": "config.log.tensorboard = 'maybe': must be bool",
    "data.threads=1000000": "config.data.threads = 1000000: must be at most",
    "model.layers[1].repeat=2147483647": "layers[1].repeat = 2147483647: must be at m",
    "model.dim=2097152": "config.model.dim = 2097152: must be at most",
    "model.dim=1048576": "heads = 2: must be enough that a head of dim = 1048576 is at",
    "model.layers[0].pattern[0].hidden=2147483647": "config.model: parameters and opti",
    "model.vocab=2147483647": "config.model: parameters and optimizer take",
    "batch_size=8388608": "config.batch_size = 8388608: the float32 logits",
    "kernels=,": "config.kernels = ''",
    "__class__=3": "config.__class__: no such field",
}


@pytest.mark.parametrize("text", OVERRIDES, ids=range(len(OVERRIDES)))
def test_overrides(refusal, text):
    assert OVERRIDES[text] in refusal("train", FILE, f"--config.{text}", "--dry-run")


ARGUMENTS = {
    ("--profile=3:1",): "--profile=3:1: must be START:STOP",
    ("--profile=-1:2",): "--profile=-1:2: must be START:STOP",
    (f"--profile={LONG}:3",): "must be START:STOP",
    ("--sweep=",): "--sweep : must be FIELD=V1,V2",
    ("--sweep=seed=(1",): "--sweep ...=(1: ) is missing",
    ("--sweep=model.layers[=1,2",): "not a field path",
    ("--sweep=seed=0,1", f"--sweep-index={LONG}"): "must be a whole number of at most",
    ("--sweep=seed=0,1", "--sweep-index=-1"): "--sweep-index = -1: must be in 0 to 1",
    ("--num-processes=0",): "must be at least 1, not 0",
    ("--num-processes=99999999999",): "must be a whole number of at most 2,147,483,647",
    ("--join-timeout=1e3",): "must be a whole number of at most 2,147,483,647, not",
}


@pytest.mark.parametrize("args", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_of_train(refusal, args):
    assert ARGUMENTS[args] in refusal("train", FILE, "--dry-run", *args)


OTHERS = {
    ("train", "--config=" + "a" * 300, "--dry-run"): "Configs of moex are",
    ("train", "--config=/dev/null", "--dry-run"): "there is no file /dev/null",
    ("plan", FILE, f"--topology=h100:{LONG}"): "must be h100:GPUSxNODES",
    ("plan", FILE, "--topology=cpu:0"): "must be cpu:N, N devices",
    ("data", "inspect", FILE, "--example=-1"): "--example = -1: must be in 0 to",
    ("data", "inspect", FILE, "--example=2147483647"): "must be in 0 to",
    ("generate", "none", "--max-new-tokens=0"): "must be at least 1, not 0",
    ("generate", "none", f"--top-k={LONG}"): "must be a whole number of at most",
    ("eval", "none", "--sequences=-5"): "must be at least 1, not -5",
    ("eval", "none", "--tasks=a", "--limit=0"): "must be at least 1, not 0",
    ("trace", "none", "--out=a", "--step=1.5"): "must be a whole number of at most",
    ("convert", "a", "--to=moe", "--workdir=b", f"--experts={LONG}"): "whole number",
}


@pytest.mark.parametrize("args", OTHERS, ids=range(len(OTHERS)))
def test_arguments_of_other_commands(refusal, args):
    assert OTHERS[args] in refusal(*args)


def test_what_is_quoted_in_an_error_is_cut(capsys):
    with pytest.raises(SystemExit):
        process.fail(ConfigError("a\n" * 5000), 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("a a\n")
    assert "..." in said
    assert len(said) < 2100


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), RuntimeError("RESOURCE_EXHAUSTED: no room\nmore")]
)
def test_out_of_memory_is_one_line(monkeypatch, capsys, error):
    def fails(self, args, config_args):
        raise error

    monkeypatch.setattr(config.Command, "run", fails)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["config"])
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("moex: error: out of memory (")
    assert "no room); see `moex plan`" in said
    assert "more" not in said
