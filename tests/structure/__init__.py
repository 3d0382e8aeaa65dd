"""Tests of the structure engine."""
