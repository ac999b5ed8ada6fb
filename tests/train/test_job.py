"""What a run's figures come from, where it is evaluated elsewhere."""

import types

import pytest

from moex.config.base import ConfigError, ConfigWarning, to_dict
from moex.configs import base
from moex.nn.context import Compute
from moex.runs.open import saved_with
from moex.runs.program import check_kernels, compute_of, kernels_here
from tests.helpers import tiny_lm


@pytest.mark.parametrize(
    ("kernels", "here"),
    [("auto", True), ("cpu", True), ("triton", False), ("triton,xla", True)],
)
def test_kernels_of_another_platform_are_not_here(kernels, here):
    cfg = base.get_config()
    cfg.kernels = kernels
    assert kernels_here(cfg) == here
    assert compute_of(cfg, train=True).kernels in (None, kernels)
    if here:
        compute_of(cfg, train=False)
        return
    with pytest.warns(ConfigWarning, match="do not run here; 'auto' is used"):
        assert compute_of(cfg, train=False).kernels is None


def test_scores_are_computed_without_what_only_training_needs():
    cfg = base.get_config()
    cfg.remat, cfg.scan_layers, cfg.mesh.exchange_buffer = "full", False, 1.5
    trained, scored = (compute_of(cfg, train=train) for train in (True, False))
    assert trained == Compute(
        dtype="float32", remat="full", scan_layers=False, exchange_buffer=1.5
    )
    assert scored == Compute(scan_layers=False)


def test_kernels_that_cannot_are_refused_with_their_reasons():
    cfg = base.get_config()
    cfg.kernels, cfg.precision = "native,triton", "bfloat16"
    said = (
        "'native,triton'.*among .*cpu.* in bfloat16. native: .*float32.*triton: it runs"
    )
    with pytest.raises(ConfigError, match=said):
        check_kernels(cfg)


def saved(model, fingerprint="ab", **changes):
    """Compare the `meta` of a checkpoint with a model that has other fields."""
    cfg = types.SimpleNamespace(model=tiny_lm(**changes))
    meta = {"model": model, "tokenizer": "ab"}
    saved_with(cfg, {"tokenizer": fingerprint})(7, meta)


def test_a_checkpoint_of_another_model_names_the_field():
    model = to_dict(tiny_lm())
    saved(model)
    said = r"config.model.dim = 32, but the checkpoint of step 7 was trained with 16; "
    with pytest.raises(ConfigError, match=said):
        saved(model, dim=32)
    # Of a field that changes no shape too.
    with pytest.raises(ConfigError, match=r"config.model.norm_eps = 0.5, but"):
        saved(model, norm_eps=0.5)
    with pytest.raises(ConfigError, match="trained with another tokenizer"):
        saved(model, fingerprint="cd")


def test_a_checkpoint_of_before_a_field_was_there_has_its_default():
    model = to_dict(tiny_lm())
    del model["norm_eps"]
    saved(model)
    saved({**model, "a name of old": 1})  # cannot be compared; the arrays are
    cfg = types.SimpleNamespace(model=tiny_lm())
    saved_with(cfg, {"tokenizer": "ab"})(7, {})  # older still
