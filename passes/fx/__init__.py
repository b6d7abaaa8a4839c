"""FX graphs."""
