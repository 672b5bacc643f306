"""AUTO by measurement: what ``python -m fastseq calibrate`` measures on this machine, and how AUTO uses it.

``calls``, ``file`` and ``chosen`` are read by AUTO: a call's description, the file, and the decisions made from it.
``grid``, ``measure``, ``session`` and ``command`` write it.
"""
