"""All that is worth running on a GPU, in one command: ``python -m benchmarks.gpu --help``.

points: what is timed. worker: times it, in a process of its own. supervise: keeps such processes
going. checks: the GPU tests and compute-sanitizer. smoke: what runs under that. summary: tables.
"""
