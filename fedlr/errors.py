"""The errors an operator must act on, each with its exit code.

A ``ValueError`` raised at the point of use is a programming error; everything
a *user* can cause is a `FedlrError`, whose message is a complete sentence: the
argument, its value, the bound, and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence


class FedlrError(Exception):
    """Base of every error that is shown to a user without a traceback.

    Attributes:
        exit_code: Process exit status of the command line for this error.
    """

    exit_code: int = 1


class ConfigError(FedlrError):
    """The configuration is wrong; carries *all* problems found, not the first.

    Attributes:
        problems: One sentence per problem, in the order of the configuration.

    Example:
        >>> str(ConfigError(["privacy.epsilon = -1 must be > 0; raise it."]))
        'privacy.epsilon = -1 must be > 0; raise it.'
    """

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            message = f"{len(self.problems)} problems in the configuration:\n{listed}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        """Say how to make it again in another process: from the problems, not from the text."""
        return type(self), (self.problems,)


class DataError(FedlrError):
    """A data set is missing, unreadable, or does not fit its declaration."""

    exit_code = 3


class ModelError(FedlrError):
    """A base model is missing, unsafe, altered, or lacks the named modules."""

    exit_code = 4


class BudgetExceeded(FedlrError):
    """The planned events would take a site over its privacy budget."""

    exit_code = 5


class LedgerError(FedlrError):
    """The ledger refuses: wrong state, unknown event, damaged or newer file."""

    exit_code = 6


class LedgerMoved(LedgerError):
    """Something was booked since the caller looked; its budget has to be computed again."""


class LedgerCorrupt(LedgerError):
    """The ledger file is damaged; nothing may be released until it is repaired."""


class RunError(FedlrError):
    """The run cannot start or go on: output folder, cohort, or engine."""

    exit_code = 7


class EndedEarly(FedlrError):
    """A run ended before its last round, and has a result: whoever waits for it must know both."""

    exit_code = 12


class DoctorError(FedlrError):
    """What privacy rests on does not hold on this machine: nothing private may run here."""

    exit_code = 10


class OrderRefused(FedlrError):
    """A run asks a site for something that its operator has not allowed.

    Attributes:
        code: What the server is told, one of `OrderRefused.CODES`; the message is for the
            operator alone.
    """

    exit_code = 11
    CODES = ("unsigned", "expired", "replayed", "unapproved", "policy")

    def __init__(self, code: str, message: str) -> None:
        if code not in self.CODES:
            raise ValueError(f"code = {code!r} must be one of {self.CODES}")
        self.code = code
        super().__init__(message)

    def __reduce__(self) -> tuple[type[OrderRefused], tuple[str, str]]:
        """Say how to make it again in another process."""
        return type(self), (self.code, str(self))


class BadUpdate(FedlrError):
    """An update from a site fails the server's checks and is not aggregated.

    Attributes:
        code: Machine-readable reason, one of `BadUpdate.CODES`.
    """

    exit_code = 8
    CODES = ("names", "shape", "dtype", "not_finite", "norm", "schema")

    def __init__(self, code: str, message: str) -> None:
        if code not in self.CODES:
            raise ValueError(f"code = {code!r} must be one of {self.CODES}")
        self.code = code
        super().__init__(message)

    def __reduce__(self) -> tuple[type[BadUpdate], tuple[str, str]]:
        """Say how to make it again in another process."""
        return type(self), (self.code, str(self))
