"""How much memory a program needs for its values: a walk along its jaxpr.

Each value is alive from the operation that makes it to the last one that reads it; the
most that is alive at once is what the program needs. Elementwise operations and changes
of layout are taken as fused into what reads them, as XLA does: their results need no
memory of their own, and their operands live on until the result is read. The order is
that of the jaxpr; XLA may find a better one.

Values are split over devices in ways that only XLA decides; so sizes come from outside,
as a function of a value's bytes in the same program at one and at two sequences per
device. Values that grow between them hold tokens, and are split as tokens are.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax
from jax.extend import core

# Primitives that XLA fuses into their readers: they need no memory of their own.
FUSED = {
    *("abs", "add", "add_any", "and", "ceil", "clamp", "convert_element_type", "copy"),
    *("copy_p", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt"),
    *("integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt"),
    *("max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision"),
    *("rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square"),
    *("stop_gradient", "sub", "tan", "tanh", "xor", "shift_left"),
    *("shift_right_logical", "shift_right_arithmetic", "pvary", "pcast"),
    *("broadcast_in_dim", "expand_dims", "pad", "reshape", "rev", "slice", "split"),
    *("sharding_constraint", "squeeze", "transpose"),
}
# A scatter of one value into each row, as in the gradient of the targets' logits: the
# compiler for TPUs makes a comparison and a selection of it, and fuses these.
SCATTER_ONE = "scatter-one"
# Calls whose bodies are put in place of the call.
INLINED = {
    *("pjit", "jit", "closed_call", "core_call", "checkpoint", "remat2", "remat"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"),
    *("shard_map",),
}
# Primitives that read a fused operand as they go; others need it in memory.
READERS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"),
    *("argmin", "cumsum", "reduce_prod", "concatenate", "dynamic_update_slice"),
}
# Primitives that write their results over operands that nothing reads later.
IN_PLACE = FUSED | {
    *("scatter-add", "scatter", "scatter_add", "dynamic_update_slice", "scan", "while"),
    *("sort", SCATTER_ONE),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a `Graph`; values are named by number."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    bodies: tuple["Graph", ...] = ()


@dataclasses.dataclass(frozen=True)
class Graph:
    """A jaxpr with its calls put in place."""

    operations: list[Operation]  # in order
    # inputs, outputs: values; inputs are the caller's memory.
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sizes: dict[int, int]  # bytes of each value, over all devices


def graph(function, *args) -> Graph:
    """The graph of a function of abstract arguments."""
    return _Builder(itertools.count(1)).build(jax.make_jaxpr(function)(*args).jaxpr, 1)


class _Builder:
    """Builds one `Graph`; `numbers` names the values of all graphs of a program."""

    def __init__(self, numbers: Iterator[int]):
        self.numbers = numbers
        self.operations: list[Operation] = []
        self.sizes: dict[int, int] = {}

    def build(self, jaxpr, copies: int) -> Graph:
        env: dict = {}
        for var in (*jaxpr.constvars, *jaxpr.invars):
            self._new(var, env, copies)
        inputs = tuple(env.values())
        self._add(jaxpr, env, copies)
        return Graph(self.operations, inputs, _known(jaxpr.outvars, env), self.sizes)

    def _new(self, var, env, copies) -> int:
        env[var] = number = next(self.numbers)
        self.sizes[number] = _bytes(var.aval) * copies
        return number

    def _add(self, jaxpr, env, copies) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            inner = list(_sub_jaxprs(eqn)) if name != "pallas_call" else []
            if name in INLINED and len(inner) == 1:
                # Inside a shard_map shapes are those of one device.
                more = math.prod(_manual_sizes(eqn)) if name == "shard_map" else 1
                self._inline(eqn, inner[0], env, copies * more)
                continue
            bodies = tuple(_Builder(self.numbers).build(j, copies) for j in inner)
            makes = tuple(self._new(v, env, copies) for v in eqn.outvars)
            if name == "scatter-add" and _one_a_row(eqn):
                name = SCATTER_ONE
            reads = _known(eqn.invars, env)
            self.operations.append(Operation(name, reads, makes, bodies))

    def _inline(self, eqn, jaxpr, env, copies) -> None:
        own: dict = {}
        for var in jaxpr.constvars:
            self._new(var, own, copies)
        given = eqn.invars[len(eqn.invars) - len(jaxpr.invars) :]
        for var, outer in zip(jaxpr.invars, given, strict=True):
            if isinstance(outer, core.Literal):
                self._new(var, own, copies)
            else:
                own[var] = env[outer]
        self._add(jaxpr, own, copies)
        for var, outer in zip(jaxpr.outvars, eqn.outvars, strict=True):
            if isinstance(var, core.Literal):
                self._new(outer, env, copies)
            else:
                env[outer] = own[var]


def _known(variables, env) -> tuple[int, ...]:
    return tuple(env[v] for v in variables if not isinstance(v, core.Literal))


def _manual_sizes(eqn) -> Iterator[int]:
    mesh = eqn.params["mesh"]
    names = eqn.params.get("manual_axes") or mesh.axis_names
    return (mesh.shape[name] for name in names)


def _sub_jaxprs(eqn) -> Iterator:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") and hasattr(item, "invars"):
                yield item
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr


def _one_a_row(eqn) -> bool:
    """Whether a scatter adds one value to each row of its operand."""
    operand, _, updates = (v.aval for v in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    rest = {*range(operand.ndim)} - {*numbers.operand_batching_dims}
    if len(rest) != 1 or numbers.update_window_dims:
        return False
    return updates.size * operand.shape[rest.pop()] == operand.size


def _bytes(aval) -> int:
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", (0,))) * itemsize


@dataclasses.dataclass(frozen=True)
class Moment:
    """The values that are alive while one operation of a graph runs."""

    name: str  # of the operation
    # Bytes of these values and of the working memory of the operation's body.
    bytes: float


def moments(
    graph: Graph, size: Callable[[Graph, int], float], fused_into_dots: bool
) -> list[Moment]:
    """The values alive besides the inputs at each operation, in order.

    Args:
      size: (graph, value) -> bytes on one device.
      fused_into_dots: whether matrix products read fused operands, as on a TPU.
    """
    fused, readers = FUSED, READERS
    if fused_into_dots:
        fused, readers = FUSED | {SCATTER_ONE}, READERS | {"dot_general"}
    stored = _stored(graph, fused, readers)
    last = _last_reads(graph, fused, stored)
    alive, found, free = 0.0, [], dict[int, list[int]]()
    for value, at in last.items():
        free.setdefault(at, []).append(value)
    owned = stored - {*graph.inputs}
    for i, op in enumerate(graph.operations):
        freed = [v for v in free.get(i, ()) if v in owned]
        made = sum(size(graph, v) for v in op.makes if v in stored)
        if op.name in IN_PLACE:
            made = max(0.0, made - sum(size(graph, v) for v in freed))
        inside = max((peak(b, size, fused_into_dots) for b in op.bodies), default=0.0)
        found.append(Moment(op.name, alive + made + inside))
        alive += sum(size(graph, v) for v in op.makes if v in stored)
        alive -= sum(size(graph, v) for v in freed)
    return found


def peak(graph: Graph, size, fused_into_dots: bool) -> float:
    """The most bytes alive at once besides the inputs."""
    found = moments(graph, size, fused_into_dots)
    return max((m.bytes for m in found), default=0.0)


def _stored(graph: Graph, fused, readers) -> set[int]:
    """The values that are in memory."""
    stored = {*graph.outputs}
    for op in graph.operations:
        if op.name not in fused:
            stored.update(op.makes)
            if op.name not in readers:
                stored.update(op.reads)
    return stored


def _last_reads(graph: Graph, fused, stored: set[int]) -> dict[int, int]:
    """Value -> the last operation that reads it, or that reads what is fused of it."""
    end = len(graph.operations)
    last = dict.fromkeys(graph.outputs, end)
    for i in range(end - 1, -1, -1):
        op = graph.operations[i]
        until = i
        if op.name in fused and not any(v in stored for v in op.makes):
            until = max([i, *(last.get(v, i) for v in op.makes)])
        for v in op.makes:
            last.setdefault(v, i)
        for v in op.reads:
            last[v] = max(last.get(v, until), until)
    return last


def growth(small: Graph, large: Graph) -> Callable[[Graph, int], float]:
    """Bytes by which values grow from one program to the same one on more tokens.

    Returns:
      (graph inside `small`, value) -> bytes.
    """
    found: dict[int, dict[int, int]] = {}

    def compare(a: Graph, b: Graph):
        if [op.name for op in a.operations] != [op.name for op in b.operations]:
            raise ValueError("the program's operations depend on the number of tokens")
        pairs = zip(a.sizes.values(), b.sizes.values(), strict=True)
        grown = [more - less for less, more in pairs]
        found[id(a)] = dict(zip(a.sizes, grown, strict=True))
        for one, other in zip(a.operations, b.operations, strict=True):
            for body, same in zip(one.bodies, other.bodies, strict=True):
                compare(body, same)

    compare(small, large)
    return lambda graph, value: found[id(graph)][value]
