"""The errors that a user can cause and mend."""


class UserError(Exception):
    """One clear line that says what is wrong and what to do; shown without a traceback, exit code 1."""


class UsageError(UserError):
    """The command line or the configuration is wrong; exit code 2."""


class OverBudget(UserError):
    """No file of one runtime is within a budget that only the file which ships has to keep; exit code 1 if none is."""


class DamagedError(UserError):
    """A file of ours isn't what was written: a checksum differs, or it is cut short; exit code 1."""


class UntrustedError(UserError):
    """What isn't the user's own names code that isn't this package's; exit code 1."""


class Pruned(UserError):
    """A search ends this trial: its validation accuracy is low beside that of others. No failure; exit code 0."""

    status = "pruned"  # in run.json
