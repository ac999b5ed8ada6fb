"""The documentation names what there is, and its examples run."""

import ast
import re

from tests import runs
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


def test_the_map_has_the_floors_of_the_test_of_imports():
    table = ARCHITECTURE.split("| floor |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table]
    assert rows == list(FLOORS)
