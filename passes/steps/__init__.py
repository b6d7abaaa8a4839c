"""Step-cache policies: when a step computes, what it reuses otherwise. Pure functions of arrays; no torch."""
