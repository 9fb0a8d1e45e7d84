"""For all tests: no deadlines, since machines are busy; and Ctrl-C ends the programs they start."""

import signal

from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# A shell that starts the suite in the background lets it, and its children, ignore this signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
