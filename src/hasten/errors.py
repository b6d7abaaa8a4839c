"""The errors that a user can meet, each with the exit code that the command line gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class HastenError(Exception):
    """Something failed; the message is one sentence that says what was asked, what was found, where, and what to do."""

    exit_code = 1


class UsageError(HastenError, ValueError):
    """An option, a name or an input that cannot be meant."""

    exit_code = 2


class ExpectationError(HastenError):
    """A rule did not match as often as the caller expected."""

    exit_code = 3


class MissingPackageError(HastenError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""

    exit_code = 4


class VerificationError(HastenError):
    """A rewritten graph gives another result than the original one."""

    exit_code = 5


def need(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or raise `MissingPackageError` with the command that installs it.

    Only the absence of ``module`` itself is reported as such; an error inside it is the user's to see.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingPackageError(f"{module} is not installed: pip install 'hasten[{extra}]'") from missing


def nearest(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``choices``, or the empty string where none is close.

    >>> nearest("atention", ["attention", "gelu"])
    " Did you mean 'attention'?"
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
