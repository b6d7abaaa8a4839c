"""From a rewritten graph to something that runs."""

if __name__ != "hasten.backends":
    raise ImportError("import hasten.backends, not backends: a module under two names is two modules")
