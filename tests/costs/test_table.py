"""`moex params`: rows by layer, bytes by hand, and the command itself."""

import json

import jax
import pytest

from moex import cli
from moex.adapters.lora import LoRA
from moex.adapters.v2 import AdapterV2
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.costs import residual_bytes, table
from moex.data.tokenizer import Bytes, TokenizerFile
from moex.model.accounting import model_cost, num_bytes
from moex.model.layers import sites
from moex.model.optim import AdamW, Muon, make_optimizer
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests import runs
from tests.helpers import tiny_lm, tiny_moe

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("params")
    runs.write_config(folder)
    return folder


@pytest.fixture
def run_config(folder):
    """`run_config(*segments, **run keys)`: a tiny run config of other layers."""

    def run_config(*segments, **fields):
        cfg = runs.config(folder, f"seq_len={LENGTH}")
        if segments:
            cfg.model = tiny_lm(*segments)
        for name, value in fields.items():
            cfg[name] = value
        return cfg

    return run_config


@pytest.fixture
def moex(capsys):
    """`moex(*args)`: what it prints."""

    def moex(*args):
        capsys.readouterr()
        cli.main([str(a) for a in args])
        return capsys.readouterr().out

    return moex


# Activations. D = 16, 4 query and 2 key/value heads of 4, a dense layer of width 24.


def kept(cfg, place=0):
    """Bytes per token that a layer of the first segment keeps."""
    spec = model_spec(cfg.model)
    return residual_bytes.block_activation_bytes(cfg, spec, sites(cfg.model)[place])


@pytest.mark.thorough
def test_kept_by_full_recomputation(run_config):
    """The input of each layer, and nothing else."""
    cfg = run_config(Segment(pattern=(tiny_moe(),), repeat=3), remat="full")
    assert kept(cfg) == 4 * 16
    cfg.precision = "bfloat16"
    assert kept(cfg) == 2 * 16


def test_kept_when_matmuls_are_kept(run_config):
    cfg = run_config(Segment(pattern=(Dense(hidden=24),)), remat="dots")
    # The input, queries, keys and values, attention's output, and both halves of the
    # hidden layer; the last matmul is only added to something.
    floats = 16 + 16 + (8 + 8) + 16 + 2 * 24
    assert kept(cfg) == 4 * floats


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("remat", "second"), [("none", Dense(hidden=8)), ("dots", tiny_moe())]
)
def test_kept_by_a_pattern_is_kept_by_its_layers(run_config, remat, second):
    pair = Segment(pattern=(Dense(hidden=24), second))
    cfg = run_config(pair, remat=remat)
    both = residual_bytes._pattern_bytes(cfg, model_spec(cfg.model), 0, (0, 1))
    assert kept(cfg, 0) + kept(cfg, 1) == both


@pytest.mark.slow
def test_kept_grows_with_rounds(run_config):
    """Not with experts: a token has two slots among 8 as among 16."""

    def of(ffn):
        return kept(run_config(Segment(pattern=(ffn,))))

    plain, twice = of(tiny_moe()), of(Chain(moe=tiny_moe(), iterations=2))
    assert twice > plain + 4 * 2 * (2 * 8)  # float32 pre-activations of two slots
    assert of(tiny_moe(16)) < 1.3 * plain


@pytest.mark.slow
def test_equal_segments_with_other_adapters_keep_their_own(run_config):
    """Three equal layers of which the second is adapted, in a segment each."""
    segments = [Segment(pattern=(Dense(hidden=24),)) for _ in range(3)]

    def of(*targets):
        cfg = run_config(*segments)
        cfg.model.adapter = LoRA(rank=2, alpha=2.0, targets=targets)
        rows = table.model_rows(cfg)
        found = {n: r.figures["activation_bytes"] for r in rows for n in r.layers}
        return [found[n] for n in range(3)], rows[-1].figures["activation_bytes"]

    one, rest = of("segments/1/*/w_out_FD")
    every, rest_of_every = of("*/w_out_FD")
    # Nothing before the adapter needs a gradient; what is after it passes one on.
    assert one[0] == 0 < one[2] < one[1] == every[1]
    assert len(set(every)) == 1
    # They begin to need a gradient in another layer, whose input is kept or not.
    assert min(rest, rest_of_every) > 0 and abs(rest - rest_of_every) <= 4 * 16


@pytest.mark.slow
def test_layers_keep_what_their_attention_to_prompts_needs(run_config):
    """For each token and head the weights of the prompts, at least."""
    own = {"targets": (), "bias": False, "scale_side": None, "norms": False}

    def of(length):
        cfg = run_config(Segment(pattern=(Dense(hidden=24),), repeat=2))
        cfg.model.adapter = AdapterV2(prompt_length=length, layers=1, **own)
        rows = table.model_rows(cfg)
        return [row.figures["activation_bytes"] for row in rows]

    (layer, rest), (longer, same) = of(4), of(12)
    assert longer - layer >= 8 * 4 * 4
    assert rest == same > 0


# Rows.


def test_rows_add_up(run_config):
    """Six layers of three kinds; totals are those of the whole model."""
    dense = Dense(hidden=24)
    cfg = run_config(
        Segment(pattern=(dense,)),
        Segment(pattern=(tiny_moe(), dense), repeat=2),
        Segment(pattern=(dense,)),
    )
    rows = table.model_rows(cfg)
    assert [(row.label, row.copies, row.kind) for row in rows] == [
        ("layers 0, 2, 4, 5", 4, "Dense"),
        ("layers 1, 3", 2, "MoE(8, TopK, Glu)"),
        ("rest", 1, "embedding, last norm, logits, loss"),
    ]
    total = table.totals(rows)
    spec = model_spec(cfg.model)
    cost = model_cost(cfg.model, spec, LENGTH)
    tx, _ = make_optimizer(cfg.optim, cfg.steps, spec.params, spec.info)
    assert total["params"] == cost.num_params
    assert total["active"] == cost.num_active
    assert total["forward_flops"] * 3 == cost.train_flops
    assert total["backward_flops"] == 2 * total["forward_flops"]
    assert total["weight_bytes"] == total["gradient_bytes"] == 4 * cost.num_params
    assert total["optimizer_bytes"] == num_bytes(jax.eval_shape(tx.init, spec.params))
    # What the loss needs of the logits, at least.
    assert rows[-1].figures["activation_bytes"] >= 4 * cfg.model.vocab


@pytest.mark.thorough
@pytest.mark.parametrize(("rule", "moments"), [(AdamW(), 2), (Muon(), 1)])
def test_optimizer_state_is_that_of_the_optimizer(run_config, rule, moments):
    """Muon keeps one moment of matrices, and two of embeddings and norms."""
    cfg = run_config(Segment(pattern=(Dense(hidden=24),)))
    cfg.optim.rule = rule
    layer, rest = (row.figures for row in table.model_rows(cfg))
    norms = 16 + 16 + 4 + 4
    matrices = layer["params"] - norms
    assert layer["optimizer_bytes"] == 4 * (moments * matrices + 2 * norms)
    counters = rest["optimizer_bytes"] - 4 * 2 * rest["params"]
    assert 0 <= counters <= 32


def test_vocabulary_without_data(run_config, tmp_path):
    cfg = run_config()
    cfg.model.vocab = None
    cfg.data.tokenizer = Bytes()
    cfg.task.fill(cfg)
    assert cfg.model.vocab == 257
    cfg.model.vocab = None
    cfg.data.tokenizer = TokenizerFile(path=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"config\.data\.tokenizer\.path = .*no such"):
        cfg.task.fill(cfg)
    cfg.model.vocab = 100
    cfg.task.fill(cfg)
    assert cfg.model.vocab == 100


# The command.


@pytest.mark.thorough
def test_the_command(moex, folder):
    arg = f"--config={folder / 'tiny.py'}"
    out = moex("params", arg).splitlines()
    assert out[0].split()[:3] == ["copies", "params", "active"]
    assert out[1].endswith("Dense")
    assert out[2].startswith("layers 1 ")
    assert out[2].endswith("MoE(4, TopK, Glu)")
    assert out[-2].startswith("total")
    made = json.loads(moex("params", arg, "--json"))
    assert made["setting"]["vocab"] == 257
    rows = made["rows"]
    assert [row["layers"] for row in rows] == [[0], [1], []]
    assert rows[1]["active"] == rows[1]["params"] - 2 * 3 * 32 * 32  # two of four
    assert made["total"]["params"] == sum(row["params"] for row in rows)


def test_matching_from_the_command_line(moex, folder):
    """The flags it prints, given back, are a match."""
    file = folder / "tiny.py"
    dense = folder / "dense.py"
    text = file.read_text().replace("pattern=(moe,)", "pattern=(Dense(hidden=50),)")
    dense.write_text(text)
    ask = ["params", f"--config={file}", f"--like={dense}", "--match=active"]
    *flags, line = moex(*ask).splitlines()
    assert [flag.split("=")[0] for flag in flags] == [
        "--config.model.layers[0].pattern[0].hidden",
        "--config.model.layers[1].pattern[0].experts.hidden",
    ]
    assert "parameters per token beside" in line
    made = json.loads(moex(*ask, "--json"))
    for args, expected in (([file, *flags], "cost"), ([dense], "target")):
        cfg = load_config([f"--config={args[0]}", *args[1:]])
        cfg.model.vocab = 257
        cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
        assert cost.num_active == made[expected]
    assert abs(made["difference"]) < 0.005


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--like=configs/quickstart.py"],
            "--like and --match go together; give both.",
        ),
        (["--match=size"], "--match: invalid choice: 'size'"),
        (["--like=none.py", "--match=flops"], "there is no file none.py"),
    ],
)
def test_mistakes(folder, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["params", f"--config={folder / 'tiny.py'}", *args])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("moex: error: ")
    assert err.count("\n") == 1
    assert message in err
