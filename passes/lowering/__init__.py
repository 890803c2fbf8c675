"""How legalize writes each float op as integer ops: one rule an op, listed in `qir.passes.lowering.rules`."""
