"""What the demonstration reads and asks."""

from __future__ import annotations

from importlib import resources

__all__ = ["FIRST_QUESTION", "QUESTIONS", "handbook"]

FIRST_QUESTION = "What is this text about?"
"""Asked once to fill the cache; not measured."""

QUESTIONS = (
    "What was the highest water ever measured here, and when?",
    "How many guests does the Cottage take at a time?",
    "When is a storm warning given?",
)


def handbook() -> str:
    """Return the document that the questions are about."""
    return resources.files("kvstrata.demo").joinpath("document.md").read_text("utf-8")
