"""What the command lines of the scripts share."""

import argparse
import sys


def new_parser(doc):
    """A parser that shows defaults, described by the first line of a script's docstring."""
    return argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def out_of_bounds(args, bounds):
    """Messages for the options that break a bound; one that is None was not given.
    bounds: {what is allowed: (function of the value, names of options, separated by spaces)}."""
    return [
        f"--{key.replace('_', '-')} {getattr(args, key)}: {allowed}"
        for allowed, (fits, keys) in bounds.items()
        for key in keys.split()
        if getattr(args, key) is not None and not fits(getattr(args, key))
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
