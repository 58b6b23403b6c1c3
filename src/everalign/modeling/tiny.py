"""The tiny assistant: a small chat model that comes with the package, for the demo and the tests."""

from pathlib import Path


def tiny_assistant_path() -> Path:
    """The embedded assistant's folder, a Hugging Face model (built by `scripts/build_tiny_assistant.py`)."""
    return Path(__file__).resolve().parent / "tiny_assistant"
