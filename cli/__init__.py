"""The command `safe-region`. Every module here is one of its commands, or what they share."""

from __future__ import annotations

import os
import sys
import warnings

NEEDED = 'run  python -m pip install ".[train]"'


def main(argv: list[str] | None = None) -> None:
    """Entry point. What a person can mend is one line on stderr, without a traceback; see `Failure` for exit codes."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"safe-region: the command line needs {error.name}: {NEEDED}", file=sys.stderr)
        raise SystemExit(1) from None
    try:
        app(argv, prog_name="safe-region", obj=sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        if end.code:
            raise
    except (ValueError, OSError, MemoryError) as error:
        print(f"safe-region: {error or 'the memory is full.'}", file=sys.stderr)
        code = 1 if isinstance(error, (OSError, MemoryError)) else 2
        raise SystemExit(getattr(error, "code", code)) from None
