"""Errors that a user can mend, told from bugs. A library, for every file here."""

import errno

# Errors of the machine that a user can mend, as against a bug of ours, which keeps its traceback.
_USER_ERRNOS = {getattr(errno, name) for name in (
    "EACCES EPERM EROFS ENOSPC EDQUOT EISDIR ENOTDIR ENAMETOOLONG EFBIG EIO EBUSY ELOOP ENXIO "
    "ENODEV ESTALE ENOTCONN ETIMEDOUT").split() if hasattr(errno, name)}


class UserError(Exception):
    """Something that the user can mend. `run` prints it as one line and exits with `status`."""

    status = 2


class Stopped(UserError):
    """The work ended early although the input was fine (diverged, interrupted)."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def require(condition: object, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def describe(error: OSError) -> str:
    """File and cause of an error of the file system."""
    return (f"{error.filename}: " if error.filename else "") + str(error.strerror or error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the user can mend it: a full disk, missing rights, a broken device."""
    return isinstance(error, OSError) and error.errno in _USER_ERRNOS
