"""What the command lines of the scripts share."""

import argparse
import io
import math
import os
import sys
from dataclasses import fields
from pathlib import Path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and a description as it is written."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def new_parser(doc):
    """Make a parser that is described by a script's docstring."""
    return argparse.ArgumentParser(
        description=doc.strip(),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def number_or_word(text, kind=float):
    """Read a text as a number of the kind; returns the text itself if it is none."""
    try:
        return kind(text)
    except ValueError:
        return text


def count_or_word(text):
    """Read a text as a whole number; returns the text itself if it is none."""
    return number_or_word(text, int)


class Options:
    """Parent of dataclasses of options."""

    @classmethod
    def of(cls, values):
        """Take the options from a dict, of parsed arguments or run.json; others have defaults."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})


# Kind of number: (whether a value is one, what is said of a value that is not).
BOUNDS = {
    "count": (lambda value: value >= 1, "must be at least 1"),
    "size": (lambda value: 0 <= value < math.inf, "must be 0 or above, and finite"),
    "share": (lambda value: 0 <= value < 1, "not in [0, 1)"),
    "seed": (lambda value: 0 <= value < 2**63, "not in [0, 2^63)"),
    "number": (math.isfinite, "not finite"),
}


def parse(parser, argv, bounds, checks):
    """Parse the options, and report all bad ones at once, before anything is read.

    bounds: {key of BOUNDS: names of options, separated by spaces}; None and "auto" always pass.
    checks: a function of the options that returns pairs (whether something is wrong, what).
    """
    args = parser.parse_args(argv)
    problems = []
    for kind, names in bounds.items():
        holds, otherwise = BOUNDS[kind]
        for name in names.split():
            value = getattr(args, name)
            if value in (None, "auto"):
                continue
            if isinstance(value, str) or not holds(value):
                problems.append(f"--{name.replace('_', '-')} {value}: {otherwise}")
    problems += [problem for is_wrong, problem in checks(args) if is_wrong]
    if problems:
        parser.error("; ".join(problems))

    # A folder has one spelling, so that it has one run folder.
    if args.model and Path(args.model).exists():
        args.model = os.path.normpath(args.model)
    return args


def exit_code(run, *arguments):
    """Call `run` and return its exit code; 2 for bad data or options (one line), 130 for Ctrl-C.
    No text stops it: stdout gets an escape for what its encoding lacks, and bytes on stdin that are
    no text are read as U+FFFD."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # Others decide for themselves.
            stream.reconfigure(errors=errors)
    try:
        return run(*arguments)
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, start again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
