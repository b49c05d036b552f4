"""One exception tree and the exit codes: every error says what (with the numbers) and what to type next.

    QwenrunError            1  something failed while running
    +-- UsageError          2  an option, a message or a recipe is not valid
    +-- ModelError          3  a model is missing, corrupt, or not one we know
    +-- DoesNotFitError     4  the plan does not fit the budget
    (interrupt)           130  Ctrl-C

Errors of the quant floor (`qwenrun.quant.errors`) carry the same two texts and are given a code here.
Knows nothing of how an error is printed: `cli` does that.
"""

from __future__ import annotations

from qwenrun.quant import errors as quant_errors

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_MODEL = 3
EXIT_NO_FIT = 4
EXIT_INTERRUPTED = 130


class QwenrunError(Exception):
    """Base of everything qwenrun raises on purpose; `hint` is the next command to type (may be empty)."""

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QwenrunError):
    """The caller asked for something that can't be understood or is not allowed."""

    exit_code = EXIT_USAGE


class ModelError(QwenrunError):
    """A model is missing, corrupt, or of an architecture this program does not know."""

    exit_code = EXIT_MODEL


class DoesNotFitError(QwenrunError):
    """What was asked for needs more memory than there is."""

    exit_code = EXIT_NO_FIT


_QUANT_EXIT_CODES: dict[type[quant_errors.QuantError], int] = {
    quant_errors.CheckpointError: EXIT_MODEL,
    quant_errors.PackError: EXIT_MODEL,
    quant_errors.RecipeError: EXIT_USAGE,
    quant_errors.StorageError: EXIT_FAILURE,
}


def exit_code(error: BaseException) -> int:
    """The process exit code for `error`; 1 for anything that is not one of ours."""
    if isinstance(error, QwenrunError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    for kind, code in _QUANT_EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return EXIT_FAILURE
