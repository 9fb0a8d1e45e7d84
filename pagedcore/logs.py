"""What is logged by the command line and its processes: text, or one JSON object a line.

A library configures no log (LIFE-3): only programs call this. Processes that they start are told by
an environment variable.
"""

import json
import logging
import os
import time
from typing import Literal

LogFormat = Literal["text", "json"]

VARIABLE = "PAGEDCORE_LOG_FORMAT"

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Time in UTC, level, logger, process id, message, and the traceback where there is one.

    A line break in a message is escaped: no text that came from a client looks like a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """As one line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logs(log_format: LogFormat | None = None) -> None:
    """Log to standard error from INFO on, in this process and in those that it starts.

    Without a format, as the process that started this one was told.
    """
    if log_format is not None:
        os.environ[VARIABLE] = log_format
    handler = logging.StreamHandler()
    is_json = os.environ.get(VARIABLE) == "json"
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=log_format is not None)
