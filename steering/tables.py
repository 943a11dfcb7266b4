"""Tables as lines of text."""


def aligned(rows, left=(0,)):
    """Pad cells so that columns line up; returns a line of text for each row.

    rows: lists of strings, all of one length. left: indices of the columns that are flush left;
    the others are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            pad = cell.ljust if i in left else cell.rjust
            cells.append(pad(widths[i]))
        lines.append("  ".join(cells).rstrip())
    return lines
