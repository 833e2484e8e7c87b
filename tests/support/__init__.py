"""Helpers of the tests: a real S3 server, writers of small stores, a proxy that injects faults."""
