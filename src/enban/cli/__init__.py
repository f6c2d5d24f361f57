"""The `enban` command: dispatch, and the one place that turns errors into a line and an exit code.

0    done                          70   a bug of ours (ENBAN_DEBUG=1 shows the traceback)
1    failed                       130   interrupted with Ctrl-C (143: terminated)
more: see `check` and `compare`   141   the reader of our output went away
"""

from __future__ import annotations

import atexit
import os
import sys

from enban.cli.common import Terminated, complain
from enban.cli.options import Verb, help_text, parse, table
from enban.errors import EnbanError, UsageError

VERBS = {
    "create": "Make a new, empty image",
    "info": "Show what an image is: format, sizes, backing file, snapshots",
    "convert": "Copy images to another format, compressed or not",
    "check": "Look for damage in an image and repair it",
    "map": "List where the data of a disk is",
    "compare": "Compare two disks byte for byte",
    "resize": "Change the size of a disk",
    "measure": "Tell how large a file a new image needs",
    "dd": "Copy a part of a disk into a new image",
    "rebase": "Base an image on another backing file, or on none",
    "snapshot": "List, create, apply and delete the snapshots inside an image",
    "bitmap": "Record what changes: make, change and remove dirty bitmaps",
    "backup": "Copy what changed since the last backup",
    "commit": "Write the data of an image into its backing file",
    "amend": "Change what an image was created with",
    "stream": "Copy into an image what it shows of its backing files",
    "serve": "Serve disks over NBD",
    "run": "Run a guest on QEMU, on our disks",
    "ctl": "Speak to a guest that runs",
    "serial bridge": "Join a guest's serial line with those who debug it",
    "serial doctor": "Say why a kernel-debugging session stands still",
    "serial list": "List the serial ports of this machine",
    "keys show": "Draw a keyboard layout; tell how characters are typed and keys are called",
    "keys test": "Show which keys are pressed",
    "torture": "Find out whether disks keep their promises in crashes and failures",
    "cdrom": "List CD-ROM drives, show, read and eject discs",
}
# Verbs that may leave something half-made if they are killed: they clean up on SIGTERM too.
_MAKERS = (
    "create",
    "convert",
    "dd",
    "rebase",
    "commit",
    "resize",
    "check",
    "snapshot",
    "amend",
    "bitmap",
    "backup",
    "stream",
    "cdrom",
    "torture",
)
_ERROR = {"compare": 2}  # where 1 means something else than "failed"

EXIT_BUG, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 70, 130, 141, 143


def load(name: str) -> Verb:
    """The verb of a name, importing nothing of the others. Raises UsageError."""
    if name not in VERBS:
        if parts := " or ".join(f"enban {part}" for part, _ in _parts(name)):
            raise UsageError(f"'{name}' alone is no verb", hint=f"say {parts}")
        raise UsageError(f"there is no verb '{name}'", hint="see: enban --help")
    verb: Verb = __import__(f"enban.cli.{name.replace(' ', '_')}", fromlist=("VERB",)).VERB
    return verb


def _parts(name: str) -> list[tuple[str, str]]:
    """The verbs of two words that begin with a name, and their summaries."""
    return [(verb, summary) for verb, summary in VERBS.items() if verb.startswith(name + " ")]


def verb_of(words: list[str]) -> tuple[str, list[str]]:
    """The name at the start of a command line, of one word or two, and the words after it."""
    name = " ".join(words[:2])
    return (name, words[2:]) if name in VERBS and len(words) > 1 else (words[0], words[1:])


def program() -> None:
    """Run the command of this process and end it. Where Python has nothing to do at its end but to take its
    modules apart, that is left to the kernel: it takes as long as a short command."""
    code = main()
    threading = sys.modules.get("threading")
    if (
        atexit._ncallbacks()
        or not {"concurrent.futures.thread", "multiprocessing"}.isdisjoint(sys.modules)
        or (threading is not None and threading.active_count() > 1)
        or sys.gettrace() is not None
        or sys.getprofile() is not None
    ):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            sys.exit(code)  # says what it has to say about that
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Never raises what a user could cause."""
    words = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        # File names are bytes: they come out as they went in.
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    name = words[0] if words else ""
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _output_closed()
    except EnbanError as error:
        if getattr(error, "errno", 0) == 32:  # our reader went away while we wrote to it
            return _output_closed()
        complain(str(error))
        return _ERROR.get(name, 1)
    except Terminated:
        complain("terminated")
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        return _ERROR.get(name, 1)
    except MemoryError:
        complain("not enough memory")
        return _ERROR.get(name, 1)
    except Exception as error:
        if os.environ.get("ENBAN_DEBUG"):
            raise
        what = f"{type(error).__name__}: {error}"
        complain(f"internal error ({what}); please report it with the output of ENBAN_DEBUG=1")
        return EXIT_BUG


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 1
    if words[0] in ("-V", "--version", "version"):
        from enban import __version__

        print(f"enban {__version__}")
        return 0
    if words[0] == "help":
        words = [*words[1:3], "--help"] if len(words) > 1 else ["--help"]
        return _run(words)
    name, words = verb_of(words)
    if name not in VERBS and words[:1] in (["-h"], ["--help"]) and (parts := _parts(name)):
        print("\n".join([f"usage: enban {name} ...", "", *table(parts)]))
        return 0
    verb = load(name)
    if "-h" in words or "--help" in words:
        print(help_text(verb))
        return 0
    arguments = parse(verb, words)
    if verb.name in _MAKERS:
        from enban.cli import signals

        signals.catch()
    return verb.run(arguments)


def _overview() -> str:
    lines = ["usage: enban VERB [flags] ...", "", "Virtual disks: what qemu-img does, and more.", ""]
    lines += table(list(VERBS.items()))
    lines += ["", "enban VERB --help tells about one of them; enban --version about this program."]
    return "\n".join(lines)


def _output_closed() -> int:
    """The reader of our output went away: end as quietly as a program killed by SIGPIPE."""
    try:
        # What is still buffered must not fail again when Python closes the stream at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass
    return EXIT_PIPE
