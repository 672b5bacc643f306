"""GPU kernels in Triton. Installed as ``fastseq.kernels``; nothing here imports the rest of fastseq."""

if __name__ != "fastseq.kernels":
    raise ImportError(
        f"these kernels were imported as {__name__!r}; they are the package 'fastseq.kernels': install fastseq "
        "(pip install -e .) and import that instead. Another package has that name too: for that one start "
        "Python outside of fastseq's source folder."
    )
