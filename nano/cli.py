"""The `nanokit` command: maps a command to a function by a string and imports it when it is called.

`nanokit --help` therefore loads neither torch nor transformers. This is also the one place where errors become
messages and exit statuses: 0 done, 1 a check said no, 2 the request was wrong, 3 it failed, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback

from cyclopts import App

from nano.errors import NanokitError, NoSpaceError, PeerLostError
from nano.folder import is_no_space
from nano.progress import speaks
from nano.version import __version__

COMMANDS = {
    "demo": ("nano.command:demo", "Run the whole way on the embedded teacher: the quickest look."),
    "plan": ("device_profiles.command:plan", "Solve a student's shape; count bytes and training cost."),
    "distill": ("distill.command:distill", "Prune a teacher to a student's shape and train it."),
    "cache-teacher": ("distill.command:cache_teacher", "Keep a teacher's answers, to train students from."),
    "quantize": ("quantize.command:quantize", "Quantize a student to packed int4."),
    "export": ("export.command:export", "Write an int4 student as an ExecuTorch or ONNX bundle."),
    "verify": ("export.command:verify", "Check hashes, and a bundle's codes against its int4 checkpoint."),
    "bench": ("export.command:bench", "Measure a bundle's speed and memory on this machine."),
    "check": ("device_profiles.command:check", "Check a bundle's memory against a phone's budget."),
    "evaluate": ("nano.command:evaluate", "Perplexity, divergence and scorecards, of any stage."),
    "compare": ("nano.command:compare", "Gate: has a model lost accuracy against a baseline?"),
    "report": ("nano.report.command:report", "Write one page about a bundle, for a release."),
    "lm-eval": ("nano.command:lm_eval", "lm-evaluation-harness, with any stage's model as `--model nanokit`."),
    "generate": ("nano.command:generate", "Continue a prompt with any stage's model."),
    "build": ("nano.command:build", "Run a recipe end to end; skip what has not changed."),
    "push": ("export.store.command:push", "Put a bundle into a store: an OCI layout folder or a registry."),
    "pull": ("export.store.command:pull", "Bring an artifact into a folder: whole, checked, the best for a phone."),
    "ls": ("export.store.command:ls", "List artifacts in a store."),
    "inspect": ("export.store.command:inspect", "Show what a store says of one artifact."),
    "tags": ("export.store.command:tags", "List the tags of a name."),
    "rm": ("export.store.command:rm", "Take a tag out of a local store."),
    "gc": ("export.store.command:gc", "Delete what no tag of a local store leads to."),
    "sign": ("export.store.command:sign", "Sign an artifact, as cosign does with a key pair."),
    "keygen": ("export.store.command:keygen", "Make a key pair to sign artifacts with."),
    "catalog": ("export.store.command:catalog", "Make a static page of a store's artifacts."),
    "profiles": ("device_profiles.command:profiles", "List the device profiles, or show one with its sources."),
}

app = App(
    name="nanokit",
    help="Make phone artifacts of a language model: distil, quantize to int4, export, check.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # else cyclopts leaves silently: run() says what an interruption left
    help_format="plaintext",  # markdown costs 40 ms of imports
)
for _name, (_target, _help) in COMMANDS.items():
    app.command(_target, name=_name, help=_help)
app.register_install_completion_command(name="--install-completion")


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run the command line; gives the exit status instead of leaving the process."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):  # help and version need no hushing, and logging costs time
        from nano.quiet import hush

        hush()
        if not {"--help", "-h"}.isdisjoint(words):
            app.help_format = "markdown"  # joins the lines of a docstring's paragraph; worth its imports here
    try:
        result = app(words, exit_on_error=False, print_error=True)
    except NanokitError as error:
        if speaks() or isinstance(error, PeerLostError):
            _report(str(error), error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        return _report("Interrupted; nothing half-written was left.", 130) if speaks() else 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    except Exception as error:
        return _unexpected(error)
    return result if isinstance(result, int) else 0


def _report(message: str, status: int) -> int:
    who = "nanokit" if speaks() else f"nanokit (rank {os.environ['RANK']})"
    print(f"{who}: {message}", file=sys.stderr)
    return status


def _unexpected(error: Exception) -> int:
    """What no one foresaw: cyclopts has printed its own usage errors; a bug is named as one."""
    if type(error).__module__.startswith("cyclopts"):
        return 2
    if is_no_space(error):
        return _report(str(NoSpaceError("The disk is full.", found=str(error), todo="free some space")), 3)
    if os.environ.get("NANOKIT_DEBUG"):
        traceback.print_exc()
    first = (str(error).splitlines() or [""])[0]
    return _report(
        f"It failed in a way that was not foreseen: {type(error).__name__}: {first}\n"
        f"  to do:    run again with NANOKIT_DEBUG=1 for the traceback, and report it",
        3,
    )
