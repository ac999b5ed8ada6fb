"""A small model that predicts the experts of a token in all layers from its text.

It reads the first token of the document and the last few, and runs before the first
layer: what it predicts can be moved to the device in time. The inputs are a window, not
the whole text as in ExpertFlow (arXiv:2410.17954), so that it costs the same for every
token and needs no cache of its own.

N tokens · H inputs: the first token of the document and the last ones · D width of an
embedding · F hidden width · R routers · E experts, the most of a layer · K slots
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from moex.analysis.header import Header
from moex.config.base import MOST, ConfigError, require
from moex.data.files import naming
from moex.interop.folder import stored_tensors
from moex.json_files import check_names, digest, dump_json, field, parse_object
from moex.nn.param import param, split_params
from moex.offload.routes import Routes

KEY = "moex.predictor"  # of the description in the metadata of the file
VERSION = 1
MOST_LAST = 1024  # tokens that a predictor reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """The text that a predictor reads, and the routers that it predicts."""

    tokenizer: str  # digest of the vocabulary and tokenizer that its token ids are of
    vocab: int  # token ids are below this
    experts: tuple[int, ...]  # of each router; rounds of a chain are routers too
    slots: tuple[int, ...]  # the most experts of a token, for each router
    last: int = 4  # tokens that it reads, the newest one too
    width: int = 32  # D
    hidden: int = 256  # F

    def __post_init__(self):
        allowed = f"from 1 to {MOST_LAST:,}"
        require(1 <= self.last <= MOST_LAST, "last", self.last, allowed)
        for name in ("vocab", "width", "hidden"):
            value = getattr(self, name)
            allowed = f"from 1 to {MOST['dim']:,}"
            require(1 <= value <= MOST["dim"], name, value, allowed)
        ok = 0 < len(self.experts) == len(self.slots) and min(self.experts) > 0
        require(ok, "experts", self.experts, "1 or more for each router")

    @classmethod
    def of(cls, header: Header, **sizes) -> Self:
        """Describe a predictor of the routes of a trace.

        Raises:
          ConfigError: if its tokens have no ids, such as the inputs of a regression.
        """
        if header.tokenizer is None:
            raise ConfigError(
                f"the trace of {header.run}: its tokens have no ids to predict from."
            )
        infos = header.layers
        return cls(
            tokenizer=tokenizer_of(header),
            vocab=len(header.vocabulary),
            experts=tuple(info.num_experts for info in infos),
            slots=tuple(min(info.slots, info.num_experts) for info in infos),
            **sizes,
        )

    def check(self, header: Header, where: str) -> None:
        """Check that a trace has the vocabulary and the layers of this predictor.

        Raises:
          ConfigError: naming `where`, the file of the predictor.
        """
        own = About.of(header)
        if own.tokenizer != self.tokenizer:
            raise ConfigError(
                f"{where}: predicts for another vocabulary than that of {header.run} "
                f"({self.vocab:,} and {own.vocab:,} tokens)."
            )
        if own.experts != self.experts:
            raise ConfigError(
                f"{where}: predicts for routers of {list(self.experts)} experts; "
                f"{header.run} has {list(own.experts)}."
            )


def tokenizer_of(header: Header) -> str:
    """A digest of what token ids mean."""
    hashed = hashlib.sha256("\0".join(header.vocabulary).encode()).hexdigest()
    return digest([hashed, header.tokenizer])


class Network(nnx.Module):
    """Logits of all experts of all routers from a window of token ids.

    Parameters: w_embed_VD (one more row: no token), w_in_MF with M = H * D, bias_in_F,
    w_out_FRE, bias_out_RE.
    """

    def __init__(self, about: About, rngs: nnx.Rngs):
        D, F, H = about.width, about.hidden, about.last + 1
        shape = len(about.experts), max(about.experts)
        self.w_embed_VD = param(rngs, (about.vocab + 1, D), (None, None), std=1.0)
        self.w_in_MF = param(rngs, (H * D, F), (None, None), fan_in=H * D)
        self.bias_in_F = param(rngs, (F,), (None,), value=0.0)
        self.w_out_FRE = param(rngs, (F, *shape), (None,) * 3, fan_in=F)
        self.bias_out_RE = param(rngs, shape, (None, None), value=0.0)

    def __call__(self, token_NH):
        x_NHD = self.w_embed_VD[...][token_NH]
        x_NM = x_NHD.reshape(len(token_NH), -1)
        h_NF = jax.nn.silu(x_NM @ self.w_in_MF[...] + self.bias_in_F[...][None])
        out_NRE = jnp.einsum("nf,fre->nre", h_NF, self.w_out_FRE[...])
        return out_NRE + self.bias_out_RE[...][None]


class Predictor:
    """A trained predictor.

    Attributes:
      about: `About`.
      params: arrays by name, as in `Network`.
      recall: what it was measured to find, plain data of `fit.py`.
    """

    def __init__(self, about: About, params: dict[str, Any], recall=None):
        self.about, self.params, self.recall = about, params, recall or {}
        self._graphdef, *_ = split_params(
            nnx.eval_shape(lambda: Network(about, nnx.Rngs(params=0)), graph=False)
        )
        self._logits = jax.jit(lambda params, token_NH: self.apply(params, token_NH))

    @classmethod
    def fresh(cls, about: About, seed: int = 0) -> Self:
        """One that is not trained."""
        _, params, _ = split_params(Network(about, nnx.Rngs(params=seed)))
        return cls(about, nnx.to_pure_dict(params))

    def apply(self, params, token_NH) -> jax.Array:
        """Logits float32[N, R, E]; for use inside a jitted function."""
        return nnx.merge(self._graphdef, params, {})(token_NH)

    def experts(self, token_NH) -> np.ndarray:
        """The experts that each token will most likely have, best first.

        Args:
          token_NH: from `windows` or `window`.

        Returns:
          int32[N, R, K]; -1: the router has fewer slots.
        """
        about = self.about
        logits_NRE = np.asarray(self._logits(self.params, token_NH))
        there_RE = np.arange(max(about.experts)) < np.array(about.experts)[:, None]
        order_NRE = np.argsort(-np.where(there_RE, logits_NRE, -np.inf), axis=2)
        ids_NRK = order_NRE[:, :, : max(about.slots)].astype(np.int32)
        used_RK = np.arange(max(about.slots)) < np.array(about.slots)[:, None]
        return np.where(used_RK, ids_NRK, -1)

    def window(self, documents: list[list[int]]) -> np.ndarray:
        """The input for the newest token of each text, int32[N, H]."""
        none, last = self.about.vocab, self.about.last
        rows = []
        for tokens in documents:
            newest = list(reversed(tokens[-last:]))
            rows.append(
                [*(tokens[:1] or [none]), *newest, *[none] * (last - len(newest))]
            )
        token_NH = np.array(rows, np.int32).reshape(len(rows), last + 1)
        if token_NH.size and token_NH.max() > none:
            raise ConfigError(f"token {token_NH.max()}: must be below {none:,}.")
        return token_NH

    def save(self, file) -> None:
        """Write it as a safetensors file that describes itself in its metadata."""
        file = Path(file)
        told = {"version": VERSION, **dataclasses.asdict(self.about)}
        metadata = {KEY: dump_json(told | {"recall": self.recall})}
        arrays = {name: np.asarray(a, np.float32) for name, a in self.params.items()}
        temporary = file.with_name(file.name + ".tmp")
        try:
            with naming(file):
                save_file(arrays, temporary, metadata)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, file) -> Self:
        """Read what `save` wrote.

        Raises:
          ConfigError: if it is no predictor, or has parameters that are missing, of
            another shape, or not finite.
        """
        file = Path(file)
        if not file.is_file():
            told = "is a folder" if file.is_dir() else "no such file"
            raise ConfigError(
                f"{file}: {told}; `moex place TRACE --fit-predictor` writes one."
            )
        stored = stored_tensors(file)
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(KEY)
        if text is None:
            raise ConfigError(f"{file}: a safetensors file, but not a predictor.")
        about, recall = _about(parse_object(text, f"{file}, metadata"), str(file))
        wanted = cls(about, {}).shapes()
        check_names(stored, wanted, str(file))
        params = {}
        for name, shape in wanted.items():
            if name not in stored:
                raise ConfigError(f"{file}: has no tensor {name!r}.")
            found = stored[name]
            require(found.shape == shape, f"{file}: {name}", found.shape, f"{shape}")
            params[name] = found.read().astype(np.float32)
            if not np.isfinite(params[name]).all():
                raise ConfigError(f"{file}: {name} has numbers that are not finite.")
        return cls(about, params, recall)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        network = nnx.eval_shape(
            lambda: Network(self.about, nnx.Rngs(params=0)), graph=False
        )
        _, params, _ = split_params(network)
        return {name: tuple(a.shape) for name, a in nnx.to_pure_dict(params).items()}


def windows(routes: Routes, about: About) -> np.ndarray:
    """The inputs of a predictor for every token of a trace, int32[N, H].

    Row n is the first token of its document, then token n, the one before, and so on;
    what lies before the document is no token (the id `about.vocab`).
    """
    return windows_of(routes.token_N, routes.document_N, about)


def windows_of(token_N, document_N, about: About) -> np.ndarray:
    """The same as `windows`, for the tokens of documents that are numbered from 0."""
    count = len(token_N)
    starts = np.flatnonzero(np.diff(document_N, prepend=-1))
    start_N = np.repeat(starts, np.diff([*starts, count]))
    columns = [token_N[start_N]]
    for back in range(about.last):
        at_N = np.arange(count) - back
        before_N = token_N[np.maximum(at_N, 0)]
        columns.append(np.where(at_N >= start_N, before_N, about.vocab))
    return np.stack(columns, 1).astype(np.int32)


def _about(data: dict[str, Any], where: str) -> tuple[About, dict]:
    version = field(data, "version", int, where)
    require(version == VERSION, f"{where}: version", version, str(VERSION))
    names = [f.name for f in dataclasses.fields(About)]
    check_names(data, ("version", "recall", *names), where)
    kinds = {"tokenizer": str, "experts": list[int], "slots": list[int]}
    values = {name: field(data, name, kinds.get(name, int), where) for name in names}
    values |= {name: tuple(values[name]) for name in ("experts", "slots")}
    try:
        about = About(**values)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    return about, field(data, "recall", dict, where, {})
