"""Finds names of objects, adjectives and other nouns in WordNet 3.0: `wordnet.py OUT FOLDER`.

OUT is `wordings/wordnet.json`: synonyms and kinds of the objects that scenes show, and common words. The file
`known_objects.json` of FOLDER has all names and words of captions, and nouns for other things that have a shape, by
which the model says what it cannot draw. It also lists objects and colours for people to read. Only words of
`/usr/share/dict/american-english` are among the other things (Debian: `apt install wamerican`). WordNet is in
`/usr/share/wordnet` (Debian: `apt install wordnet-base`; licence of Princeton University).
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from make_scenes import GROUNDS, OBJECTS
from scene_captions import VOICES, caption_words, known_names, read_wordings

from svqvae_hf.pipelines.known_objects import KnownObjects
from svqvae_hf.pipelines.known_objects_file import write_known_objects
from svqvae_hf.trainer.scripts import one_line_errors, script_parser

WORDNET = Path("/usr/share/wordnet")
SENSES = {  # that mean the object, counted from 1; of all other objects, the first one does
    **{"banana": [2], "bell": [1, 2], "carrot": [1, 3], "cow": [1, 2], "crown": [4], "dolphin": [2], "octopus": [2]},
    **{"hedgehog": [1, 2], "mushroom": [1, 2, 3], "pineapple": [2], "tiger": [2], "turtle": [2], "whale": [2]},
}
COLOURS = {*GROUNDS, "gray", "violet", "brown", "golden", "silver", "scarlet", "crimson", "lilac"}
LATIN_ENDINGS = ("us", "is", "ca", "ra", "ia", "ns", "um", "ta", "la", "na", "ae")
NOT_NAMES = set(  # kinds in WordNet that people do not mean by the object
    "okapi camelopard porcupine castle palace convent cloister monastery mansion mammoth bulldozer dozer "
    "angledozer lynx bobcat caracal cougar puma ocelot serval margay catamount panther cheetah jaguar leopard "
    "missile icbm abm exocet moth buzzer webcam passport bomber eggbeater skyhook tambourine moped grampus "
    "agua charger dinky torpedo orca".split()
)
SHAPED_FILES = {"05": "animal", "06": "artifact", "13": "food", "20": "plant"}  # of lexicographers, see lexnames(5)
SHAPED_KINDS = ("imaginary_being",)  # kinds of things with a shape in other files
GROUND_KINDS = tuple(  # and places and meals: what prompts name besides the objects
    "fabric linen floor_cover curtain paper bedclothes room workplace plot tract meal nutriment course".split()
)
NOT_THINGS = set("john bot dinky flipper tail milk salad soup flag moon sun star".split())
CATEGORIES = set("flower pet animal vehicle fruit vegetable bird fish insect building machine instrument toy".split())
DICTIONARY = Path("/usr/share/dict/american-english")
COLOUR_NOUNS = set(
    "olive salmon coral mint peach rust sand wine cream mustard plum fuchsia teal apricot slate".split()
)
NOT_IN_NAMES = re.compile("missile|bomb|wildcat")
ONE_OR_TWO_WORDS = re.compile(r"[a-z'\-]{3,}(_[a-z'\-]+)?")
# Fields of a line of data.noun, see wndb(5): offset, file, type, number of words, then a word and its number for each
# word, number of pointers, then four fields for each pointer, of which the first is a symbol and the second a synset.
FIRST_WORD = 4
FIELDS_PER_WORD = 2
FIELDS_PER_POINTER = 4
POINTER_TO_KIND = "~"  # symbol of a pointer to a synset below
NOUN = "1"  # type of a word in cntlist.rev, see senseidx(5)
SHARE_OF_USES = 0.6  # of a name, in WordNet's texts, that must mean the object
NOT_ADJECTIVES = set(
    "small tiny little big large huge giant great left right top bottom upper lower high low two three four one "
    "single double triple first second third last other same another more many few several no not next "
    "near under above".split()
)


@dataclass
class Nouns:
    """Nouns of WordNet.

    Synsets, the sets of words of one meaning, are named by their offset in data.noun.

    Args:
        lemmas (`dict[str, list[str]]`): Words of each synset.
        kinds (`dict[str, list[str]]`): Synsets below each synset.
        files (`dict[str, str]`): Lexicographer file of each synset.
        senses (`dict[str, list[str]]`): Synsets of each word, the commonest first.
        uses (`dict[str, Counter]`): How often each sense of a word is used, counted from 1.
        other_uses (`Counter`): How often each word is used as a verb or an adjective.
    """

    lemmas: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    senses: dict[str, list[str]] = field(default_factory=dict)
    uses: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    other_uses: Counter = field(default_factory=Counter)

    @classmethod
    def read(cls, folder: Path) -> "Nouns":
        """Reads all nouns from Debian's folder of WordNet."""
        nouns = cls()
        for line in data_lines(folder / "data.noun"):
            nouns._add_synset(line)
        for line in data_lines(folder / "index.noun"):
            nouns._add_senses(line)
        for line in (folder / "cntlist.rev").read_text().splitlines():
            nouns._add_uses(line)
        return nouns

    def _add_synset(self, line: str) -> None:
        """Adds a synset from a line of data.noun."""
        fields = line.split(" | ")[0].split(" ")  # without the definition
        synset = fields[0]
        num_words = int(fields[3], 16)
        end_of_words = FIRST_WORD + FIELDS_PER_WORD * num_words
        pointers = fields[end_of_words + 1 :]  # without their number
        self.files[synset] = fields[1]
        self.lemmas[synset] = fields[FIRST_WORD:end_of_words:FIELDS_PER_WORD]
        self.kinds[synset] = []
        for start in range(0, len(pointers) - FIELDS_PER_POINTER + 1, FIELDS_PER_POINTER):
            symbol, target = pointers[start : start + 2]
            if symbol == POINTER_TO_KIND:
                self.kinds[synset].append(target)

    def _add_senses(self, line: str) -> None:
        """Adds the senses of a word from a line of index.noun, which ends with them."""
        fields = line.split()
        word = fields[0]
        num_senses = int(fields[2])
        self.senses[word] = fields[-num_senses:]

    def _add_uses(self, line: str) -> None:
        """Adds the uses of a sense from a line of cntlist.rev, such as `dog%1:05:00:: 1 42`."""
        sense_key, sense, count = line.split()
        word, _, lexical_sense = sense_key.partition("%")
        if lexical_sense.startswith(NOUN):
            self.uses[word][int(sense)] = int(count)
        else:
            self.other_uses[word] += int(count)

    def below(self, synsets: Iterable[str], stops: Collection[str] = ()) -> set[str]:
        """Some synsets and all synsets below them. The search does not enter the synsets `stops`."""
        reached = set()
        to_visit = list(synsets)
        while to_visit:
            synset = to_visit.pop()
            reached.add(synset)
            for kind in self.kinds[synset]:
                if kind not in stops:
                    to_visit.append(kind)
        return reached

    def means(self, word: str, synsets: set[str]) -> bool:
        """Whether a word usually means one of some synsets.

        Its first sense must be among them, and most of its uses, or half of its senses if no use is counted.
        """
        senses = self.senses[word]
        if senses[0] not in synsets:
            return False
        uses = self.uses[word]
        if not uses:
            num_senses_among = len(synsets.intersection(senses))
            return num_senses_among >= len(senses) / 2
        num_uses_among = 0
        for sense, count in uses.items():
            if senses[sense - 1] in synsets:
                num_uses_among += count
        return num_uses_among >= SHARE_OF_USES * uses.total()


def data_lines(path: Path) -> list[str]:
    """Lines of a file of WordNet, without the licence, whose lines start with two spaces."""
    return [line.rstrip() for line in path.read_text().splitlines() if not line.startswith("  ")]


def synsets_of(name: str, nouns: Nouns) -> list[str]:
    """Synsets that mean an object."""
    senses = nouns.senses[name]
    numbers = SENSES.get(name, [1])  # counted from 1
    return [senses[number - 1] for number in numbers]


def find_names(nouns: Nouns, adjectives: set[str]) -> dict[str, list[str]]:
    """Synonyms and kinds of each object, without names that another object or a writer has."""
    names_of_object: dict[str, set[str]] = {}
    uses_of_name: Counter = Counter()  # by objects, and by writers
    for object_name in OBJECTS:
        names_of_object[object_name] = names_of(object_name, nouns, adjectives)
        uses_of_name.update(names_of_object[object_name])
        for voice in VOICES:
            uses_of_name.update(read_wordings(voice)["objects"].get(object_name, []))
    unique_names = {}
    for object_name, names in names_of_object.items():
        unique_names[object_name] = sorted(name for name in names if uses_of_name[name] == 1)
    return unique_names


def names_of(object_name: str, nouns: Nouns, adjectives: set[str]) -> set[str]:
    """Everyday synonyms and kinds of an object."""
    synsets_of_others: set[str] = set()
    for other_name in OBJECTS:
        if other_name != object_name:
            synsets_of_others.update(synsets_of(other_name, nouns))
    synsets = nouns.below(synsets_of(object_name, nouns), synsets_of_others)
    names = set()
    for synset in synsets:
        for word in nouns.lemmas[synset]:
            if is_everyday(word, object_name, nouns, adjectives) and nouns.means(word.lower(), synsets):
                names.add(word.lower().replace("_", " "))
    return names


def is_everyday(word: str, object_name: str, nouns: Nouns, adjectives: set[str]) -> bool:
    """Whether a word may name an object: one or two English words, no colour, no Latin, and no other object in it."""
    lower = word.lower()
    if lower in OBJECTS or lower in NOT_NAMES or lower not in nouns.senses:
        return False
    if NOT_IN_NAMES.search(lower) or not ONE_OR_TWO_WORDS.fullmatch(lower):
        return False
    if is_latin(word, nouns):
        return False
    for part in re.split(r"[_\-]", lower):
        is_other_object = part in OBJECTS and part != object_name
        if part in COLOURS or is_other_object:
            return False
    return all(part in nouns.senses or part in adjectives for part in lower.split("_"))


def is_latin(word: str, nouns: Nouns) -> bool:
    """Whether a word looks like the Latin name of a genus or a species, which starts with a capital."""
    if not word[0].isupper():
        return False
    lower = word.lower()
    is_species = "_" in word and not nouns.uses[lower.split("_")[1]]
    return is_species or lower.endswith(LATIN_ENDINGS)


def find_things(nouns: Nouns, names: set[str]) -> list[str]:
    """Nouns, in singular, for things that have a shape and no name in captions.

    Args:
        nouns ([`Nouns`]): All nouns.
        names (`set[str]`): Names and words of captions.
    """
    shaped = nouns.below(nouns.senses[kind][0] for kind in SHAPED_KINDS)
    grounds: set[str] = set()
    for kind in GROUND_KINDS:
        grounds |= nouns.below(nouns.senses[kind])
    drawable: set[str] = set()
    for name in OBJECTS:
        drawable |= nouns.below(synsets_of(name, nouns))
    words = set(DICTIONARY.read_text("utf-8").split())
    words -= names | COLOUR_NOUNS | NOT_THINGS | CATEGORIES
    things = []
    for word, senses in nouns.senses.items():
        if word not in words or len(word) < 3 or senses[0] in grounds:
            continue
        is_mostly_no_noun = nouns.other_uses[word] > nouns.uses[word].total()  # "flies", "acoustic"
        may_be_drawable = not drawable.isdisjoint(senses[:3])  # "boxer", which is also a dog
        if is_mostly_no_noun or may_be_drawable:
            continue
        has_shape = any(nouns.files[sense] in SHAPED_FILES or sense in shaped for sense in senses[:2])
        if has_shape:
            things.append(word)
    return sorted(things)


def common_words(folder: Path, part: str) -> list[str]:
    """Words of a part of speech that occur in WordNet's texts and are neither names nor sizes nor numbers."""
    banned = NOT_ADJECTIVES | COLOURS | known_names()
    words = []
    for line in data_lines(folder / f"index.{part}"):
        # Fields, see wndb(5): word, part of speech, number of synsets, number of pointers, the pointers, number of
        # senses, number of senses in texts, the synsets.
        fields = line.split()
        word = fields[0]
        num_pointers = int(fields[3])
        num_senses_in_texts = int(fields[5 + num_pointers])
        if num_senses_in_texts > 0 and word.isalpha() and word not in banned:
            words.append(word)
    return words


def main() -> None:
    """Reads the arguments and writes both files."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="JSON file of names to write")
    parser.add_argument("folder", type=Path, help="folder of the language model, for known_objects.json")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder of WordNet (default: Debian's)")
    options = parser.parse_args()
    nouns = Nouns.read(options.wordnet)
    adjectives = {line.split()[0] for line in data_lines(options.wordnet / "index.adj")}
    objects = find_names(nouns, adjectives)
    common_adjectives = common_words(options.wordnet, "adj")
    words = set(common_adjectives)
    words.update(common_words(options.wordnet, "noun"))
    words.update(common_words(options.wordnet, "verb"))
    entries = {"objects": objects, "adjectives": common_adjectives, "words": sorted(words)}
    options.out.write_text(json.dumps(entries, indent=0) + "\n", encoding="utf-8")
    names = caption_words().union(OBJECTS, *objects.values())
    things = find_things(nouns, names)
    known_objects = KnownObjects(frozenset(names), frozenset(things), tuple(OBJECTS), tuple(GROUNDS))
    write_known_objects(known_objects, options.folder)


if __name__ == "__main__":
    with one_line_errors():
        main()
