"""The memory of one device while a job trains.

Weights, optimizer state and gradients are exact: shapes and shardings of the abstract
train state. Values of the forward and backward pass are those of a walk along the
jaxpr of the loss and its gradient (`liveness`), traced for the topology's platform with
the weights that one device holds of the `tensor` axis, and split over devices as
batches are. Nothing is fitted to what a compiler said.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moex import sharding
from moex.costs.residual_bytes import loss_args, model_activation_bytes, traced_loss
from moex.model.accounting import local_bytes
from moex.model.paths import apart, of_trained, path_name, together
from moex.model.precision import compute_dtype
from moex.plan import liveness
from moex.plan.topology import Topology, abstract_mesh
from moex.train.job import Training


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    # params, optimizer: these parts of the train state.
    params: int
    optimizer: int
    other_state: int  # router state, and the counters of the update guard
    batch: int  # the token arrays of one step
    # Those of the trained parameters; twice with microbatches: their sum is kept.
    gradients: int
    # One layer's weights in the compute dtype, whole along `fsdp`, and their gradients;
    # of the embedding and logits if these are larger. Without recomputation the weights
    # of all layers, as far as they are copies.
    gathered: int
    # Values that the forward pass keeps for the backward pass, with the logits.
    kept: float
    working: float  # values alive besides those at the worst moment of the two passes
    # Values that the optimizer needs besides gradients and state, at its worst.
    update: float

    @property
    def state(self) -> int:
        """The train state, which stays."""
        return self.params + self.optimizer + self.other_state

    @property
    def peak(self) -> float:
        """The most at any time: in the passes, or in the update."""
        passes = self.gathered + self.kept + self.working
        return self.state + self.batch + self.gradients + max(passes, self.update)

    def to_dict(self) -> dict:
        """The figures as plain data."""
        figures = {name: int(v) for name, v in dataclasses.asdict(self).items()}
        return figures | {"state": self.state, "peak": int(self.peak)}


def memory(program: Training, topology: Topology) -> Memory:
    """The memory of one device for a program. Call it under no other mesh."""
    state = program.abstract_state()
    params = local_bytes(state["params"])
    trained = local_bytes(apart(state["params"], program.spec.trained())[0])
    batch = batch_arguments(program)
    kept, most = pass_bytes(program, topology)
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        gathered = gathered_bytes(program)
    return Memory(
        params=params,
        optimizer=local_bytes(state["opt"]),
        other_state=local_bytes((state["state"], state["guard"])),
        batch=local_bytes(batch),
        gradients=trained * (2 if program.cfg.grad_accum > 1 else 1),
        gathered=gathered,
        kept=min(kept, most),
        working=max(0.0, most - kept),
        update=update_bytes(program),
    )


def local_shape(leaf) -> tuple[int, ...]:
    """The shape that one device holds of an abstract array with a sharding."""
    return leaf.sharding.shard_shape(leaf.shape)


def batch_arguments(program: Training) -> dict:
    """The batch of one step as abstract arrays with shardings."""
    cfg = program.cfg
    arrays = cfg.task.batch_shapes(cfg, cfg.batch_size)
    return {
        name: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=sharding.batch_sharding(program.mesh, a.ndim)
        )
        for name, a in arrays.items()
    } | program.abstract_teacher()


def gathered_bytes(program: Training) -> int:
    """Bytes of gathered weights and their gradients, in the layer that needs most.

    A weight that is in the compute dtype and whole on the device is read in place.
    Without recomputation JAX keeps the copies of all layers in the compute dtype,
    except those of experts that are gathered: these are gathered again.
    """
    itemsize = jnp.dtype(compute_dtype(program.cfg)).itemsize
    fsdp = program.mesh.shape["fsdp"]
    repeats = [segment.repeat for segment in program.cfg.model.layers]
    sums, kept = dict[str, int](), 0
    leaves = jax.tree_util.tree_flatten_with_path(program.abstract_state()["params"])
    for path, leaf in leaves[0]:
        name = path_name(path)
        split = fsdp > 1 and "fsdp" in leaf.sharding.spec
        local = math.prod(local_shape(leaf)) * itemsize
        whole = local * (fsdp if split else 1)
        is_copy = split or leaf.dtype.itemsize != itemsize
        part, number = "rest", 1
        if name.startswith("segments/"):
            part = "/".join(name.split("/")[:2])
            number = repeats[int(name.split("/")[1])]
            if program.cfg.remat == "none":
                if is_copy and not (split and "experts" in name):
                    kept += local
                is_copy = split
        sums[part] = sums.get(part, 0) + (2 if is_copy else 1) * whole // number
    return kept + max(sums.values())


def pass_bytes(program: Training, topology: Topology) -> tuple[float, float]:
    """(kept for the backward pass, most alive at once) of one microbatch, no weights.

    The loss is traced at 2 and 4 sequences per device: values that grow hold tokens.
    At 1 sequence JAX would leave out operations.
    """
    cfg, mesh = program.cfg, program.mesh
    shards, parts = sharding.batch_shards(mesh), mesh.shape["seq"]
    sequences = cfg.batch_size // cfg.grad_accum / shards / parts
    local = dataclasses.replace(program.spec, params=tensor_local(program))
    # Weights already have the shapes of one device.
    sizes = [1 if name == "tensor" else n for name, n in mesh.shape.items()]
    with jax.sharding.use_abstract_mesh(abstract_mesh(topology, sizes)):
        graphs = [_gradient_graph(cfg, local, n * shards) for n in (2, 4)]
        per_token = model_activation_bytes(cfg, local, sequences=shards)
    grown = liveness.growth(*graphs)
    most = liveness.peak(graphs[0], grown, topology.platform == "tpu")
    return per_token * cfg.seq_len * sequences, most / 2 / shards * sequences


def tensor_local(program: Training) -> dict:
    """Parameters in the shapes of one device if only the `tensor` axis is split."""
    spec, tensor = program.spec, program.mesh.shape["tensor"]

    def local(path, leaf):
        axes = spec.info[path_name(path)].axes
        placed = sharding.partition_spec(axes)
        own = [
            size // tensor if axis == "tensor" else size
            for size, axis in zip(leaf.shape[-len(axes) :], placed, strict=True)
        ]
        stacked = leaf.shape[: leaf.ndim - len(axes)]
        return jax.ShapeDtypeStruct((*stacked, *own), leaf.dtype)

    return jax.tree_util.tree_map_with_path(local, spec.params)


def _gradient_graph(cfg, spec, batch_size) -> liveness.Graph:
    """The graph of the loss and its gradient for one microbatch."""
    loss = traced_loss(cfg, spec)

    def gradient(params, *rest):
        own, trained = of_trained(loss, params, spec.trained())
        return jax.grad(own, has_aux=True)(trained, *rest)

    return liveness.graph(gradient, *loss_args(cfg, spec, batch_size))


def update_bytes(program: Training) -> float:
    """Bytes that the optimizer needs besides gradients and state, at its worst moment.

    New state is written over the old, so the results take nothing.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(local_shape(a), a.dtype),
        {k: program.abstract_state()[k] for k in ("params", "opt")},
    )

    trains = program.spec.trained()
    trained, frozen = apart(shapes["params"], trains)
    nothing = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), frozen)
    shapes["params"] = together(trained, nothing)

    def update(grads, opt, params):
        updates, opt = program.tx.update(grads, opt, params)
        return jax.tree.map(jnp.add, params, updates), opt

    graph = liveness.graph(update, shapes["params"], shapes["opt"], shapes["params"])
    results = {*graph.outputs}

    def size(g, value):
        return 0.0 if g is graph and value in results else float(g.sizes[value])

    return liveness.peak(graph, size, False)
