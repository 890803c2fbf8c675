"""The command line. Input that does not fit is one message on standard error and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import qir
from qir.backend import find_backends, load_backend
from qir.cli_input import SAMPLES, add_input_options, read_calibration, read_model
from qir.cli_widths import add_width_commands, add_work_options, workers
from qir.cost import graph_cost
from qir.cost_report import cost_json, cost_text, draw_cost, parts_text
from qir.drawing import drawing_of
from qir.errors import QirError, TargetError
from qir.feeds import join_samples, read_npz, split_samples, write_npz
from qir.ir import Stage
from qir.pass_manager import Dump, Feeds, Instrument, PassContext, Progress, Timing
from qir.report import constant_bytes, fields_text, pass_table, progress_bar, size_text
from qir.serialization import whole_folder, write_bytes, write_graph
from qir.verifier import find_faults

_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells report it
_BROKEN_PIPE = 141  # the same for SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for input that does not fit, 130 when interrupted.

    Raises SystemExit where argparse does: for `--help`, `--version` and (status 2) malformed command lines.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except QirError as fault:
        print(f"qir: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone; keep Python's own flush at exit quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qir", description="Compile float ONNX models into proved, bit-exact integer programs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qir {qir.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(command=command)
        return made

    demo = add("demo", _demo, "Compile the model that ships with qir, pass by pass, and measure it. Needs no network.")
    demo.add_argument(
        "-o", "--output", default="qir-demo", metavar="DIR", help="folder to write (default: %(default)s)"
    )

    make = add("compile", _compile, "Compile an ONNX model, or a float graph in text form, into a program.")
    make.add_argument("model", help="an .onnx file, or a .qir text at stage float")
    make.add_argument("--target", required=True, metavar="NAME", help="name of a target, or path of its .toml file")
    make.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write the program to")
    make.add_argument(
        "--passes", metavar="STR", help='pipeline to run, such as "a,b{option=1}" (default: the full one)'
    )
    make.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="PATTERN:BITS",
        help="widths for ops whose results or locations match: fc*:8, fc*:w4 for weights alone, fc*:w4/power_of_two "
        "and fc*:w4/codebook for formats of weights, fc*:a16 for results; repeatable, the last match counts",
    )
    make.add_argument("--dump-ir", metavar="DIR", help="folder to write the graph to after every pass")
    add_work_options(make)
    add_input_options(make)

    opt = add("opt", _opt, "Run passes on a graph: text in, text out.")
    opt.add_argument("graph", help="a .qir text, or an .onnx file")
    opt.add_argument("--passes", required=True, metavar="STR", help='passes to run; "" only reads and verifies')
    opt.add_argument("--target", metavar="NAME", help="name of a target, or path of its .toml file")
    opt.add_argument("-o", "--output", metavar="FILE", help="write text and sidecar of large constants here")
    add_input_options(opt)

    run = add("run", _run, "Run a compiled program on samples.")
    run.add_argument("program", help="folder of the program")
    run.add_argument("--inputs", required=True, metavar="FILE", help=f".npz file: {SAMPLES}")
    run.add_argument("-o", "--output", required=True, metavar="FILE", help=".npz file to write the outputs to")
    run.add_argument("--integer", action="store_true", help="write the raw integers instead of the reals")

    compare = add("compare", _compare, "Show where a model differs from target to target, and by which rule.")
    compare.add_argument("model", help="an .onnx file, or a .qir text at stage float")
    compare.add_argument(
        "--targets",
        required=True,
        metavar="A,B,...",
        help="names of targets, or paths of .toml files, apart by commas; the others are compared with the first",
    )
    compare.add_argument("--inputs", metavar="FILE", help="samples to compare on (default: those of the calibration)")
    compare.add_argument(
        "--samples", type=int, default=64, metavar="N", help="how many of them, the first ones (default: %(default)s)"
    )
    compare.add_argument("-o", "--output", metavar="FILE", help="write all numbers here too, as JSON")
    add_input_options(compare)

    plan = add("plan", _plan, "Show the buffers and the kernels chosen on this host.")
    plan.add_argument("program", help="folder of the program")

    cost = add("cost", _cost, "Estimate what a program costs on its chip, layer by layer, and what bounds it.")
    cost.add_argument("program", help="folder of the program, or a .qir text whose values have widths")
    cost.add_argument(
        "--target", metavar="NAME", help="whose costs: name of a target, or path of its .toml file (default: its own)"
    )
    cost.add_argument("-o", "--output", metavar="FILE", help="write all numbers here too, as JSON")
    cost.add_argument("--plot", metavar="FILE", help="draw the layers: an .svg or .png file; needs matplotlib")

    add_width_commands(add)

    targets = add("targets", _targets, "List the targets, or print the contract of one.")
    targets.add_argument("name", nargs="?", help="name of a target, or path of its .toml file")
    targets.add_argument(
        "--check", action="store_true", help="hold the target's kernels to vectors that are made from its contract"
    )

    check = add("check", _check, "Verify and prove again what was compiled, and show what overflows.")
    check.add_argument("program", help="folder of the program, or a .qir text")
    check.add_argument(
        "--counterexamples",
        metavar="FILE",
        help=".npz file to write the inputs to that bring the sums of each layer to the ends of what is proved",
    )
    return parser


def _override(text: str) -> tuple[str, str]:
    pattern, _, bits = text.rpartition(":")
    if not pattern or not bits:
        raise argparse.ArgumentTypeError(f"expected PATTERN:BITS such as fc*:8 or fc*:w4, found {text!r}")
    return pattern, bits


def _demo(arguments: argparse.Namespace) -> None:
    from qir.demo import run_demo

    with progress_bar() as progress:
        run_demo(Path(arguments.output), print, progress)


def _compile(arguments: argparse.Namespace) -> None:
    graph = read_model(arguments.model, arguments.shape)
    calibration: Iterable[Feeds] | None = read_calibration(arguments.calibration, graph)
    timing, output = Timing(), Path(arguments.output)
    if arguments.dump_ir:
        _need_apart(output, Path(arguments.dump_ir))
    with contextlib.ExitStack() as stack:
        # Both folders are opened first, so that a place that cannot be written costs no compilation.
        folder = stack.enter_context(whole_folder(output))
        instruments: list[Instrument] = [timing]
        if arguments.dump_ir:
            dumps = stack.enter_context(whole_folder(Path(arguments.dump_ir)))
            write_graph(graph, dumps / "00_import.qir")
            instruments.append(Dump(dumps))
        progress = stack.enter_context(progress_bar())
        executor = stack.enter_context(workers(arguments))
        program = qir.compile(
            graph,
            arguments.target,
            calibration,
            pipeline=arguments.passes,
            overrides=dict(arguments.override),
            instruments=instruments,
            progress=progress,
            executor=executor,
            cache=arguments.cache,
        )
        program.save(folder)
    print(pass_table(timing.records))
    fields = [
        ("weights", f"{size_text(constant_bytes(graph))} became {size_text(program.weight_bytes())}"),
        ("work", f"{program.macs():,} multiply-accumulates a sample"),
        ("program", str(output)),
    ]
    if arguments.dump_ir:
        fields.append(("IR dumps", arguments.dump_ir))
    fields += [("warning", f"{d.place}: {d.message}") for record in timing.records for d in record.diagnostics]
    print(f"\n{fields_text(fields)}")


def _need_apart(output: Path, dumps: Path) -> None:
    """Each folder is replaced as a whole, so that neither may lie in the other. Raises QirError when one does."""
    ours, theirs = output.resolve(), dumps.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise QirError(f"--output {output} and --dump-ir {dumps} lie in each other; give folders side by side")


def _opt(arguments: argparse.Namespace) -> None:
    graph = read_model(arguments.graph, arguments.shape)
    pipeline = qir.parse_pipeline(arguments.passes)
    target = qir.load_target(arguments.target) if arguments.target else None
    faults = find_faults(graph, claims=not pipeline)
    if faults:
        raise qir.VerifyError(faults, graph.name)
    context = PassContext(target, read_calibration(arguments.calibration, graph))
    with progress_bar() as context.progress:
        graph = pipeline.run(graph, context)
    for found in context.diagnostics:
        print(f"qir: {found}", file=sys.stderr)
    if arguments.output:
        write_graph(graph, arguments.output)
    else:
        print(graph, end="")


def _run(arguments: argparse.Namespace) -> None:
    program = qir.load(arguments.program)
    feeds = split_samples(program.graph.inputs, read_npz(arguments.inputs))
    run = program.run_integer if arguments.integer else program.run
    with progress_bar() as progress:
        results = (run(feed) for feed in _watched(feeds, "run", progress))
        write_npz(arguments.output, join_samples(program.graph, results))


def _watched(feeds: Sequence[Mapping[str, Any]], name: str, progress: Progress) -> Iterator[Mapping[str, Any]]:
    for place, feed in enumerate(feeds):
        yield feed
        progress(name, place + 1, len(feeds))


def _compare(arguments: argparse.Namespace) -> None:
    graph = read_model(arguments.model, arguments.shape)
    calibration = read_calibration(arguments.calibration, graph)
    inputs = split_samples(graph.inputs, read_npz(arguments.inputs)) if arguments.inputs else None
    targets = [name.strip() for name in arguments.targets.split(",")]
    with progress_bar() as progress:
        found = qir.compare(graph, targets, calibration, inputs, samples=arguments.samples, progress=progress)
    if arguments.output:
        write_bytes(Path(arguments.output), found.to_json().encode())
    print(found)


def _plan(arguments: argparse.Namespace) -> None:
    print(qir.load(arguments.program).plan())


def _text_of(program: str | Path) -> Path:
    """The .qir text of a compiled program, or the path itself where it is no folder."""
    path = Path(program)
    return path / "graph.qir" if path.is_dir() else path


def _cost(arguments: argparse.Namespace) -> None:
    kind = drawing_of(arguments.plot)
    graph = qir.read_graph(_text_of(arguments.program))
    name = arguments.target or graph.target
    if not name:
        raise QirError(f"graph @{graph.name} names no target; give the one whose costs are meant by --target")
    try:
        backend = load_backend(name)
    except TargetError as fault:
        raise TargetError(f"{fault}, by --target" if not arguments.target else str(fault)) from fault
    target = backend.target()
    if backend.cost is not None:
        parts = backend.cost(graph, target)
        if kind:
            raise QirError(f"the cost function of {name} gives no layers to draw; leave out --plot")
        text = parts_text(parts)
        data = json.dumps({"graph": graph.name, "target": name, "parts": dict(parts)}, indent=2)
    else:
        found = graph_cost(graph, target)
        text, data = cost_text(found), cost_json(found)
        if kind:
            write_bytes(Path(arguments.plot), draw_cost(found, kind))
    if arguments.output:
        write_bytes(Path(arguments.output), data.encode())
    print(text)


def _targets(arguments: argparse.Namespace) -> None:
    if arguments.check:
        if not arguments.name:
            raise QirError("--check is of one target; name it, or give the path of its .toml file")
        from qir.testing import check_backend

        with progress_bar() as progress:
            report = check_backend(arguments.name, progress=progress)
        print(report)
    elif arguments.name:
        print(qir.load_target(arguments.name), end="")
    else:
        print(fields_text([(name, qir.load_target(name).description) for name in find_backends()]))


def _check(arguments: argparse.Namespace) -> None:
    from qir.certificate import hold_to_certificate
    from qir.check import check_graph

    path = Path(arguments.program)
    graph = qir.read_graph(_text_of(path))
    if arguments.counterexamples and graph.stage is not Stage.FIXED:
        raise QirError(f"--counterexamples is for stage fixed; graph @{graph.name} is at stage {graph.stage}")
    claims = hold_to_certificate(graph, path / "graph.qir") if path.is_dir() and graph.stage is Stage.FIXED else 0
    with progress_bar() as progress:
        report = check_graph(graph, progress, claims)
    if arguments.counterexamples:
        write_npz(arguments.counterexamples, report.inputs())
    print(report)
