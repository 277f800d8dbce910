"""Errors a user can act on, each with the exit code the command line gives it."""


class GenstreamError(Exception):
    """Any error with a message for the user: what is wrong, where, and what to do.

    `exit_code` is what the command line exits with (70 marks a bug in genstream itself).
    """

    exit_code = 70


class RefusedError(GenstreamError):
    """All was done, but for batches that were refused or candidates of a sweep that failed."""

    exit_code = 1


class ConfigError(GenstreamError, ValueError):
    """A configuration or an argument is wrong."""

    exit_code = 2


class DataError(GenstreamError, ValueError):
    """The data cannot be used as they are: names the file, column or row."""

    exit_code = 3


class ConflictError(GenstreamError):
    """Another writer committed first, more often than the retries allow."""

    exit_code = 4


class ComputeError(GenstreamError):
    """Computation was lost: a worker, a cluster, or a fit that became non-finite."""

    exit_code = 5


class StorageError(GenstreamError):
    """Storage cannot be read or written: permissions, a full disk, a missing folder."""

    exit_code = 6


class CorruptError(GenstreamError):
    """Stored bytes are not the bytes that were committed."""

    exit_code = 7
