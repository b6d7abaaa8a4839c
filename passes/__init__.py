"""Everything that changes a graph, and the data that drives it."""

if __name__ != "hasten.passes":
    raise ImportError("import hasten.passes, not passes: a module under two names is two modules")
