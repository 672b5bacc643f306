"""GPU kernels in Triton. Installed as ``fastseq.kernels``; nothing here imports the rest of fastseq."""

if __name__ != "fastseq.kernels":
    raise ImportError(
        f"these kernels were imported as {__name__!r}; they are the package 'fastseq.kernels': install fastseq "
        "(pip install -e .) and import that instead. Another package is named 'kernels': if it was that one you wanted, "
        "start Python outside of fastseq's source folder."
    )
