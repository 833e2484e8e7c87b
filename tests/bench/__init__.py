"""Benchmarks against the peers: ``tools/bench``, or ``python -m tests.bench``. Not collected by
pytest: nothing in the suite depends on time.
"""
