"""Certificates: what they state, who checks them, and that no false one passes, whatever else is made to agree."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certified import (
    AFFINE_TEXTS,
    HASH,
    affine,
    certificate,
    changed,
    every_input,
    faults_of,
    numbers,
    proof_of,
    rich,
)
from models import PATHS, compiled
from property.recorder import Unsound, check_soundness
from safetensors.numpy import load_file, save_file
from unit.test_program import NET, small_net

import qir
from qir import program
from qir.arrays import Array
from qir.backend import shipped_backends
from qir.certificate import hold_to_certificate, make_certificate
from qir.checker import check_certificate
from qir.cli import main
from qir.errors import CertificateError, QirError, VerifyError
from qir.interval import Bounds
from qir.ir import OpBounds
from qir.ops import OPS
from qir.ops.fixed_rescale import Requantize
from qir.proof import Method, false_claims, prove
from qir.serialization import read_graph

ROOT = Path(__file__).parents[2]
CHECKER = sorted((ROOT / "qir" / "checker").glob("*.py"))


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A program of two padded convolutions, whose weights lie in the sidecar."""
    program.Program(NET).save(tmp_path / "build")
    return tmp_path / "build"


def _held(build: Path) -> int:
    return hold_to_certificate(read_graph(build / "graph.qir"), build / "graph.qir")


def _stated(build: Path) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads((build / "certificate.json").read_text())
    return stated


def _forge(build: Path, stated: dict[str, Any]) -> None:
    """Write a certificate with the right hashes, as an attacker does."""
    stated["graph_sha256"] = hashlib.sha256((build / "graph.qir").read_bytes()).hexdigest()
    stated["weights_sha256"] = hashlib.sha256((build / "weights.safetensors").read_bytes()).hexdigest()
    (build / "certificate.json").write_text(json.dumps(stated))


# What it states


def test_a_certificate_states_every_bound_with_its_rule_and_inputs() -> None:
    stated = certificate(rich())
    assert stated["values"]["x"] == {"rule": "type", "inputs": [], "lo": -2, "hi": 1, "step": 1}
    assert stated["values"]["b"] == {"rule": "const", "inputs": [], "lo": [5, -7], "hi": [5, -7], "step": [0, 0]}
    assert stated["accumulators"]["g"] == {
        "rule": "matmul",
        "inputs": ["f", "u"],
        "type": "s7",
        "overflow": "none",
        "order": "bias_ckhw",
        "partial": [-64, 62],
        "bits": 7,
        "idle": True,
        "lo": [-64, -32, -64],
        "hi": [61, 31, 62],
        "step": [1, 1, 1],
    }
    assert stated["lanes"]["g:entering"] == {
        "rule": "matmul", "inputs": ["f", "u"], "lo": -96, "hi": 96, "step": 1
    }  # fmt: skip
    assert {name.rpartition(":")[2] for name in stated["lanes"]} == {
        "product", "pair", "entering", "shifted", "unsaturated", "sum"
    }  # fmt: skip
    assert stated["values"].keys() == {v.name for v in rich().values()}
    assert stated["accumulators"].keys() == {"acc", "g", "r"}


def test_a_certificate_is_one_entry_a_line_and_the_same_each_time() -> None:
    graph = rich()
    text = make_certificate(graph, prove(graph), HASH, None)
    assert text == make_certificate(graph.with_changes(), prove(graph.with_changes()), HASH, None)
    entries = [line for line in text.splitlines() if '"rule"' in line]
    stated = json.loads(text)
    assert len(entries) == sum(len(stated[part]) for part in ("values", "accumulators", "lanes"))
    assert [*stated["values"]] == sorted(stated["values"])


def test_a_saved_program_lies_beside_its_certificate(build: Path) -> None:
    stated = _stated(build)
    for key, name in (("graph_sha256", "graph.qir"), ("weights_sha256", "weights.safetensors")):
        assert stated[key] == hashlib.sha256((build / name).read_bytes()).hexdigest()
    assert _held(build) == sum(len(stated[part]) for part in ("values", "accumulators", "lanes"))
    qir.load(build).save(build)  # is replaced as a whole
    assert _stated(build) == stated


def test_facts_that_are_not_so_are_named(build: Path) -> None:
    stated = _stated(build)
    name, entry = next(iter(stated["accumulators"].items()))
    _, most = entry["partial"]
    entry |= {"idle": int(entry["idle"]), "partial": [0, most], "note": None}
    _forge(build, stated)
    with pytest.raises(CertificateError) as caught:
        _held(build)
    assert f"accumulators '{name}': partial must be [" in str(caught.value)
    assert f"and is [0, {most}], idle must be true and is 1, note must be nothing and is null, and must hold" in str(
        caught.value
    )


def test_a_program_without_large_constants_has_no_hash_of_them(tmp_path: Path) -> None:
    program.Program(rich()).save(tmp_path / "build")
    assert _stated(tmp_path / "build")["weights_sha256"] is None
    assert _held(tmp_path / "build")


def test_another_json_in_a_folder_is_not_replaced(build: Path) -> None:
    (build / "notes.json").write_text("{}")
    with pytest.raises(QirError, match="holds more than qir output"):
        program.Program(NET).save(build)


@pytest.mark.parametrize("target", shipped_backends())
@pytest.mark.parametrize("model", PATHS)
def test_the_checker_agrees_on_every_model_for_every_target(model: str, target: str) -> None:
    graph = compiled(model, target).program.graph
    assert faults_of(graph, certificate(graph)) == []


# Who checks it


def _imports() -> Iterator[tuple[str, str]]:
    for path in CHECKER:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((str(node.module), alias.name) for alias in node.names)


def test_the_checker_shares_no_code_with_the_prover() -> None:
    ours = {(module, name) for module, name in _imports() if module.startswith("qir") and "checker" not in module}
    assert ours == {
        ("qir.errors", "QirError"),
        ("qir.ir", "Graph"),
        ("qir.ir", "Op"),
        ("qir.ir", "Value"),
        ("qir.types", "storage_of"),
        ("qir.types", "zero_array"),
    }
    others = {module.split(".")[0] for module, _ in _imports() if not module.startswith("qir")}
    assert others <= {
        "__future__",
        "collections",
        "dataclasses",
        "fractions",
        "functools",
        "itertools",
        "json",
        "math",
        "numpy",
        "typing",
    }


def test_the_checker_reads_attributes_of_ops_and_calls_no_method_of_theirs() -> None:
    attributes = {name for op in OPS for name in op.attribute_names()} | {"mnemonic", "operands", "results", "location"}
    members = {name: getattr(op, name) for op in OPS for name in dir(op) if not name.startswith("_")}
    computed = {name for name, member in members.items() if isinstance(member, property)} - attributes
    methods = {name for name, member in members.items() if callable(member)} - attributes
    nodes = [n for path in CHECKER for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    calls = {n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert {"bounds", "eval_int", "chain_bounds", "describe"} <= methods
    assert {"result", "window", "storage"} <= computed
    assert calls & methods == set()
    assert {n.attr for n in nodes if isinstance(n, ast.Attribute)} & computed == set()


def test_the_files_of_the_checker_are_small() -> None:
    assert len(CHECKER) > 1
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 300 for path in CHECKER)


# Changes of a certificate, with hashes made right


def _inward(end: str) -> Callable[[int], int]:
    return {"lo": lambda n: n + 1, "hi": lambda n: n - 1, "step": lambda n: 2 * n}[end]


@pytest.mark.parametrize("path", list(numbers(certificate(rich()))), ids=str)
def test_no_bound_can_be_tighter_than_what_follows(path: tuple[Any, ...]) -> None:
    stated = certificate(rich())
    tampered = changed(stated, path, _inward(path[2]))
    if tampered != stated:  # a step of 0 stays
        assert faults_of(rich(), tampered)


@cache
def _mobile() -> tuple[qir.Graph, dict[str, Any]]:
    graph = compiled("fm_mobile").program.graph
    return graph, certificate(graph)


@pytest.mark.parametrize("seed", range(60))
def test_no_bound_of_a_model_can_be_tighter_than_what_follows(seed: int) -> None:
    graph, stated = _mobile()
    paths = [p for p in numbers(stated) if changed_by_one(stated, p)]
    path = paths[int(np.random.default_rng(seed).integers(len(paths)))]
    assert faults_of(graph, changed(stated, path, _inward(path[2])))


def changed_by_one(stated: dict[str, Any], path: tuple[Any, ...]) -> bool:
    """Whether moving a number inward changes what is stated; a step of 0 stays."""
    entry = stated[path[0]][path[1]]["step"]
    return path[2] != "step" or bool(entry[path[3]] if len(path) > 3 else entry)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("accumulators", "acc", "bits"), lambda n: n - 1),
        (("accumulators", "acc", "bits"), lambda n: n + 1),
        (("accumulators", "acc", "bits"), float),
        (("accumulators", "acc", "partial", 0), lambda n: n + 1),
        (("accumulators", "acc", "idle"), lambda _: False),
        (("accumulators", "acc", "idle"), int),
        (("accumulators", "acc", "type"), lambda _: "s32"),
        (("accumulators", "acc", "overflow"), lambda _: "wrap"),
        (("accumulators", "acc", "order"), lambda _: "ckhw"),
        (("accumulators", "acc", "rule"), lambda _: "matmul"),
        (("accumulators", "acc", "rule"), lambda _: "type"),
        (("values", "acc", "rule"), lambda _: "type"),
        (("values", "acc", "rule"), lambda _: "trust"),
        (("values", "acc", "rule"), lambda _: None),
        (("values", "acc", "inputs"), lambda names: names[:2]),
        (("values", "acc", "inputs"), lambda names: [*names, "x"]),
        (("values", "x", "rule"), lambda _: "const"),
        (("lanes", "q:shifted", "rule"), lambda _: "type"),
        (("lanes", "q:shifted", "inputs"), lambda _: []),
        (("values", "acc", "lo"), lambda _: [-14]),
        (("values", "acc", "lo"), lambda lo: [*lo, -14]),
        (("values", "acc", "lo"), lambda _: -14),
        (("values", "acc", "lo"), lambda _: []),
        (("values", "x", "lo"), float),
        (("values", "x", "lo"), str),
        (("values", "x", "lo"), lambda _: None),
        (("values", "x", "lo"), lambda _: {"x": 1}),
        (("values", "x", "lo"), lambda _: float("nan")),
        (("values", "x", "lo"), lambda _: float("-inf")),
        (("values", "x", "lo"), lambda _: -(10**300)),
        (("values", "x", "hi"), lambda _: True),
        (("values", "x", "hi"), lambda _: 10**300),
        (("values", "x", "hi"), lambda _: -3),
        (("values", "x", "step"), lambda _: 0),
        (("values", "x", "step"), lambda _: -1),
        (("values", "x", "step"), lambda _: 10**300),
        (("values", "x"), lambda _: None),
        (("values", "x"), lambda _: [1]),
        (("values", "x"), lambda entry: entry | {"note": 1}),
        (("values",), lambda _: []),
        (("lanes",), lambda _: {}),
        (("lanes",), lambda lanes: lanes | {"q:other": lanes["q:shifted"]}),
        (("values",), lambda values: values | {"y": values["x"]}),
        (("accumulators",), lambda entries: entries | {"x": entries["acc"]}),
        (("version",), lambda _: 2),
        (("version",), lambda _: True),
        (("format",), lambda _: "qir"),
        (("graph_sha256",), lambda _: "1" * 64),
        (("graph_sha256",), lambda _: None),
        (("weights_sha256",), lambda _: "1" * 64),
    ],
)  # fmt: skip
def test_what_is_not_so_or_not_of_the_format_is_refused(path: tuple[Any, ...], change: Callable[[Any], Any]) -> None:
    faults = faults_of(rich(), changed(certificate(rich()), path, change))
    assert faults
    assert all("; compile the model again" in fault and ": " in fault for fault in faults)


@pytest.mark.parametrize("part", ["values", "accumulators", "lanes"])
def test_an_entry_that_is_deleted_renamed_or_doubled_is_refused(part: str) -> None:
    stated = certificate(rich())
    for name in stated[part]:
        without = {k: v for k, v in stated[part].items() if k != name}
        assert [
            f for f in faults_of(rich(), stated | {part: without}) if f.startswith(f"{part} {name!r}: must be there")
        ]
        renamed = without | {f"{name}'": stated[part][name]}
        assert [f for f in faults_of(rich(), stated | {part: renamed}) if "the graph has no such thing" in f]
        text = json.dumps(stated).replace(f'"{part}": {{', f'"{part}": {{"{name}": {json.dumps(stated[part][name])}, ')
        assert faults_of(rich(), text) == [
            "certificate: is no JSON that can be read, a name stands twice in it; compile the model again"
        ]


@pytest.mark.parametrize(
    "cut",
    [
        lambda text: "",
        lambda text: text[:-2],
        lambda text: text[: len(text) // 2],
        lambda text: text + text,
        lambda text: "null",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: '{"a": ' * 100_000,
        lambda text: "{}",
        lambda text: text.replace('"lo": -2,', '"lo": -' + "2" * 5000 + ",", 1),
        lambda text: text.replace('"lo": -2,', '"lo": NaN,', 1),
        lambda text: text.replace('"lo": -2,', '"lo": -2e0,', 1),
        lambda text: text.replace('"lo": -2,', '"lo": [-2, "1"],', 1),
    ],
)
def test_what_is_no_certificate_gives_one_error(cut: Callable[[str], str]) -> None:
    text = make_certificate(rich(), prove(rich()), HASH, None)
    (fault,) = faults_of(rich(), cut(text))
    assert fault.startswith("certificate: ")
    assert fault.endswith("; compile the model again")


def test_every_fault_is_found_and_one_lie_is_one_fault() -> None:
    stated = certificate(rich())
    stated["values"]["t"]["hi"][0] -= 1
    stated["lanes"]["p:sum"]["lo"] += 1
    del stated["accumulators"]["r"]
    faults = faults_of(rich(), stated)
    assert [fault.split(": ")[0] for fault in faults] == ["values 't'", "lanes 'p:sum'", "accumulators 'r'"]


# Bounds by linear functions


@pytest.mark.parametrize("name", AFFINE_TEXTS)
def test_a_program_that_rests_on_affine_forms_is_certified(name: str, tmp_path: Path) -> None:
    graph = affine(name)
    assert any(false_claims(graph, prove(graph)))
    program.Program(graph).save(tmp_path / "build")
    assert _held(tmp_path / "build")
    rules = {
        entry["rule"]
        for part in ("values", "accumulators", "lanes")
        for entry in _stated(tmp_path / "build")[part].values()
    }
    assert "affine" in rules
    assert faults_of(graph, certificate(graph))  # by intervals alone the text does not hold


def _affine_numbers() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in AFFINE_TEXTS:
        stated = certificate(affine(name), prove(affine(name), Method.AFFINE))
        for path in numbers(stated):
            if stated[path[0]][path[1]]["rule"] == "affine" and path[2] != "step":
                yield name, path


@pytest.mark.parametrize(("name", "path"), list(_affine_numbers()), ids=str)
@pytest.mark.parametrize("by", [1, 2, 3])
def test_an_affine_bound_that_some_input_refutes_is_refused(name: str, path: tuple[Any, ...], by: int) -> None:
    graph = affine(name)
    tampered = changed(
        certificate(graph, prove(graph, Method.AFFINE)), path, lambda n: n + by if path[2] == "lo" else n - by
    )
    if path[0] == "accumulators":
        entry = tampered[path[0]][path[1]]
        lo, hi = min(entry["lo"]), max(entry["hi"])
        entry |= {"partial": [lo, hi], "bits": max(hi, ~lo).bit_length() + 1}
    try:
        check_soundness(graph, every_input(graph), proof_of(graph, tampered))
    except (Unsound, QirError):  # or no interval at all
        assert faults_of(graph, tampered)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry | {"inputs": ["nothing"]},
        lambda entry: entry | {"inputs": "x"},
        lambda entry: entry | {"inputs": [1]},
        lambda entry: entry | {"inputs": ["y"]},
        lambda entry: entry | {"inputs": ["x", "s"]},  # s is related to x, which is then not seen
        lambda entry: entry | {"rule": "sub", "inputs": ["t", "s"]},
        lambda entry: entry | {"rule": "type", "inputs": []},
        lambda entry: entry | {"witness": 1},
        lambda entry: {k: v for k, v in entry.items() if k != "inputs"},
    ],
)
def test_an_affine_claim_names_what_it_follows_from(change: Callable[[Any], Any]) -> None:
    graph = affine("mean")
    stated = certificate(graph, prove(graph, Method.AFFINE))
    assert stated["values"]["y"]["rule"] == "affine"
    assert stated["values"]["y"]["inputs"] == ["x"]
    assert faults_of(graph, changed(stated, ("values", "y"), change))


# Changes of the text and the weights, with hashes made right


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"in \[-\d+, (\d+)\] partial", r"in [0, \1] partial"),
        (r"partial in \[-\d+,", "partial in [-9,"),
        (r"overflow=saturate", "overflow=none"),
        (r"zero=-3> in", "zero=-4> in"),
        (r"order=khwc", "order=ckhw"),
        (r"pads=\[1, 1, 1, 1\]", "pads=[2, 2, 0, 0]"),
        (r"shift=s64 \[-7\]", "shift=s64 [-6]"),
        (r"multiplier=s64 \[1073741824\]", "multiplier=s64 [1073741825]"),
        (r"form=double_round", "form=neon"),
        (r"s32 4 \[-?\d+,", "s32 4 [9999,"),
        (r"x s8<0.05, zero=-3> in \[-128, 127\]", "x s8[-127, 127]<0.05, zero=-3> in [-127, 127]"),
        (r"in \[-128, 127\]", "in [-128, 126]"),
    ],
)
def test_text_that_is_changed_is_held_to_what_is_certified(old: str, new: str, build: Path) -> None:
    """Where a claim becomes false the change is refused; where all stay as they are it may stand."""
    text = (build / "graph.qir").read_text()
    edited, count = re.subn(old, new, text, count=1)
    assert count == 1
    assert edited != text
    (build / "graph.qir").write_text(edited)
    assert any("its graph_sha256 is" in fault for fault in _faults(build))
    _forge(build, _stated(build))
    graph, stated = read_graph(build / "graph.qir"), _stated(build)
    fresh = certificate(graph)
    holds = all(fresh[part] == stated[part] for part in ("values", "accumulators", "lanes"))
    assert bool(_faults(build)) == (not holds or any(false_claims(graph, prove(graph))))


def _faults(build: Path) -> list[str]:
    """What the checker alone says of the files as they are."""
    graph, text = read_graph(build / "graph.qir"), (build / "certificate.json").read_text()
    hashes = [hashlib.sha256((build / name).read_bytes()).hexdigest() for name in ("graph.qir", "weights.safetensors")]
    return check_certificate(graph, text, graph_sha256=hashes[0], weights_sha256=hashes[1])


def test_one_weight_that_breaks_a_bound_is_refused_with_all_hashes_made_right(build: Path) -> None:
    arrays = load_file(build / "weights.safetensors")
    name = next(n for n in sorted(arrays) if arrays[n].dtype == np.int8)
    old = Array(arrays[name].copy()).sha256
    weights = arrays[name].copy()
    at = np.unravel_index(int(np.abs(weights.astype(int)).argmin()), weights.shape)
    weights[at] = 127 if weights[at] <= 0 else -127
    save_file(arrays | {name: weights}, build / "weights.safetensors")
    with pytest.raises(QirError, match="hash"):
        read_graph(build / "graph.qir")
    text = (build / "graph.qir").read_text()
    assert text.count(old) == 1
    (build / "graph.qir").write_text(text.replace(old, Array(weights).sha256))
    _forge(build, _stated(build))
    faults = _faults(build)
    assert any("accumulators 'acc0': states" in fault for fault in faults)
    with pytest.raises(VerifyError, match="acc0"):
        qir.load(build)


def test_a_program_whose_facts_do_not_hold_is_refused_before_a_kernel_is_bound(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*_: object, **__: object) -> None:
        raise AssertionError("a kernel is bound")

    monkeypatch.setattr(program, "own_kernels", bind)
    monkeypatch.setattr(program, "lay_out", bind)
    with pytest.raises(AssertionError, match="a kernel is bound"):
        qir.load(build)
    text = (build / "graph.qir").read_text()
    (build / "graph.qir").write_text(re.sub(r"partial in \[-\d+,", "partial in [-9,", text, count=1))
    with pytest.raises(VerifyError, match="states partial sums in"):
        qir.load(build)


def test_a_wrong_rule_of_the_prover_does_not_pass_the_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Requantize.bounds

    def wrong(op: Requantize, operands: Sequence[Bounds]) -> OpBounds:
        found = right(op, operands)
        return replace(found, results=(found.results[0].clamp(-100, 100),))

    monkeypatch.setattr(Requantize, "bounds", wrong)
    graph = small_net()
    program.Program(graph).save(tmp_path / "build")  # it believes itself
    with pytest.raises(CertificateError, match=r"values 'scaled0': states \[-100, 100\]") as raised:
        hold_to_certificate(graph, tmp_path / "build" / "graph.qir")
    assert str(raised.value).count("\n") == 2  # the rule is wrong of two values, and of nothing else


# On the command line


def _check(build: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of `qir check`."""
    assert main(["check", str(build)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_check_needs_a_certificate(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(build)]) == 0
    assert re.search(r"certificate +\d+ claims, all hold\n", capsys.readouterr().out)
    (build / "certificate.json").unlink()
    error = _check(build, capsys)
    assert re.fullmatch(
        r"qir: cannot read .*certificate\.json: No such file or directory; compile the model again\n", error
    )


def test_check_lists_every_fault(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = _stated(build)
    for name in ("acc0:product", "acc1:product"):
        stated["lanes"][name]["hi"] -= 1
    _forge(build, stated)
    error = _check(build, capsys)
    assert "certificate.json: does not certify graph.qir, 2 finding(s):\n" in error
    assert error.count("\n  lanes 'acc") == 2


def test_check_refuses_files_that_do_not_belong_together(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = _stated(build)
    (build / "certificate.json").write_text(json.dumps(stated | {"weights_sha256": HASH}))
    assert "certificate: its weights_sha256 is 000" in _check(build, capsys)
    (build / "certificate.json").write_bytes(b"\xff")
    assert "it is not UTF-8 text; compile the model again" in _check(build, capsys)


def test_load_proves_anew_and_needs_no_certificate(build: Path) -> None:
    (build / "certificate.json").unlink()
    assert qir.load(build).graph == NET


def test_a_register_of_products_holds_the_0_of_padding() -> None:
    """Where products are narrowed one by one, what padding adds is one of them."""
    graph = qir.parse("""
        graph @g stage=fixed (%x: Nx1x1x1 x s8[3, 17]) {
          %w = const {value=s8 1x1x1x1 [127]} : 1x1x1x1 x s8
          %y = conv2d %x, %w {accumulator=s32, overflow=wrap, order=khwc, product=s16, product_overflow=saturate,
            pads=[0, 0, 0, 1], strides=[1, 1], dilations=[1, 1], groups=1} : Nx1x2x1 x s32
          return %y
        }""")
    stated = certificate(graph)
    assert (stated["lanes"]["y:entering"]["lo"], stated["lanes"]["y:entering"]["hi"]) == (0, 17 * 127)
    assert faults_of(graph, stated) == []
    (fault,) = faults_of(graph, changed(stated, ("lanes", "y:entering", "lo"), lambda n: n + 1))
    assert fault.startswith("lanes 'y:entering': states [1, 2159], which does not hold")
