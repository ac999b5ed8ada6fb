"""The documentation names what there is, and its examples run."""

import ast
import importlib
import inspect
import re
import sys

import jax
import numpy as np
import pytest

from moex import project
from moex.commands import Verb
from moex.config.base import from_dict, to_dict
from moex.convert.base import Conversion
from moex.data.contract import Source, TokenizerConfig
from moex.data.encoding import Tokenizer
from moex.model.accounting import model_cost
from moex.model.paths import flat_paths
from moex.moe.contract import ExpertsConfig, RouterConfig
from moex.moe.losses import RoutingLoss
from moex.moe.metrics import Figure
from moex.nn.contract import AttentionConfig, FeedForwardConfig
from moex.runs.keys import Loss
from moex.tasks.base import Task
from tests import documented, runs
from tests.helpers import TASK, XLA, random_batch
from tests.test_architecture import FLOORS

ROOT = runs.ROOT
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PLACE = re.compile(
    r"`((?:moex|kernels_pallas|tests|configs)/[\w/]+\.py)(?::([\w.]+))?`"
)


def defined(path: str) -> set[str]:
    """Names that a file defines: `function`, `Class`, `Class.method`, `CONSTANT`."""
    found = set()

    def look(nodes, before=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(before + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{before}{node.name}.")
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found.update(before + t.id for t in targets if isinstance(t, ast.Name))

    look(ast.parse((ROOT / path).read_text(encoding="utf-8")).body)
    return found


def missing(text: str) -> list[str]:
    """The places that a text names and that are not there."""
    found = []
    for path, name in PLACE.findall(text):
        there = (ROOT / path).is_file() and (not name or name in defined(path))
        if not there:
            found.append(f"{path}:{name}")
    return found


def test_every_place_that_the_architecture_names_is_there():
    assert len(PLACE.findall(ARCHITECTURE)) > 60
    assert missing(ARCHITECTURE) == []


def test_a_place_that_is_gone_is_seen():
    text = "`moex/cli.py:mian` `moex/cli.py:main` `moex/clii.py` `moex/cli.py`"
    assert missing(text) == ["moex/cli.py:mian", "moex/clii.py:"]
    assert missing("`moex/nn/lm.py:LM.make` `moex/nn/lm.py:LM.mak`") == [
        "moex/nn/lm.py:LM.mak"
    ]


def headings(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    plain = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in found}


def test_the_links_of_pages_lead_to_files_and_headings():
    folders = ("docs", "benchmarks", "experiments", "launch", "configs")
    inner = [page for name in folders for page in (ROOT / name).rglob("*.md")]
    found = 0
    for page in [*ROOT.glob("*.md"), *inner]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s:]+)\)", text):  # no https:
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page}: {link}"
            if heading:
                there = headings(target.read_text(encoding="utf-8"))
                assert heading in there, f"{page}: {link}"
            found += 1
    assert found > 100
    assert headings("# A: b-c\n```\n# no\n```\n") == {"a-b-c"}


def test_the_map_has_the_floors_of_the_test_of_imports():
    table = ARCHITECTURE.split("| floor |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table]
    assert rows == list(FLOORS)


CONTRACTS = {
    "relu": RouterConfig,
    "mlp": ExpertsConfig,
    "scaled": FeedForwardConfig,
    "gated": AttentionConfig,
    "robust": Task,
    "images": Task,
    "pages": Source,
    "unigram": TokenizerConfig,
    "fewer": Conversion,
    "last_step": Verb,
    "gini": Figure,
    "mutual": RoutingLoss,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(modules of the files of docs/extending.md, names of the block that is none)."""
    folder = tmp_path_factory.mktemp("project")
    files = {name.split("/")[-1]: code for name, code in documented.files().items()}
    for name, code in files.items():
        (folder / name).write_text(code, encoding="utf-8")
    modules = [name.removesuffix(".py") for name in files]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        project.use(folder)
        found = {name: importlib.import_module(name) for name in modules}
        (block,) = (b for b in documented.blocks() if not b.startswith("# "))
        names: dict = {}
        exec(block, names)
        yield found, names
        for name in modules:
            sys.modules.pop(name, None)
    project.use(None)


def defined_in(module, contract):
    """The name of a module that is of a contract and is not imported."""
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, contract)
        or (getattr(value, "__module__", "") == module.__name__)
        and isinstance(value, type)
        and issubclass(value, contract)
    )
    return found


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_contract_has_an_example_that_defines_all_of_it(page, name):
    assert not inspect.isabstract(defined_in(page[0][name], CONTRACTS[name]))


def test_the_page_has_an_example_of_every_contract(page):
    used = {"run", "usage"}  # a config file, and functions on runs
    assert set(page[0]) == set(CONTRACTS) | used


def test_the_kinds_of_the_page_are_found_again_in_a_saved_config(page):
    model = page[1]["model"]
    saved = to_dict(model)
    text = str(saved)
    for tag in ("relu.Relu", "mlp.Mlp", "scaled.Scaled", "gated.Gated"):
        assert f"'{tag}'" in text
    assert to_dict(from_dict(saved)) == saved


def test_the_layer_of_the_page_tells_its_load(page):
    names = page[1]
    assert names["logits_BLV"].shape == (2, 8, 50)
    load = np.asarray(names["told"]["load"])
    assert load.shape == (2, 4) and np.all(load == np.round(load))
    assert 0 < load.sum() < 2 * 16 * 4
    assert np.all(np.asarray(names["told"]["losses"]["l1_loss"]) > 0)


@pytest.mark.thorough
def test_the_kinds_of_the_page_learn_and_are_counted(page):
    """Every parameter of them gets a gradient from the loss of the language model."""
    names = page[1]
    spec, model = names["spec"], names["model"]
    batch = random_batch(2, 8, vocab=50, num_domains=1)

    @jax.jit
    @jax.grad
    def gradient(params):
        ctx = TASK.context(batch, compute=XLA)
        built = spec.merge(params, names["state"])
        return TASK.loss(built, ctx, batch, Loss(), num_domains=1)[0]

    for path, value in flat_paths(gradient(names["params"])).items():
        assert np.all(np.isfinite(value)) and np.any(value != 0), path
    cost = model_cost(model, spec, 8)
    assert cost.train_flops > 0


def test_the_source_and_the_tokenizer_of_the_page_read_and_write_text(page, tmp_path):
    (tmp_path / "book.txt").write_text("one page\n\nanother pagé", encoding="utf-8")
    source = page[0]["pages"].Pages(paths=(str(tmp_path / "book.txt"),))
    texts = [document.value for document in source.read("source")]
    assert texts == ["one page", "another pagé"]
    corpus = (lambda limit: texts * 20, "")
    tokenizer = (
        page[0]["unigram"].Unigram(vocab=300).make("tokenizer", corpus, tmp_path)
    )
    for text in ("another page", "日本"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
