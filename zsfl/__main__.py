"""`python -m zsfl` and the `zsfl` command: so little that Ctrl-C finds it ready from the first moment on."""

import sys


def main() -> int:
    """Run the command line; its exit code."""
    try:
        from zsfl.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("zsfl: interrupted; all nodes have left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
