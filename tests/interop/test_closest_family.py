"""Layers to segments, and models that were never imported."""

import json
import shutil

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.convert.apply import convert_run
from moex.convert.kinds.moe import Upcycle
from moex.interop.closest_family import closest
from moex.interop.export import export_hf
from moex.interop.families import read_model
from moex.interop.layers import fold
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.open import load_run
from tests import runs
from tests.helpers import tiny_lm, tiny_moe
from tests.interop import parity
from tests.interop.folders import SAY, import_fixture, tensors, train_on

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
)


def test_layers_fold_into_few_segments():
    a, b, c = ((name, name) for name in "abc")
    shapes = [
        (segment.pattern, segment.repeat)
        for segment in fold([a, b, a, b, a, b, c, c, a])
    ]
    assert shapes == [(("a", "b"), 3), (("c",), 2), (("a",), 1)]


@pytest.mark.thorough
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
    assert config["bos_token_id"] == run.tokenizer.begin_id == 256
    assert config["pad_token_id"] is None
    assert config["max_position_embeddings"] == run.cfg.seq_len
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


@pytest.mark.slow
def test_a_dense_folder_leaves_as_one_of_experts(tmp_path):
    """Import, upcycle, export: of the dense model's logits; moved between all steps."""

    def move(name):
        shutil.move(tmp_path / name, tmp_path / f"moved_{name}")
        return tmp_path / f"moved_{name}"

    folder = tmp_path / "llama"
    shutil.copytree(parity.FIXTURES / "llama", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    import_fixture("llama", tmp_path / "dense", folder)
    shutil.rmtree(folder)
    options = Upcycle(experts=4, k=2)
    with runs.one_device():
        convert_run(move("dense"), tmp_path / "sparse", [options], sequences=0, **SAY)
        run = move("sparse")
        config = export_hf(run, tmp_path / "folder", **SAY)
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 4)
    assert (tmp_path / "folder" / "chat_template.jinja").read_text() == TEMPLATE
    want = parity.expected("llama")
    _, spec, arrays, _ = parity.load(tmp_path / "folder")
    logits_BLV, _ = spec.merge(arrays["params"], arrays["state"])(parity.context(want))
    got = np.asarray(logits_BLV)[want["mask"]]
    scale = np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale
    shutil.rmtree(tmp_path / "moved_dense")  # its tokenizer too

    train_on(tmp_path, run, "steps=2", "optim.warmup_steps=1")
    with runs.one_device():
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
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0: must be a whole"),
        (
            "llama",
            {"num_hidden_layers": "2"},
            "num_hidden_layers = '2': must",
        ),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0: must be"),
        (
            "llama",
            {"rope_parameters": "yarn"},
            "rope_parameters = 'yarn': must",
        ),
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


@pytest.mark.slow
def test_what_no_family_has_is_refused_with_the_difference(tmp_path):
    with runs.one_device():
        runs.train(tmp_path, tmp_path / "run", "steps=2", "eval.every=0")
    with (
        runs.one_device(),
        pytest.raises(ConfigError, match="no family .* differs in .*bias_rate"),
    ):
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
    assert not (tmp_path / "folder").exists()
