"""A real model on every target that ships: compiled, verified, read back, run by kernels and by the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import compiled, labelled_images

import qir
from qir.backend import shipped_backends
from qir.interpreter import trace
from qir.pass_manager import integer_feeds
from qir.verifier import verify

_FLOAT_ACCURACY = 0.9145  # of fm_cnn, by benchmarks/accuracy.py


@pytest.mark.parametrize("target", shipped_backends())
def test_fm_cnn_compiles_verifies_and_runs(target: str, tmp_path: Path) -> None:
    program = compiled("fm_cnn", target).program
    verify(program.graph)
    assert program.graph.target == target
    x, labels = labelled_images()
    feeds = integer_feeds(program.graph, {"x": x[:16]})
    expected, found = trace(program.graph, feeds), program.trace(feeds)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    program.save(tmp_path / "build")
    again = qir.load(tmp_path / "build")
    assert again.graph == program.graph
    logits = again.run({"x": x[:2000]})["logits"]
    assert not [step.kernel for step in program.plan().steps if step.kernel == "interpreter"]
    assert np.mean(logits.argmax(axis=1) == labels[:2000]) > _FLOAT_ACCURACY - 0.02
