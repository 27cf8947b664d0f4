"""Faults at the worst moment, tried at random; ``python -m tests.faults`` counts what was tried and what survived."""
