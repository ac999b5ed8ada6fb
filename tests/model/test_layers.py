"""The walk over layers: numbers, paths and what stands inside of what."""

import jax
import pytest

from moex.config.base import to_dict
from moex.model.layers import label, layers, routers, shown, site_at, sites
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.narrow import Narrow
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import tiny_lm, tiny_moe

ROUTERS = (TopK(k=1), TopK(k=2))
DEEP = Narrow(latent=8, inner=Narrow(latent=4, inner=tiny_moe(4)))
CHAIN = Narrow(latent=8, inner=Chain(moe=tiny_moe(8), iterations=2, routers=ROUTERS))
LOCAL = Attention(heads=2, window=4)
# Layers 0 | 1 2, 3 4 | 5, 6, 7
MODEL = tiny_lm(
    Segment(pattern=(Dense(hidden=8),), attention=(LOCAL,)),
    Segment(pattern=(CHAIN, Dense(hidden=24)), repeat=2),
    Segment(pattern=(DEEP,), repeat=3),
)


def test_every_layer_is_met_once_in_order():
    numbers = [site.numbers[r] for site, r in layers(MODEL)]
    assert numbers == list(range(MODEL.num_layers())) == list(range(8))
    assert [list(site.numbers) for site in sites(MODEL)] == [
        [0],
        [1, 3],
        [2, 4],
        [5, 6, 7],
    ]
    kinds = [site.ffn.describe() for site, _ in layers(MODEL)]
    inside = "Narrow(8, Chain(2, MoE(8, TopK, Glu)))"
    assert kinds[:5] == ["Dense", inside, "Dense", inside, "Dense"]
    assert kinds[5:] == ["Narrow(8, Narrow(4, MoE(4, TopK, Glu)))"] * 3


def test_a_site_says_whose_attention_its_layers_have():
    own = [site.attention for site in sites(MODEL)]
    assert own == [LOCAL, *[MODEL.attention] * 3]


@pytest.mark.parametrize("site", sites(MODEL), ids=lambda site: site.path)
def test_paths_are_those_of_the_parameters_and_of_the_config(site):
    params = flat_paths(model_spec(MODEL).params)
    own = {n: a for n, a in params.items() if n.startswith(f"{site.path}/")}
    assert own
    assert {a.shape[0] for a in jax.tree.leaves(own)} == {site.repeat}
    found = to_dict({"model": MODEL})
    for part in site.where.removeprefix("config.").replace("[", ".").split("."):
        part = part.removesuffix("]")
        found = found[int(part) if part.isdigit() else part]
    assert found == to_dict(site.ffn)
    if site.sparse is not None:
        experts = f"{site.sparse.path}/experts/w_out_EFD"
        assert own[experts].shape[-1] == site.sparse.width


def test_the_experts_inside_of_other_layers_are_found():
    _, chain, _, deep = (site.sparse for site in sites(MODEL))
    assert chain.path == "segments/1/blocks/0/ffn/inner"
    assert chain.where == "config.model.layers[1].pattern[0].inner.moe"
    assert (chain.width, chain.chained, chain.routers) == (8, True, ROUTERS)
    assert deep.path == "segments/2/blocks/0/ffn/inner/inner"
    assert deep.where == "config.model.layers[2].pattern[0].inner.inner"
    assert (deep.width, deep.chained, deep.routers) == (4, False, (deep.moe.router,))
    assert deep.moe is MODEL.layers[2].pattern[0].inner.inner, "a part, not a copy"


def test_routers_have_labels_by_layer_and_round():
    found = list(routers(MODEL))
    labels = ["001.1", "001.2", "003.1", "003.2", "005", "006", "007"]
    assert [routed.label for routed in found] == labels
    assert [routed.router for routed in found[:2]] == list(ROUTERS)
    assert [shown(text) for text in labels[:2]] == ["1.1", "1.2"]
    assert shown(label(0)) == "0"


def test_no_site_holds_the_path_of_another_segment():
    with pytest.raises(KeyError):
        site_at(sites(MODEL), "segments/10/blocks/0/ffn")


@pytest.mark.thorough
def test_the_places_of_more_than_ten_blocks_and_segments_are_kept():
    """As text, 10 comes before 2: arrays must not go to the wrong module."""
    ffns = tuple(Dense(hidden=4 + i) for i in range(12))
    alone = tuple(Segment(pattern=(ffn,)) for ffn in ffns)
    for segments in ((Segment(pattern=ffns),), alone):
        spec = model_spec(tiny_lm(*segments))
        model = spec.merge(spec.params, spec.state)
        found = [
            block.ffn.w_out_FD.get_value().shape
            for segment in model.segments
            for block in segment.blocks
        ]
        assert found == [(1, 4 + i, 16) for i in range(12)]
