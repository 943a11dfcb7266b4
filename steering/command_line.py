"""What the command lines of the scripts share."""

import argparse
import math
import sys


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and a description as it is."""


def new_parser(doc):
    """A parser described by a script's docstring."""
    return argparse.ArgumentParser(description=doc.strip(), formatter_class=HelpFormatter)


BOUNDS = {  # kind of number: (whether a value is one, what to say otherwise)
    "count": (lambda value: value >= 1, "must be at least 1"),
    "size": (lambda value: 0 <= value < math.inf, "must be 0 or above, and finite"),
    "share": (lambda value: 0 <= value < 1, "not in [0, 1)"),
    "seed": (lambda value: 0 <= value < 2**63, "not in [0, 2^63)"),
    "number": (math.isfinite, "not finite"),
}


def out_of_bounds(args, options):
    """Messages for the options that break a bound; one that is None was not given.
    options: {key of BOUNDS: names of options, separated by spaces}."""
    return [
        f"--{key.replace('_', '-')} {getattr(args, key)}: {BOUNDS[kind][1]}"
        for kind, keys in options.items()
        for key in keys.split()
        if getattr(args, key) is not None and not BOUNDS[kind][0](getattr(args, key))
    ]


def exit_code(run, *arguments):
    """What `run` returns; 2, and one line on stderr, if the user's data or flags are at fault."""
    try:
        return run(*arguments)
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
