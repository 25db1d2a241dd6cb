"""Runs on the disk. `summary`, `curves`, `models` and `folders` read many of them as pandas tables,
`over_seeds` pools repetitions."""


def __getattr__(name):  # pandas is imported only when it is asked for
    if name in ("summary", "curves", "models", "folders", "over_seeds", "SAME"):
        from distill.runs import tables

        return getattr(tables, name)
    raise AttributeError(f"module 'distill.runs' has no attribute '{name}'")
