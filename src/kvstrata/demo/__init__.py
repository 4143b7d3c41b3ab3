"""The demonstration: a real model answers questions about one long document, with and without the cache.

Nothing here imports torch; only the worker processes do.
"""

from kvstrata.demo.runner import DemoFailed, Outcome, Row, run

__all__ = ["DemoFailed", "Outcome", "Row", "run"]
