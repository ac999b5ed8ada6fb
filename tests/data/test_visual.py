"""Visual tokens beside prompts and responses: from a file into batches, and to text."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moex.config.base import ConfigError
from moex.data import cache
from moex.data.pipeline import Data, prepare
from moex.data.sources import PromptResponse
from moex.data.tokenizer import Bytes
from moex.interop.adapter import export_adapter, import_adapter
from moex.model.paths import flat_paths
from moex.runs.open import load_run
from moex.serve.text import write_text
from tests import runs

M, C, L = 2, 3, 16


def captions(root, suffix=".jsonl", number=40, **fields):
    """A source of captions with [M, C] numbers each, and these by caption."""
    random = np.random.default_rng(0)
    known = {f" {i:03}": random.normal(size=(M, C)) for i in range(number)}
    rows = [
        {"prompt": "Say:", "response": text, "image": v.tolist()} | fields
        for text, v in known.items()
    ]
    file = root / f"captions{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    source = PromptResponse(paths=(str(file),), visual="image", holdout=0.3)
    return source, known


def read(root, *sources, **options):
    data = Data(sources=sources, tokenizer=Bytes(), cache_dir=str(root / "cache"))
    return prepare(data, L, log=lambda line: None, **options)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_record_is_a_sequence_with_its_own_visual_tokens(tmp_path, suffix):
    source, known = captions(tmp_path, suffix)
    prepared = read(tmp_path, source)
    seen = []
    for examples in (*prepared.train, *prepared.eval):
        for i in range(len(examples)):
            row = examples[i]
            real = row["segment"] > 0
            assert set(row["segment"][real]) == {1}
            text = bytes(row["targets"][real][:-1].astype(np.uint8)).decode()
            caption = text.removeprefix("Say:")
            np.testing.assert_array_equal(row["visual"], np.float32(known[caption]))
            assert row["visual"].dtype == np.float32 and row["has_visual"] == 1
            seen.append(caption)
    assert sorted(seen) == sorted(known)
    assert all(len(examples) for examples in (*prepared.train, *prepared.eval))


def test_a_source_without_them_is_cached_as_before(tmp_path):
    source, _ = captions(tmp_path)
    source.visual = ""
    assert "visual" not in cache.scan(source, "source")["settings"]
    (examples,) = read(tmp_path, source).train
    assert not {"visual", "has_visual"} & examples[0].keys()
    assert set(examples[0]["segment"]) != {1}  # several records in a sequence


@pytest.mark.parametrize(
    "bad", [None, 1.0, [], [[]], [[1.0], [2.0, 3.0]], ["a"], [float("inf")], [[[1.0]]]]
)
def test_what_is_no_list_of_numbers_is_one_clear_line(tmp_path, bad):
    source, _ = captions(tmp_path, image=bad)
    told = r"source\.visual = 'image': .*captions\.jsonl:1 must have a list of finite"
    with pytest.raises(ConfigError, match=told) as error:
        next(iter(source.read("source")))
    assert "\n" not in str(error.value)


def test_all_must_have_one_shape(tmp_path):
    source, _ = captions(tmp_path)
    file = tmp_path / "captions.jsonl"
    more = {"prompt": "Say:", "response": " more", "image": [1.0] * C}
    file.write_text(f"{json.dumps(more)}\n{file.read_text()}")
    told = r"sources\[0\]: visual tokens must all be of one shape.*\[1, 3\].*\[2, 3\]"
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, source)


V2 = "AdapterV2(prompt_length=2, layers=1, visual=Visual(width={}, tokens=2, layers=1))"
OPTIM = "optim.spike_factor=None"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, run): a run whose adapter was trained on captions and on text."""
    folder = tmp_path_factory.mktemp("visual")
    path = runs.write_config(folder)
    with runs.one_device():
        runs.train(folder, folder / "base", "steps=2", "eval.every=0")
    text = path.read_text()
    old = 'sources=(Text(paths=(CORPUS,), delimiter="\\n\\n", holdout=0.1),),'
    old = old.replace("CORPUS", repr(str(folder / "corpus.txt")))
    assert old in text
    captions(folder)
    own = f"PromptResponse(paths=({str(folder / 'captions.jsonl')!r},), visual='image')"
    text = text.replace(old, f"{old[:-2]} {own}), one_source=True,")
    path.write_text(text.replace("import Text", "import PromptResponse, Text"))
    with runs.one_device():
        start = f"init_from={folder / 'base'}"
        own = (start, f"model.adapter={V2.format(C)}", OPTIM, "optim.lr=0.3")
        runs.train(folder, folder / "run", *own)
        yield folder, folder / "run"


@pytest.mark.slow
def test_a_run_learns_from_the_file_and_writes_about_an_image(trained, tmp_path):
    folder, run = trained
    params = flat_paths(load_run(run).params)
    assert np.any(params["adapters/visual/gate_YH"])
    assert np.any(params["adapters/prompts/gate_YH"])
    features = np.random.default_rng(0).normal(size=(2, M, C)).astype(np.float32)
    np.save(tmp_path / "two.npy", 50 * features)
    np.save(tmp_path / "one.npy", 50 * features[0])
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 0}
    prompts = ["Say:", "Say:"]
    both = write_text(run, prompts, visual=tmp_path / "two.npy", **options)
    same = write_text(run, prompts, visual=tmp_path / "one.npy", **options)
    none = write_text(run, prompts, **options)
    assert both[0] == same[0]
    assert len({both[1], same[1], none[1]}) >= 2
    export_adapter(run, tmp_path / "files", say=lambda line: None)
    again = tmp_path / "again"
    args = [f"--config.{OPTIM}"]
    import_adapter(
        folder / "base", tmp_path / "files", again, args, say=lambda line: None
    )
    runs.assert_same_arrays(load_run(again).params, load_run(run).params)
    assert write_text(again, prompts, visual=tmp_path / "two.npy", **options) == both
    one = {"adapter": [str(tmp_path / "files")], "visual": tmp_path / "two.npy"}
    assert write_text(folder / "base", prompts, **one, **options) == both


@pytest.mark.slow
def test_visual_tokens_that_do_not_fit_are_one_clear_line(trained, tmp_path):
    folder, run = trained
    (tmp_path / "text.npy").write_text("text")
    np.save(tmp_path / "flat.npy", np.zeros(C))
    np.save(tmp_path / "narrow.npy", np.zeros((M, C - 1)))
    np.save(tmp_path / "nan.npy", np.full((M, C), np.nan))
    options = {"max_new_tokens": 2, "seed": 0}
    for file, told in (
        ("none.npy", "is no .npy file of numbers"),
        ("text.npy", "is no .npy file of numbers"),
        ("flat.npy", r"has the shape \[3\]; it must be \[tokens, width\]"),
        ("nan.npy", "has a number that is not finite"),
        ("narrow.npy", r"visual tokens of shape \[1, 2, 3\]; got \[1, 2, 2\]"),
    ):
        with pytest.raises(ConfigError, match=told):
            write_text(run, ["Say:"], visual=tmp_path / file, **options)
    with pytest.raises(ConfigError, match="visual tokens for a model that takes none"):
        np.save(tmp_path / "fits.npy", np.zeros((M, C)))
        write_text(folder / "base", ["Say:"], visual=tmp_path / "fits.npy", **options)
    for fields, told in (
        (
            (f"model.adapter={V2.format(C + 1)}", OPTIM),
            r"field 'visual' = 'float32\[2, 3\]': must be float32\[2, 4\]",
        ),
        ((), "field 'visual' = .*must be one of"),
    ):
        with pytest.raises(ConfigError, match=told):
            runs.train(
                folder, tmp_path / "run", f"init_from={folder / 'base'}", *fields
            )
