"""Checks and measurements on a GPU in three parts: ``python -m benchmarks.gpu --help``.

points: what is timed. sweep: plans against each other, and the fit of the planner's constants.
micro: the parts of a step alone, by the kernels of micro.cu. canaries: every kernel family, once.
worker: does all of these in a separate process. supervise: restarts such processes. process: what
they do first. checks: GPU tests, compute-sanitizer and ncu. smoke: the calls under these. summary:
tables.
"""
