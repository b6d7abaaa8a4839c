"""stdout and stderr: results, messages, progress. Nothing but results ever goes to stdout."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hasten.backends.build import Progress

PATIENCE = 2.0
"""Seconds that something may take before it says what it is doing."""
WIDTH = 140
"""Columns where stdout is no terminal."""


class Console:
    """Where a verb writes. ``show`` is for people, ``document`` for ``--json``; the other one does nothing."""

    def __init__(self, verb: str, *, json: bool = False, verbosity: int = 0) -> None:
        self.verb, self.json, self.verbosity = verb, json, verbosity
        self._stdout = sys.stdout
        self._out = _rich(sys.stdout)
        self._document: dict[str, Any] | None = None

    def show(self, *parts: RenderableType) -> None:
        """Write on stdout, unless ``--json`` was given. Text is taken as it is: ``[x]`` is no markup."""
        if not self.json:
            for part in parts:
                self._out.print(Text(part) if isinstance(part, str) else part)

    def document(self, content: dict[str, Any]) -> None:
        """The one JSON document; written when the verb ends."""
        self._document = content

    def note(self, message: str) -> None:
        """One line on stderr that is no error."""
        if self.verbosity >= 0:
            self._line(message)

    def finish(self, code: int) -> None:
        """Write the JSON document."""
        if self.json and self._document is not None:
            self._stdout.write(json.dumps(self._document, indent=2, allow_nan=False) + "\n")
            self._stdout.flush()

    def fail(self, message: str, code: int) -> None:
        """The one line that an error is; with ``--json`` the document says it too, beside what was found out before."""
        message = " ".join(message.split())
        self._line(message)
        self.document({**(self._document or {}), "error": message, "exit_code": code})
        self.finish(code)

    def _line(self, message: str) -> None:
        sys.stderr.write(f"hasten {self.verb}: {message}\n")
        sys.stderr.flush()

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Send the package's log to stderr: warnings, with -v what happens, with -vv everything, with -q errors."""
        handler = _Handler(self)
        levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
        handler.setLevel(levels.get(max(-1, self.verbosity), logging.DEBUG))
        logger = logging.getLogger("hasten")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(handler.level)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """Give a function (stage, part done) that tells how ``what`` gets on, once it has taken over two seconds."""
        reporter = _Reporter(self, what)
        timer = threading.Timer(PATIENCE, reporter.start)
        timer.daemon = True
        if self.verbosity >= 0:
            timer.start()
        try:
            yield reporter.tell
        finally:
            timer.cancel()
            reporter.stop()


class _Handler(logging.Handler):
    """Tells a warning once, however many runs of one command have reason for it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console, self.told = console, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING and record.getMessage() in self.told:
            return
        self.told.add(record.getMessage())
        sys.stderr.write(f"hasten {self.console.verb}: {record.levelname.lower()}: {record.getMessage()}\n")


class _Reporter:
    """A status line with a spinner on a terminal, otherwise one line a stage."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what, self.stage = console, what, ""
        self.started, self.lock = False, threading.Lock()
        self.status: Any = None

    def tell(self, stage: str, fraction: float) -> None:
        with self.lock:
            self.stage = f"{stage} ({fraction:.0%})" if fraction < 1 else ""
            if self.started and self.stage:
                self._show()

    def start(self) -> None:
        with self.lock:
            self.started = True
            if sys.stderr.isatty():
                self.status = RichConsole(stderr=True).status("")
                self.status.start()
            self._show()

    def stop(self) -> None:
        with self.lock:
            self.started = False
            if self.status is not None:
                self.status.stop()

    def _show(self) -> None:
        line = f"{self.what}: {self.stage}" if self.stage else self.what
        if self.status is not None:
            self.status.update(Text(line))
        else:
            self.console._line(line)


def _rich(stream: Any) -> RichConsole:
    return RichConsole(
        file=stream, width=None if stream.isatty() else WIDTH, highlight=False, markup=False, emoji=False
    )


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; a column whose name starts with ``>`` holds numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return made


def quantity(value: float, unit: str) -> str:
    """A number with a decimal prefix.

    >>> quantity(1_234_000, "FLOP"), quantity(512, "B")
    ('1.23 MFLOP', '512 B')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time with a suitable unit.

    >>> duration(0.00123), duration(72.0)
    ('1.23 ms', '72 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
