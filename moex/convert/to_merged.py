"""Merged experts in a model: the plan of a run, its config, and its parameters.

Which experts merge is in `merge.py`, the mathematics of their weights in `align.py`;
reading and writing runs in `apply.py`.

E experts · R copies of a layer
"""

import copy

import jax
import numpy as np

from moex.config.base import ConfigError, require
from moex.convert.align import matching, merged, one_expert, reordered
from moex.convert.kinds.merged import Merged
from moex.convert.merge import (
    Used,
    adaptive_groups,
    error_bound,
    greedy_groups,
    nearest_groups,
    similarity,
    usage,
)
from moex.convert.plans import Merge, Plan
from moex.convert.segments import chosen_layers, cut, cut_arrays, cut_model
from moex.convert.to_latent import at_path, with_path
from moex.json_files import field
from moex.model.layers import Sparse, layers, sites
from moex.model.paths import flat_paths
from moex.moe.experts.glu import Glu
from moex.progress import phase
from moex.runs.base import base_hash


def mergeable(model, options: Merged) -> dict[int, tuple[Sparse, int]]:
    """The layers to merge: {number: (its MoE, which copy of it)}.

    Raises:
      ConfigError: if there is no MoE layer, or the experts of one cannot be merged.
    """
    found = {
        number: (site.sparse, r)
        for number, (site, r) in enumerate(layers(model))
        if site.sparse is not None
    }
    if not found:
        raise ConfigError("config.model: has no MoE layer; there is nothing to merge.")
    chosen = chosen_layers(options.layers, list(found), "MoE")
    for number in chosen:
        sparse = found[number][0]
        if not isinstance(sparse.moe.experts, Glu):
            kind = type(sparse.moe.experts).__name__
            raise ConfigError(
                f"{sparse.where}.experts = {kind}: must be Glu; only gated experts "
                "with weights of their own can be merged."
            )
        given, none = sparse.moe.stored_experts, "None: its experts are merged already"
        require(given is None, f"{sparse.where}.stored_experts", given, none)
    return {number: found[number] for number in chosen}


def make_plan(run, counter, used, options: Merged) -> Plan:
    """The plan for a run.

    Args:
      run: `LoadedRun`.
      counter: `used.Counter`, for a method that looks again after each layer; None:
        there is only `used`.
      used: {number of a layer: `Used`}.
      options: the flags.
    """
    places = mergeable(run.cfg.model, options)
    sizes = {n: sparse.moe.num_experts for n, (sparse, _) in places.items()}
    most = max(sizes.values())
    allowed = f"below the {most} experts of a layer"
    require(options.groups < most, "--groups", options.groups, allowed)
    counts = {n: min(options.groups, E) for n, E in sizes.items()}
    if options.budget == "adaptive":
        found = adaptive_groups(
            [usage(used[n].count_E) for n in places], options.groups
        )
        counts = dict(zip(places, found, strict=True))
    params, first = run.params, used
    plans: list[Merge] = []
    with phase("grouping experts", len(places), "layers") as at:
        for number, (sparse, r) in places.items():
            if options.method == "ream" and counter is not None and plans:
                used = counter.used(params)
            weights = _weights(params, sparse, r)
            routers = _router_rows(params, sparse, r)
            args = (used[number], weights, routers, counts[number], options)
            plans.append(plan_layer(number, *args))
            if options.method == "ream" and counter is not None:
                params = _with_copies(params, sparse, r, plans[-1], options.align)
            at.add(1)
    how = {name: getattr(options, name) for name in options.HOW}
    how["pairs"] = bounds(plans, first)
    return Plan(
        kind="merge",
        run=str(run.folder),
        step=run.step,
        base=base_hash(run.cfg.model),
        layers=tuple(plans),
        how=how,
    )


def plan_layer(number, used: Used, weights, routers, num_groups, options: Merged):
    """The `Merge` of one layer.

    Args:
      number: of the layer.
      used: how its experts are used.
      weights: {name: [E, ...]} of its experts.
      routers: the matrices [D, E] of its routers, one for each round of a chain.
      num_groups: G.
    """
    E = len(used.count_E)
    score_E = used.reap() if options.method == "ream" else usage(used.count_E)
    similar_EE = _similarity(number, used, weights, routers, options)
    largest = options.largest
    if largest is not None and num_groups * largest < E:
        told = f"at least {-(-E // num_groups)}: layer {number} has {E} experts in "
        require(False, "--largest", largest, f"{told}{num_groups} groups")
    if options.method == "ream":
        groups = greedy_groups(score_E, similar_EE, num_groups, largest or E)
    else:
        groups = nearest_groups(score_E, similar_EE, num_groups, largest)
    weight_E = np.ones(E) if options.average == "uniform" else score_E
    return Merge(
        layer=number,
        experts=E,
        groups=tuple(map(tuple, groups)),
        dominant=tuple(group[0] for group in groups),
        weights=tuple(float(f"{w:.6g}") for w in weight_E),
    )


def _similarity(number, used: Used, weights, routers, options: Merged):
    """The similarity of every two experts, [E, E] in [0, 1]."""
    kinds = {
        "logits": lambda: similarity(used.gram_EE),
        "weights": lambda: similarity(_weight_gram(weights, options.align)),
        "router": lambda: similarity(_router_gram(routers, number)),
        "inputs": lambda: similarity(used.input_gram_EE),
        "outputs": lambda: similarity(used.output_gram_EE),
        "gradients": lambda: similarity(used.gradient_gram_EE),
        "mse": lambda: 1 / (1 + np.asarray(used.merge_error_EE, np.float64)),
        "random": lambda: _random(len(used.count_E), options.seed, number),
    }
    names = options.similarity.split("+")
    return sum(kinds[name]() for name in names) / len(names)


def _weight_gram(weights, align: str):
    """The products of the weights of every two experts, aligned to the first."""
    experts = [one_expert(weights, e) for e in range(len(next(iter(weights.values()))))]
    if align != "none":
        first = experts[0]
        experts = [first, *(reordered(e, matching(first, e)) for e in experts[1:])]
    flat = [np.concatenate([v.ravel() for v in own.values()]) for own in experts]
    return np.array([[np.dot(a, b) for b in flat] for a in flat], np.float64)


def _router_gram(routers, number):
    if not routers:
        raise ConfigError(
            f"--similarity = 'router': the router of layer {number} has no weights."
        )
    columns = np.concatenate([np.asarray(w_DE, np.float64) for w_DE in routers])
    return columns.T @ columns


def _random(E, seed, number):
    value_EE = np.random.default_rng((seed, number)).uniform(size=(E, E))
    return np.maximum(value_EE, value_EE.T)


def _weights(params, sparse: Sparse, r) -> dict:
    path = (*sparse.path.split("/"), "experts")
    return {k: jax.device_get(v[r]) for k, v in at_path(params, path).items()}


def _router_rows(params, sparse: Sparse, r) -> list:
    """The matrices of the routers of a layer, without zero-computation experts."""
    own = flat_paths(at_path(params, sparse.path.split("/")))
    E = sparse.moe.num_experts
    return [
        jax.device_get(value[r])[:, :E]
        for name, value in own.items()
        if name.startswith("router") and name.endswith("/w_DE")
    ]


def _with_copies(params, sparse: Sparse, r, plan: Merge, align: str):
    """The parameters with a copy of its group's merged expert for each expert."""
    path = (*sparse.path.split("/"), "experts")
    old = at_path(params, path)
    own = merged({k: jax.device_get(v[r]) for k, v in old.items()}, plan, align)
    stored_E = stored(plan)
    new = {
        name: jax.device_put(value.at[r].set(own[name][stored_E]), value.sharding)
        for name, value in old.items()
    }
    return with_path(params, path, new)


def stored(plan: Merge) -> np.ndarray:
    """The group of each expert, int32[E]."""
    found = np.zeros(plan.experts, np.int32)
    for g, members in enumerate(plan.groups):
        found[list(members)] = g
    return found


def _labels(plan: Plan) -> dict[int, int]:
    """The groups of each layer in which experts merge."""
    groups = {number: len(own.groups) for number, own in plan.by_layer().items()}
    return {n: g for n, g in groups.items() if g < plan.by_layer()[n].experts}


def merged_model(model, plan: Plan):
    """A copy of a `Model` config with fewer stored experts, by a plan for it."""
    labels = _labels(plan)
    model = copy.deepcopy(cut_model(model, cut(model, labels)))
    for site in sites(model):
        if site.sparse is not None and site.number in labels:
            site.sparse.moe.stored_experts = labels[site.number]
    return model


def merged_arrays(params, state, model, plan: Plan, align: str):
    """`(params, state)` of `merged_model(model, plan)`.

    Args:
      params, state: nested dicts of arrays of the old model; not changed.
      model: the old config.
      align: as for `align.merged`.
    """
    by_layer, labels = plan.by_layer(), _labels(plan)
    found = cut(model, labels)
    params, state = (cut_arrays(tree, found, model) for tree in (params, state))
    with phase("merging experts", len(labels), "layers") as at:
        for site in sites(cut_model(model, found)):
            if site.sparse is None or site.number not in labels:
                continue
            path = tuple(site.sparse.path.split("/"))
            old = jax.device_get(at_path(params, (*path, "experts")))
            made = []
            for r, number in enumerate(site.numbers):
                weights = {name: value[r] for name, value in old.items()}
                made.append(merged(weights, by_layer[number], align))
                at.add(1)
            new = {name: np.stack([own[name] for own in made]) for name in old}
            params = with_path(params, (*path, "experts"), new)
            stored_RE = np.stack([stored(by_layer[n]) for n in site.numbers])
            state = _with_new(state, (*path, "stored_E"), stored_RE)
    return params, state


def _with_new(tree: dict, path: tuple[str, ...], value):
    """The nested dict with `value` at a path that may be new."""
    if not path:
        return value
    return tree | {path[0]: _with_new(tree.get(path[0], {}), path[1:], value)}


def pairs_of(plan: Plan) -> list[dict]:
    """The error bounds in a plan of the pairs that still merge; a plan may have none.

    Raises:
      ConfigError: if a field is missing or of another type.
    """
    form = {"layer": int, "dominant": int, "expert": int, "bound": float}
    rows = []
    for row in field(plan.how, "pairs", list[dict], f"{plan.where}: how", []):
        own = {k: field(row, k, v, f"{plan.where}: how.pairs") for k, v in form.items()}
        layer = plan.by_layer().get(own["layer"])
        groups = () if layer is None else zip(layer.groups, layer.dominant, strict=True)
        if any(own["expert"] in g and own["dominant"] == d for g, d in groups):
            rows.append(own)
    return rows


def bounds(plans: list[Merge], used: dict[int, Used]) -> list[dict]:
    """The least error of each merged pair, of an expert and its dominant one."""
    rows = []
    for own in plans:
        seen = used[own.layer]
        if seen.gate_gram_EE is None:
            continue
        sums = (seen.gate_gram_EE, seen.output_gram_EE, seen.tokens)
        rows += [
            {
                "layer": own.layer,
                "dominant": dominant,
                "expert": e,
                "bound": float(f"{error_bound(dominant, e, *sums):.6g}"),
            }
            for group, dominant in zip(own.groups, own.dominant, strict=True)
            for e in group
            if e != dominant
        ]
    return rows
