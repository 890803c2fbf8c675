"""The backends of qir: a target file each and, only where a chip needs them, kernels, a cost model and exporters."""

if __name__ != "qir.backends":
    raise ImportError(
        f"the folder 'backends' was imported as {__name__!r}; "
        "import it as 'qir.backends', the name under which it installs"
    )
