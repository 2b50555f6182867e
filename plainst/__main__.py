"""python -m plainst simulate | download | convert: data to run the methods on."""

import sys

from plainst import download, simulate
from plainst.readers import convert

COMMANDS = {"simulate": simulate.main, "download": download.main, "convert": convert.main}


def main(argv=None):
    """Hand the words behind the command's name to that command; -> its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in COMMANDS:
        print(f"usage: python -m plainst {{{','.join(COMMANDS)}}} ... (each has --help)")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    return COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
