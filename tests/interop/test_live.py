"""transformers itself reads what was exported (`make test-hf`).

Random weights again, at other sizes and lengths than those of the fixtures.
"""

import numpy as np
import pytest

from moex.interop.hf import export_hf, import_hf
from moex.serve.decode import generate
from moex.train.job import load_run
from tests import runs
from tests.interop import make_fixtures, parity

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
    want = parity.expected(name)
    with torch.no_grad():
        found = make_fixtures.expected(theirs(tmp_path / "folder"), "", torch)
    np.testing.assert_allclose(found["logits"], want["logits"], rtol=0, atol=1e-6)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


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
