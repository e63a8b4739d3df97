"""Errors a user can fix. Commands print them as one line and exit with status 2 (69 where waiting may help);
anything else is a bug.

A message names the field (or file), the value, the rule it breaks, and what to do instead.
"""


class UserError(Exception):
    """Base of every error that the user, not the programmer, can put right."""


class ConfigError(UserError, ValueError):
    """A setting, a command-line argument, or a combination of them is not allowed."""


class DataError(UserError, ValueError):
    """A file the user gave holds something that cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or run folder is missing, damaged, locked, or does not fit the config."""


class UnavailableError(ConfigError, CheckpointError):
    """Nothing is wrong that time may not mend: a host that is late, a lock whose owner may be dead."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on: the loss is not finite, and skipping steps did not help."""
