"""The passes that ship with qir, those of plugins, and the default pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Final

from qir.errors import PassError
from qir.pass_manager import Pass, Pipeline
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.calibrate import Calibrate
from qir.passes.canonicalize import Canonicalize
from qir.passes.correct_bias import CorrectBias
from qir.passes.dead_code import EliminateDeadCode
from qir.passes.equalize_cross_layer import EqualizeCrossLayer
from qir.passes.fold_constants import FoldConstants
from qir.passes.fuse_activation import FuseActivation
from qir.passes.fuse_batch_norm import FuseBatchNorm
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.learn_rounding import LearnRounding
from qir.passes.legalize import Legalize
from qir.passes.minimize_accumulators import MinimizeAccumulators
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.search_weight_ranges import SearchWeightRanges
from qir.passes.select_q_formats import SelectQFormats

#: The entry point group by which installed packages offer passes; each point is a subclass of `Pass`.
GROUP: Final = "qir.passes"

PASSES: Final[tuple[type[Pass], ...]] = (
    FoldConstants,
    Canonicalize,
    FuseBatchNorm,
    FuseActivation,
    EliminateDeadCode,
    EqualizeCrossLayer,
    Calibrate,
    RangeAnalysis,
    AssignBitWidths,
    SelectQFormats,
    SearchWeightRanges,
    LearnRounding,
    CorrectBias,
    Legalize,
    InsertSaturation,
    MinimizeAccumulators,
)


def pass_registry() -> Mapping[str, type[Pass]]:
    """Every pass by name: those that ship with qir, then those of installed plugins.

    Raises PassError, which names the plugin, when one cannot be loaded, is no pass or takes a name.
    """
    found: dict[str, type[Pass]] = {kind.name: kind for kind in PASSES}
    for point in entry_points(group=GROUP):
        try:
            kind = point.load()
        except Exception as fault:
            raise PassError(f"pass plugin {point.name!r} ({point.value}) failed to load: {fault}") from fault
        if not (isinstance(kind, type) and issubclass(kind, Pass) and kind.name):
            raise PassError(f"pass plugin {point.name!r} ({point.value}) is no named subclass of qir.Pass")
        if kind.name in found:
            raise PassError(f"pass plugin {point.name!r} ({point.value}) claims the name {kind.name!r}, which is taken")
        found[kind.name] = kind
    return MappingProxyType(found)


def parse_pipeline(text: str) -> Pipeline:
    """The pipeline that a string names, `"range-analysis{method=interval},insert-saturation"`.

    Raises PassError for a malformed string and for an unknown pass or option.
    """
    return Pipeline.parse(text, pass_registry())


def pipeline_of(given: Pipeline | str | None) -> Pipeline:
    """The pipeline that is given, as such or as a string, or the default one."""
    if given is None:
        return default_pipeline()
    return parse_pipeline(given) if isinstance(given, str) else given


def default_pipeline() -> Pipeline:
    """From an imported float graph to a proved integer one.

    Canonicalizing comes before fusing: a HardSwish written out is found while its Add and Clip stand apart, and what
    became Mul or Add then fuses.
    """
    return Pipeline(
        [
            FoldConstants(),
            Canonicalize(),
            FuseBatchNorm(),
            FuseActivation(),
            EliminateDeadCode(),
            Calibrate(),
            RangeAnalysis(),
            AssignBitWidths(),
            SelectQFormats(),
            Legalize(),
            RangeAnalysis(),
            InsertSaturation(),
        ]
    )
