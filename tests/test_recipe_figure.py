"""The recipe of a new figure: one row of `metrics.FIGURES`, and it is everywhere."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from moex.model.figures import by_layer, moe_summary, routing_record
from moex.moe import metrics
from moex.nn.stack import Segment
from moex.report import routing as report
from moex.report.material import Routing
from moex.runs.keys import Log
from moex.train.charts import layout
from tests import documented
from tests.helpers import tiny_lm, tiny_moe
from tests.moe.test_metrics import example
from tests.test_run import run_config

PAGE = pathlib.Path(__file__).parents[1] / "docs/monitoring.md"


@pytest.fixture
def rows(monkeypatch):
    """Two layers of two experts, with one figure more: loads 2, 1 and 3, 0."""
    own: dict = {}
    exec(documented.files()["gini.py"], own)
    monkeypatch.setattr(metrics, "FIGURES", (*metrics.FIGURES, own["GINI"]))
    stats = {name: jnp.stack([value, value]) for name, value in example().items()}
    stats["load_E"] = jnp.array([[2.0, 1.0], [3.0, 0.0]])
    figures = metrics.layer_metrics(stats)
    model = tiny_lm(Segment(pattern=(tiny_moe(2),), repeat=2))
    return by_layer(model, {"segments/0/blocks/0/ffn": figures})


def test_a_new_figure_is_in_the_files_with_its_worst_layer(rows):
    summary = moe_summary(rows)
    assert summary["gini"] == pytest.approx((1 / 6 + 1 / 2) / 2)
    assert summary["gini_worst"] == pytest.approx(1 / 2)
    assert summary["gini_worst_layer"] == "001"
    assert routing_record(rows)["000"]["gini"] == pytest.approx(1 / 6, rel=1e-5)


@pytest.mark.parametrize("detail", ["brief", "detailed"])
def test_a_new_figure_has_charts(rows, detail):
    pages = layout(run_config(model=tiny_lm(), log=Log(detail=detail)), num_domains=1)
    charts = {
        "Gini of the load, mean of layers (0 to 1)": "moe/gini_mean$",
        "Gini of the load, worst layer (0 to 1)": "moe/gini_worst$",
    }
    if detail == "detailed":
        charts["Gini of the load, every layer (0 to 1)"] = "moe_layers/gini/layer_.*"
    page = pages["MoE: balance"]
    assert [page[title][1] for title in charts] == [[p] for p in charts.values()]


def test_a_new_figure_has_a_curve_and_a_column_in_a_report(rows):
    layers = {
        label: {name: np.array([value]) for name, value in own.items()}
        for label, own in routing_record(rows).items()
    }
    found = Routing(step_S=np.array([1]), layers=layers, read=1, there=1)
    figure = report.curves(found, metrics.FIGURES[-1]).figure
    assert figure.layout.title.text == "Gini of the load"
    assert figure.layout.yaxis.title.text == "0 to 1"
    table = report.table(found)
    column = table.head.index("gini of the load")
    assert [row[column] for row in table.rows] == ["0.1667", "0.5"]


def test_a_new_figure_is_in_the_table_of_the_documentation(rows):
    last = metrics.documentation().splitlines()[-1]
    assert last == "| `gini` | Gini of the load | 0 to 1 | largest |"


def test_the_documentation_has_the_table_of_this_code():
    text = PAGE.read_text(encoding="utf-8")
    there = text.split("<!-- figures -->")[1].split("<!-- /figures -->")[0].strip()
    made = metrics.documentation()
    assert there == made, "python -m moex.moe.metrics prints the new one"


def test_figures_have_names_of_their_own_and_pages_that_are_there():
    names = [figure.name for figure in metrics.FIGURES]
    titles = [figure.title for figure in metrics.FIGURES]
    assert len(set(names)) == len(names) and len(set(titles)) == len(titles)
    pages = {figure.chart for figure in metrics.FIGURES}
    assert pages == {
        *(None, metrics.BALANCE, metrics.FAULTS, metrics.ROUTERS, metrics.EXPERTS)
    }
    assert all(figure.is_scalar for figure in metrics.FIGURES if figure.chart)
