"""Mistakes: one line that names file and tensor, and nothing left behind."""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from moex import cli
from moex.config.base import ConfigError
from moex.interop.folder import INDEX
from moex.interop.hf import import_hf
from moex.runs.claim import new_folder
from moex.runs.directory import RunDir
from tests import runs
from tests.interop import parity
from tests.interop.folders import SAY, changed, import_fixture

GATE = "model.layers.1.block_sparse_moe.gate.weight"


def drop(values):
    del values[GATE]


def add(values):
    values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def reshape(values):
    values[GATE] = values[GATE][:, :-1].copy()


def make_infinite(values):
    values[GATE][3, 5] = np.inf


MISTAKES = [
    (
        make_infinite,
        {},
        "^params/segments/0/.*/router/w_DE: has numbers that are not finite",
    ),
    (drop, {}, rf"changed.model\.safetensors: tensor '{GATE}' is missing"),
    (add, {}, r"model\.safetensors: tensor '.*q_proj.bias' is one too many"),
    (reshape, {}, rf"tensor '{GATE}' has shape \[8, 31\].*makes it \[8, 32\]"),
    (None, {"model_type": "mistral"}, "model_type = 'mistral'.*; moex has no other.$"),
    (None, {"model_type": None}, "model_type = None: must be one of"),
    (None, {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
    (None, {"num_local_experts": None}, "num_local_experts = None: must be a whole"),
    (None, {"num_local_experts": 10**6}, r"has shape \[8, 32\].*it \[1000000, 32\]"),
    (None, {"num_hidden_layers": 9999}, "tensor 'model.layers.2.input_lay.*is missing"),
    (
        None,
        {"num_hidden_layers": 10**6},
        "num_hidden_layers = 1000000: must be at most",
    ),
    (None, {"max_position_embeddings": "9"}, "max_position_embeddings = '9': must be"),
    (None, {"eos_token_id": [[2]]}, "config.json: eos_token_id = .*must be int"),
    (None, {"quantization_config": {"quant_method": ["fp8"]}}, "by the method"),
    (None, {"num_local_experts": 9}, r"has shape \[8, 32\].*makes it \[9, 32\]"),
    (
        None,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type = 'dynamic': must be 'default', 'linear'",
    ),
]


@pytest.mark.parametrize(("change", "config", "message"), MISTAKES)
def test_broken_folders(tmp_path, change, config, message):
    folder = changed(tmp_path, "mixtral", change, config)
    with pytest.raises(ConfigError, match=message):
        import_fixture(None, tmp_path / "run", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "[]", "generation_config.json: must be a JSON obj"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: is not JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token = 3: must be str"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizers JSON file"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: not a tokenizers JSON file"),
    ],
)
def test_broken_files_beside_the_weights(tmp_path, file, content, message):
    folder = changed(tmp_path, "mixtral")
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        import_fixture(None, tmp_path / "run", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path, capsys):
    """Neither of the two ways out that a config has would help; both are refused."""
    folder = changed(tmp_path, "mixtral")
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.add_special_tokens(["<more>"])
    model.save(str(folder / "tokenizer.json"))
    message = "tokenizer.json: the token '<more>' has id 272, but .*vocab_size = 272"
    with pytest.raises(ConfigError, match=message):
        import_fixture(None, tmp_path / "run", folder)
    own = str(parity.FIXTURES / "mixtral" / "tokenizer.json")
    for value in ("None", "273"):
        args = ["import-hf", str(folder), f"--out={tmp_path / 'run'}"]
        args += [f"--tokenizer={own}", f"--config.model.vocab={value}"]
        with runs.one_device(), pytest.raises(SystemExit) as stop:
            cli.main(args)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert f"--config.model.vocab = {value}: must be 272 or left out" in error
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]


def test_a_run_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr("moex.interop.hf.write_run", full)
    with pytest.raises(OSError, match="no space left"):
        import_fixture("mixtral", tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["import-hf", "nowhere", "--out=RUN"], "nowhere"),
        (["import-hf", "FIXTURE", "--out=FULL"], "must be new or an empty folder"),
        (
            ["import-hf", "FIXTURE", "--out=RUN", "--tokenizer=no.json"],
            "no.json: there",
        ),
        (
            ["import-hf", "FIXTURE", "--out=RUN", "--doc-token=??"],
            "not in the voc",
        ),
        (["import-hf", "FIXTURE", "--out=RUN", "--config.stepz=3"], "stepz"),
        (["export-hf", "nowhere", "--out=RUN"], "nowhere"),
        (["export-hf", "nowhere", "--out=RUN", "--dtype=int4"], "must be float32, bf"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, args, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    places = {
        "FIXTURE": str(parity.FIXTURES / "mixtral"),
        "RUN": str(tmp_path / "run"),
        "FULL": str(tmp_path / "full"),
    }
    for name, place in places.items():
        args = [a.replace(name, place) for a in args]
    with runs.one_device(), pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("bf", "bfloat16") in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


SHARD = "model-00002-of-00003.safetensors"


def cut_short(folder):
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:-1])


def lose(folder):
    (folder / SHARD).unlink()


def lead_out(folder):
    outside = "../outside.safetensors"
    edit_index(
        folder,
        lambda names: {n: outside if f == SHARD else f for n, f in names.items()},
    )
    (folder / SHARD).rename(folder.parent / "outside.safetensors")


def lose_a_tensor(folder):
    last = "model-00003-of-00003.safetensors"
    values = load_file(folder / last)
    values.pop("model.norm.weight")
    save_file(values, folder / last, metadata={"format": "pt"})
    edit_index(folder, lambda names: names.pop("model.norm.weight") and names)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (cut_short, rf"{SHARD} is truncated: the tensor 'model\.layers\.\S+' ends at"),
        (lose, rf"{INDEX}: the shard {SHARD} of tensor 'model\.\S+' is missing"),
        (lead_out, rf"{INDEX}: the file of tensor 'model.*' is '\.\./outside"),
        (lose_a_tensor, rf"{INDEX}: tensor 'model\.norm\.weight' is missing"),
    ],
)
def test_broken_shards(tmp_path, breaks, message):
    folder = changed(tmp_path, "mixtral", max_shard_bytes=70_000)
    assert (folder / SHARD).exists()
    breaks(folder)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        import_fixture(None, tmp_path / "deep" / "run", folder)
    assert sorted(tmp_path.iterdir()) == before


def test_a_mesh_that_does_not_fit_leaves_no_folder(tmp_path):
    folder, out = parity.FIXTURES / "mixtral", tmp_path / "deep" / "run"
    with runs.one_device(), pytest.raises(ConfigError, match="mesh"):
        import_hf(folder, out, ["--config.mesh.fsdp=3"], **SAY)
    assert not list(tmp_path.iterdir())


def test_where_a_run_can_be_written(tmp_path, monkeypatch):
    """Into an empty folder, by a link and under the home folder; not into this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in (".", str(tmp_path), "./"):
        with pytest.raises(ConfigError, match="is the folder you are in"):
            import_hf("nowhere", out, **SAY)  # before anything is looked at
        with pytest.raises(ConfigError, match="is the folder you are in"):
            new_folder(out, f"--out={out}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    import_fixture("llama", "link")
    assert (tmp_path / "link").is_symlink()
    assert RunDir(tmp_path / "empty").config().seq_len == 32
    assert new_folder("~/new", "--out") == tmp_path / "new"


@pytest.mark.thorough
@pytest.mark.parametrize("cut", [False, True])
def test_logits_of_their_own_are_not_dropped_for_tied_embeddings(tmp_path, cut):
    def add(values):
        own = values["model.embed_tokens.weight"].copy()
        own[-1, -1] += 1  # in the last rows that are compared
        values["lm_head.weight"] = own[:-1] if cut else own

    folder = changed(tmp_path, "qwen3", add)
    message = r"model\.safetensors: tensor 'lm_head.weight' differs .*config\.json says"
    with pytest.raises(ConfigError, match=message):
        import_fixture(None, tmp_path / "run", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["changed"]
    if not cut:  # as the line says
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {"tie_word_embeddings": False}
        file.write_text(json.dumps(config))
        assert not import_fixture(None, tmp_path / "run", folder)["unused"]


@pytest.mark.parametrize(
    "override", ["layers[0].repeat=40", "layers[0].pattern[0].num_experts=2"]
)
def test_overrides_that_change_arrays_are_refused(tmp_path, override):
    folder, out = parity.FIXTURES / "mixtral", tmp_path / "run"
    with runs.one_device(), pytest.raises(ConfigError, match="of shape"):
        import_hf(folder, out, [f"--config.model.{override}"], **SAY)
    assert not out.exists()
