"""Rules: declarations only, one computation a file."""
