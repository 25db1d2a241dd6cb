"""Distill: from a big image classifier to a small measured mobile file."""

__version__ = "0.1.0"


def __getattr__(name):  # torch is imported only when work starts
    if name == "load_student":
        from distill.runs.student import load_student

        return load_student
    raise AttributeError(f"module 'distill' has no attribute '{name}'")
