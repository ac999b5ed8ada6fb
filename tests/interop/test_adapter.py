"""Adapters as folders of their own: in, out, folded in, and what is refused."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from moex import cli
from moex.adapters.moram import MoRAM
from moex.config import base as configs
from moex.config.base import ConfigError
from moex.convert.apply import convert_run
from moex.convert.kinds.folded import Folded
from moex.interop import adapter as files
from moex.interop import peft
from moex.interop.adapter import export_adapter, import_adapter
from moex.interop.export import export_hf
from moex.interop.writing import Tensor, write
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.runs.base import base_hash
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from tests import runs
from tests.interop import parity
from tests.interop.folders import SAY, import_fixture, tensors, tensors_of_file

SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.0}
TARGETS = {
    "target_modules": ["q_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = tmp_path_factory.mktemp("base") / "run"
    import_fixture("mixtral", run)
    return RunDir(run)


def folder_for(base, path, dtype=np.float32, change=None, **settings):
    """A folder as PEFT writes it, with random tensors."""
    settings = SETTINGS | TARGETS | settings
    every = files.family_sites(base, base.config().model)
    chosen = [site for site in every if peft._targeted(settings, site, "")]
    full, random = {site.full for site in chosen}, np.random.default_rng(0)
    values = {
        name: (0.3 * random.normal(size=shape)).astype(dtype)
        for site in chosen
        for name, shape in zip(
            peft.names_of(site, full),
            site.shapes(peft.rank_of(settings, site, "")),
            strict=True,
        )
    }
    if change is not None:
        change(values)
    made = [Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()]
    text = json.dumps(settings)
    write(path, made, single=peft.TENSORS, files={peft.SETTINGS: text})
    return path


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """(the folder, a run of it)."""
    path = tmp_path_factory.mktemp("adapted")
    folder = folder_for(base, path / "peft", ml_dtypes.bfloat16)
    with runs.one_device():
        import_adapter(base, folder, path / "run", **SAY)
    return folder, path / "run"


def logits(run):
    token_BL = np.arange(24).reshape(2, 12)
    ctx = parity.context({"tokens": token_BL, "mask": np.ones((2, 12), bool)})
    model = jax.jit(lambda *arrays: run.spec.merge(*arrays)(ctx)[0])
    return np.asarray(model(run.params, run.state))


def test_a_folder_comes_back_byte_for_byte(adapted, tmp_path):
    folder, run = adapted
    with runs.one_device():
        cli.main(["export-hf", str(run), "--adapter", f"--out={tmp_path}/b"])
    for name in (peft.TENSORS, peft.SETTINGS):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    size = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*"))
    assert size < 1e6  # the base is not in it


def test_what_a_folder_leaves_out_stays_zero(adapted):
    _, run = adapted
    with runs.one_device():
        own = flat_paths(load_run(run, whole=False).params)
    (name,) = [n for n in own if n.endswith("w_kv_D2GA/a_INR")]
    assert not np.any(own[name][..., 0, :])  # keys
    assert np.all(np.any(own[name][..., 1, :], axis=-1))  # values


@pytest.mark.thorough
def test_a_kind_that_peft_lacks_comes_back(base, adapted, tmp_path):
    """Routers are trained too, and PEFT has no place for them."""
    folder, _ = adapted
    say = []
    with runs.one_device():
        args = ["--config.model.adapter.also_train=('router', 'norm_ffn')"]
        import_adapter(base, folder, tmp_path / "run", args, **SAY)
        export_adapter(tmp_path / "run", tmp_path / "own", say=say.append)
        import_adapter(base, tmp_path / "own", tmp_path / "again", **SAY)
        a, b = (load_run(tmp_path / name) for name in ("run", "again"))
    assert "layout of moex" in say[-1]
    stored = tensors_of_file(tmp_path / "own", files.TENSORS)
    assert sum(name.endswith("router/w_DE") for name in stored) == 1
    assert a.cfg.model == b.cfg.model
    runs.assert_same_arrays(a.params, b.params)


def drop(end):
    return lambda values: values.pop(next(n for n in values if n.endswith(end)))


MISTAKES = {
    "rank": ({"r": 4}, None, r"tensor '.*' has shape \[2, 32\]; r of .* make it \[4"),
    "missing": ({}, drop("q_proj.lora_B.weight"), "q_proj.lora_B.weight' is missing"),
    "many": (
        {},
        lambda values: values.update(extra=np.zeros(2, np.float32)),
        "tensor 'extra' belongs to nothing that adapter_config.json targets",
    ),
    "type": (
        {},
        lambda v: v.update({n: a.astype(np.int32) for n, a in v.items()}),
        "is of type int32; must be float32 or bfloat16 or float16",
    ),
    "kind": ({"peft_type": "IA3"}, None, "peft_type = 'IA3': must be 'LORA'"),
    "dora": ({"use_dora": True}, None, "use_dora = True: must be off"),
    "ranks": (
        {"rank_pattern": {"q_proj": 4}},
        None,
        r"alpha / rank = \[1.5, 3.0\]: must be one number",
    ),
    "pattern": ({"rank_pattern": {"(": 4}}, None, "is no regular expression"),
    "pattern rank": ({"rank_pattern": {"q_proj": 0}}, None, "r = 0: must be at least"),
    "bias": ({"bias": "all"}, None, "bias = 'all': must be 'none'"),
    "pissa": ({"init_lora_weights": "pissa"}, None, "'pissa': must be a kind that"),
    "text": ({"r": "8"}, None, "r = '8'"),
    "none": ({"r": 0}, None, r"adapter_config.json: r = 0: must be at least 1"),
    "new": ({"use_xlora": True}, None, "use_xlora = True: moex does not know this f"),
    "nan": (
        {},
        lambda values: next(iter(values.values())).fill(np.nan),
        "model.safetensors: tensor '.*' has numbers that are not finite",
    ),
    "copy": (
        {},
        lambda v: v.update({"lm_head.base_layer.weight": np.zeros(2, np.float32)}),
        "is a copy of the base: save_embedding_layers=False",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_folder_that_does_not_fit_is_one_clear_line(base, tmp_path, name):
    settings, change, told = MISTAKES[name]
    wrong = {"r": 2} if "r" in settings else {}
    wrong |= {"rank_pattern": {}} if "rank_pattern" in settings else {}
    folder = folder_for(base, tmp_path / "peft", change=change, **settings | wrong)
    written = json.loads((folder / peft.SETTINGS).read_text()) | settings
    (folder / peft.SETTINGS).write_text(json.dumps(written))
    with pytest.raises(ConfigError, match=told):
        import_adapter(base, folder, tmp_path / "run", **SAY)
    assert not (tmp_path / "run").exists()


def test_own_files_with_wrong_numbers_or_types_are_refused(base, tmp_path):
    adapter = MoRAM(rank=2, alpha=2.0, k=2, targets=("w_q_DGRA",))
    model = dataclasses.replace(base.config().model, adapter=adapter)
    about = {"format": 1, "adapter": configs.to_dict(adapter)}
    text = json.dumps(about | {"base": base_hash(model), "step": 0})
    shapes = {n: s for n, s in model_spec(model).shapes().items() if "adapters/" in n}
    for number, kind, told in (
        (np.nan, np.float32, "b_NRO' has numbers that are not finite"),
        (1, np.int32, "a_INR' is of type int32; must be float32"),
    ):
        values = {n: np.zeros(shape, kind) for n, shape in sorted(shapes.items())}
        list(values.values())[-1].fill(number)
        made = [Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()]
        folder = tmp_path / np.dtype(kind).name
        write(folder, made, single=files.TENSORS, files={files.ABOUT: text})
        with pytest.raises(ConfigError, match=told):
            import_adapter(base, folder, tmp_path / "run", **SAY)


def test_targets_of_our_file_must_be_those_of_the_folder(base, adapted, tmp_path):
    with runs.one_device():
        export_adapter(adapted[1], tmp_path / "a", **SAY)
        file = tmp_path / "a" / files.ABOUT
        about = json.loads(file.read_text())
        about["adapter"]["targets"] = ["w_q_DGRA"]
        file.write_text(json.dumps(about))
        with pytest.raises(ConfigError, match="adapter.targets match no .*w_"):
            import_adapter(base, tmp_path / "a", tmp_path / "run", **SAY)


def test_an_import_names_the_base_that_it_was_given(base, adapted, tmp_path):
    args = ["--config.init_from=elsewhere"]
    with pytest.raises(ConfigError, match="init_from = 'elsewhere': must be .*the run"):
        import_adapter(base, adapted[0], tmp_path / "run", args, **SAY)


@pytest.mark.thorough
def test_ranks_by_pattern_are_filled_up_with_zeros(base, tmp_path):
    """PEFT writes such a folder for `target_modules="all-linear"` of Mixtral."""
    by_name = {r".*\.gate_up_proj": 4}, {r".*\.gate_up_proj": 12}
    wanted = {"rank_pattern": by_name[0], "alpha_pattern": by_name[1]}
    folder = folder_for(base, tmp_path / "peft", **wanted)
    with runs.one_device():
        import_adapter(base, folder, tmp_path / "run", **SAY)
        export_adapter(tmp_path / "run", tmp_path / "back", **SAY)
        run = load_run(tmp_path / "run")
    lora = run.cfg.model.adapter
    assert (lora.rank, lora.alpha) == (4, 12.0)
    for end, rank in (("w_out_GRAD/a_INR", 2), ("w_in_ED2F/a_INR", 4)):
        (a,) = [a for n, a in flat_paths(run.params).items() if n.endswith(end)]
        assert np.all(a[..., :rank]) and not np.any(a[..., rank:])
    for name in (peft.TENSORS, peft.SETTINGS):
        back = (tmp_path / "back" / name).read_bytes()
        assert back == (folder / name).read_bytes()


def test_excluded_modules_may_have_adapted_parameters(base, tmp_path):
    """PEFT looks at `exclude_modules` for modules only."""
    wanted = {"exclude_modules": ["k_proj", "experts"]}
    folder = folder_for(base, tmp_path / "peft", **wanted)
    found = files.read_adapter(folder, base)
    assert any("/experts/adapters/" in name for name in found.arrays)


def test_pickles_and_empty_folders_are_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="neither adapter_config.json nor moex_ad"):
        import_adapter(base, tmp_path, tmp_path / "run", **SAY)
    (tmp_path / peft.SETTINGS).write_text(json.dumps(SETTINGS | TARGETS))
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        import_adapter(base, tmp_path, tmp_path / "run", **SAY)
    (tmp_path / peft.PICKLE).write_bytes(b"\x80")
    with pytest.raises(ConfigError, match="pickle only.*unpickling runs code"):
        import_adapter(base, tmp_path, tmp_path / "run", **SAY)
    with pytest.raises(ConfigError, match="there is no such folder"):
        import_adapter(base, tmp_path / "gone", tmp_path / "run", **SAY)
    with pytest.raises(ConfigError, match="must be a run. Import it first"):
        mixtral = parity.FIXTURES / "mixtral"
        import_adapter(mixtral, tmp_path, tmp_path / "run", **SAY)


def test_another_base_is_refused(base, adapted, tmp_path):
    folder, run = adapted
    other = tmp_path / "other"
    shutil.copytree(base, other, ignore=shutil.ignore_patterns("checkpoints"))
    theirs = (other / "hf" / "config.json", "intermediate_size")
    for file, width in ((RunDir(other).config_file, "hidden"), theirs):
        text = file.read_text()
        file.write_text(text.replace(f'"{width}": 12', f'"{width}": 16'))
        assert file.read_text() != text
    for part in ("peft", "base"):
        with runs.one_device():
            export_adapter(run, tmp_path / part, **SAY)
    (tmp_path / "peft" / files.ABOUT).unlink()
    with pytest.raises(ConfigError, match="is for another base than .*other"):
        import_adapter(other, tmp_path / "base", tmp_path / "run", **SAY)
    with pytest.raises(ConfigError, match=r"has shape \[24, 16\].* it \[32, 16\]"):
        import_adapter(other, tmp_path / "peft", tmp_path / "run", **SAY)
    with pytest.raises(ConfigError, match="has adapters itself; fold them in"):
        import_adapter(run, folder, tmp_path / "run", **SAY)


@pytest.mark.thorough
def test_folded_in_it_has_the_same_logits(base, adapted):
    _, run = adapted
    with runs.one_device():
        old, before = load_run(run), load_run(base)
        params, state, _ = Folded().arrays(old, None, **SAY)
    assert Folded().model(old.cfg.model) == before.cfg.model
    want = logits(old)
    scale = np.abs(want).max()
    new = dataclasses.replace(before, params=params, state=state)
    np.testing.assert_allclose(logits(new), want, rtol=0, atol=2e-6 * scale)
    assert np.abs(logits(before) - want).max() > 0.1 * scale


@pytest.mark.slow  # it reads the data of the run, as every conversion
def test_folded_in_it_is_an_ordinary_run(base, adapted, tmp_path):
    _, run = adapted
    with runs.one_device():
        convert_run(run, tmp_path / "folded", [Folded()], sequences=0, **SAY)
        new = load_run(tmp_path / "folded")
        export_hf(tmp_path / "folded", tmp_path / "back", dtype="float32", **SAY)
    assert new.cfg.model == base.config().model and not new.cfg.init_from
    assert not RunDir(tmp_path / "folded").base.exists()
    before, after = tensors(parity.FIXTURES / "mixtral"), tensors(tmp_path / "back")
    same = {n for n, value in before.items() if np.array_equal(value, after[n])}
    assert {n for n in before if n.endswith("k_proj.weight")} <= same
    assert not {n for n in before if n.endswith("v_proj.weight")} & same


def test_what_would_overlook_adapters_says_to_fold_them_in(adapted, tmp_path, capsys):
    _, run = adapted
    where = f"--workdir={tmp_path}/new"
    verbs = (
        ["export-hf", str(run), f"--out={tmp_path}/new"],
        ["convert", str(run), "--to=moe", "--experts=2", "--k=1", where],
        ["convert", str(run), "--to=latent", "--group=2", "--latent=8", where],
    )
    for verb in verbs:
        with runs.one_device(), pytest.raises(SystemExit) as stop:
            cli.main(verb)
        told = capsys.readouterr().err
        assert stop.value.code == 2 and "has adapters" in told and "--to=folded" in told
        assert not (tmp_path / "new").exists()


def test_only_lora_is_folded_in_and_only_where_that_is_exact(base):
    model = base.config().model
    with pytest.raises(ConfigError, match="the run has no adapters"):
        Folded().model(model)
    lora = files.LoRA(rank=2, alpha=2.0, targets=("w_embed_VD",))
    tied = dataclasses.replace(model, tied_embeddings=True, adapter=lora)
    with pytest.raises(ConfigError, match="one matrix cannot do both"):
        Folded().model(tied)

    class Mixed(files.LoRA):
        pass

    other = Mixed(rank=2, alpha=2.0, targets=("attention",))
    with pytest.raises(ConfigError, match="Mixed adds depends on the input"):
        Folded().model(dataclasses.replace(model, adapter=other))
