"""How a script of this folder ends when its user has made a mistake: with one line that says which. What a script does
lives in the script."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# What arguments, files and data that do not fit raise, here and in the libraries; anything else is a fault of the code.
USER_ERRORS = (ValueError, OSError, ImportError)


def run_command(main: Callable[[], None]) -> None:
    """
    Run a script's `main` and exit.

    A mistake of the user ends in one line on standard error and status 1; with `TTT_TRACEBACK=1` in the environment the
    traceback comes before it. An interrupt ends with status 130. Other errors keep their traceback.
    """
    name = Path(sys.argv[0]).name
    try:
        main()
    except Exception as error:
        if not isinstance(error, USER_ERRORS) and not is_of_datasets(error):
            raise
        if os.environ.get("TTT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        sys.exit(f"{name}: error: {one_line(error)}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def is_of_datasets(error: BaseException) -> bool:
    """Return whether an error is one that `datasets` raises for data it cannot read; without loading it to find out."""
    exceptions = sys.modules.get("datasets.exceptions")
    return exceptions is not None and isinstance(error, exceptions.DatasetsError)


def one_line(error: BaseException) -> str:
    """Return what an error says, with its causes' words where it has none of its own."""
    text = " ".join(str(error).split())
    if is_of_datasets(error) and error.__cause__ is not None:  # "An error occurred while ..."
        text = f"{text} ({one_line(error.__cause__)})"
    return text or type(error).__name__
