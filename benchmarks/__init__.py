"""Benchmarks of the library against its alternatives, from the checkout: ``python -m benchmarks``.

A benchmark is a list of cases, a case a few ways ("sides") to do one piece of work. Every side is first compared with
an oracle. Only the sides that pass are timed, in turns within one process, so that a busy machine slows all of them.
"""
