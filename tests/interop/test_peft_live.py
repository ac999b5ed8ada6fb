"""peft itself and our adapters, on models that transformers wrote (`make test-hf`)."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.adapters.lora import factors
from moex.interop import peft as ours
from moex.interop.adapter import export_adapter, family_sites, import_adapter
from moex.json_files import read_object
from moex.model.paths import flat_paths, nested
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from tests import runs
from tests.interop import make_fixtures, parity
from tests.interop.folders import SAY, import_fixture, tensors_of_file

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
peft = pytest.importorskip("peft", reason="needs the hf extra")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DENSE = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
SHARED = [f"shared_experts.{name[4:]}" for name in DENSE]
# (modules, parameters) that PEFT adapts.
TARGETS = {
    "mixtral": (ATTENTION, [*EXPERTS, "mlp.gate.weight"]),
    "olmoe": (ATTENTION, [*EXPERTS, "mlp.gate.weight"]),
    "qwen3_moe": (ATTENTION, [*EXPERTS, *DENSE, "mlp.gate.weight"]),
    "deepseek_v2": (LATENT, [*EXPERTS, *DENSE, *SHARED, "mlp.gate.weight"]),
    "deepseek_v3": (LATENT, [*EXPERTS, *DENSE, *SHARED, "mlp.gate.weight"]),
    "gpt_oss": (ATTENTION, [*EXPERTS, "mlp.router.weight"]),
    "llama": ([*ATTENTION, "gate_proj", "up_proj", "down_proj"], None),
    "qwen3": ([*ATTENTION, "gate_proj", "up_proj", "down_proj"], None),
    "mixtral-linear": ("all-linear", None),
    "qwen3_moe-dense": (["q_proj", "gate_proj", "up_proj", "down_proj"], None),
    "mixtral-few": (["q_proj", "v_proj"], ["experts.down_proj"]),
    "qwen3_moe-layer": (["model.layers.2.self_attn.v_proj"], None),
    "llama-ends": (["embed_tokens", "lm_head", "q_proj"], None),
}


def theirs(name):
    return transformers.AutoModelForCausalLM.from_pretrained(
        parity.FIXTURES / name, attn_implementation="eager", dtype="float32"
    ).eval()


def adapted(name, kind, folder, rank=3):
    """peft's model with random adapters, saved in `folder`."""
    modules, parameters = TARGETS[kind]
    settings = peft.LoraConfig(
        r=rank, lora_alpha=5, target_modules=modules, target_parameters=parameters
    )
    model = peft.get_peft_model(theirs(name), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.normal_(std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def logits_and_gradients(model, token_BL, target_BLV):
    """peft's logits, and the gradient of each of its tensors by name."""
    logits = model(torch.tensor(token_BL)).logits
    (logits * torch.tensor(target_BLV)).sum().backward()
    gradients = {
        key.replace(".default", ""): value.grad.numpy()
        for key, value in model.named_parameters()
        if "lora_" in key
    }
    return logits.detach().numpy(), gradients


def ours_of(run, base, names, token_BL, target_BLV, settings):
    """Our logits, and the gradients of the same tensors."""
    ctx = parity.context({"tokens": token_BL, "mask": np.ones(token_BL.shape, bool)})
    own = {n: a for n, a in flat_paths(run.params).items() if "adapters/" in n}
    rest = {n: a for n, a in flat_paths(run.params).items() if n not in own}

    def loss(own):
        logits, _ = run.spec.merge(nested(rest | own), run.state)(ctx)
        return jnp.vdot(logits, target_BLV), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(own)
    gradients = {n: np.asarray(g) for n, g in gradients.items()}
    every = family_sites(base, run.cfg.model)
    adapted = {s.full for s in every if set(ours.names_of(s, set())) & names}
    adapted |= {s.full for s in every if s.parameter == "gate_up_proj"}
    found = {}
    for site in every:
        a, b = factors(site.path)
        if a in gradients:
            rank = ours.rank_of(settings, site, "")
            pair = site.tensors(gradients[a], gradients[b], rank)
            found |= dict(zip(ours.names_of(site, adapted), pair, strict=True))
    return np.asarray(logits), found


@pytest.mark.parametrize("kind", TARGETS)
def test_folders_of_peft_come_in_and_go_out(kind, tmp_path):
    name = kind.partition("-")[0]
    base, folder, run, back = (tmp_path / n for n in ("base", "peft", "run", "back"))
    import_fixture(name, base)
    model = adapted(name, kind, folder)
    token_BL = np.random.default_rng(0).integers(2, make_fixtures.V, (3, 20))
    target_BLV = np.random.default_rng(1).normal(size=(3, 20, make_fixtures.V))
    target_BLV = target_BLV.astype(np.float32)
    want, want_gradients = logits_and_gradients(model, token_BL, target_BLV)
    with runs.one_device():
        import_adapter(base, folder, run, **SAY)
        export_adapter(run, back, **SAY)
        loaded = load_run(run)
        names = set(want_gradients)
        settings = read_object(folder / ours.SETTINGS)
        given = names, token_BL, target_BLV, settings
        got, gradients = ours_of(loaded, RunDir(base), *given)
    for file in (ours.TENSORS, ours.SETTINGS, "README.md"):
        assert (back / file).read_bytes() == (folder / file).read_bytes(), file
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
    for key, gradient in want_gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 0, key
        error = np.abs(gradients[key] - gradient).max()
        most = 2e-5 if name == "gpt_oss" else 1e-5  # it has the largest activations
        assert error <= most * largest, (key, error, largest)
    # What we write of a run of our own is the same to peft.
    shutil.rmtree(run / "hf")
    with runs.one_device():
        export_adapter(run, tmp_path / "own", **SAY)
    assert tensors_of_file(tmp_path / "own").keys() == tensors_of_file(folder).keys()
    again = peft.PeftModel.from_pretrained(theirs(name), tmp_path / "own").eval()
    with torch.no_grad():
        logits = again(torch.tensor(token_BL)).logits.numpy()
    np.testing.assert_array_equal(logits, want)
