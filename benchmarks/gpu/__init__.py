"""Checks and measurements on a GPU in one command: ``python -m benchmarks.gpu --help``.

points: what is timed. worker: times points in a separate process. supervise: restarts such
processes. checks: GPU tests and compute-sanitizer. smoke: the calls under compute-sanitizer.
summary: tables.
"""
