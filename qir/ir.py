"""Values, ops and graphs: immutable and topologically ordered; a pass rebuilds forward and shares what it keeps."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args, get_type_hints

import numpy as np

from qir.affine import Form
from qir.arrays import Array
from qir.errors import QirError, RewriteError
from qir.interval import EVERYTHING, Bounds, Interval
from qir.types import ElementType, IntegerType, Shape, TensorType

if TYPE_CHECKING:
    import networkx


class Stage(enum.StrEnum):
    """How far a graph is lowered; DESIGN: float -> ranged -> typed -> fixed."""

    FLOAT = "float"
    RANGED = "ranged"
    TYPED = "typed"
    FIXED = "fixed"


FLOAT_STAGES = frozenset({Stage.FLOAT, Stage.RANGED, Stage.TYPED})
FIXED_ONLY = frozenset({Stage.FIXED})
ALL_STAGES = frozenset(Stage)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """An edge of the graph: a name, unique in its graph, a type, and facts. Hashes by identity.

    `range` is the calibrated interval (float) before stage `fixed` and the proved one (int) at it. `histogram` is what
    calibration observed, as `qir.calibration.Histogram.to_array` lays it out. `storage` is the integer type that
    assign-bit-widths chose and select-q-formats will give a scale.
    """

    name: str
    type: TensorType
    range: Interval | None = None
    histogram: Array | None = None
    storage: IntegerType | None = None

    def __post_init__(self) -> None:
        if self.range is not None and any(isinstance(e, float | np.floating) for e in (self.range.lo, self.range.hi)):
            outward = Interval(*(_outward_float32(float(e), s) for e, s in ((self.range.lo, -1), (self.range.hi, 1))))
            object.__setattr__(self, "range", outward)


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """A node. A subclass is one op of the language and declares its attributes as dataclass fields.

    `operand_names` lists the operands; a trailing `name?` is optional and a sole `name*` takes any number.
    `has_tolerance` marks float ops whose last bits are the host's, because they sum in an order of its own or call its
    mathematical functions; the results of the others are defined to the bit by IEEE 754.
    """

    mnemonic: ClassVar[str] = ""
    stages: ClassVar[frozenset[Stage]] = frozenset()
    operand_names: ClassVar[tuple[str, ...]] = ("input",)
    has_tolerance: ClassVar[bool] = False
    _kinds: ClassVar[Mapping[str, Any]]

    operands: tuple[Value, ...] = ()
    results: tuple[Value, ...] = ()
    location: str = ""

    def __post_init__(self) -> None:
        for name, kind in attribute_kinds(type(self)).items():
            value = getattr(self, name)
            if value is not None and _holds_floats(kind):  # the text carries float32, so the op does too
                rounded = tuple(map(as_float32, value)) if isinstance(value, tuple) else as_float32(value)
                object.__setattr__(self, name, rounded)

    @property
    def result(self) -> Value:
        """The only result. Raises RewriteError when there are several."""
        if len(self.results) != 1:
            raise RewriteError(f"{self.describe()} has {len(self.results)} results, not one")
        return self.results[0]

    @property
    def is_float(self) -> bool:
        """Whether the op computes on reals; at stage `fixed` such an op is an island."""
        return Stage.FLOAT in self.stages

    @property
    def island_mark(self) -> str:
        """What the text of stage `fixed` says of an op that stays in floating point; empty for all others."""
        if not self.is_float or self.mnemonic == "const":
            return ""
        return "island tolerance" if self.has_tolerance else "island"

    @classmethod
    def attribute_names(cls) -> tuple[str, ...]:
        """The declared attributes, in order."""
        return tuple(attribute_kinds(cls))

    @classmethod
    def operand_limits(cls) -> tuple[int, int | None]:
        """The least and the greatest number of operands; None means any number."""
        if cls.operand_names and cls.operand_names[-1].endswith("*"):
            return len(cls.operand_names), None
        return sum(not n.endswith("?") for n in cls.operand_names), len(cls.operand_names)

    def check_operand_count(self) -> None:
        """Raises QirError when there are too few operands or too many."""
        least, most = self.operand_limits()
        if len(self.operands) < least or (most is not None and len(self.operands) > most):
            expected = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
            raise QirError(f"takes {expected} operands, not {len(self.operands)}")

    def describe(self) -> str:
        """The op and its place, for messages: `Conv %3 (from node "conv1")`."""
        results = ", ".join(f"%{r.name}" for r in self.results)
        origin = f' (from node "{self.location}")' if self.location else ""
        return f"{self.mnemonic} {results}{origin}".strip()

    def optional_operand(self, index: int) -> Value | None:
        """The operand at `index`, or None when it is omitted."""
        return self.operands[index] if index < len(self.operands) else None

    # What an op class may define; the defaults are the conservative answers.

    def infer(self) -> tuple[Shape, ...]:
        """The shapes of the results. Raises QirError when the operands do not fit."""
        raise NotImplementedError

    def infer_elements(self) -> tuple[ElementType, ...] | None:
        """The element types of the results where the op fixes them; None leaves them to whoever builds the op."""
        return None

    def check(self) -> Iterator[str]:
        """What is wrong with attributes and types beyond shapes: one sentence each."""
        return iter(())

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds | None:
        """Sound integer bounds of results and partial sums from those of the operands; None: no rule."""
        return None

    def asked(self, demand: Bounds, operands: Sequence[Bounds]) -> tuple[Bounds, ...]:
        """For each operand, bounds such that clamping it to them leaves the one result, clamped to `demand`, as it is.

        This holds for all integers of the operands' containers; `operands` are the proved bounds.
        """
        return (EVERYTHING,) * len(self.operands)

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The exact centred result, before it is narrowed, from the forms and bounds of the operands; None: unknown."""
        return None

    def real_range(self, operands: Sequence[Interval]) -> tuple[Interval, ...] | None:
        """Sound real intervals of the results from those of the operands; None: nothing is known."""
        return None

    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return 0

    def intermediate_bits(self) -> int:
        """Bits that hold every intermediate integer of `eval_int`; above 63 the interpreter uses Python ints."""
        return 63

    def with_changes(self, **changes: Any) -> Self:
        """A copy with other operands, results or attributes."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, eq=False)
class OpBounds:
    """What a transfer function proves: bounds per result and, for accumulating ops, of every partial sum.

    `unsaturated` bounds a narrowing op's value before saturation, so that a proof can show it idle; `product` does so
    for the products that an accumulating op narrows one by one. Partial sums are bounded before a step narrows them.
    `lanes` bounds other registers on the way, by name; `channel_partials` is `partial` for each output channel.
    `sources` names the values whose affine forms made bounds tighter than those of the operands do.
    """

    results: tuple[Bounds, ...]
    partial: Interval | None = None
    unsaturated: Interval | None = None
    product: Interval | None = None
    lanes: Mapping[str, Interval] = field(default_factory=dict)
    channel_partials: Bounds | None = None
    sources: tuple[str, ...] = ()


_BASE_FIELDS = ("operands", "results", "location")


def attribute_kinds(op_class: type[Op]) -> Mapping[str, Any]:
    """Attribute name -> type annotation, in declaration order; worked out once and kept on the class."""
    kinds: Mapping[str, Any] | None = op_class.__dict__.get("_kinds")
    if kinds is None:
        hints = get_type_hints(op_class)
        kinds = MappingProxyType({f.name: hints[f.name] for f in fields(op_class) if f.name not in _BASE_FIELDS})
        op_class._kinds = kinds
    return kinds


def _holds_floats(kind: Any) -> bool:
    return kind is float or any(_holds_floats(k) for k in get_args(kind))


def _outward_float32(value: float, sign: int) -> float:
    """The nearest float32 that is not on the inner side of `value`: the text carries float32."""
    rounded = as_float32(value)
    inside = rounded < value if sign > 0 else rounded > value
    return float(np.nextafter(np.float32(rounded), np.float32(sign * np.inf))) if inside else rounded


def as_float32(value: float) -> float:
    """The nearest float32, as a Python float."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


Attribute = int | float | str | bool | tuple[int, ...] | tuple[float, ...]


_ATTRIBUTE_NAME = re.compile(r"(?!(?:inf|nan)$)[A-Za-z_][A-Za-z0-9_]*")


def _printable(value: Attribute) -> Attribute:
    if isinstance(value, tuple):
        return tuple(as_float32(v) if isinstance(v, float) else v for v in value)
    return as_float32(value) if isinstance(value, float) else value


@dataclass(frozen=True, eq=False)
class Graph:
    """A program: inputs, ops in topological order, named outputs. Equal when everything that prints is equal.

    `attributes` are numeric choices of the whole program, such as the rounding at its quantized inputs; floats are
    rounded to float32, as those of ops are. Raises QirError when the output names do not fit the outputs, or the name
    of an attribute is no word.
    """

    name: str
    stage: Stage
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    output_names: tuple[str, ...]
    target: str = ""
    attributes: Mapping[str, Attribute] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if len(self.outputs) != len(self.output_names):
            raise QirError(f"graph @{self.name}: {len(self.outputs)} outputs but {len(self.output_names)} output names")
        unprintable = next((k for k in self.attributes if not _ATTRIBUTE_NAME.fullmatch(k)), None)
        if unprintable is not None:
            raise QirError(f"graph @{self.name}: the name of the attribute {unprintable!r} is no word")
        rounded = {k: _printable(v) for k, v in self.attributes.items()}
        object.__setattr__(self, "attributes", MappingProxyType(rounded))

    @cached_property
    def producers(self) -> Mapping[Value, Op]:
        """The op that makes each value; graph inputs are absent."""
        return MappingProxyType({r: op for op in self.ops for r in op.results})

    @cached_property
    def users(self) -> Mapping[Value, tuple[Op, ...]]:
        """The ops that read each value, in order, one entry an op; unread values are absent."""
        found: dict[Value, dict[Op, None]] = {}
        for op in self.ops:
            for operand in op.operands:
                found.setdefault(operand, {})[op] = None
        return MappingProxyType({value: tuple(ops) for value, ops in found.items()})

    @cached_property
    def constants(self) -> Mapping[Value, Array]:
        """The data of every value made by a `const` op."""
        return MappingProxyType({op.results[0]: op.value for op in self.ops if op.mnemonic == "const"})  # type: ignore[attr-defined]

    def values(self) -> Iterator[Value]:
        """Every value: inputs, then results in order."""
        yield from self.inputs
        for op in self.ops:
            yield from op.results

    def value(self, name: str) -> Value:
        """The value of this name. Raises QirError when there is none."""
        found = next((v for v in self.values() if v.name == name), None)
        if found is None:
            raise QirError(f"graph @{self.name} has no value %{name}")
        return found

    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return sum(op.macs() for op in self.ops)

    def with_changes(self, **changes: Any) -> Graph:
        """A copy with other fields."""
        return replace(self, **changes)

    def __eq__(self, other: object) -> bool:
        return _equal(self, other) if isinstance(other, Graph) else NotImplemented

    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        """What other processes get: the fields, without what is worked out from them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Graph, tuple({**own, "attributes": dict(self.attributes)}.values())

    def __str__(self) -> str:
        from qir.printer import print_graph

        return print_graph(self)

    def to_networkx(self) -> networkx.MultiDiGraph[str]:
        """A view for algorithms and drawings: nodes are inputs, ops and outputs, edges carry value name
        and type (shape and storage).

        Node keys are `%name` of the first result (inputs likewise) and `return name` for outputs; nodes are inserted
        in program order, with the attributes `kind`, `label` and `location`.
        """
        import networkx

        view: networkx.MultiDiGraph[str] = networkx.MultiDiGraph(name=self.name)
        source: dict[Value, str] = {}
        for value in self.inputs:
            source[value] = f"%{value.name}"
            view.add_node(source[value], kind="input", label=value.name, location="")
        for op in self.ops:
            key = f"%{op.results[0].name}"
            source.update(dict.fromkeys(op.results, key))
            view.add_node(key, kind=op.mnemonic, label=op.mnemonic, location=op.location)
            for operand in op.operands:
                view.add_edge(source[operand], key, value=operand.name, type=str(operand.type))
        for name, value in zip(self.output_names, self.outputs, strict=True):
            key = f"return {name}"
            view.add_node(key, kind="output", label=name, location="")
            view.add_edge(source[value], key, value=value.name, type=str(value.type))
        return view

    def to_dot(self) -> str:
        """The graph in Graphviz DOT, in program order."""
        view = self.to_networkx()
        lines = [f"digraph {_dot(self.name)} {{", "  node [shape=box];"]
        lines += [f"  {_dot(key)} [label={_dot(data['label'])}];" for key, data in view.nodes(data=True)]
        lines += [f"  {_dot(a)} -> {_dot(b)} [label={_dot(data['type'])}];" for a, b, data in view.edges(data=True)]
        return "\n".join([*lines, "}", ""])


def _dot(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _equal(left: Graph, right: Graph) -> bool:
    """Structural equality: names, types, facts, attributes, locations and array contents."""
    if left is right:
        return True
    heads = [
        (g.name, g.stage, g.output_names, g.target, dict(g.attributes), len(g.inputs), len(g.ops))
        for g in (left, right)
    ]
    if heads[0] != heads[1]:
        return False
    pairs = dict(zip(left.inputs, right.inputs, strict=True))
    for a, b in zip(left.ops, right.ops, strict=True):
        if type(a) is not type(b) or a.location != b.location:
            return False
        if len(a.operands) != len(b.operands) or len(a.results) != len(b.results):
            return False
        if any(pairs.get(x) is not y for x, y in zip(a.operands, b.operands, strict=True)):
            return False
        if any(not _same(getattr(a, n), getattr(b, n)) for n in a.attribute_names()):
            return False
        pairs.update(zip(a.results, b.results, strict=True))
    if len(left.outputs) != len(right.outputs):
        return False
    if any(pairs.get(x) is not y for x, y in zip(left.outputs, right.outputs, strict=True)):
        return False
    return all(_facts(x) == _facts(y) for x, y in pairs.items())


def _same(left: object, right: object) -> bool:
    """Whether attributes are equal; NaN, which no legal op has, is NaN."""
    return left == right or (isinstance(left, float | tuple) and repr(left) == repr(right))


def _facts(value: Value) -> tuple[object, ...]:
    return value.name, value.type, value.range, value.histogram, value.storage
