"""Quantised checkpoints against slow loops, and against transformers (`-m hf`)."""

import itertools
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moex.config.base import ConfigError
from moex.interop.dequantise import reader
from moex.interop.folder import SINGLE, Folder

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FULL = slice(None)


def open_folder(path, tensors, settings):
    path.mkdir(exist_ok=True)
    config = {"model_type": "tiny", "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / SINGLE)
    return Folder.open(path)


def fp8_settings(block=(128, 128)):
    return {"quant_method": "fp8", "weight_block_size": list(block)}


def fp8_tensors(shape, block=(128, 128)):
    rng = np.random.default_rng(0)
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    return {
        "x.weight": (rng.standard_normal(shape) * 50).astype(FP8),
        "x.weight_scale_inv": rng.uniform(1e-4, 1e-2, grid).astype(np.float32),
        "norm.weight": np.arange(7).astype(BF16),
    }


def mxfp4_tensors(experts=2, rows=5, groups=3):
    rng = np.random.default_rng(0)
    shape = (experts, rows, groups)
    return {
        "gate_up_proj_blocks": rng.integers(0, 256, (*shape, 16), np.uint8),
        "gate_up_proj_scales": rng.integers(100, 140, shape, np.uint8),
        "gate_up_proj_bias": np.arange(7).astype(BF16),
    }


def slow_fp8(weight, scale, block):
    out = np.empty(weight.shape, np.float32)
    for i, j in itertools.product(*map(range, weight.shape)):
        out[i, j] = np.float32(weight[i, j]) * scale[i // block[0], j // block[1]]
    return out


def slow_number(code):
    """A 4-bit number by the definition of E2M1."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    if exponent == 0:
        return sign * mantissa * 0.5
    return sign * 2.0 ** (exponent - 1) * (1 + mantissa / 2)


def slow_mxfp4(blocks, scales):
    num_experts, rows, groups, _ = blocks.shape
    out = np.empty((num_experts, groups * 32, rows), np.float32)
    for e, i, r in itertools.product(*map(range, out.shape)):
        byte = int(blocks[e, r, i // 32, (i % 32) // 2])
        code = byte >> 4 if i % 2 else byte & 15
        exponent = int(scales[e, r, i // 32]) - 127
        out[e, i, r] = slow_number(code) * 2.0**exponent
    return out


def refused(folder, *words):
    with pytest.raises(ConfigError) as e:
        reader(folder)
    text = str(e.value)
    assert "\n" not in text
    for word in (str(folder.path), *words):
        assert word in text, text


def check_slices(folder, name, indices):
    whole = folder[name].read()
    for index in indices:
        want = np.asarray(whole[index])
        got = folder[name].read(index)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize(
    "shape, block",
    [((300, 150), (128, 128)), ((128, 256), (128, 128)), ((5, 7), (2, 4))]
    + [((1, 1), (128, 128))],
)
def test_fp8(tmp_path, shape, block):
    tensors = fp8_tensors(shape, block)
    folder = reader(open_folder(tmp_path, tensors, fp8_settings(block)))
    assert folder.names == {"x.weight", "norm.weight"}
    assert folder.config == {"model_type": "tiny"}
    assert folder["x.weight"].shape == shape
    assert folder["x.weight"].dtype == BF16
    assert folder["x.weight"].file == tmp_path / SINGLE
    got = folder["x.weight"].read()
    assert got.dtype == BF16
    want = slow_fp8(tensors["x.weight"], tensors["x.weight_scale_inv"], block)
    np.testing.assert_array_equal(got, want.astype(BF16))
    # What was not quantised is as it was.
    assert folder["norm.weight"].shape == (7,)
    assert folder["norm.weight"].dtype == BF16
    np.testing.assert_array_equal(folder["norm.weight"].read(), tensors["norm.weight"])


def test_fp8_slices(tmp_path):
    folder = reader(open_folder(tmp_path, fp8_tensors((300, 290)), fp8_settings()))
    indices = [
        *((), (slice(299, 300),), (slice(130, 135),), (FULL, slice(200, 290))),
        *((slice(120, 140), slice(250, 260)), (FULL, slice(128, 129)), (slice(3, 3),)),
        *((slice(-3, None), slice(None, -7)), (slice(250, 999), slice(0, 1))),
    ]
    check_slices(folder, "x.weight", indices)


@pytest.mark.parametrize("scale", [BF16, ml_dtypes.float8_e8m0fnu])
def test_fp8_scales_of_other_types(tmp_path, scale):
    tensors = fp8_tensors((130, 5))
    tensors["x.weight_scale_inv"] = np.array([[0.25], [2.0]], scale)
    folder = reader(open_folder(tmp_path, tensors, fp8_settings()))
    want = tensors["x.weight"].astype(np.float32)
    want[:128] *= 0.25
    want[128:] *= 2
    np.testing.assert_array_equal(folder["x.weight"].read(), want.astype(BF16))


def test_fp8_refuses(tmp_path):
    def tensors(**change):
        made = fp8_tensors((130, 5))
        for name, value in change.items():
            made[f"x.{name}"] = value
        return {k: v for k, v in made.items() if v is not None}

    def opened(**change):
        return open_folder(tmp_path, tensors(**change), fp8_settings())

    scale = "x.weight_scale_inv"
    refused(opened(weight_scale_inv=None), "'x.weight' has no scale", scale)
    wrong = np.zeros((1, 1), np.float32)
    refused(opened(weight_scale_inv=wrong), scale, "(1, 1)", "(2, 1)")
    wrong = np.zeros((2, 1), np.uint8)
    refused(opened(weight_scale_inv=wrong), scale, "uint8")
    refused(opened(weight=np.zeros((130, 5), BF16)), scale, "scales no tensor")
    refused(opened(weight=np.zeros((2, 2, 2), FP8)), "'x.weight'", "2-D")
    for block in (None, 128, [128], [128, 0], [1.5, 2]):
        settings = {"quant_method": "fp8", "weight_block_size": block}
        refused(open_folder(tmp_path, tensors(), settings), "weight_block_size")


@pytest.mark.parametrize("sizes", [(2, 5, 3), (1, 1, 1), (3, 270, 1)])
def test_mxfp4(tmp_path, sizes):
    tensors = mxfp4_tensors(*sizes)
    folder = reader(open_folder(tmp_path, tensors, {"quant_method": "mxfp4"}))
    assert folder.names == {"gate_up_proj", "gate_up_proj_bias"}
    shape = (sizes[0], sizes[2] * 32, sizes[1])
    assert folder["gate_up_proj"].shape == shape
    assert folder["gate_up_proj"].dtype == BF16
    assert folder["gate_up_proj"].file == tmp_path / SINGLE
    got = folder["gate_up_proj"].read()
    want = slow_mxfp4(tensors["gate_up_proj_blocks"], tensors["gate_up_proj_scales"])
    assert got.dtype == BF16
    # bfloat16 holds the numbers exactly.
    np.testing.assert_array_equal(got.astype(np.float32), want)


def test_mxfp4_extreme_scales(tmp_path):
    tensors = mxfp4_tensors(1, 3, 1)
    tensors["gate_up_proj_blocks"][:] = 0x21  # 0.5 and 1.0
    tensors["gate_up_proj_scales"][0, :, 0] = [0, 254, 255]
    folder = reader(open_folder(tmp_path, tensors, {"quant_method": "mxfp4"}))
    got = folder["gate_up_proj"].read()[0].astype(np.float64)
    np.testing.assert_array_equal(got[:2, 0], [2.0**-128, 2.0**-127])
    np.testing.assert_array_equal(got[:2, 1], [2.0**126, 2.0**127])
    assert np.isnan(got[:, 2]).all()  # the format's NaN


def test_mxfp4_slices(tmp_path):
    tensors = mxfp4_tensors(3, 5, 4)
    folder = reader(open_folder(tmp_path, tensors, {"quant_method": "mxfp4"}))
    indices = [
        *((), (slice(1, 2),), (slice(1, 3),), (FULL, slice(33, 40)), (slice(2, 2),)),
        *((slice(1), slice(30, 70), slice(1, 4)), (FULL, slice(64, 65))),
        *((FULL, slice(5, 5)), (FULL, FULL, slice(-2, None))),
    ]
    check_slices(folder, "gate_up_proj", indices)


def test_mxfp4_refuses(tmp_path):
    def opened(**change):
        made = mxfp4_tensors() | {f"gate_up_proj_{k}": v for k, v in change.items()}
        made = {k: v for k, v in made.items() if v is not None}
        return open_folder(tmp_path, made, {"quant_method": "mxfp4"})

    blocks, scales = "'gate_up_proj_blocks'", "'gate_up_proj_scales'"
    refused(opened(scales=None), blocks, "has no scale", scales)
    refused(opened(scales=np.zeros((2, 5, 4), np.uint8)), scales, "(2, 5, 4)")
    refused(opened(scales=np.zeros((2, 5, 3), np.int8)), scales, "int8")
    refused(opened(blocks=None), scales, "scales no tensor")
    refused(opened(blocks=np.zeros((2, 5, 3, 8), np.uint8)), blocks, "groups, 16]")
    refused(opened(blocks=np.zeros((2, 5, 48), np.uint8)), blocks, "groups, 16]")
    both = mxfp4_tensors() | {"gate_up_proj": np.zeros(2, BF16)}
    folder = open_folder(tmp_path, both, {"quant_method": "mxfp4"})
    refused(folder, "'gate_up_proj'", "too")


def test_a_slice_reads_only_its_blocks(tmp_path):
    """Of tensors of 16 M numbers, a part is made without the whole."""
    tensors = {
        "w": np.zeros((4096, 4096), FP8),
        "w_scale_inv": np.ones((32, 32), np.float32),
    }
    fp8 = reader(open_folder(tmp_path / "fp8", tensors, fp8_settings()))
    tensors = {
        "w_blocks": np.zeros((16, 1024, 32, 16), np.uint8),
        "w_scales": np.zeros((16, 1024, 32), np.uint8),
    }
    mxfp4 = reader(open_folder(tmp_path / "m", tensors, {"quant_method": "mxfp4"}))
    tracemalloc.start()
    try:
        assert fp8["w"].read((slice(7, 9),)).shape == (2, 4096)
        assert mxfp4["w"].read((slice(3, 4), slice(7, 9))).shape == (1, 2, 1024)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("settings", [None, {}])
def test_not_quantised(tmp_path, settings):
    folder = open_folder(tmp_path, {"w": np.zeros(3, np.float32)}, settings)
    assert reader(folder) is folder


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_other_methods(tmp_path, method):
    tensors = {"w": np.zeros(3, np.float32)}
    refused(open_folder(tmp_path, tensors, {"quant_method": method}), repr(method))
    refused(open_folder(tmp_path, tensors, [method]), "method None")


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
def test_fp8_as_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the hf extra")
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    tensors = fp8_tensors((384, 256))  # theirs takes whole blocks only
    folder = open_folder(tmp_path, tensors, fp8_settings())
    weight = torch.from_numpy(tensors["x.weight"].view(np.uint8))
    scale = torch.from_numpy(tensors["x.weight_scale_inv"])
    inputs = {"weight": weight.view(torch.float8_e4m3fn), "weight_scale_inv": scale}
    out = integration.Fp8Dequantize(None).convert(inputs)["weight"]
    assert out.dtype == torch.float32
    rounded = out.to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(reader(folder)["x.weight"].read().view("i2"), rounded)


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
def test_mxfp4_as_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the hf extra")
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = mxfp4_tensors(3, 34, 2)
    # All scales with which no number overflows.
    low = np.arange(3 * 34 * 2, dtype=np.uint8).reshape(3, 34, 2)
    tensors["gate_up_proj_scales"] = low + 40
    folder = reader(open_folder(tmp_path, tensors, {"quant_method": "mxfp4"}))
    want = integration.convert_moe_packed_tensors(
        torch.from_numpy(tensors["gate_up_proj_blocks"]),
        torch.from_numpy(tensors["gate_up_proj_scales"]),
    )
    got = folder["gate_up_proj"].read()
    np.testing.assert_array_equal(got.view("i2"), want.view(torch.int16).numpy())
