"""Tests of llmtune.tracking."""
