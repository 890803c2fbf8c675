"""Importers: the only code that knows a source format. Import `qir.frontend.onnx_import` for ONNX."""
