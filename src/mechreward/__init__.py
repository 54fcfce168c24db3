"""A training signal inside a language model: SAE features that go with correct reasoning, gated, rewarded per token."""

__version__ = "0.1.0"
