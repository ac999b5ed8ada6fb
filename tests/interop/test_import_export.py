"""`moex import-hf` and `moex export-hf`: whole runs, other meshes, broken folders."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moex import cli
from moex.compress.convert import convert_run
from moex.compress.upcycle import Upcycle
from moex.config import ConfigError
from moex.data.sources import Text
from moex.flags import load_config as load_config_flags
from moex.interop.arrays import load_array, tensor_of
from moex.interop.dequantise import reader
from moex.interop.families import fold, read_model
from moex.interop.folder import INDEX, SINGLE, Folder
from moex.interop.hf import export_hf, import_hf
from moex.interop.names import Piece
from moex.interop.native import closest
from moex.interop.writing import Tensor, write
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Context
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.optim import flat_paths
from moex.train import loop
from moex.train.job import load_config, load_run
from tests import runs
from tests.helpers import mesh_of, tiny_lm, tiny_moe
from tests.interop import parity

SAY = {"say": lambda line: None}


def import_fixture(name, out, folder=None):
    with runs.one_device():
        folder = folder or parity.FIXTURES / name
        return import_hf(folder, out, ["--config.seq_len=32"], **SAY)


def tensors(folder) -> dict:
    with Folder.open(folder) as opened:
        return {n: opened.read(n) for n in opened.names}


def same_tensors(a, b) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.tobytes() == b[name].tobytes(), name


def test_in_and_out_again(tmp_path, capsys):
    """A run that trains on, and a folder with the same bytes in every tensor."""
    run, back = tmp_path / "run", tmp_path / "back"
    source = parity.FIXTURES / "mixtral"
    record = import_fixture("mixtral", run)
    assert record["model_type"] == "mixtral" and not record["unused"]
    assert load_config(run).model == read_model("c", parity.config_of("mixtral"))
    with runs.one_device():
        config = export_hf(run, back, **SAY)
    same_tensors(source, back)
    assert config == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    with runs.one_device():
        cli.main(["generate", str(run), "--prompt=the", "--max-new-tokens=2"])
    assert "the" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "run"]


def test_one_part_at_a_time_is_on_the_host(monkeypatch):
    """A part is on its devices before the next one is read."""
    shape, piece = (4, 6), Piece("w", (4, 6), "ours", (), (4, 6), (0, 1))
    sharding = NamedSharding(mesh_of(8, fsdp=4, tensor=2), PartitionSpec("fsdp"))
    whole, events = np.arange(24.0, dtype=np.float32).reshape(shape), []

    class Folder:
        def read(self, name, index):
            events.append("read")
            return whole[index]

    put = jax.device_put
    monkeypatch.setattr(
        jax, "device_put", lambda *args: events.append("put") or put(*args)
    )
    made = load_array(shape, np.float32, sharding, [piece], Folder())
    np.testing.assert_array_equal(made, whole)
    assert events == ["read", "put", "put"] * 4  # of two copies each


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "olmoe"])
def test_shards_are_read_in_their_places(name):
    """On 2 x 2 x 2 devices: the same bits, the same tensors out, the same logits."""
    mesh = mesh_of(8, fsdp=2, expert=2, tensor=2)
    model, spec, arrays, wanted = parity.load(name, mesh)
    _, _, alone, _ = parity.load(name)
    split = [a for a in jax.tree.leaves(arrays["params"]) if not a.is_fully_replicated]
    assert len(split) > 10
    jax.tree.map(np.testing.assert_array_equal, arrays, alone)
    flat = flat_paths(arrays["params"]) | flat_paths(arrays["state"])
    theirs = tensors(parity.FIXTURES / name)
    for piece in wanted:
        ours = tensor_of(piece, flat[piece.path], np.float32)
        np.testing.assert_array_equal(ours, theirs[piece.name])
    want = parity.expected(name)
    rows = np.tile(np.arange(3), 3)[:8]  # as many as devices
    mask, tokens = want["mask"][rows], want["tokens"][rows]

    def logits(params, state):
        ctx = Context(
            segment_BL=jnp.asarray(mask, jnp.int32),
            position_BL=jnp.asarray(np.arange(mask.shape[1])[None] * mask),
            token_BL=jnp.asarray(tokens),
            mode="eval",
            kernels="xla",
        )
        return spec.merge(params, state)(ctx)[0]

    with jax.set_mesh(mesh):
        got_BLV = np.asarray(jax.jit(logits)(arrays["params"], arrays["state"]))
    got, scale = got_BLV[:3][want["mask"]], np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale


@pytest.mark.parametrize(
    "override", ["layers[0].repeat=40", "layers[0].pattern[0].num_experts=2"]
)
def test_overrides_that_change_arrays_are_refused(tmp_path, override):
    folder, out = parity.FIXTURES / "mixtral", tmp_path / "run"
    with runs.one_device(), pytest.raises(ConfigError, match="of shape"):
        import_hf(folder, out, [f"--config.model.{override}"], **SAY)
    assert not out.exists()


def test_the_dtype_of_an_older_config_is_kept(tmp_path):
    folder, run = tmp_path / "folder", tmp_path / "run"
    shutil.copytree(parity.FIXTURES / "mixtral", folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    import_fixture("mixtral", run, folder)
    with runs.one_device():
        written = export_hf(run, tmp_path / "back", **SAY)
    assert written["dtype"] == "float16" and "torch_dtype" not in written


def test_a_shard_asks_for_its_own_slices_only():
    """No read is larger than the largest part of one array on one device."""
    mesh = mesh_of(8, fsdp=2, expert=2, tensor=2)
    read: list[int] = []
    original = Folder.read

    def watched(self, name, index=None):
        value = original(self, name, index)
        read.append(value.nbytes)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "read", watched)
        _, _, arrays, _ = parity.load("gpt_oss", mesh)
    leaves = jax.tree.leaves(arrays)
    largest = max(a.addressable_shards[0].data.nbytes for a in leaves)
    whole = max(a.nbytes for a in leaves)
    assert max(read) <= largest < whole / 4


# Quantised originals, and layers that are not used.


def changed(tmp_path, name, change=None, config=None) -> pathlib.Path:
    """A copy of a fixture with other tensors, other fields."""
    source = parity.FIXTURES / name
    values = tensors(source)
    if change is not None:
        change(values)
    fields = json.loads((source / "config.json").read_text()) | (config or {})
    files = {"config.json": json.dumps(fields)}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        files[file] = source / file
    made = [
        Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in sorted(values.items())
    ]
    write(tmp_path / "changed", made, files=files)
    return tmp_path / "changed"


def test_fp8_is_read_by_its_blocks_and_leaves_as_bfloat16(tmp_path):
    def quantise(values):
        for name in [n for n in values if ".experts." in n]:
            scale = np.float32(np.abs(values[name]).max() / 448)
            values[name] = (values[name] / scale).astype(ml_dtypes.float8_e4m3fn)
            values[f"{name}_scale_inv"] = np.full((1, 1), scale)

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = changed(
        tmp_path, "deepseek_v3", quantise, {"quantization_config": settings}
    )
    import_fixture(None, tmp_path / "run", folder)
    with runs.one_device():
        config = export_hf(tmp_path / "run", tmp_path / "back", **SAY)
    assert "quantization_config" not in config
    got = tensors(tmp_path / "back")
    with Folder.open(folder) as opened:
        source = reader(opened)
        assert got.keys() == source.names
        for name, value in got.items():
            assert value.dtype == source.dtype(name)
            assert value.tobytes() == source.read(name).tobytes(), name
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    original = tensors(parity.FIXTURES / "deepseek_v3")[name]
    error = np.abs(got[name].astype(np.float32) - original).max()
    assert error <= 0.04 * np.abs(original).max()


def test_further_token_layers_are_reported_and_left_out(tmp_path):
    def add(values):
        values["model.layers.3.eh_proj.weight"] = np.zeros((4, 4), np.float32)

    folder = changed(tmp_path, "deepseek_v3", add, {"num_nextn_predict_layers": 1})
    said: list[str] = []
    with runs.one_device():
        record = import_hf(
            folder, tmp_path / "run", ["--config.seq_len=32"], say=said.append
        )
    assert record["unused"] == ["model.layers.3.eh_proj.weight"]
    assert "not used: model.layers.3.eh_proj.weight" in said


def test_a_copy_of_tied_embeddings_is_reported_and_left_out(tmp_path):
    def add(values):
        values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()

    folder = changed(tmp_path, "qwen3", add)
    record = import_fixture(None, tmp_path / "run", folder)
    assert record["unused"] == ["lm_head.weight"]


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


# Mistakes: one line that names file and tensor, and nothing left behind.

GATE = "model.layers.1.block_sparse_moe.gate.weight"


def drop(values):
    del values[GATE]


def add(values):
    values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def reshape(values):
    values[GATE] = values[GATE][:, :-1].copy()


MISTAKES = [
    (drop, {}, f"tensor '{GATE}' is missing"),
    (add, {}, r"model\.safetensors: tensor '.*q_proj.bias' is one too many"),
    (reshape, {}, rf"tensor '{GATE}' has shape \[8, 31\].*makes it \[8, 32\]"),
    (None, {"model_type": "mixtrall"}, "model_type = 'mixtrall'.*Did you mean 'mixt"),
    (None, {"model_type": None}, "model_type = None: must be one of"),
    (None, {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
    (None, {"num_local_experts": None}, "has no 'num_local_experts'"),
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


def test_an_index_with_a_path_is_refused(tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(parity.FIXTURES / "mixtral", folder)
    (folder / SINGLE).rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"\.\./outside\.safetensors"):
        import_fixture(None, tmp_path / "run", folder)


# Layers to segments, and models that were never imported.


def test_layers_fold_into_few_segments():
    a, b, c = ((name, name) for name in "abc")
    shapes = [
        (segment.pattern, segment.repeat)
        for segment in fold([a, b, a, b, a, b, c, c, a])
    ]
    assert shapes == [(("a", "b"), 3), (("c",), 2), (("a",), 1)]


def test_a_native_run_leaves_as_the_closest_family(tmp_path):
    """With the factor of its embeddings in their rows, and comes back the same."""
    fields = ("model.attention.qk_norm=True", "eval.every=0", "steps=2")
    bias = "model.layers[1].pattern[0].router.bias_rate=0.0"
    with runs.one_device():
        runs.train(tmp_path, tmp_path / "run", *fields, bias)
        config = export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
    assert config["model_type"] == "qwen3_moe" and config["mlp_only_layers"] == [0]
    # Else transformers takes the family's own: its generation would not end.
    assert config["eos_token_id"] == run.tokenizer.doc_id == 256
    assert config["bos_token_id"] is config["pad_token_id"] is None
    model = read_model("c", config)
    assert run.cfg.model.scale_embeddings and not model.scale_embeddings
    values = tensors(tmp_path / "folder")
    scaled = np.asarray(run.params["w_embed_VD"]) * 32**0.5
    embed = values["model.embed_tokens.weight"]
    np.testing.assert_allclose(embed, scaled, rtol=1e-6)
    w_in = np.asarray(
        run.params["segments"]["1"]["blocks"]["0"]["ffn"]["experts"]["w_in_ED2F"]
    )
    up = values["model.layers.1.mlp.experts.3.up_proj.weight"]
    np.testing.assert_array_equal(up.T, w_in[0, 3, :, 1])


def test_a_dense_folder_leaves_as_one_of_experts(tmp_path):
    """Import, upcycle, export: of the dense model's logits; moved between all steps."""

    def move(name):
        shutil.move(tmp_path / name, tmp_path / f"moved_{name}")
        return tmp_path / f"moved_{name}"

    import_fixture("llama", tmp_path / "dense")
    options = Upcycle(experts=4, k=2, sequences=0)
    with runs.one_device():
        convert_run(move("dense"), tmp_path / "sparse", upcycle=options, **SAY)
        run = move("sparse")
        config = export_hf(run, tmp_path / "folder", **SAY)
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 4)
    want = parity.expected("llama")
    _, spec, arrays, _ = parity.load(tmp_path / "folder")
    logits_BLV, _ = spec.merge(arrays["params"], arrays["state"])(parity.context(want))
    got = np.asarray(logits_BLV)[want["mask"]]
    scale = np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale
    shutil.rmtree(tmp_path / "moved_dense")  # its tokenizer too

    fields = ("steps=2", "optim.warmup_steps=1", "eval.every=0", "batch_size=2")
    args = [f"--config={run / 'config.py'}", *(f"--config.{f}" for f in fields)]
    cfg = load_config_flags(args)
    text = runs.write_corpus(tmp_path / "corpus.txt")
    cfg.data = dataclasses.replace(cfg.data, sources=(Text(paths=(str(text),)),))
    with runs.one_device():
        loop.train(cfg, run, **SAY)
        assert load_run(run).step == 2


def test_what_is_different_is_said_of_a_model_that_can_be_read(tmp_path):
    """Not of a family that refuses the fields, which OLMoE does here."""
    model = tiny_lm(
        Segment(pattern=(Dense(hidden=8),)),
        attention=Attention(heads=2, clip=1.0),
    )
    with pytest.raises(ConfigError, match="llama is the closest, .*clip"):
        closest(model)


def test_a_capacity_does_not_keep_a_run_from_leaving():
    moe = tiny_moe(router=TopK(k=2), shared=None, capacity_factor=2.0)
    model = tiny_lm(Segment(pattern=(moe,)), attention=Attention(heads=2))
    assert closest(model)["model_type"] == "mixtral"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("olmoe", {"head_dim": 3}, "head_dim = 3: must be"),
        ("deepseek_v3", {"first_k_dense_replace": 99}, "first_k_dense_replace = 99"),
    ],
)
def test_fields_that_contradict_others(name, change, message):
    config = json.loads((parity.FIXTURES / name / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        read_model("config.json", config | change)


def test_the_base_of_positions_is_that_of_the_family():
    for name, theta in (("mixtral", 1e6), ("llama", 1e4), ("olmoe", 1e4)):
        config = json.loads((parity.FIXTURES / name / "config.json").read_text())
        for field in ("rope_theta", "rope_parameters", "rope_scaling"):
            config.pop(field, None)
        assert read_model("config.json", config).attention.rope_theta == theta


def test_what_no_family_has_is_refused_with_the_difference(tmp_path):
    with runs.one_device():
        runs.train(tmp_path, tmp_path / "run", "steps=2", "eval.every=0")
    with (
        runs.one_device(),
        pytest.raises(ConfigError, match="no family .* differs in .*bias_rate"),
    ):
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
    assert not (tmp_path / "folder").exists()
