"""What a user can cause, one class per exit code (documented in docs/cli.md). A message names the thing and the
remedy."""

from __future__ import annotations


class QuestError(ValueError):
    """Shown as one to four lines without a traceback; the process ends with `exit_code`."""

    exit_code = 1


class UsageError(QuestError):
    """A wrong option, key, type, range or combination."""

    exit_code = 2


class DataError(QuestError):
    """Input data or model files that cannot be used; the message names file and line."""

    exit_code = 3


class GuardStop(QuestError):
    """A training guard stopped the run (too many non-finite steps, a run that cannot learn)."""

    exit_code = 4


class ResourceError(QuestError):
    """Out of memory or disk."""

    exit_code = 5


class MissingError(QuestError):
    """An optional package, a network or a device that is not there."""

    exit_code = 6


class BusyError(QuestError):
    """The run folder is in use by another process, or belongs to another run."""

    exit_code = 7
