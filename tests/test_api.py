"""The API reference: public names say what they are, and its pages are made."""

import dataclasses
import importlib.util
import inspect
import posixpath
import re
import subprocess
import sys
from typing import ClassVar, get_origin

import pytest

import moex
from tests import runs

API = runs.ROOT / "docs/api"
spec = importlib.util.spec_from_file_location("comments", API / "comments.py")
comments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(comments)


def own_docstring(thing):
    """The docstring of a thing itself; dataclasses without one get their signature."""
    own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    text = inspect.cleandoc(own or "")
    made = dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
    return "" if made else text


def unexplained(thing):
    """The arguments of a public function, or fields of a class, without a word."""
    if inspect.isfunction(thing):
        text = own_docstring(thing)
        return [n for n in inspect.signature(thing).parameters if not names(text, n)]
    if not dataclasses.is_dataclass(thing):
        return []
    found = []
    for cls in (c for c in thing.__mro__ if "__annotations__" in vars(c)):
        told = comments.of_fields(cls)
        for name, kind in vars(cls)["__annotations__"].items():
            if get_origin(kind) is ClassVar or kind is ClassVar or name in told:
                continue
            if not names(own_docstring(cls), name):
                found.append(f"{cls.__name__}.{name}")
    return found


def names(text, name):
    """Whether a docstring has a name between backticks, or as a row of a section."""
    return re.search(rf"`{name}`|^ +(\w+, )*\**{name}(, \w+)*:", text, re.MULTILINE)


@pytest.mark.parametrize("name", moex.MODULES)
def test_a_public_name_says_what_it_is_and_what_it_takes(name):
    value = getattr(moex, name)
    first = own_docstring(value).partition("\n\n")[0]
    assert first.endswith("."), first
    assert unexplained(value) == []


def test_what_is_not_explained_is_seen():
    @dataclasses.dataclass
    class Fields:
        """It has `told`.

        Attributes:
          row, other: explained.
        """

        told: int
        row: int
        other: int
        left_out: int
        behind: int  # explained
        # Explained,
        # in two lines.
        above: tuple[int, ...] = (
            0,
            1,
        )

    def function(told, left_out):
        """Do something with `told`."""

    assert unexplained(Fields) == ["Fields.left_out"]
    told = {"behind": "explained", "above": "Explained, in two lines."}
    assert comments.of_fields(Fields) == told
    assert unexplained(function) == ["left_out"]
    assert own_docstring(dataclasses.make_dataclass("Plain", ["x"])) == ""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages by name, made as `make docs` does; a warning is an error."""
    pytest.importorskip("pdoc", reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("api")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(API), str(folder)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=runs.environment(),
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {
        str(file.relative_to(folder)): file.read_text(encoding="utf-8")
        for file in folder.rglob("*.html")
    }


@pytest.mark.slow
def test_every_public_name_stands_in_the_pages(pages):
    for name, module in moex.MODULES.items():
        page = module.replace(".", "/") + ".html"
        assert f'id="{name}"' in pages[page]
        assert f'href="{page}#{name}"' in pages["moex.html"]


@pytest.mark.slow
def test_the_pages_show_fields_calls_and_sections(pages):
    topk = pages["moex/moe/routers/topk.html"]
    assert "rate of the loss-free bias; 0: no bias" in topk
    contract = pages["moex/moe/contract.html"]
    assert 'id="Router.__call__"' in contract
    assert re.search("<strong>x_TD:</strong>[^<]* the input of the layer", contract)
    assert not [name for name, text in pages.items() if "jaxlib" in text]


@pytest.mark.slow
def test_the_links_of_the_pages_lead_somewhere(pages):
    for name, text in pages.items():
        for link in re.findall(r'href="([^":$]+)"', text):
            file, _, place = link.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), file))
            target = pages[path if file else name]
            assert not place or f'id="{place}"' in target, f"{name}: {link}"
