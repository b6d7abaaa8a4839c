"""Solvers: float64 coefficient tables and one step function."""
