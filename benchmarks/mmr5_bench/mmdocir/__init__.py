"""MMDocIR page reranking as its authors measure it, on data the user has downloaded.

``annotations`` and ``pages`` read the data, ``candidates`` freezes a first stage, ``run`` reranks
every question and keeps each in a ``journal``, ``metrics`` and ``bootstrap`` score orders, and
``summary`` puts the figures of one run, or of two on the same lists, together.
"""
