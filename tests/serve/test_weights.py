"""Models with weights in bfloat16, int8 and int4: rounding, decoding, `--weights`."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device
from kernels_pallas.lowered import LEVELS
from kernels_pallas.native import library
from moex import cli
from moex.model.accounting import bytes_per_token, num_bytes
from moex.model.decode import _generate, generate
from moex.model.paths import flat_paths, nested
from moex.model.spec import model_spec
from moex.moe.experts.glu import Glu
from moex.moe.experts.lowrank import LowRank
from moex.nn.context import Compute
from moex.nn.lowered import DTYPES, SCALES, VALUES, Lowered, lowered, to_int4, to_int8
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs import weights as loading
from tests import runs
from tests.helpers import built, tiny_lm, tiny_moe
from tests.marks import thorough_but_for

STORED = pathlib.Path(__file__).parents[1] / "stored_run"
PROMPTS = [[1, 2, 3], [7, 5, 3, 2, 9, 11]]
needs_c = pytest.mark.skipif(
    device.platform() != "cpu" or library.find_compiler() is None,
    reason="no C compiler",
)


def lm_of(*patterns, **fields):
    segments = [Segment(pattern=(own,), repeat=2) for own in patterns]
    return tiny_lm(*segments, dim=32, **fields)


MODELS = {
    "experts": lm_of(tiny_moe(experts=Glu(hidden=48))),
    "biases, latent attention": lm_of(
        tiny_moe(experts=Glu(hidden=32, bias=True), stored_experts=3),
        attention=LatentAttention(
            heads=2, kv_latent=16, q_latent=16, nope_dim=16, rope_dim=8, v_dim=16
        ),
        tied_embeddings=True,
    ),
    "other experts": lm_of(tiny_moe(experts=LowRank(rank=4))),
}


@pytest.mark.parametrize(
    "shape", thorough_but_for([(3, 64, 5), (1, 32, 1), (2, 96, 33)], (3, 64, 5))
)
def test_int4_takes_the_nearest_level_of_a_good_scale(shape):
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))
    w[0, :32, 0] = 0
    size = (shape[0], shape[1] // 32, shape[2])
    words, scales = to_int4(jnp.asarray(w, jnp.float32), size)
    assert words.dtype == jnp.int32 and words.shape == (
        shape[0],
        shape[1] // 8,
        shape[2],
    )
    found = np.asarray(Lowered(words, scales).raised(), np.float64)
    wide = np.repeat(np.asarray(scales.astype(jnp.float32), np.float64), 32, axis=1)
    every = wide[..., None] * np.array(LEVELS)
    nearest = np.abs(every - w[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(found - w), nearest, rtol=1e-3, atol=1e-6)
    assert not found[0, :32, 0].any()


@pytest.mark.thorough
def test_int4_is_better_than_symmetric_integers():
    """Relative to normal weights, in blocks of 32: integers up to 7 have 0.097."""
    w = np.random.default_rng(0).normal(size=(1, 3200, 32))
    found = Lowered(*to_int4(jnp.asarray(w, jnp.float32), (1, 100, 32))).raised()
    error = np.sqrt(np.mean((np.asarray(found, np.float64) - w) ** 2) / np.mean(w**2))
    assert 0.070 < error < 0.077


@pytest.mark.parametrize("how", [to_int8, to_int4])
@pytest.mark.parametrize("factor", [1e-42, 1e-37, 1.0, 1e37])
def test_blocks_of_extreme_numbers(how, factor):
    w = np.linspace(-1, 1, 64).reshape(1, 64, 1) * factor
    parts = how(jnp.asarray(w, jnp.float32), (1, 2, 1), jnp.bfloat16)
    found = np.asarray(Lowered(*parts).raised(), np.float64)
    assert np.isfinite(found).all()
    # Numbers too small for a scale in bfloat16 are 0.
    np.testing.assert_allclose(found, w, rtol=0, atol=max(0.12 * factor, 2e-36))


@needs_c
@pytest.mark.parametrize(
    "case",
    thorough_but_for(
        [f"{name}: {weights}" for name in MODELS for weights in DTYPES],
        "experts: int8",
        later=[f"{name}: bfloat16" for name in MODELS]
        + ["biases, latent attention: int8", "experts: int4", "other experts: int8"],
    ),
)
def test_decoding_is_that_of_the_rounded_model(case):
    name, weights = case.split(": ")
    cfg = MODELS[name]
    spec, params, state = built(cfg)
    low = model_spec(cfg, weights=weights)
    small = lowered(flat_paths(params), flat_paths(low.params))
    assert small.keys() == flat_paths(low.params).keys()
    for path, leaf in flat_paths(low.params).items():
        assert (small[path].shape, small[path].dtype) == (leaf.shape, leaf.dtype)
    whole = {n: a.astype(jnp.float32) for n, a in small.items() if "/values" not in n}
    whole = {n: a for n, a in whole.items() if not n.endswith(SCALES)}
    for n in (n for n in small if n.endswith(VALUES)):
        parts = small[n], small[n.replace(VALUES, SCALES)]
        whole[n.removesuffix(VALUES)] = Lowered(*parts).raised()
    options = {"max_new_tokens": 6, "temperature": 0.0}
    own = generate(low, cfg, nested(small), state, PROMPTS, **options)
    want = generate(spec, cfg, nested(whole), state, PROMPTS, **options)
    assert own == want
    xla = options | {"compute": Compute(kernels="cpu")}
    assert generate(low, cfg, nested(small), state, PROMPTS, **xla) == want
    kinds = {a.dtype.name for a in small.values()}
    assert (
        kinds
        == {
            "bfloat16": {"float32", "bfloat16"},
            "int8": {"float32", "bfloat16", "int8"},
            "int4": {"float32", "bfloat16", "int8", "int32"},
        }[weights]
        or name == "biases, latent attention"
    )


def compiled(cfg, weights=None, new=4):
    """The program of `_generate` for a prompt of 16 tokens."""
    low = model_spec(cfg, weights=weights)

    def shape(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype)

    cache = jax.eval_shape(lambda: cfg.init_cache(1, 15 + new, jnp.dtype("float32")))
    arrays = (low.params, low.state, cache, np.zeros((1, 16), np.int32))
    arrays = (*arrays, np.zeros(1, np.int32), jax.random.key(0), np.zeros(8, np.int32))
    options = {"graphdef": low.graphdef, "sampling": (0.0, 0, 1.0)}
    options |= {"max_new_tokens": new, "compute": Compute(scan_layers=True)}
    return _generate.lower(
        *jax.tree.map(shape, arrays), None, None, **options
    ).compile()


@needs_c
@pytest.mark.parametrize("weights", thorough_but_for(DTYPES, "int8"))
def test_the_stack_of_layers_is_neither_copied_nor_widened(weights):
    """A prompt and the loop over tokens take less memory than one layer in float32."""
    moe = tiny_moe(num_experts=32, experts=Glu(hidden=64), shared=None)
    cfg = tiny_lm(Segment(pattern=(moe,), repeat=4), dim=64)
    temporary = compiled(cfg, weights).memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 32 * 3 * 64 * 64 / 2


def test_the_loop_over_tokens_does_not_copy_the_keys_of_all_layers():
    cfg = tiny_lm(Segment(pattern=(Dense(hidden=8),), repeat=3), dim=16)
    loops, _, main = compiled(cfg, new=20).as_text().partition("ENTRY")
    copied = re.compile(r" = f32\[3,1,35,2,4\]\S* copy\(")
    assert "f32[3,1,35,2,4]" in loops
    assert copied.search(main) and not copied.search(loops)


def test_bytes_per_token():
    moe = tiny_moe(num_experts=8, experts=Glu(hidden=32), shared=None)
    cfg = lm_of(moe)
    spec = model_spec(cfg)
    flat = flat_paths(spec.params)
    experts = num_bytes({n: a for n, a in flat.items() if "/experts/" in n})
    rest = num_bytes(flat) - experts - num_bytes(flat["w_embed_VD"])
    row = 4 * 32
    assert bytes_per_token(cfg, flat) == pytest.approx(experts / 4 + rest + row)
    assert bytes_per_token(cfg, flat, 8) == pytest.approx(experts + rest + row)
    low = flat_paths(model_spec(cfg, weights="int4").params)
    of = num_bytes({n: a for n, a in low.items() if "/experts/" in n})
    assert of == experts / 8 * (1 + 1 / 8)  # half a byte, and 2 bytes for 32 numbers
    assert bytes_per_token(cfg, low) < bytes_per_token(cfg, flat) / 3


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("experts", ""),
        ("biases, latent attention", "w_kvb_ZHC"),
        ("other experts", "a_EDR, b_ERD"),
    ],
)
def test_matrices_that_stay_are_named(name, matrices):
    spec = model_spec(MODELS[name], weights="int8")
    told = loading._kept(spec)
    assert told.partition("trained: ")[2] == matrices
    if told:
        named = matrices.split(", ")
        flat = flat_paths(spec.params).items()
        size = num_bytes([a for n, a in flat if n.split("/")[-1] in named])
        assert told.startswith(f"{loading._gb(size)} of them (")


@pytest.fixture
def run(tmp_path, monkeypatch):
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with runs.one_device():
        yield tmp_path


@pytest.mark.thorough
@needs_c
def test_eval_and_generate_say_what_they_keep(run, capsys):
    cli.main(["eval", "run", "--json"])
    exact = json.loads(capsys.readouterr().out)
    cli.main(["eval", "run", "--json", "--weights=int8"])
    out, told = capsys.readouterr()
    found = json.loads(out)
    assert found["weights"] == "int8" and "weights" not in exact
    assert found["nll"] == pytest.approx(exact["nll"], abs=0.02)
    assert found["nll"] != exact["nll"]
    assert "weights in int8: " in told and "a token reads " in told
    cli.main(["generate", "run", "--prompt=a", "--max-new-tokens=2", "--weights=int4"])
    assert "weights in int4: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weights=int3"], "invalid choice: 'int3'"),
        (
            ["--weights=int8", "--experts=a:b"],
            "--weights: cannot be used together with",
        ),
        (["--weights=int8", "--adapter=x=run"], "--weights: cannot be used together"),
    ],
)
def test_what_has_no_meaning_is_refused(run, flags, said, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", "run", "--prompt=a", *flags])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.thorough
def test_weights_that_are_not_finite_are_refused(run, monkeypatch, capsys):
    read = loading.Rows.read

    def damaged(self, item, path, index=(...,)):
        array = read(self, item, path, index)
        return np.full_like(array, np.nan) if "w_out_EFD" in path else array

    monkeypatch.setattr(loading.Rows, "read", damaged)
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", "run", "--weights=int8"])
    assert left.value.code == 2
    assert (
        "w_out_EFD of step 3 has a number that is not finite" in capsys.readouterr().err
    )
