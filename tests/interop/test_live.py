"""transformers itself reads what was exported (`make test-hf`).

Random weights again, at other sizes and lengths than those of the fixtures.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moex.compress.convert import write_run
from moex.interop.export import export_hf
from moex.interop.hf import import_hf
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.serve.decode import generate
from moex.train.job import load_run, make_job
from tests import runs
from tests.helpers import built, context
from tests.interop import make_fixtures, parity
from tests.interop.folders import mxfp4_folder

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
SAY = {"say": lambda line: None}


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    ).eval()


@pytest.mark.parametrize("name", parity.NAMES)
def test_an_exported_folder_has_the_same_logits(name, tmp_path):
    with runs.one_device():
        import_hf(
            parity.FIXTURES / name, tmp_path / "run", ["--config.seq_len=32"], **SAY
        )
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
    # The same machine computes both: another one's float32 sums differ by more.
    with torch.no_grad():
        found, want = (
            make_fixtures.expected(theirs(folder), "", torch)
            for folder in (tmp_path / "folder", parity.FIXTURES / name)
        )
    np.testing.assert_array_equal(found["logits"], want["logits"])
    committed = parity.expected(name)["logits"]
    np.testing.assert_allclose(found["logits"], committed, rtol=0, atol=1e-5)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_an_mxfp4_folder_has_the_same_logits_unpacked(tmp_path):
    folder = mxfp4_folder(tmp_path)
    with runs.one_device():
        import_hf(folder, tmp_path / "run", ["--config.seq_len=32"], **SAY)
        export_hf(tmp_path / "run", tmp_path / "back", **SAY)
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        attn_implementation="eager",
        dtype="bfloat16",  # the others too: it unpacks to this one only
    )
    settings = transformers.Mxfp4Config(dequantize=True)
    unpacked = load(folder, quantization_config=settings)
    with torch.no_grad():
        found, want = (
            make_fixtures.expected(model.float().eval(), "", torch)["logits"]
            for model in (load(tmp_path / "back"), unpacked)
        )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


SPARSE = MoE(num_experts=4, router=TopK(k=2), experts=Glu(hidden=16))
PLAIN = MoE(num_experts=4, router=TopK(k=2, normalize="none"), experts=Glu(hidden=16))
NATIVE = {
    "mixtral": (False, (SPARSE, SPARSE)),
    "qwen3_moe": (True, (Dense(hidden=24), SPARSE)),
    "olmoe": ("whole", (PLAIN, PLAIN)),
    "llama": (False, (Dense(hidden=24),)),
    "qwen3": (True, (Dense(hidden=24),)),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_model_is_its_closest_family(kind, tmp_path):
    qk_norm, pattern = NATIVE[kind]
    cfg = runs.config(tmp_path)
    cfg.model = dataclasses.replace(
        cfg.model,
        layers=(Segment(pattern=pattern),),
        attention=Attention(heads=2, kv_heads=1, qk_norm=qk_norm),
    )
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        write_run(job, cfg, {"params": params, "state": state}, tmp_path / "run")
        config = export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
        token_BL = np.arange(2 * 12).reshape(2, 12) % 100
        ctx = context(2, 12, token_BL=jnp.asarray(token_BL), mode="eval")
        ours, _ = run.spec.merge(run.params, run.state)(ctx)
    assert config["model_type"] == kind
    model = theirs(tmp_path / "folder")
    assert model.config.eos_token_id == run.tokenizer.doc_id
    with torch.no_grad():
        logits = model(torch.tensor(token_BL)).logits.numpy()
    scale = np.abs(logits).max()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5 * scale)


def test_a_native_run_continues_the_same_in_transformers(tmp_path):
    fields = ("model.attention.qk_norm=True", "eval.every=0", "steps=2")
    bias = "model.layers[1].pattern[0].router.bias_rate=0.0"
    with runs.one_device():
        runs.train(tmp_path, tmp_path / "run", *fields, bias)
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
        run = load_run(tmp_path / "run")
    prompt = run.tokenizer.encode("the cat sees a dog")
    made = generate(
        *(run.spec, run.cfg.model, run.params, run.state),
        [prompt],
        max_new_tokens=24,
        temperature=0,
    )
    theirs_made = theirs(tmp_path / "folder").generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )
    assert made[0] == theirs_made[0, len(prompt) :].tolist()
