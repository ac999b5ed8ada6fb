"""`moex import-hf` and `moex export-hf`: whole runs, other meshes, other tensors."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from moex import cli
from moex.data.tokenizer import Tokenizer
from moex.interop import export
from moex.interop.arrays import load_array, tensor_of
from moex.interop.dequantise import reader
from moex.interop.export import export_hf
from moex.interop.families import read_model
from moex.interop.folder import INDEX, SINGLE, Folder, Stored
from moex.interop.hf import import_hf
from moex.interop.names import Piece
from moex.model.decode import generate
from moex.model.paths import flat_paths
from moex.nn.context import Context
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.tasks import lm
from tests import runs
from tests.helpers import XLA, mesh_of
from tests.interop import parity
from tests.interop.folders import (
    SAY,
    changed,
    import_fixture,
    mxfp4_folder,
    same_tensors,
    tensors,
    train_on,
)
from tests.interop.test_dequantise import slow_mxfp4
from tests.marks import slow, thorough_but_for


@pytest.mark.parametrize(
    "name",
    thorough_but_for(parity.NAMES, "deepseek_v3", later=("deepseek_v2", "olmoe")),
)
def test_in_and_out_again(tmp_path, name):
    """A run of the family's model, and a folder with the same bytes in every tensor."""
    run, back = tmp_path / "run", tmp_path / "back"
    source = parity.FIXTURES / name
    record = import_fixture(name, run)
    assert record["model_type"] == name and not record["unused"]
    assert RunDir(run).config().model == read_model("c", parity.config_of(name))
    tokenizer = Tokenizer.load(run / "tokenizer")  # its files name no begin token
    assert (tokenizer.begin_id, tokenizer.prefix_id) == (None, tokenizer.doc_id)
    with runs.one_device():
        config = export_hf(run, back, **SAY)
    same_tensors(source, back)
    want = json.loads((source / "config.json").read_text())
    if "num_nextn_predict_layers" in want:
        want["num_nextn_predict_layers"] = 0  # the folder has none of these layers
    assert config == want
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / file).read_bytes() == (source / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "run"]


@pytest.mark.thorough
def test_the_shards_of_a_folder_come_back(tmp_path):
    """bfloat16 and float32 in files of someone's own choice, byte for byte."""
    folder, run, back = (tmp_path / name for name in ("folder", "run", "back"))
    shutil.copytree(parity.FIXTURES / "deepseek_v3", folder)
    (folder / SINGLE).unlink()
    values = tensors(parity.FIXTURES / "deepseek_v3")
    shards = {f"model-{i + 1:05d}-of-00003.safetensors": {} for i in range(3)}
    for i, name in enumerate(sorted(values, reverse=True)):
        kind = np.float32 if "bias" in name else ml_dtypes.bfloat16
        [*shards.values()][i % 3][name] = values[name].astype(kind)
    for file, members in shards.items():
        save_file(members, folder / file, metadata={"format": "pt"})
    size = sum(v.nbytes for members in shards.values() for v in members.values())
    index = {
        "metadata": {"total_parameters": 12345, "total_size": size},
        "weight_map": {n: file for file, members in shards.items() for n in members},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    import_fixture(None, run, folder)
    with runs.one_device():
        export_hf(run, back, **SAY)
        other = export_hf(run, tmp_path / "other", dtype="float16", **SAY)
    files = {p.name for p in back.iterdir()} - {"README.md"}
    assert files == {p.name for p in folder.iterdir()} - {"expected.npz"}
    for name in files - {"config.json"}:
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name
    # Another dtype is another size; the files stay.
    got = json.loads((tmp_path / "other" / INDEX).read_text())
    assert got["weight_map"] == index["weight_map"] and other["dtype"] == "float16"
    opened = Folder.open(tmp_path / "other")
    kinds = {n: opened[n].dtype for n in opened.names}
    assert {n for n, kind in kinds.items() if kind != np.float16} == {
        n for n in values if "bias" in n
    }


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [slow("messages"), "pairs", slow("text")])
def test_an_imported_run_is_trained_on_own_records(tmp_path, capsys, kind):
    """As docs/interop.md says; importing alone encodes no text."""
    said = " and ".join(["the cat sees the dog"] * 3)
    record = {
        "messages": {
            "messages": [
                {"role": "user", "content": "who?"},
                {"role": "assistant", "content": said},
            ]
        },
        "pairs": {"prompt": "who?", "response": said},
        "text": {"text": said},
    }[kind]
    run, file = tmp_path / "run", tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(record | {"id": i}) for i in range(40)))
    with runs.one_device():
        cli.main(["import-hf", str(parity.FIXTURES / "olmoe"), "--out", str(run)])
        assert "data:" not in capsys.readouterr().out
        cli.main(
            [
                *("train", f"--workdir={run}", f"--data={file}", "--config.steps=1"),
                *("--config.seq_len=128", "--config.batch_size=2"),
                "--config.optim.warmup_steps=0",
                *("--config.data.sources.0.truncate=True",)[: kind != "text"],
                *("--config.data.sources.0.holdout=0", "--config.log.sample_tokens=0"),
            ]
        )
    assert "training time" in capsys.readouterr().out
    assert load_run(run).step == 1
    files = export.description(RunDir(run), RunDir(run).config())[1]
    assert ("chat_template.jinja" in files) == (kind == "messages")


@pytest.mark.slow
def test_an_imported_run_writes_text_and_trains_on(tmp_path, capsys):
    """After a step another folder of the same names, router biases too."""
    run, back = tmp_path / "run", tmp_path / "back"
    import_fixture("deepseek_v3", run)
    with runs.one_device():
        cli.main(["generate", str(run), "--prompt=the", "--max-new-tokens=2"])
    assert "the" in capsys.readouterr().out
    checkpoint = run / "checkpoints" / "0"
    assert (checkpoint / "params").is_dir() and not (checkpoint / "opt").exists()
    train_on(tmp_path, run, "steps=1", "optim.warmup_steps=0")
    with runs.one_device():
        assert load_run(run).step == 1
        export_hf(run, back, **SAY)
    old, new = tensors(parity.FIXTURES / "deepseek_v3"), tensors(back)
    assert old.keys() == new.keys()
    same = {name for name in old if np.array_equal(old[name], new[name])}
    assert not same
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    moved = np.abs(new[bias] - old[bias])
    np.testing.assert_allclose(moved[moved > 0], 1e-3, rtol=1e-3)  # bias_rate


@pytest.mark.thorough
def test_generation_ends_at_any_of_a_list_of_tokens(tmp_path, monkeypatch):
    """Which an export has again, in both files."""
    wanted = parity.expected("llama")["greedy"].tolist()
    prompt = parity.expected("llama")["tokens"][1, :9].tolist()
    ends = [wanted[9], wanted[4]]
    folder = changed(tmp_path, "llama", config={"eos_token_id": ends})
    kept = {"eos_token_id": ends, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(kept))
    import_fixture(None, tmp_path / "run", folder)
    with runs.one_device():
        run = load_run(tmp_path / "run")
        run.tokenizer.prompt = lambda text: prompt  # its words are of no language
        made = []
        monkeypatch.setattr(
            lm, "generate", lambda *a, **k: made.extend(generate(*a, **k)) or made
        )
        state = {"params": run.params, "state": run.state}
        lm.continue_texts(
            *(run, state, run.tokenizer, [""]),
            max_new_tokens=20,
            temperature=0,
        )
        config = export_hf(tmp_path / "run", tmp_path / "back", **SAY)
    stop = min(wanted.index(end) for end in ends)
    assert made == [wanted[:stop]]
    assert config["eos_token_id"] == ends
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert back == kept


@pytest.mark.thorough
def test_a_run_with_another_tokenizer_leaves_with_it(tmp_path):
    """And not with the folder's own, nor with other forms of that."""
    folder = changed(tmp_path, "llama")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}", encoding="utf-8")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    other = text.replace("<|doc|>", "<end>")
    (tmp_path / "other.json").write_text(other, encoding="utf-8")
    with runs.one_device():
        given = {"tokenizer": tmp_path / "other.json", "doc_token": "<end>"}
        import_hf(folder, tmp_path / "run", ["--config.seq_len=32"], **given, **SAY)
        export_hf(tmp_path / "run", tmp_path / "back", **SAY)
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    assert back.token_to_id("<end>") == 0 and back.token_to_id("<|doc|>") is None
    assert not {"vocab.json", "merges.txt"} & set(os.listdir(tmp_path / "back"))


def test_one_part_at_a_time_is_on_the_host(monkeypatch):
    """A part is on its devices before the next one is read."""
    shape, index = (4, 6), (slice(None), slice(None))
    piece = Piece("w", "ours", index, ((4,), (6,)), (0, 1))
    sharding = NamedSharding(mesh_of(8, fsdp=4, tensor=2), PartitionSpec("fsdp"))
    whole, events = np.arange(24.0, dtype=np.float32).reshape(shape), []

    class Tensor:
        def read(self, index):
            events.append("read")
            return whole[index]

    put = jax.device_put
    monkeypatch.setattr(
        jax, "device_put", lambda *args: events.append("put") or put(*args)
    )
    made = load_array(shape, np.float32, sharding, [piece], {"w": Tensor()})
    np.testing.assert_array_equal(made, whole)
    assert events == ["read", "put", "put"] * 4  # of two copies each


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["deepseek_v3", slow("gpt_oss"), slow("olmoe")])
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
            compute=XLA,
        )
        return spec.merge(params, state)(ctx)[0]

    with jax.set_mesh(mesh):
        got_BLV = np.asarray(jax.jit(logits)(arrays["params"], arrays["state"]))
    got, scale = got_BLV[:3][want["mask"]], np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale


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
    original = Stored.read

    def watched(self, index=()):
        value = original(self, index)
        read.append(value.nbytes)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "read", watched)
        _, _, arrays, _ = parity.load("gpt_oss", mesh)
    leaves = jax.tree.leaves(arrays)
    largest = max(a.addressable_shards[0].data.nbytes for a in leaves)
    whole = max(a.nbytes for a in leaves)
    assert max(read) <= largest < whole / 4


# Quantised originals, and layers that are not used.


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
    opened = Folder.open(folder)
    source = reader(opened)
    assert got.keys() == source.names
    for name, value in got.items():
        assert value.dtype == source[name].dtype
        assert value.tobytes() == source[name].read().tobytes(), name
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    original = tensors(parity.FIXTURES / "deepseek_v3")[name]
    error = np.abs(got[name].astype(np.float32) - original).max()
    assert error <= 0.04 * np.abs(original).max()


@pytest.mark.thorough
def test_mxfp4_is_unpacked_and_leaves_as_bfloat16(tmp_path):
    folder = mxfp4_folder(tmp_path)
    import_fixture(None, tmp_path / "run", folder)
    with runs.one_device():
        config = export_hf(tmp_path / "run", tmp_path / "back", **SAY)
    assert "quantization_config" not in config
    packed, got = tensors(folder), tensors(tmp_path / "back")
    parts = [n.removesuffix("_blocks") for n in packed if n.endswith("_blocks")]
    assert len(parts) == 8  # gate and up, down of four layers
    for name in parts:
        blocks, scales = (packed.pop(f"{name}_{part}") for part in ("blocks", "scales"))
        assert got[name].dtype == ml_dtypes.bfloat16
        want = slow_mxfp4(blocks, scales)
        np.testing.assert_array_equal(got.pop(name).astype(np.float32), want)
    assert got.keys() == packed.keys()
    for name, value in packed.items():
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_a_copy_of_tied_embeddings_is_reported_and_left_out(tmp_path):
    def add(values):
        values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()

    folder = changed(tmp_path, "qwen3", add)
    record = import_fixture(None, tmp_path / "run", folder)
    assert record["unused"] == ["lm_head.weight"] and not record["whole"]
