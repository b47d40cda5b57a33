"""The tables of evidence.py: every seed, mean and spread of each method, and the differences between two of them."""
import statistics
from collections.abc import Sequence

from selfpatch.evaluation.tables import format_table

COLUMNS = {"k-NN": ".3f", "J&F": ".3f", "mean IoU": ".3f", "image loss": ".3f", "patch loss": ".3f", "images": ".0f",
           "seconds": ".0f", "CPU s": ".0f"}

Figures = dict[str, float]  # by column; those that are not known, or mean nothing for the method, are left out


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """"mean ± standard deviation" (of a sample, so n - 1); of one value there is no spread."""
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def summary_row(name: str, rows: Sequence[Figures], columns: Sequence[str], sign: str = "") -> list[str]:
    """Mean and spread of each column over the rows that have it."""
    cells = [[row[column] for row in rows if column in row] for column in columns]
    return [name, *(mean_and_spread(found, sign + COLUMNS[column]) if found else "-"
                    for column, found in zip(columns, cells, strict=True))]


def all_tables(found: dict[int, dict[str, Figures]], pairs: Sequence[tuple[str, str]]) -> str:
    """Nothing is chosen: every figure of every seed that there is, whichever method is ahead.

    Args:
        found: by seed, by method.
        pairs: of methods; the first one's figures are subtracted from the second one's, seed by seed.
    """
    known = {column for methods in found.values() for row in methods.values() for column in row}
    columns = [column for column in COLUMNS if column in known]
    rows = [[f"{method}, seed {seed}", *(f"{row[c]:{COLUMNS[c]}}" if c in row else "-" for c in columns)]
            for seed, methods in found.items() for method, row in methods.items()]
    methods = dict.fromkeys(method for each in found.values() for method in each)
    rows += [summary_row(f"{method}, mean", [each[method] for each in found.values() if method in each], columns)
             for method in methods]
    text = format_table(["", *columns], rows)
    for pair in pairs:
        if gains := differences(found, pair):
            shared = [column for column in columns if any(column in row for row in gains.values())]
            rows = [summary_row(f"seed {seed}", [row], shared, "+") for seed, row in gains.items()]
            rows.append(summary_row("mean", list(gains.values()), shared, "+"))
            text += f"\n\n{pair[1]} - {pair[0]}, seed by seed\n{format_table(['', *shared], rows)}"
    return text


def differences(found: dict[int, dict[str, Figures]], pair: tuple[str, str]) -> dict[int, Figures]:
    """By seed: the second method's figures less the first one's, of the columns that both have."""
    gains = {}
    for seed, methods in found.items():
        first, second = (methods.get(method, {}) for method in pair)
        if gain := {column: second[column] - first[column] for column in first if column in second}:
            gains[seed] = gain
    return gains
