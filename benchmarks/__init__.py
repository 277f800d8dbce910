"""Benchmarks and the public data they and the tests run on; not part of the distribution."""
