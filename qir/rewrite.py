"""Building graphs and rewriting them forward: a pass walks the old ops in order and emits the new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qir.arrays import Array
from qir.errors import QirError, RewriteError
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.types import F32, ElementType, TensorType


class GraphBuilder:
    """Collects inputs and ops, gives every value a fresh name, and infers result types."""

    def __init__(self, name: str, stage: Stage = Stage.FLOAT) -> None:
        self.name = name
        self.stage = stage
        self.inputs: list[Value] = []
        self.ops: list[Op] = []
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}  # the next number to try, for each hint

    def fresh(self, hint: str = "") -> str:
        """`hint` when it is free, else a name derived from it; numbers where there is no hint."""
        name = hint
        while not name or name in self._taken:
            number = self._next.get(hint, 1 if hint else 0)
            self._next[hint] = number + 1
            name = f"{hint}.{number}" if hint else str(number)
        self._taken.add(name)
        return name

    def input(self, name: str, kind: TensorType, range: Interval | None = None) -> Value:
        """A graph input. Raises RewriteError when the name is taken."""
        if name in self._taken:
            raise RewriteError(f"graph @{self.name}: two inputs are named {name!r}")
        value = Value(self.fresh(name), kind, range)
        self.inputs.append(value)
        return value

    def constant(self, data: Array, kind: TensorType, name: str = "") -> Value:
        """A `const` op's result."""
        return self.emit(Const, (), value=data, types=(kind,), name=name or data.name, location="")

    def emit(
        self,
        op_class: type[Op],
        operands: Sequence[Value],
        *,
        types: Sequence[TensorType] | None = None,
        elements: Sequence[ElementType] | None = None,
        name: str = "",
        location: str = "",
        **attributes: Any,
    ) -> Value:
        """Append an op with one result and return it; see `emit_all`."""
        return self.emit_all(
            op_class, operands, types=types, elements=elements, names=[name], location=location, **attributes
        )[0]

    def emit_all(
        self,
        op_class: type[Op],
        operands: Sequence[Value],
        *,
        types: Sequence[TensorType] | None = None,
        elements: Sequence[ElementType] | None = None,
        names: Sequence[str] = (),
        location: str = "",
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Append an op and return its results.

        Result types are `types`, else the inferred shapes with `elements`, else with what the op infers or float32.
        Raises RewriteError, which names the op and its place, when operands or attributes do not fit.
        """
        bare = op_class(operands=tuple(operands), location=location, **attributes)
        try:
            bare.check_operand_count()
            if types is None:
                shapes = bare.infer()
                found = elements or bare.infer_elements() or (F32,) * len(shapes)
                types = [TensorType(s, e) for s, e in zip(shapes, found, strict=True)]
        except QirError as fault:
            place = f'node "{location}"' if location else f"op {op_class.mnemonic}"
            raise RewriteError(f"{place}: {op_class.mnemonic}: {fault}") from fault
        hints = [*names, *[""] * (len(types) - len(names))]
        op = bare.with_changes(results=tuple(Value(self.fresh(h), t) for h, t in zip(hints, types, strict=True)))
        self.ops.append(op)
        return op.results

    def append(self, op: Op) -> tuple[Value, ...]:
        """Append a finished op as it is, renaming results whose names are taken."""
        if any(r.name in self._taken for r in op.results):
            results = tuple(replace(r, name=self.fresh(r.name)) for r in op.results)
            op = op.with_changes(results=results)
        else:
            self._taken.update(r.name for r in op.results)
        self.ops.append(op)
        return op.results

    def finish(
        self,
        outputs: Sequence[Value],
        output_names: Sequence[str],
        *,
        target: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> Graph:
        """The graph."""
        return Graph(
            self.name,
            self.stage,
            tuple(self.inputs),
            tuple(self.ops),
            tuple(outputs),
            tuple(output_names),
            target,
            dict(attributes or {}),
        )


class Rewriter(GraphBuilder):
    """A builder that follows an old graph: `get` maps its values to the new ones, `set` says what replaces them."""

    def __init__(self, graph: Graph, stage: Stage | None = None) -> None:
        super().__init__(graph.name, stage or graph.stage)
        self.graph = graph
        self._map: dict[Value, Value] = {}
        self._reserved = {v.name for v in graph.values()}

    def fresh(self, hint: str = "") -> str:
        """As GraphBuilder's, and never a name that the old graph still uses for another value."""
        if hint and hint not in self._taken and hint not in self._reserved:
            self._taken.add(hint)
            return hint
        while True:
            name = super().fresh(hint)
            if name not in self._reserved:
                return name

    def get(self, value: Value) -> Value:
        """What stands for an old value. Raises RewriteError when nothing does yet."""
        try:
            return self._map[value]
        except KeyError:
            raise RewriteError(f"graph @{self.name}: %{value.name} is read before anything replaced it") from None

    def operands(self, op: Op) -> tuple[Value, ...]:
        """What stands for the operands of an old op."""
        return tuple(self._map[v] for v in op.operands)

    def set(self, old: Value, new: Value) -> None:
        """From here on, `new` stands for `old`."""
        self._map[old] = new

    def keep_input(self, value: Value, **changes: Any) -> Value:
        """Carry an input over, with changes to its type or facts."""
        new = replace(value, **changes) if changes else value
        self._taken.add(new.name)
        self.inputs.append(new)
        self.set(value, new)
        return new

    def keep(self, op: Op, results: Sequence[Value] | None = None, **attributes: Any) -> tuple[Value, ...]:
        """Carry an op over on its new operands, with other attributes or results (same names) where given."""
        operands = self.operands(op)
        if operands == op.operands and results is None and not attributes:
            new = op
        else:
            new = op.with_changes(operands=operands, results=tuple(results or op.results), **attributes)
        self._taken.update(r.name for r in new.results)
        self.ops.append(new)
        for before, after in zip(op.results, new.results, strict=True):
            self.set(before, after)
        return new.results

    def claim(self, old: Value) -> str:
        """The name of an old value that goes away, free to be given to what stands for it."""
        self._reserved.discard(old.name)
        return old.name

    def replace(self, old: Op, op_class: type[Op], operands: Sequence[Value], **options: Any) -> Value:
        """Emit an op in place of `old`, under the name and the location of its one result, and map that result.

        `options` are those of `emit`.
        """
        self.claim(old.result)
        options.setdefault("location", old.location)
        new = self.emit(op_class, operands, name=old.result.name, **options)
        self.set(old.result, new)
        return new

    def finish_graph(self, **changes: Any) -> Graph:
        """The new graph, with the outputs of the old one under their names."""
        return self.graph.with_changes(
            stage=self.stage,
            inputs=tuple(self.inputs),
            ops=tuple(self.ops),
            outputs=tuple(self.get(v) for v in self.graph.outputs),
            **changes,
        )


def rewrite(graph: Graph, visit: Callable[[Rewriter, Op], bool], stage: Stage | None = None, **changes: Any) -> Graph:
    """Rebuild `graph` forward: `visit` returns True when it has replaced the op, False to keep it as it is."""
    rewriter = Rewriter(graph, stage)
    for value in graph.inputs:
        rewriter.keep_input(value)
    for op in graph.ops:
        if not visit(rewriter, op):
            rewriter.keep(op)
    return rewriter.finish_graph(**changes)


def live_ops(graph: Graph) -> list[Op]:
    """The ops that some output depends on, in order."""
    needed = set(graph.outputs)
    live: list[Op] = []
    for op in reversed(graph.ops):
        if any(r in needed for r in op.results):
            needed.update(op.operands)
            live.append(op)
    return live[::-1]


def map_values(
    graph: Graph,
    facts: Callable[[Value], Mapping[str, Any]],
    stage: Stage | None = None,
    attributes: Callable[[Op], Mapping[str, Any]] = lambda op: {},
) -> Graph:
    """The same ops with other types or facts of their values (`facts`) and other attributes (`attributes`)."""
    rewriter = Rewriter(graph, stage)
    for value in graph.inputs:
        rewriter.keep_input(value, **facts(value))
    for op in graph.ops:
        results = [replace(r, **changes) if (changes := facts(r)) else r for r in op.results]
        rewriter.keep(op, results, **attributes(op))
    return rewriter.finish_graph()
