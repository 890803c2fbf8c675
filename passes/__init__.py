"""The passes of qir, one file each; ``qir.passes.pipelines`` strings them together."""

if __name__ != "qir.passes":
    raise ImportError(
        f"the folder 'passes' was imported as {__name__!r}; import it as 'qir.passes', the name under which it installs"
    )
