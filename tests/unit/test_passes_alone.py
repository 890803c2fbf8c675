"""Each pass, run alone on the dump of the stage before it, gives the text that the whole pipeline gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qir.backend import load_target
from qir.frontend.onnx_import import import_onnx
from qir.pass_manager import Dump, PassContext, Pipeline, Verifier
from qir.passes.pipelines import default_pipeline, parse_pipeline
from qir.serialization import read_graph, write_graph

DATA = Path(__file__).parents[2] / "qir" / "data"


def test_each_pass_alone_gives_the_text_of_the_whole_pipeline(tmp_path: Path) -> None:
    feeds = [{"x": np.random.default_rng(seed).standard_normal((4, 1, 28, 28), np.float32)} for seed in range(2)]
    graph = import_onnx(DATA / "fm_mobile.onnx")
    write_graph(graph, tmp_path / "start.qir")
    pipeline = default_pipeline()
    target = load_target("arm-neon")
    context = PassContext(target=target, calibration=feeds)
    pipeline.run(graph, context, [Verifier(), Dump(tmp_path / "dumps")])
    dumps = sorted((tmp_path / "dumps").glob("*.qir"))
    assert [d.stem.split("_", 1)[1] for d in dumps] == [p.name for p in pipeline]
    before = tmp_path / "start.qir"
    for item, dump in zip(pipeline, dumps, strict=True):
        alone = parse_pipeline(str(Pipeline([item])))
        after = alone.run(read_graph(before), PassContext(target=target, calibration=feeds))
        again = tmp_path / "again" / dump.name
        again.parent.mkdir(exist_ok=True)
        write_graph(after, again)
        assert again.read_text() == dump.read_text(), item.name
        assert after == read_graph(dump)
        before = dump
