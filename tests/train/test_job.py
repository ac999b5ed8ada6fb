"""What a run's figures come from, where it is evaluated elsewhere."""

import pytest

from configs import base
from moex.config import ConfigError, ConfigWarning
from moex.train.job import check_kernels, kernels_here, static_options


@pytest.mark.parametrize(
    ("kernels", "here"),
    [("auto", True), ("cpu", True), ("triton", False), ("triton,xla", True)],
)
def test_kernels_of_another_platform_are_not_here(kernels, here):
    cfg = base.get_config()
    cfg.kernels = kernels
    assert kernels_here(cfg) == here
    assert static_options(cfg, train=True)["kernels"] in (None, kernels)
    if here:
        static_options(cfg, train=False)
        return
    with pytest.warns(ConfigWarning, match="do not run here; 'auto' is used"):
        assert static_options(cfg, train=False)["kernels"] is None


def test_kernels_that_cannot_are_refused_with_their_reasons():
    cfg = base.get_config()
    cfg.kernels, cfg.precision = "native,triton", "bfloat16"
    said = (
        "'native,triton'.*among .*cpu.* in bfloat16. native: .*float32.*triton: it runs"
    )
    with pytest.raises(ConfigError, match=said):
        check_kernels(cfg)
