"""The fields of a run config by names that runs of other shapes have too.

A layer's place is left out of its name: the number of experts per token is `router.k`
in every layer, inside a chain as well, so that tables of runs have it in one column.
"""

from typing import Any

from moex.config.base import flat, to_dict
from moex.model.layers import sites

# Fields that change what is watched or where it runs, and not what is learned.
BOOKKEEPING = (
    *("checkpoint", "data.cache_dir", "data.prefetch", "data.threads", "eval"),
    *("kernels", "log", "mesh", "nan_limit", "remat", "scan_layers"),
)


def is_bookkeeping(name: str) -> bool:
    """Whether a field of `named_fields` is one of `BOOKKEEPING`, or inside of one."""
    return any(name == own or name.startswith(f"{own}.") for own in BOOKKEEPING)


def named_fields(cfg) -> dict[str, Any]:
    """The plain values of all fields of a run config, and the class names of its parts.

    Those of MoE layers begin with `router`, `experts` and so on, those of other
    feed-forwards and of what wraps an MoE with `ffn`. A field whose values differ
    between layers is a text of these.
    """
    data = to_dict(cfg)
    model = data.pop("model")
    found: dict[str, list] = {}

    def add(fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)

    own = {k: v for k, v in model.items() if k not in ("layers", "attention")}
    add(flat(own, "model"))
    add({"model.layers": sum(s.repeat * len(s.pattern) for s in cfg.model.layers)})
    for segment in model["layers"]:
        left = ("pattern", "repeat", "attention")
        add(flat({k: v for k, v in segment.items() if k not in left}, "segment"))
    for site in sites(cfg.model):
        add(flat(to_dict(site.attention), "attention"))
        outer = flat(to_dict(site.ffn), "ffn")
        if site.sparse is not None:
            inner = f"ffn{site.sparse.where.removeprefix(site.where)}"
            moe = flat(to_dict(site.sparse.moe))
            add({name: value for name, value in moe.items() if name})
            outer = {
                name: value
                for name, value in outer.items()
                if not name.startswith(f"{inner}.")
                and (name != inner or inner == "ffn")
            }
        add(outer)
    add(flat(data))
    return {name: _one(values) for name, values in found.items()}


def _one(values: list) -> Any:
    return values[0] if len(values) == 1 else " and ".join(map(str, values))


def short_names(names: list[str], every: list[str]) -> list[str]:
    """The last word of each name, or the last two, where no other of `every` has it."""
    found = []
    for name in names:
        parts = name.split(".")
        last = parts[-1]
        alone = sum(other.rpartition(".")[2] == last for other in every) == 1
        found.append(last if alone else ".".join(parts[-2:]))
    return found
