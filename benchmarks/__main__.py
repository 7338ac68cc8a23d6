"""All benchmarks and one table: `make bench`, or `python -m benchmarks`; writes latest.json."""

import warnings

from benchmarks import gate, transformer
from benchmarks.pairs import RESULTS, report

SUBJECTS = (gate, transformer)


def main() -> None:
    warnings.simplefilter("ignore")  # the peers' own
    rows = [row for subject in SUBJECTS for row in subject.main([])]
    packages = dict.fromkeys(name for subject in SUBJECTS for name in subject.PACKAGES)
    print("\nAll rows:\n")
    report(rows, list(packages), RESULTS / "latest.json")


if __name__ == "__main__":
    main()
