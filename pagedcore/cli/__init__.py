"""The `pagedcore` command: serve, generate, chat, plan, bench, plugins, doctor.

Commands are imported when they are called, and torch when a model is loaded, so that asking for
help takes no time.
"""

import logging
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from pagedcore import __version__
from pagedcore.errors import PagedcoreError

app = App(
    name="pagedcore",
    help="A paged LLM inference core that any serving framework can mount.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(
        allow_repeating=True,  # the last one counts, or all where the flag takes several
        negative_iterable="",
        negative_none="",
    ),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command("pagedcore.cli.serve:serve", name="serve", help="Serve a model over HTTP.")
app.command("pagedcore.cli.generate:generate", name="generate", help="Complete one prompt.")
app.command("pagedcore.cli.chat:chat", name="chat", help="Talk to a model.")
app.command(
    "pagedcore.cli.plan:plan", name="plan", help="Tell what a model would take of a device."
)
app.command("pagedcore.cli.bench:app", name="bench", help="Measure speed.")
app.command(
    "pagedcore.cli.quantize:quantize", name="quantize", help="Store a model's weights in few bits."
)
app.command(
    "pagedcore.cli.doctor:doctor", name="doctor", help="Say what is wrong here, and what mends it."
)
app.command("pagedcore.cli.plugins:app", name="plugins", help="Look at what is installed.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is the process's own by default.

    Returns the exit status: 2 for a command line that cannot be understood (CFG-4), 1 for what
    fails on purpose, with one line on stderr, 130 when interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        status = app(argv, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _complain(error)
        return 2
    except PagedcoreError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output is gone; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(status or 0)


def _complain(error: Exception) -> None:
    print("pagedcore:", " ".join(str(error).split()), file=sys.stderr)
