"""Passes, pipelines and the instruments that watch them.

A pass is a frozen dataclass: its fields are its options, `name` is what a pipeline string calls it, `run` rebuilds a
graph.
"""

from __future__ import annotations

import enum
import re
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Protocol, Self, overload

import numpy as np
import numpy.typing as npt

from qir.calibration import Calibration
from qir.errors import Diagnostic, PassError, QirError
from qir.interpreter import interpret
from qir.ir import Graph, Stage
from qir.ops.fixed_rescale import quantize_input
from qir.serialization import write_graph
from qir.target import Target
from qir.verifier import verify

Feeds = Mapping[str, npt.ArrayLike]
Progress = Callable[[str, int, int], None]


def no_progress(task: str, done: int, total: int) -> None:
    """Shows nothing. `total` is 0 where it is not known."""


@dataclass
class PassContext:
    """What passes may read and report to: the target, calibration feeds, diagnostics, notes and progress.

    `calibration` is any iterable of feeds, walked once by calibrate and several times by correct-bias,
    learn-rounding and search-weight-ranges, or what was observed already.
    """

    target: Target | None = None
    calibration: Iterable[Feeds] | Calibration | None = None
    progress: Progress = no_progress
    diagnostics: list[Diagnostic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say what the running pass changed, in a few words."""
        self.notes.append(text)

    def need_target(self, pass_name: str) -> Target:
        """The target. Raises PassError when none is given."""
        if self.target is None:
            raise PassError(f"{pass_name} needs a target; pass one in the context, or --target on the command line")
        return self.target


@dataclass(frozen=True)
class Pass:
    """Base of passes. `requires` lists the stages that a pass takes; it gives the same stage, or `ensures`."""

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[Stage]] = frozenset(Stage)
    ensures: ClassVar[Stage | None] = None

    @property
    def preserves_bits(self) -> bool:
        """Whether the outputs keep every bit from stage `fixed` to stage `fixed`; False for a repair, say."""
        return True

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The rewritten graph."""
        raise NotImplementedError

    def __str__(self) -> str:
        shown = [
            f"{f.name.replace('_', '-')}={_option_text(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The pass with options given as text. Raises PassError for an unknown option or a bad value."""
        kinds = typing.get_type_hints(cls)
        known = {f.name.replace("_", "-"): f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in known:
                listed = ", ".join(known) or "none"
                raise PassError(f"pass {cls.name} has no option {key!r}; its options: {listed}")
            try:
                values[known[key]] = _parse_option(kinds[known[key]], text)
            except ValueError as fault:
                raise PassError(f"pass {cls.name}: option {key}={text}: {fault}") from fault
        try:
            return cls(**values)
        except QirError as fault:
            raise PassError(f"pass {cls.name}: {fault}") from fault


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ";".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse_option(kind: Any, text: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(_parse_option(typing.get_args(kind)[0], part) for part in text.split(";") if part)
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("expected true or false")
        return text == "true"
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum) and text not in tuple(kind):
        raise ValueError(f"there are: {', '.join(kind)}")
    return kind(text)


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: its notes, its wall time in seconds, the graphs before and after, and what it warned of."""

    name: str
    seconds: float
    notes: tuple[str, ...]
    before: Graph
    after: Graph
    diagnostics: tuple[Diagnostic, ...] = ()


class Instrument(Protocol):
    """Something that sees every pass run."""

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        """Called with the outcome of pass number `index`; raise a QirError to stop the pipeline."""


@dataclass
class Verifier:
    """Verifies the graph after each pass."""

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        verify(record.after)


@dataclass
class Dump:
    """Writes `NN_pass-name.qir`, counted from 1, with its sidecar into a folder after each pass."""

    folder: Path

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise QirError(
                f"cannot write IR dumps to {self.folder}: {fault.strerror}; choose another folder"
            ) from fault
        write_graph(record.after, self.folder / f"{index + 1:02d}_{record.name}.qir")


@dataclass
class Timing:
    """Collects what each pass took and changed."""

    records: list[PassRecord] = field(default_factory=list)

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        self.records.append(record)


@dataclass(frozen=True)
class Difference:
    """How far one output moved over a pass: the largest absolute difference, in real units."""

    pass_name: str
    output: str
    largest: float


@dataclass
class Differential:
    """Runs the interpreter on the graph before and after each pass and records how far the real outputs moved.

    From stage `typed` on they are those of simulated quantization. At stage `fixed` bits count: see qir.Equivalence.
    """

    feeds: Feeds
    differences: list[Difference] = field(default_factory=list)

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        if Stage.FIXED in (record.before.stage, record.after.stage):
            return
        left, right = interpret(record.before, self.feeds), interpret(record.after, self.feeds)
        for name in record.after.output_names:
            gap = np.abs(left[name].astype(np.float64) - right[name].astype(np.float64))
            self.differences.append(Difference(record.name, name, float(gap.max(initial=0.0))))


def integer_feeds(graph: Graph, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """Real feeds quantized as a fixed-stage graph says its inputs are; other feeds pass as they are."""
    return {v.name: quantize_input(graph, v, np.asarray(feeds[v.name])) for v in graph.inputs}


class Pipeline(Sequence[Pass]):
    """Passes in order. Composed by slicing, `+`, `before`, `after` and `replace`; each returns a new pipeline."""

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        self.passes = tuple(passes)
        for item in self.passes:
            if not isinstance(item, Pass) or not item.name:
                raise PassError(f"{item!r} is no pass: subclass qir.Pass as a frozen dataclass and give it a name")

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    @overload
    def __getitem__(self, index: int) -> Pass: ...
    @overload
    def __getitem__(self, index: slice) -> Pipeline: ...
    def __getitem__(self, index: int | slice) -> Pass | Pipeline:
        return Pipeline(self.passes[index]) if isinstance(index, slice) else self.passes[index]

    def __add__(self, other: Iterable[Pass]) -> Pipeline:
        return Pipeline([*self.passes, *other])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __repr__(self) -> str:
        return f"Pipeline({str(self)!r})"

    def position(self, name: str) -> int:
        """The place of the first pass of this name. Raises PassError when there is none."""
        found = next((i for i, p in enumerate(self.passes) if p.name == name), None)
        if found is None:
            raise PassError(f"the pipeline has no pass {name!r}; it runs {self}")
        return found

    def before(self, name: str) -> Pipeline:
        """The passes that run before the first one of this name."""
        return self[: self.position(name)]

    def after(self, name: str) -> Pipeline:
        """The passes that run after the first one of this name."""
        return self[self.position(name) + 1 :]

    def replace(self, name: str, *passes: Pass) -> Pipeline:
        """The pipeline with the first pass of this name replaced by these, or removed when there are none."""
        place = self.position(name)
        return Pipeline([*self.passes[:place], *passes, *self.passes[place + 1 :]])

    def insert_after(self, name: str, *passes: Pass) -> Pipeline:
        """The pipeline with these passes behind the first one of this name."""
        place = self.position(name) + 1
        return Pipeline([*self.passes[:place], *passes, *self.passes[place:]])

    @staticmethod
    def parse(text: str, registry: Mapping[str, type[Pass]]) -> Pipeline:
        """The pipeline that a string such as `"calibrate,range-analysis{method=interval}"` names.

        Raises PassError for a malformed string, an unknown pass or an unknown option.
        """
        return Pipeline(registry_pass(name, registry).from_options(options) for name, options in _split(text))

    def run(self, graph: Graph, context: PassContext, instruments: Sequence[Instrument] | None = None) -> Graph:
        """Run every pass. `instruments` defaults to verification after each.

        A failure raises PassError, which names the pass and those done and keeps the last good graph.
        """
        watching = [Verifier()] if instruments is None else instruments
        done: list[str] = []
        for index, item in enumerate(self.passes):
            try:
                if graph.stage not in item.requires:
                    stages = " or ".join(sorted(item.requires))
                    mend = "run the passes that lead there first, or give it a text of that stage"
                    raise PassError(f"takes stage {stages}, the graph is at {graph.stage}; {mend}")
                context.notes.clear()
                warned = len(context.diagnostics)
                context.progress(item.name, index, len(self.passes))
                start = time.perf_counter()
                after = item.run(graph, context)
                seconds, found = time.perf_counter() - start, tuple(context.diagnostics[warned:])
                record = PassRecord(item.name, seconds, tuple(context.notes), graph, after, found)
                if item.ensures is not None and after.stage is not item.ensures:
                    raise PassError(f"ended at stage {after.stage}, it promises {item.ensures}")
                for instrument in watching:
                    instrument.after_pass(index, item, record, context)
            except QirError as fault:
                ran = ", ".join(done) or "none"
                raise PassError(f"pass {item.name} failed: {fault}\n(passes done: {ran})", done, graph) from fault
            graph = after
            done.append(item.name)
        return graph


def registry_pass(name: str, registry: Mapping[str, type[Pass]]) -> type[Pass]:
    """The pass class of this name. Raises PassError, which lists those there are."""
    if name not in registry:
        raise PassError(f"unknown pass {name!r}; there are: {', '.join(sorted(registry))}")
    return registry[name]


_PASS_TEXT = re.compile(r"\s*(?P<name>[A-Za-z][A-Za-z0-9_.-]*)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?P<end>,|$)")


def _split(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    place = 0
    while place < len(text):
        match = _PASS_TEXT.match(text, place)
        if match is None or (match["end"] == "," and match.end() == len(text)):
            raise PassError(f'pipeline string: expected "name{{option=value}},..." at {text[place:]!r}')
        options: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in (match["options"] or "").split(","))):
            key, equals, value = part.partition("=")
            if not equals or key.strip() in options:
                raise PassError(f"pipeline string: {match['name']}: expected one option=value, found {part!r}")
            options[key.strip()] = value.strip()
        yield match["name"], options
        place = match.end()
