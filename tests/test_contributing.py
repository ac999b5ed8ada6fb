"""The recipes of CONTRIBUTING.md: what they name is there, and a few are walked.

Others are walked where they belong: `test_own_kinds.py` (kinds in a folder of one's
own), `test_recipe_figure.py`, `test_commands.py` (a verb), `convert/test_convert.py`
(a conversion), `train/test_regression.py` (a task).
"""

import ast
import re
import shutil
import subprocess
import sys

import pytest

from tests import documented, runs
from tests.marks import thorough_but_for
from tests.test_documentation import defined

ROOT = runs.ROOT
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACE = re.compile(r"`((?:moex|kernels_pallas|tests|configs|docs|experiments)/[^`]*)`")
NAMED = re.compile(r"`(\w+)` of\s+`([\w/]+\.py)`")


def test_every_file_that_a_recipe_names_is_there():
    places = PLACE.findall(TEXT)
    assert len(places) > 25
    for place in places:
        assert list(ROOT.glob(re.sub(r"<\w+>", "*", place))), place


def test_every_list_that_a_recipe_adds_to_is_there():
    named = NAMED.findall(TEXT)
    assert len(named) >= 10
    for name, file in named:
        assert name.split(".")[-1] in defined(file), f"{name} of {file}"


def imports_of(folder):
    """`{module of the folder: rooms of moex that import it}`, its own room apart."""
    kinds = {f"{folder}.{f.stem}" for f in (ROOT / "moex/moe").glob("*/*.py")}
    found = {}
    for path in (ROOT / "moex").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None)
            if isinstance(node, ast.ImportFrom) and module in kinds:
                room = path.relative_to(ROOT / "moex").as_posix()
                found.setdefault(module, set()).add(room)
    return found


@pytest.mark.parametrize("folder", thorough_but_for(["routers", "experts"], "routers"))
def test_a_router_or_an_expert_kind_is_one_file_of_moex(folder):
    """Nothing else knows it, but for what makes or reads one kind: no list of kinds."""
    found = imports_of(f"moex.moe.{folder}")
    assert found  # such as Glu, which checkpoints of Hugging Face become
    for module, files in found.items():
        rest = {f for f in files if f.split("/")[0] not in ("convert", "interop")}
        allowed = {
            "moex.moe.routers.topp": {"report/health.py"},  # advice about k_max
            "moex.moe.routers.forced": {"placement/coherent.py"},  # which refuses it
            "moex.moe.experts.zero": {"moe/layer.py"},  # its own field, no expert kind
        }
        assert rest == allowed.get(module, set()), module


ORACLES = {
    "BY_TOKEN = {": """
def relu(cfg, logit_E, **_):
    return {e: v for e, v in enumerate(logit_E) if v > 0}, softmax(logit_E)


BY_TOKEN = {"Relu": relu, """,
    "EXPERTS = {": """
def mlp(cfg, x_D, w, e):
    return np.maximum(x_D @ w["w_in_EDF"][e], 0) ** 2 @ w["w_out_EFD"][e]


EXPERTS = {"Mlp": mlp, """,
}
ROWS = {
    "test_routers.py": (
        "ROUTERS = {",
        "from moex.moe.routers.relu import Relu\n",
        '"relu": Relu()',
    ),
    "test_experts.py": (
        "EXPERTS = {",
        "from moex.moe.experts.mlp import Mlp\n",
        '"mlp": Mlp(hidden=3)',
    ),
}


@pytest.mark.slow
def test_a_router_and_an_expert_kind_are_a_file_a_row_and_an_oracle(tmp_path):
    for package in ("moex", "kernels_pallas", "configs", "tests"):
        skip = shutil.ignore_patterns("__pycache__", "fixtures", "stored_run")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = documented.files()
    for kind in ("routers/relu.py", "experts/mlp.py"):
        code = files[kind.split("/")[1]]
        (tmp_path / "moex/moe" / kind).write_text(code, encoding="utf-8")
    for name, (start, imported, row) in ROWS.items():
        replace(tmp_path / "tests/moe" / name, start, f"{imported}{start}{row}, ")
    for start, code in ORACLES.items():
        replace(tmp_path / "tests/moe/oracle.py", start, code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "relu or mlp", "-p", "no:xdist"]
        + [f"tests/moe/{name}" for name in ROWS],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=runs.environment() | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 10


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(f"\n{old}") == 1
    path.write_text(text.replace(f"\n{old}", f"\n{new}"), encoding="utf-8")
