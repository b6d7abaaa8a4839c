"""Policies put together: the options of each and what they build, in files by how the decision is made."""
