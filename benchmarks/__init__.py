"""Checked, paired measurements of fusedrnn against its peers: ``python -m benchmarks --help``.

cases: the layers. peers: the implementations. check: correctness. measure: timing. suite: rows,
checked and timed. sweeps, training: the other parts. report, compact: files of runs. tables, pages,
plots: output. compare: changes since an earlier run. plans: docs/plans.md. transforms: torch.func's
transforms. gpu: the command for machines with a GPU.
"""
