"""Checked, paired measurements of fusedrnn against its peers: ``python -m benchmarks --help``.

cases: what is computed. peers: by whom. check: whether it is right. measure: how long it takes.
suite: the rows, each checked and then timed. report: tables, JSON, the README.
"""
