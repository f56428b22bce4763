"""Suites of questions about images: one small file a suite, answered by one runner (docs/vision.md)."""
