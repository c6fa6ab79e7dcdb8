"""Embedding-to-Prefix (E2P, arXiv 2505.17051): one soft token per user in front of a frozen LLM."""

__version__ = "0.1.0"
