"""python -m plainst simulate | download | convert | export: data for the methods, and their results
in files that other tools open."""

import importlib
import sys

COMMANDS = {  # imported when asked for: not every command needs torch
    "simulate": "plainst.simulate",
    "download": "plainst.download",
    "convert": "plainst.readers.convert",
    "export": "plainst.export",
}


def main(argv=None):
    """Hand the words behind the command's name to that command; -> its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in COMMANDS:
        print(f"usage: python -m plainst {{{','.join(COMMANDS)}}} ... (each has --help)")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    return importlib.import_module(COMMANDS[words[0]]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
