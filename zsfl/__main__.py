"""`python -m zsfl` and the `zsfl` command: so little that Ctrl-C finds it ready from the first moment on."""

import sys

CLOSED = 128 + 13
"""The exit code of a command whose output nobody reads any more: as a shell tells of SIGPIPE."""


def main() -> int:
    """Run the command line; its exit code."""
    try:
        from zsfl.cli import main as run

        try:
            return run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what is printed only as Python ends fails aloud
    except KeyboardInterrupt:
        print("zsfl: interrupted; all nodes have left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        from zsfl.outputs import drop_unread

        if not drop_unread():
            raise
        return CLOSED


if __name__ == "__main__":
    sys.exit(main())
