"""What the command line shows: tables of passes, sizes, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator, Sequence

from qir.ir import Graph
from qir.ops.constant import Const
from qir.pass_manager import PassRecord, Progress, no_progress

_NOTES_WIDTH = 72
_TEXT_WIDTH = 100


def pass_table(records: Sequence[PassRecord]) -> str:
    """One line a pass: its name, the stage behind it, its time and what it changed."""
    names = [r.name for r in records]
    width = max(map(len, [*names, "pass"]))
    lines = [f"{'pass':{width}}  {'stage':6}  {'time':>9}  what it changed"]
    for record in records:
        head = f"{record.name:{width}}  {record.after.stage:6}  {record.seconds * 1000:6.0f} ms  "
        notes = "; ".join(record.notes) or ("rewritten" if record.after is not record.before else "nothing")
        wrapped = textwrap.wrap(notes, _NOTES_WIDTH, break_long_words=False, break_on_hyphens=False)
        lines += [f"{head if not place else ' ' * len(head)}{text}" for place, text in enumerate(wrapped)]
    return "\n".join(lines)


def fields_text(fields: Sequence[tuple[str, str]]) -> str:
    """Names and what they hold, in two columns; long texts go on below."""
    width = max(len(name) for name, _ in fields)
    lines = []
    for name, text in fields:
        wrapped = textwrap.wrap(text, _TEXT_WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{'' if place else name:{width}}  {part}" for place, part in enumerate(wrapped)]
    return "\n".join(lines)


def constant_bytes(graph: Graph) -> int:
    """Bytes of all constants of a graph, as they are stored."""
    return sum(op.stored_bytes for op in graph.ops if isinstance(op, Const))


def size_text(count: int) -> str:
    """`37,422 bytes (36.5 KiB)`."""
    return f"{count:,} bytes ({count / 1024:.1f} KiB)"


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error while the block runs; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total or None)

        yield show
