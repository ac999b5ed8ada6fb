"""The facts about a batch that every layer may need, and how to compute.

B batch · L length of the queries · S length of the keys in a decoding cache
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute: the same for all layers, and part of what is compiled.

    A `Program` makes it from its config; the defaults work on every device.

    Attributes:
      dtype: compute dtype of the matmuls.
      kernels: name of the grouped-matmul implementation, or None to choose.
      attention: name of the attention implementation, or None to choose.
      remat: "none", "dots" (keep matmul results) or "full".
      scan_layers: one compiled body for all layers of a segment; False: one each.
      exchange, exchange_buffer: how tokens reach experts on a mesh: `MeshConfig`.
    """

    dtype: str = "float32"
    kernels: str | None = None
    attention: str | None = None
    remat: str = "none"
    scan_layers: bool = True
    exchange: str = "auto"
    exchange_buffer: float | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The facts about a batch that layers may need, and how to compute.

    It is a frozen pytree; the fields from `mode` on are static (they pick the program).

    Attributes:
      segment_BL: int32, document number within the row from 1; 0 is padding. Tokens
        attend only inside their segment, and padding is not routed.
      position_BL: int32, position inside the segment, from 0.
      token_BL: int32 token ids; None where tokens have none.
      visual_BMC: float32, M tokens of a frozen encoder for each sequence; None: none.
      has_visual_B: bool, which sequences have them; None: all that `visual_BMC` has.
      extra_keys: `ExtraKeys` of the adapters, which attentions attend to; or None.
      key_segment_BS, key_position_BS: the same for the keys of a decoding cache; None
        when the keys are the queries', and a cache is only written.
      cache_index: int32 scalar, where in the cache this call's keys are written.
      step: int32 scalar, the optimizer step, for coefficients that follow a schedule;
        None where nothing is trained.
      key: random key for router noise, or None for no noise; every layer gets its own.
      forced: a recorded assignment to replay (`moe/replay.py`), or None.
      steer: how experts are steered (`moe/steering.py`), or None. Like `forced` it is
        nested as the modules are, and each sees its own part.
      offload: which experts of a layer are on the device (`moe/offload.py`); None: all.
      layer: int32 scalar, which copy of its segment a layer is; None outside a stack.
      depth: int32 scalar, the number of the block in the model, from 0; a segment gets
        that of its first block. None outside a model.
      first_expert: int32 scalar, the id of the first expert of this device; set for
        the experts only. None: 0, all experts are here.
      domain_B: int32, the domain of each sequence; None where it is not known, as in
        decoding.
      scored_BL: bool, the positions whose prediction is scored; None in decoding.
      told: takes the reports of adapters by their paths, while the module that made the
        dict is traced (see `listening`); None: nobody listens.
      mode: "train", "eval" or "decode".
      collect: return routing traces.
      measure: return the norms of what experts answer to their tokens; use it with
        `collect`.
      chain_round: which round of a chain this is, from 0.
      whole_stack: experts that can (`StackReader`), and projections by weights that C
        reads, have those of all copies of their layer, [repeat, ...], and use those of
        copy `layer`.
      tensor_share: 1 / devices that hold a slice each of an expert's width and whose
        outputs are added: the weight of a term that all of them add, such as a bias.
      compute: how to compute.
    """

    segment_BL: jax.Array
    position_BL: jax.Array
    token_BL: jax.Array | None = None
    visual_BMC: jax.Array | None = None
    has_visual_B: jax.Array | None = None
    extra_keys: tuple | None = None
    key_segment_BS: jax.Array | None = None
    key_position_BS: jax.Array | None = None
    cache_index: jax.Array | None = None
    step: jax.Array | int | None = None
    key: jax.Array | None = None
    forced: dict | None = None
    steer: dict | None = None
    offload: dict | None = None
    layer: jax.Array | None = None
    depth: jax.Array | int | None = None
    first_expert: jax.Array | None = None
    domain_B: jax.Array | None = None
    scored_BL: jax.Array | None = None
    told: dict | None = None
    mode: str = dataclasses.field(default="train", metadata={"static": True})
    collect: bool = dataclasses.field(default=False, metadata={"static": True})
    measure: bool = dataclasses.field(default=False, metadata={"static": True})
    chain_round: int = dataclasses.field(default=0, metadata={"static": True})
    whole_stack: bool = dataclasses.field(default=False, metadata={"static": True})
    tensor_share: float = dataclasses.field(default=1.0, metadata={"static": True})
    compute: Compute = dataclasses.field(default=Compute(), metadata={"static": True})

    @classmethod
    def of(cls, x_BLD: jax.Array, **fields) -> "Context":
        """Make the context of a batch in which each row is one whole document.

        Args:
          x_BLD: input of a layer; only its shape counts.
          fields: the other fields, such as `mode` or `token_BL`.
        """
        B, L = x_BLD.shape[:2]
        position_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
        segment_BL = jnp.ones((B, L), jnp.int32)
        whole = cls(segment_BL=segment_BL, position_BL=position_BL, mode="eval")
        return dataclasses.replace(whole, **fields)

    def inside(self, name: str) -> "Context":
        """The context of a module inside, with its part of a replay and of steering."""
        forced = None if self.forced is None else self.forced.get(name)
        steer = None if self.steer is None else self.steer.get(name)
        return dataclasses.replace(self, forced=forced, steer=steer)

    def listening(self) -> "Context":
        """The same with a dict of its own for `told`; in decoding nobody listens.

        A module that returns aux makes one, and puts it there: so reports are outputs
        of its scan and its checkpoint, like everything else.
        """
        told: dict | None = None if self.mode == "decode" else {}
        return dataclasses.replace(self, told=told)

    def reports(self) -> dict:
        """The part of an aux that was told; {} if nothing was."""
        return {"adapters": self.told} if self.told else {}

    @property
    def valid_BL(self) -> jax.Array:
        """The mask of real tokens, bool[B, L]: False at padding."""
        return self.segment_BL > 0


def fold_key(key, number):
    """Make a separate random key for a part of the model; None (no noise) stays."""
    return None if key is None else jax.random.fold_in(key, number)
