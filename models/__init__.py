"""What must be told about a model family: data, no patching."""

if __name__ != "hasten.models":
    raise ImportError("import hasten.models, not models: a module under two names is two modules")
