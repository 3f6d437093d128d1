"""How the lines of the server's own log look: for people, for a program, or for the journal.

    serverlog.configure("text", "info")

The log goes to stderr. If that is systemd's journal, a line has the journal's priority and no time,
because the journal has its own: sd-daemon(3). The audit log is another file: see `audit.py`.
"""

from __future__ import annotations

import json
import logging
import time

from standardstreams import is_journal

__all__ = ["FORMATS", "LEVELS", "configure"]

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")

# The priorities of syslog(3) for the levels of `logging`.
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


def configure(form: str, level: str) -> None:
    """Have all of this process's log written to stderr.

    `form` is one of `FORMATS`, `level` one of `LEVELS`. Call it once, before anything is logged.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_is_not_about_metadata)
    if form == "json":
        handler.setFormatter(_Json())
    elif is_journal(2):
        handler.setFormatter(_Journal())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper())


def _is_not_about_metadata(record: logging.LogRecord) -> bool:
    """Reject gRPC's records about metadata that is not UTF-8, which contain the whole value.

    The value may be a token. The gate records the call anyway.
    """
    return not (
        record.name.startswith("grpc.")
        and record.exc_info
        and isinstance(record.exc_info[1], UnicodeDecodeError)
    )


class _Journal(logging.Formatter):
    """Begins each line with its priority, also the lines of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _Json(logging.Formatter):
    """A line is an object with `time` (RFC 3339, UTC), `level`, `message`, perhaps `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)
