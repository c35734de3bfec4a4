"""Where the installed command begins: Ctrl-C is answered at once, also while the command line itself is imported."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line and exit with its status.

    Until `nano.cli` is there to say what an interruption left, nothing was begun: the process just ends, with 130.
    """
    answers = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job ignores it
    if answers:
        signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(130))
    from nano.cli import main as run

    if answers:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
