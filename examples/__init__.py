"""The demo, and a training loop to copy: ``python -m examples.demo``, ``python -m examples.train``."""
