"""What the commands say: results on standard output, as text or as JSON; progress and errors on standard error."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

from rich.console import Console
from rich.text import Text

STYLES = {"good": "green", "warn": "yellow", "bad": "red", "neutral": ""}


class Failure(ValueError):
    """What a person can mend, in one sentence. `code`: 1 could not be done, 2 asked for wrongly, 130 interrupted."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


# what torch says of a full memory: of a card, of Windows and of Linux
FULL = ("out of memory", "not enough memory", "can't allocate memory")


def interruptible(run: Callable[..., None]) -> Callable[..., None]:
    """The command, which Ctrl-C ends with one line; and so does a full memory."""

    @wraps(run)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except KeyboardInterrupt:
            raise Failure("stopped; nothing was written.", 130) from None
        except RuntimeError as error:
            if not any(words in str(error) for words in FULL):
                raise
            raise Failure("The memory is full: choose a smaller --size, --batch or --prompts.", 1) from None

    return command


def quoted(*words: object) -> str:
    """A command as it is typed in this system's terminal."""
    found = [str(word) for word in words]
    return subprocess.list2cmdline(found) if os.name == "nt" else shlex.join(found)


class Voice:
    """How one command speaks."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json

    def say(self, text: str) -> None:
        """To people."""
        if not self.as_json:
            print(text)

    def hint(self, text: str) -> None:
        """To people who did not ask for the result alone."""
        if not self.quiet:
            self.say(text)

    def coloured(self, text: str, tone: str) -> None:
        """To people, in the tone's colour where standard output shows colours."""
        if not self.as_json:
            Console(highlight=False, soft_wrap=True).print(Text(text, STYLES[tone]))

    def doubt(self, verdict: Any) -> None:
        """To people who are about to use a region: where its own numbers speak against it."""
        if verdict.tone in ("warn", "bad"):
            self.coloured(verdict.line, verdict.tone)

    def result(self, found: Any) -> None:
        """To scripts."""
        if self.as_json:
            print(json.dumps(found, indent=1))

    def watching(self) -> AbstractContextManager[Callable[[Any], None]]:
        """What a run reports its progress to."""
        if self.quiet:
            return nullcontext(lambda progress: None)
        from .terminal import watching  # torch comes with it, and --help should not wait for that

        return watching()
