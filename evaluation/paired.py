"""Paired differences between two rows of a table: same slice, same split and fold, same seed.

    python -m evaluation.paired full-cross concat --split blocks --runs runs

prints the difference of every slice (mean over folds and seeds), and over slices the median, the
range and how many are above zero. A baseline is named as a row is.
"""

import argparse
import statistics
from collections import defaultdict

from evaluation.records import read_runs, split_name
from plainst import run
from plainst.readers.checked import DataError


def score_of(record, row, score):
    """The score of a row in a record: of the run itself, or of the baseline of that name; None
    where the record has neither."""
    if record["row"] == row:
        return record["metrics"].get(score)
    return record["baselines"].get(row, {}).get(score)


def places_of(records, row, score):
    """{(slice, split detail, seed): score} of a row. A baseline that no seed changes stands under
    the seed None."""
    places = {}
    for record in records:
        value = score_of(record, row, score)
        if value is None:
            continue
        seed = record["config"]["seed"] if record["row"] == row else None
        places[record["part"], record["split"]["detail"], seed] = value
    return places


def differences(records, first, second, score="ari"):
    """{slice: [first - second, ...]} of all pairs of runs of one slice, split and seed. Raises
    DataError where no pair is there."""
    one, two = (places_of(records, row, score) for row in (first, second))
    out = defaultdict(list)
    for part, detail, seed in sorted({*one, *two}, key=str):
        keys = (part, detail, seed), (part, detail, None)
        pair = [places.get(keys[0], places.get(keys[1])) for places in (one, two)]
        if None not in pair:
            out[part].append(pair[0] - pair[1])
    if not out:
        raise DataError(
            f"no slice, split and seed has both {first} and {second}: give names as in the report"
        )
    return dict(out)


def summary(by_slice):
    """(median, least, most, number above zero, number) of the means over each slice."""
    means = [statistics.mean(values) for values in by_slice.values()]
    above = sum(mean > 0 for mean in means)
    return statistics.median(means), min(means), max(means), above, len(means)


def main(argv=None):
    """Print the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", help="row or baseline")
    parser.add_argument("second", help="row or baseline")
    parser.add_argument("--split", default="random", help="name of the split")
    parser.add_argument("--score", default="ari")
    parser.add_argument("--method", default="gat_fusion")
    parser.add_argument("--runs", default="runs")
    options = parser.parse_args(argv)
    records = [
        record
        for record in read_runs(options.runs)
        if record["method"] == options.method and split_name(record) == options.split
    ]
    by_slice = differences(records, options.first, options.second, options.score)
    for part, values in sorted(by_slice.items()):
        print(f"{part}: {statistics.mean(values):+.3f} ({len(values)} pairs)")
    median, least, most, above, n = summary(by_slice)
    print(
        f"{options.first} - {options.second}, {options.score}, split {options.split}: median "
        f"{median:+.3f} ({least:+.3f} to {most:+.3f}) over {n} slices, {above} above zero"
    )
    return 0


if __name__ == "__main__":
    run.cli(main)
