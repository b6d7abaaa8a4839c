"""Fused operators, one folder each."""
