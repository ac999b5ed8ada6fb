"""Sums over the tokens of a text: how a model routes it, and what its experts answer.

All that merging, pruning and steering need to know of a model, in one file whose size
does not depend on the number of tokens. `record_sums.py` runs the model and makes it;
`scores.py` turns it into scores of experts. Needs no model and no JAX.

E experts (zero-computation ones included) · D width of the layer · R markers · A, B
experts of two routers
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from moex.analysis.archive import Archive, write_archive
from moex.analysis.header import LayerInfo, read_layer
from moex.analysis.markers import Marker
from moex.config.base import ConfigError, nearest, require
from moex.json_files import field

VERSION = 1
COUNTED = (
    *("tokens", "count_E", "transitions_AB", "marker_count_RE", "marker_total_R"),
)
WHOLE = ("gram_EE", "transitions_AB", "output_ED")  # not by domain


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSums:
    """The sums of one router: of a layer, or of one round of a chain.

    They are over the tokens without padding. Slots are those that the layer computes: a
    slot that a capacity drops belongs to no expert. Logits are raw: before selection
    bias and noise.
    """

    info: LayerInfo  # which router
    tokens: int  # N
    count_E: np.ndarray  # int64, kept slots
    # float64 sums over the tokens that have the expert: of its gate, of the norm of its
    # output, and of their product. Gates are divided by their sum over the kept slots
    # of the token.
    gate_E: np.ndarray
    norm_E: np.ndarray
    gate_norm_E: np.ndarray
    logit_E: np.ndarray  # float64, sum of the logits of all tokens
    # tcess_E, peu_E: float64 sums of `scores.score_sums`, without and with the adaptive
    # threshold of these tokens.
    tcess_E: np.ndarray
    peu_E: np.ndarray
    marker_count_RE: np.ndarray  # int64, kept slots at the positions of each marker
    marker_total_R: np.ndarray  # int64, positions of each marker
    threshold: float  # the adaptive threshold of PEU
    # The rest is None in the sums of a domain.
    gram_EE: np.ndarray | None = None  # float64, sum of z z^T of the logits z
    # int64, tokens by their experts of greatest gate (the lowest of equals) here and in
    # the next router of the model; None for the last one.
    transitions_AB: np.ndarray | None = None
    output_ED: np.ndarray | None = None  # float64, sum of the outputs of each expert

    @property
    def layer(self) -> int:
        """The number of the layer, from 0; dense ones count."""
        return self.info.layer

    @property
    def round(self) -> int:
        """The round of the chain, from 1; 0 where there is no chain."""
        return self.info.round

    @property
    def label(self) -> str:
        """The name of the router: "003", or "003.1" in a chain."""
        return self.info.label

    @property
    def slots(self) -> int:
        """The number of kept slots."""
        return int(self.count_E.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """The sums of all routers of a model, by label, in the order of the model."""

    # The run, as it was given, the step, and the digest of the checkpoint; None: of
    # moex before version 0.2.
    run: str
    step: int
    digest: str | None
    base: str  # hash of the shapes of the model: `runs.base.base_hash`
    data: dict[str, Any]  # what was read; plain data, for people
    domains: tuple[str, ...]  # names of the data sources
    markers: tuple[Marker, ...]  # the R markers
    pool: int | None  # experts of a token that TCESS and PEU look at; None: the slots
    layers: dict[str, LayerSums]  # by label, over all tokens
    by_domain: dict[str, dict[str, LayerSums]]  # the same by domain; {}: not recorded

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return next(iter(self.layers.values())).tokens

    def of(self, domain: str | None) -> dict[str, LayerSums]:
        """The sums of one domain by label; None: of all tokens.

        Raises:
          ConfigError: if they were not recorded, or the domain has no tokens.
        """
        if domain is None:
            return self.layers
        if domain not in self.by_domain:
            told = f"no sums of the domain {domain!r}.{nearest(domain, self.by_domain)}"
            known = ", ".join(self.by_domain) or "none: record them with --by-domain"
            raise ConfigError(f"{told} Domains are {known}.")
        found = self.by_domain[domain]
        if not any(layer.tokens for layer in found.values()):
            raise ConfigError(f"the domain {domain!r}: has no tokens.")
        return found

    def save(self, path) -> None:
        """Write them as a numpy archive without pickle; `read` reads it."""
        plain = ("run", "step", "digest", "base", "data", "domains", "pool")
        about = {"version": VERSION} | {name: getattr(self, name) for name in plain}
        about["markers"] = [dataclasses.asdict(marker) for marker in self.markers]
        about["layers"] = [dataclasses.asdict(own.info) for own in self.layers.values()]
        parts = {"all": self.layers} | {
            f"domain{d}": self.by_domain[name]
            for d, name in enumerate(self.domains)
            if self.by_domain
        }
        about["by_domain"] = bool(self.by_domain)
        arrays = {}
        for part, layers in parts.items():
            for label, own in layers.items():
                for f in dataclasses.fields(own):
                    if f.name != "info" and getattr(own, f.name) is not None:
                        array = np.asarray(getattr(own, f.name))
                        arrays[f"{part}/{label}/{f.name}"] = array
        write_archive(path, about, arrays)

    @classmethod
    def read(cls, path) -> "Sums":
        """Read what `save` wrote.

        Raises:
          ConfigError: if there is no such file, or it is damaged.
        """
        if not pathlib.Path(path).is_file():
            told = "no such file; `moex trace --sums` writes sums"
            raise ConfigError(f"{path}: {told}.")
        archive = Archive(path, "sums")
        about, where = archive.about, archive.where
        version = field(about, "version", int, where)
        require(version == VERSION, f"{where}: version", version, f"{VERSION}")
        layers = field(about, "layers", list[dict], where)
        infos = [read_layer(one, f"{where}: layer {i}") for i, one in enumerate(layers)]
        require(len(infos) > 0, f"{where}: layers", layers, "not empty")
        labels = [info.label for info in infos]
        once = len(set(labels)) == len(labels)
        require(once, f"{where}: layers", labels, "different")
        pool = field(about, "pool", int | None, where)
        require(pool is None or pool >= 1, f"{where}: pool", pool, "at least 1")
        domains = tuple(field(about, "domains", list[str], where))
        found = field(about, "markers", list[dict[str, str | None]], where)
        markers = tuple(
            Marker(field(m, "begin", str, where), field(m, "end", str | None, where))
            for m in found
        )
        by_domain = field(about, "by_domain", bool, where)
        part = _Part(archive, infos, len(markers))
        return cls(
            run=field(about, "run", str, where),
            step=field(about, "step", int, where),
            digest=field(about, "digest", str | None, where),
            base=field(about, "base", str, where),
            data=field(about, "data", dict[str, Any], where),
            domains=domains,
            markers=markers,
            pool=pool,
            layers=part.read("all", whole=True),
            by_domain={
                name: part.read(f"domain{d}", whole=False)
                for d, name in enumerate(domains)
                if by_domain
            },
        )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Reads the sums of all tokens, or of one domain, from an archive."""

    archive: Archive
    infos: list[LayerInfo]
    markers: int

    def read(self, name: str, *, whole: bool) -> dict[str, LayerSums]:
        """The sums of every router by label."""
        following = [info.num_choices for info in self.infos[1:]] + [0]
        return {
            info.label: self._layer(f"{name}/{info.label}", info, after, whole)
            for info, after in zip(self.infos, following, strict=True)
        }

    def _layer(self, start: str, info: LayerInfo, after: int, whole: bool) -> LayerSums:
        E, R = info.num_choices, self.markers
        shapes: dict[str, tuple[int | None, ...]] = {
            "tokens": (),
            "threshold": (),
            "marker_count_RE": (R, E),
            "marker_total_R": (R,),
        }
        names = ("count", "gate", "norm", "gate_norm", "logit", "tcess", "peu")
        shapes |= {f"{n}_E": (E,) for n in names}
        if whole:
            shapes |= {"gram_EE": (E, E), "output_ED": (E, None)}
            shapes |= {"transitions_AB": (E, after)} if after else {}
        found: dict[str, Any] = {}
        for name, shape in shapes.items():
            found[name] = self._array(f"{start}/{name}", shape)
        tokens, threshold = int(found.pop("tokens")), float(found.pop("threshold"))
        return LayerSums(info=info, tokens=tokens, threshold=threshold, **found)

    def _array(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        array = self.archive.array(name)
        same = len(array.shape) == len(shape) and all(
            want in (None, size) for size, want in zip(array.shape, shape, strict=True)
        )
        wanted = [("D" if n is None else n) for n in shape]
        where = f"{self.archive.where}: the shape of {name}"
        require(same, where, list(array.shape), f"{wanted}")
        if not np.isfinite(array).all():
            told = "has a number that is not finite"
            raise ConfigError(f"{self.archive.where}: {name} {told}.")
        counted = name.rpartition("/")[2] in COUNTED
        if counted and not (array.dtype.kind in "iu" and (array >= 0).all()):
            told = "must be counts: whole numbers, 0 or more"
            raise ConfigError(f"{self.archive.where}: {name} {told}.")
        return array
