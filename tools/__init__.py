"""The command line, one file a verb, imported when called."""

if __name__ != "hasten.tools":
    raise ImportError("import hasten.tools, not tools: a module under two names is two modules")
