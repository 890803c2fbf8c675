"""Text to graph: the inverse of the printer. Every error names line, column, what was found and what was expected."""

from __future__ import annotations

import enum
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import numpy as np

from qir.arrays import Array
from qir.errors import ParseError, QirError, ResourceError
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value, as_float32, attribute_kinds
from qir.ops import OPS
from qir.packing import unpack_integers
from qir.printer import DTYPE_WORDS
from qir.types import (
    BATCH,
    F32,
    AffineType,
    Dim,
    ElementType,
    FixedPointType,
    IntegerType,
    TensorType,
    integer,
)

OP_CLASSES: Final[Mapping[str, type[Op]]] = {op.mnemonic: op for op in OPS}
_DTYPES: Final = {word: np.dtype(name) for name, word in DTYPE_WORDS.items()}
T = TypeVar("T")

_TOKEN = re.compile(
    r"""
    [ \t\r]*(?:
    (?P<newline>(?://[^\n]*)?(?:\n|\Z))
  | (?P<name>[%@](?:[A-Za-z0-9_][A-Za-z0-9_.$-]*|"(?:[^"\\\n]|\\.)*"))
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<shape>(?:N|\d+)(?:x\d+)+(?![\w.]))
  | (?P<number>-?(?:inf\b|nan\b|\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w]))
  | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<symbol>[{}()\[\]<>=,:^])
    )
    """,
    re.VERBOSE | re.ASCII,
)
#: Longer numbers are refused: no float needs as many characters, and no sum of products of 64-bit integers.
_LONGEST_NUMBER: Final = 60


class Token(NamedTuple):
    """A lexeme and where it starts, both counted from 1."""

    kind: str
    text: str
    line: int
    column: int


def tokenize(text: str, source: str) -> list[Token]:
    """The lexemes of `text`, closed by one of kind `end`. Raises ParseError at a character that starts none."""
    tokens: list[Token] = []
    position, line, start = 0, 1, 0
    for match in _TOKEN.finditer(text):
        if match.start() != position:
            break
        position = match.end()
        kind = str(match.lastgroup)
        if kind != "newline":
            tokens.append(Token(kind, match[kind], line, match.start(kind) - start + 1))
        elif match[kind].endswith("\n"):
            line, start = line + 1, position
    if position < len(text):
        rest = text[position:].lstrip(" \t\r")
        raise ParseError(f"unexpected character {rest[0]!r}", line, len(text) - len(rest) - start + 1, source)
    tokens.append(Token("end", "end of text", line, position - start + 1))
    return tokens


def parse(text: str, resources: Mapping[str, Array] | None = None, source: str = "<text>") -> Graph:
    """The graph that `text` describes.

    `resources` gives the large arrays by name, packed (a sidecar read by `qir.serialization`) or not; their hashes,
    those of the arrays unpacked, are checked.
    Raises ParseError (line and column) or ResourceError.
    """
    return _Parser(text, resources or {}, source).graph()


class _Typed(NamedTuple):
    """What stands behind the colon of a value: its type and facts, in the order of Value's fields."""

    type: TensorType
    range: Interval | None
    histogram: Array | None
    storage: IntegerType | None


class _Parser:
    def __init__(self, text: str, resources: Mapping[str, Array], source: str) -> None:
        self.source = source
        self.tokens = tokenize(text, source)
        self.place = 0
        self.resources = resources
        self.declared = self._declared_resources()
        self.values: dict[str, Value] = {}

    # Lexemes

    @property
    def token(self) -> Token:
        return self.tokens[self.place]

    def fail(self, message: str, token: Token | None = None) -> NoReturn:
        at = token or self.token
        raise ParseError(message, at.line, at.column, self.source)

    def peek(self, text: str) -> bool:
        return self.token.text == text and self.token.kind in ("symbol", "word")

    def accept(self, text: str) -> bool:
        found = self.peek(text)
        self.place += found
        return found

    def expect(self, text: str) -> Token:
        token = self.token
        if not self.accept(text):
            self.fail(f"expected '{text}', found '{token.text}'")
        return token

    def take(self, kind: str, what: str) -> Token:
        token = self.token
        if token.kind != kind:
            self.fail(f"expected {what}, found '{token.text}'")
        self.place += 1
        return token

    def name(self, sigil: str, what: str) -> str:
        token = self.token
        if token.kind != "name" or token.text[0] != sigil:
            self.fail(f"expected {what}, found '{token.text}'")
        self.place += 1
        return self.unquote(token.text[1:], token)

    def unquote(self, text: str, token: Token) -> str:
        if not text.startswith('"'):
            return text
        try:
            return str(json.loads(text))
        except json.JSONDecodeError as fault:
            self.fail(f"bad string: {fault.msg}", token)

    def listed(self, item: Callable[[], T], close: str) -> list[T]:
        """Items separated by commas up to `close`, which is consumed."""
        items: list[T] = []
        while not self.accept(close):
            if items:
                self.expect(",")
            items.append(item())
        return items

    def pairs(self, item: Callable[[], tuple[str, T]]) -> dict[str, T]:
        """Named items separated by commas up to the closing brace."""
        found: dict[str, T] = {}

        def add() -> None:
            token = self.token
            name, value = item()
            if name in found:
                self.fail(f"'{name}' is given twice", token)
            found[name] = value

        self.listed(add, "}")
        return found

    def guarded(self, token: Token, make: Callable[[], T]) -> T:
        """What `make` builds; its complaint becomes an error at `token`."""
        try:
            return make()
        except ParseError:
            raise
        except QirError as fault:
            self.fail(str(fault), token)

    # Graph

    def graph(self) -> Graph:
        self.expect("graph")
        name = self.name("@", "a graph name such as @digits")
        self.expect("stage")
        self.expect("=")
        token = self.take("word", "a stage")
        if token.text not in set(Stage):
            self.fail(f"unknown stage '{token.text}'; the stages are {', '.join(Stage)}", token)
        stage = Stage(token.text)
        target = ""
        if self.accept("target"):
            self.expect("=")
            string = self.take("string", "a target name in quotes")
            target = self.unquote(string.text, string)
        attributes = self.pairs(self.graph_attribute) if self.accept("{") else {}
        self.expect("(")
        inputs = tuple(self.listed(self.graph_input, ")"))
        self.expect("{")
        ops: list[Op] = []
        while not self.peek("return"):
            ops.append(self.op(stage))
        self.expect("return")
        outputs = self.listed(self.output, "}")
        if self.token.kind != "end" and not self.peek("resources"):
            self.fail(f"expected the end of the text, found '{self.token.text}'")
        values, names = tuple(v for v, _ in outputs), tuple(n for _, n in outputs)
        return Graph(name, stage, inputs, tuple(ops), values, names, target, types.MappingProxyType(attributes))

    def graph_attribute(self) -> tuple[str, Any]:
        key = self.take("word", "an attribute name").text
        self.expect("=")
        token = self.token
        if token.kind == "number":
            self.place += 1
            return key, self.number(token)
        if token.kind == "string":
            self.place += 1
            return key, self.unquote(token.text, token)
        if self.accept("["):
            return key, tuple(self.listed(self.any_number, "]"))
        word = self.take("word", "an attribute value").text
        return key, {"true": True, "false": False}.get(word, word)

    def graph_input(self) -> Value:
        token = self.token
        name = self.name("%", "an input such as %x")
        self.expect(":")
        return self.define(name, self.value_type(), token)

    def define(self, name: str, made: _Typed, token: Token) -> Value:
        if name in self.values:
            self.fail(f"%{name} is defined twice", token)
        value = self.values[name] = Value(name, *made)
        return value

    def operand(self) -> Value:
        token = self.token
        name = self.name("%", "a value such as %x")
        if name not in self.values:
            self.fail(f"%{name} is used before it is defined", token)
        return self.values[name]

    def output(self) -> tuple[Value, str]:
        value = self.operand()
        if not self.accept("as"):
            return value, value.name
        string = self.take("string", "an output name in quotes")
        return value, self.unquote(string.text, string)

    # Ops

    def op(self, stage: Stage) -> Op:
        first = self.token
        result_tokens: list[tuple[str, Token]] = []
        while True:
            token = self.token
            result_tokens.append((self.name("%", "a result such as %0, or return"), token))
            if not self.accept(","):
                break
        self.expect("=")
        token = self.take("word", "an op")
        op_class = OP_CLASSES.get(token.text)
        if op_class is None:
            self.fail(f"unknown op '{token.text}'", token)
        operands: list[Value] = []
        if self.token.kind == "name":
            operands.append(self.operand())
            while self.accept(","):
                operands.append(self.operand())
        attributes = self.attributes(op_class)
        self.expect(":")
        results: list[Value] = []
        for place, (name, at) in enumerate(result_tokens):
            if place:
                self.expect(",")
            results.append(self.define(name, self.value_type(), at))
        if "partial" in op_class.attribute_names() and self.accept("partial"):
            self.expect("in")
            attributes["partial"] = self.interval()
        mark, at_mark = "", self.token
        if self.accept("island"):
            mark = "island tolerance" if self.accept("tolerance") else "island"
        location = ""
        if self.accept("loc"):
            self.expect("(")
            string = self.take("string", "a location in quotes")
            location = self.unquote(string.text, string)
            self.expect(")")
        made: Op = self.guarded(
            first,
            lambda: op_class(operands=tuple(operands), results=tuple(results), location=location, **attributes),
        )
        due = made.island_mark if stage is Stage.FIXED else ""
        if mark != due:
            self.fail(f"{op_class.mnemonic} must be marked {due!r} here" if due else "this op is no island", at_mark)
        return made

    def attributes(self, op_class: type[Op]) -> dict[str, Any]:
        kinds = {name: kind for name, kind in attribute_kinds(op_class).items() if name != "partial"}
        at = self.token
        found = self.pairs(lambda: self.attribute(op_class, kinds)) if self.accept("{") else {}
        for field in fields(op_class):
            required = field.default is MISSING and field.default_factory is MISSING
            if required and field.name in kinds and field.name not in found:
                self.fail(f"{op_class.mnemonic} lacks its attribute '{field.name}'", at)
        return found

    def attribute(self, op_class: type[Op], kinds: Mapping[str, Any]) -> tuple[str, Any]:
        token = self.take("word", "an attribute name")
        if token.text not in kinds:
            known = ", ".join(kinds) or "none"
            self.fail(f"{op_class.mnemonic} has no attribute '{token.text}'; it has: {known}", token)
        self.expect("=")
        return token.text, self.attribute_value(kinds[token.text])

    def attribute_value(self, kind: Any) -> Any:
        """A value of the declared kind."""
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            self.expect("[")
            return tuple(self.listed(lambda: self.attribute_value(element), "]"))
        if kind is bool:
            return {"true": True, "false": False}[self.one_of(("true", "false"))]
        if kind is int:
            return self.integer()
        if kind is float:
            return self.real()
        if kind is Array:
            return self.array()
        if kind is IntegerType:
            return self.integer_type()
        if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
            return kind(self.one_of([str(m) for m in kind]))
        if kind is str:
            token = self.token
            if token.kind == "string":
                self.place += 1
                return self.unquote(token.text, token)
            return self.take("word", "a word or a string").text
        self.fail(f"attributes of kind {kind} have no text form")

    def one_of(self, words: Iterable[str]) -> str:
        token = self.take("word", "a word")
        if token.text not in words:
            self.fail(f"'{token.text}' is not one of {', '.join(words)}", token)
        return token.text

    # Numbers and arrays

    def number(self, token: Token) -> int | float:
        if len(token.text) > _LONGEST_NUMBER:
            self.fail(f"a number takes at most {_LONGEST_NUMBER} characters, not {len(token.text)}", token)
        if re.fullmatch(r"-?\d+", token.text):
            return int(token.text)
        value = float(token.text)
        if math.isinf(value) and "inf" not in token.text:
            self.fail(f"'{token.text}' is beyond float64", token)
        return value

    def any_number(self) -> int | float:
        return self.number(self.take("number", "a number"))

    def real(self) -> float:
        token = self.token
        value = float(self.any_number())
        single = as_float32(value)
        if math.isinf(single) and "inf" not in token.text:
            self.fail(f"'{token.text}' is beyond float32", token)
        return single

    def integer(self) -> int:
        token = self.take("number", "an integer")
        value = self.number(token)
        if not isinstance(value, int):
            self.fail(f"expected an integer, found '{token.text}'", token)
        return value

    def interval(self) -> Interval:
        token = self.expect("[")
        lo = self.end()
        self.expect(",")
        hi = self.end()
        self.expect("]")
        return self.guarded(token, lambda: Interval(lo, hi))

    def end(self) -> int | float:
        return self.integer() if re.fullmatch(r"-?\d+", self.token.text) else self.real()

    def array(self) -> Array:
        if self.token.kind == "name":
            return self.resource()
        token = self.take("word", "an array such as s8 2 [1, 2] or @name")
        dtype = _DTYPES.get(token.text)
        if dtype is None:
            self.fail(f"unknown element type '{token.text}' of an array", token)
        shape = self.shape() if not self.peek("[") else ()
        return self.numbers(dtype, tuple(d for d in shape if isinstance(d, int)))

    def numbers(self, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> Array:
        token = self.expect("[")
        data = self.elements(self.listed(self.any_number, "]"), dtype, token)
        if shape is not None and math.prod(shape) != data.size:
            self.fail(f"bad array: {data.size} numbers do not fit the shape {list(shape)}", token)
        return Array(data if shape is None else data.reshape(shape))

    def elements(self, items: list[int | float], dtype: np.dtype[Any], token: Token) -> np.ndarray[Any, np.dtype[Any]]:
        """Numbers in a dtype that holds them."""
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                data = np.array(items, np.float64).astype(dtype)
            exact = np.isinf(data) == [math.isinf(i) for i in items]
        else:
            low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
            exact = np.array([isinstance(i, int) and low <= i <= high for i in items], bool)
            data = np.array(items, dtype) if exact.all() else np.empty(0, dtype)
        if not exact.all():
            self.fail(f"bad array: {items[int(np.argmin(exact))]} is no {DTYPE_WORDS[dtype.name]}", token)
        return data

    def parameter(self, dtype: type[np.generic]) -> Array:
        """A scale, zero point or exponent: a number, a list or a resource."""
        if self.token.kind == "name":
            return self.resource()
        if self.peek("["):
            return self.numbers(np.dtype(dtype), None)
        token = self.token
        return Array(self.elements([self.any_number()], np.dtype(dtype), token).reshape(()))

    def resource(self) -> Array:
        token = self.token
        name = self.name("@", "a resource such as @conv1.weight")
        if name not in self.declared:
            self.fail(f"@{name} is not listed under resources", token)
        found = self.declared[name]
        if isinstance(found, str):
            raise ResourceError(found)
        return found

    def _declared_resources(self) -> dict[str, Array | str]:
        """The arrays that the `resources` section states, checked by hash; a str says why one cannot be had."""
        starts = [
            i
            for i, t in enumerate(self.tokens)
            if t.kind == "word" and t.text == "resources" and i and self.tokens[i - 1].text == "}"
        ]
        if not starts:
            return {}
        end, self.place = self.place, starts[-1] + 1
        if self.token.kind == "string":
            self.place += 1
        self.expect("{")
        found: dict[str, Array | str] = {}
        while not self.accept("}"):
            token = self.token
            name, made = self._declaration()
            if name in found:
                self.fail(f"@{name} is listed twice", token)
            found[name] = made
        if self.token.kind != "end":
            self.fail(f"expected the end of the text, found '{self.token.text}'")
        self.place = end
        return found

    def _declaration(self) -> tuple[str, Array | str]:
        name = self.name("@", "a resource such as @conv1.weight")
        self.expect(":")
        token = self.token
        if token.text in _DTYPES and self.tokens[self.place + 1].text != "{":
            self.place += 1
            dtype, packing = _DTYPES[token.text], None
        else:
            packing = self.integer_type()
            dtype = packing.dtype
        at, dims = self.token, self.shape() if self.token.kind in ("shape", "number") else ()
        shape = tuple(d for d in dims if d != BATCH)
        if len(shape) < len(dims):
            self.fail(f"a resource has no open dimension, found '{at.text}'", at)
        self.expect("sha256")
        self.expect("=")
        string = self.take("string", "a hash in quotes")
        stated = self.unquote(string.text, string)
        array = self.resources.get(name)
        where = f"{self.source}:{string.line}: resource @{name}"
        if array is None:
            return name, f"{where} is not in the sidecar; read the text together with the sidecar written beside it"
        if packing is not None and (array.data.dtype, array.shape) != (dtype, shape):
            try:
                unpacked = unpack_integers(array.data, shape, packing)
            except QirError as fault:
                raise ResourceError(f"{where}: the sidecar does not hold it as {packing}: {fault}") from fault
            unpacked.setflags(write=False)  # nobody else holds it, so that Array need not copy it
            array = Array(unpacked, name)
        if array.sha256 != stated or array.shape != shape or array.data.dtype != dtype:
            raise ResourceError(
                f"{where}: the sidecar's array has hash {array.sha256[:12]}..., the text states {stated[:12]}...; "
                "the sidecar was changed or belongs to another text"
            )
        return name, array if array.name == name else Array(array.data, name)

    # Types

    def shape(self) -> tuple[Dim, ...]:
        token = self.token
        if token.kind not in ("shape", "number") and token.text != BATCH:
            self.fail(f"expected a shape such as Nx8x8x16, found '{token.text}'")
        self.place += 1
        if not re.fullmatch(r"(?:N|\d{1,18})(?:x\d{1,18})*", token.text):
            self.fail(f"bad shape '{token.text}'", token)
        return tuple(BATCH if d == BATCH else int(d) for d in token.text.split("x"))

    def value_type(self) -> _Typed:
        kind = self.tensor_type()
        interval = self.interval() if self.accept("in") else None
        histogram = self.array() if self.accept("hist") else None
        storage = self.integer_type() if self.accept("storage") else None
        return _Typed(kind, interval, histogram, storage)

    def tensor_type(self) -> TensorType:
        token = self.token
        shape: tuple[Dim, ...] = ()
        if token.kind in ("shape", "number") or token.text == BATCH:
            shape = self.shape()
            self.expect("x")
        element = self.element()
        return self.guarded(token, lambda: TensorType(shape, element))

    def element(self) -> ElementType:
        token = self.token
        if self.accept("f32"):
            return F32
        storage = self.integer_type()
        if not self.accept("<"):
            return storage
        is_power = self.token.text == "2" and self.tokens[self.place + 1].text == "^"
        self.place += 2 * is_power
        first = self.parameter(np.int64 if is_power else np.float32)
        zero = Array(np.zeros(first.shape, np.int64))
        axis: int | None = None
        while self.accept(","):
            if self.accept("axis"):
                self.expect("=")
                axis = self.integer()
            else:
                self.expect("zero")
                self.expect("=")
                zero = self.parameter(np.int64)
        self.expect(">")
        if is_power:
            return self.guarded(token, lambda: FixedPointType(storage, first, axis))
        return self.guarded(token, lambda: AffineType(storage, first, zero, axis))

    def integer_type(self) -> IntegerType:
        token = self.take("word", "an element type such as f32, s8 or u4")
        match = re.fullmatch(r"([su])(\d{1,3})", token.text)
        if match is None:
            self.fail(f"expected an element type such as f32, s8 or u4, found '{token.text}'", token)
        kind = self.guarded(token, lambda: integer(int(match[2]), match[1] == "s"))
        if self.accept("{"):
            levels = tuple(self.listed(self.integer, "}"))
            ends = min(levels, default=0), max(levels, default=0)
            return self.guarded(token, lambda: IntegerType(kind.bits, kind.signed, *ends, levels))
        if not self.accept("["):
            return kind
        lo = self.integer()
        self.expect(",")
        hi = self.integer()
        self.expect("]")
        return self.guarded(token, lambda: kind.narrowed(lo, hi))
