"""What the command lines of the scripts share."""

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there are any, and a description as it is."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


def new_parser(doc):
    """A parser described by a script's docstring."""
    options = {"formatter_class": HelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(description=doc.strip(), **options)


def number_or_word(text, kind=float):
    """A number of a kind, if the text is one; otherwise the text."""
    with contextlib.suppress(ValueError):
        return kind(text)
    return text


def count_or_word(text):
    """A whole number, if the text is one; otherwise the text."""
    return number_or_word(text, int)


BOUNDS = {  # kind of number: (whether a value is one, what to say otherwise)
    "count": (lambda value: value >= 1, "must be at least 1"),
    "size": (lambda value: 0 <= value < math.inf, "must be 0 or above, and finite"),
    "share": (lambda value: 0 <= value < 1, "not in [0, 1)"),
    "seed": (lambda value: 0 <= value < 2**63, "not in [0, 2^63)"),
    "number": (math.isfinite, "not finite"),
}


def parse(parser, argv, bounds, checks):
    """Parsed options; all that are bad are reported at once, before anything is read.
    bounds: {key of BOUNDS: names of options, separated by spaces}, None and "auto" being no value;
    checks: a function of the options that gives (whether something is wrong, what) pairs."""
    args, problems = parser.parse_args(argv), []
    for kind, keys in bounds.items():
        holds, otherwise = BOUNDS[kind]
        for key in keys.split():
            value = getattr(args, key)
            if value not in (None, "auto") and (isinstance(value, str) or not holds(value)):
                problems.append(f"--{key.replace('_', '-')} {value}: {otherwise}")
    problems += [what for wrong, what in checks(args) if wrong]
    if problems:
        parser.error("; ".join(problems))
    if args.model and Path(args.model).exists():  # one spelling, one run folder
        args.model = os.path.normpath(args.model)
    return args


def exit_code(run, *arguments):
    """What `run` returns; 2, and one line on stderr, if the user's data or flags are at fault; 130
    after Ctrl-C."""
    try:
        return run(*arguments)
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, start again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def aligned(rows, left=(0,)):
    """Rows of cells as lines of text; columns are flush right, those of `left` flush left."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([c.ljust(width) if i in left else c.rjust(width) for c in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
