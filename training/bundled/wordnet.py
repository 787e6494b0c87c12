"""Finds names of objects, adjectives and other nouns in WordNet 3.0: `wordnet.py OUT FOLDER`.

OUT is `wordings/wordnet.json`: synonyms and kinds of the objects that scenes show, and common words. The file
`known_objects.json` of FOLDER has all names and the usual words of captions, and nouns for other things that have a
shape, by which the model says what it cannot draw. It also lists objects and colours for people to read. Only words of
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
from scene_captions import VOICES, caption_words, known_names, read_wordings, texts_of

from svqvae_hf.pipelines.known_objects import KnownObjects
from svqvae_hf.pipelines.known_objects_file import write_known_objects
from svqvae_hf.trainer.scripts import one_line_errors, script_parser

WORDNET = Path("/usr/share/wordnet")
SENSES = {  # which senses of a name mean the object, counted from 1; of all other names, only the first does
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
GROUND_KINDS = tuple(  # kinds of grounds, places and meals, which prompts name besides the objects
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
# A line of data.noun, see wndb(5), of a synset with two words and two pointers:
#     02122725 05 n 02 tom 1 tomcat 0 002 @ 02121808 n 0000 ~ 02122810 n 0000 | male cat
# Its fields are: offset, file, type, number of words, then a word and its number for each word, number of pointers,
# then four fields for each pointer, of which the first is a symbol and the second a synset.
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
        record, _, _definition = line.partition(" | ")
        fields = record.split(" ")
        synset = fields[0]
        num_words = int(fields[3], 16)  # the file writes it in hexadecimal digits
        end_of_words = FIRST_WORD + FIELDS_PER_WORD * num_words
        num_pointers = int(fields[end_of_words])
        first_pointer = end_of_words + 1
        kinds = []
        for number in range(num_pointers):
            start = first_pointer + FIELDS_PER_POINTER * number
            symbol = fields[start]
            target = fields[start + 1]
            if symbol == POINTER_TO_KIND:
                kinds.append(target)
        file = fields[1]
        self.files[synset] = file
        self.lemmas[synset] = fields[FIRST_WORD:end_of_words:FIELDS_PER_WORD]
        self.kinds[synset] = kinds

    def _add_senses(self, line: str) -> None:
        """Adds the senses of a word from a line of index.noun, which ends with them.

        Such a line is `zebra n 1 3 @ ~ #m 1 0 02391049`, whose third field is the number of senses.
        """
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
            if synset in reached:  # a synset may be right below several others
                continue
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
        commonest_sense = senses[0]
        if commonest_sense not in synsets:
            return False
        uses = self.uses[word]
        if not uses:
            num_senses_among = len(synsets.intersection(senses))
            return num_senses_among >= len(senses) / 2
        num_uses_among = 0
        for number, count in uses.items():
            synset = senses[number - 1]  # senses are counted from 1
            if synset in synsets:
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
    """Synonyms and kinds of each object, without names that another object has or a writer uses."""
    names_of_object: dict[str, set[str]] = {}
    counts: Counter = Counter()  # how often each name is WordNet's for an object, or a writer's
    for object_name in OBJECTS:
        names = names_of(object_name, nouns, adjectives)
        names_of_object[object_name] = names
        counts.update(names)
        for voice in VOICES:
            names_by_writer = read_wordings(voice)["objects"].get(object_name, [])
            counts.update(names_by_writer)
    unique_names = {}
    for object_name, names in names_of_object.items():
        # The object itself counts 1. A higher count says that another object or a writer also has the name.
        unique_names[object_name] = sorted(name for name in names if counts[name] == 1)
    return unique_names


def names_of(object_name: str, nouns: Nouns, adjectives: set[str]) -> set[str]:
    """Everyday synonyms and kinds of an object, without kinds that are another of the objects."""
    synsets_of_others: set[str] = set()
    for other_name in OBJECTS:
        if other_name != object_name:
            synsets_of_others.update(synsets_of(other_name, nouns))
    synsets = nouns.below(synsets_of(object_name, nouns), stops=synsets_of_others)
    names = set()
    for synset in synsets:
        for word in nouns.lemmas[synset]:
            if not is_everyday(word, object_name, nouns, adjectives):
                continue
            lower = word.lower()
            usually_means_object = nouns.means(lower, synsets)
            if usually_means_object:
                names.add(lower.replace("_", " "))
    return names


def is_everyday(word: str, object_name: str, nouns: Nouns, adjectives: set[str]) -> bool:
    """Whether a word may name an object: one or two English words, no colour, no Latin, and no other object in it.

    WordNet writes an underscore for a space, as in "brown_bear".
    """
    lower = word.lower()
    if lower in OBJECTS or lower in NOT_NAMES or lower not in nouns.senses:
        return False
    if NOT_IN_NAMES.search(lower) or not ONE_OR_TWO_WORDS.fullmatch(lower):
        return False
    if is_latin(word, nouns):
        return False
    for part in re.split(r"[_\-]", lower):  # colours and objects are also looked for beside a hyphen
        is_other_object = part in OBJECTS and part != object_name
        if part in COLOURS or is_other_object:
            return False
    words = lower.split("_")  # WordNet has words with a hyphen as they are
    return all(part in nouns.senses or part in adjectives for part in words)


def is_latin(word: str, nouns: Nouns) -> bool:
    """Whether a word looks like the Latin name of a genus or a species, which starts with a capital."""
    if not word[0].isupper():
        return False
    lower = word.lower()
    is_species = "_" in word and not nouns.uses[lower.split("_")[1]]
    return is_species or lower.endswith(LATIN_ENDINGS)


@dataclass(frozen=True)
class ThingSynsets:
    """Synsets by which the words for things are found.

    The senses of a word are its synsets, the commonest first, such as `["02121808", "10153414"]`. Rare senses tell
    nothing of what a prompt means.

    Args:
        shaped (`set[str]`): Synsets of things that have a shape.
        grounds (`set[str]`): Synsets of grounds, places and meals.
        drawable (`set[str]`): Synsets of the objects that scenes show, and of their kinds.
    """

    shaped: set[str]
    grounds: set[str]
    drawable: set[str]

    def has_shape(self, senses: list[str]) -> bool:
        """Whether a word means a thing that has a shape, in one of its two commonest senses."""
        return any(sense in self.shaped for sense in senses[:2])

    def is_ground(self, senses: list[str]) -> bool:
        """Whether a word means a ground, in its commonest sense."""
        commonest_sense = senses[0]
        return commonest_sense in self.grounds

    def may_be_drawable(self, senses: list[str]) -> bool:
        """Whether a word may mean an object of the scenes: "boxer" is also a dog, in its third sense."""
        return any(sense in self.drawable for sense in senses[:3])


def find_things(nouns: Nouns, names: set[str]) -> list[str]:
    """Nouns, in singular, for things that have a shape and no name in captions.

    Args:
        nouns ([`Nouns`]): All nouns.
        names (`set[str]`): Names and words of captions.
    """
    synsets = ThingSynsets(
        shaped=shaped_synsets(nouns),
        grounds=ground_synsets(nouns),
        drawable=drawable_synsets(nouns),
    )
    english_words = set(DICTIONARY.read_text("utf-8").split())
    excluded_words = names | COLOUR_NOUNS | NOT_THINGS | CATEGORIES
    things = []
    for word in nouns.senses:
        is_candidate = word in english_words and word not in excluded_words and len(word) >= 3
        if is_candidate and is_undrawable_thing(word, nouns, synsets):
            things.append(word)
    return sorted(things)


def is_undrawable_thing(word: str, nouns: Nouns, synsets: ThingSynsets) -> bool:
    """Whether a noun usually means a thing that has a shape, but that scenes cannot show."""
    is_mostly_verb_or_adjective = nouns.other_uses[word] > nouns.uses[word].total()  # "flies", "acoustic"
    if is_mostly_verb_or_adjective:
        return False
    senses = nouns.senses[word]
    if synsets.is_ground(senses) or synsets.may_be_drawable(senses):
        return False
    return synsets.has_shape(senses)


def shaped_synsets(nouns: Nouns) -> set[str]:
    """Synsets of things that have a shape: those of some files, and kinds of imaginary beings."""
    synsets = {synset for synset, file in nouns.files.items() if file in SHAPED_FILES}
    for kind in SHAPED_KINDS:
        commonest_sense = nouns.senses[kind][0]
        synsets |= nouns.below([commonest_sense])
    return synsets


def ground_synsets(nouns: Nouns) -> set[str]:
    """Synsets of grounds, places and meals, in all senses of their words."""
    synsets: set[str] = set()
    for kind in GROUND_KINDS:
        synsets |= nouns.below(nouns.senses[kind])
    return synsets


def drawable_synsets(nouns: Nouns) -> set[str]:
    """Synsets of the objects that scenes show, and of their kinds."""
    synsets: set[str] = set()
    for name in OBJECTS:
        synsets |= nouns.below(synsets_of(name, nouns))
    return synsets


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
    survey = texts_of(list(read_wordings("xkcd")["colours"].values()))
    colours = [name for name in survey if " " in name]  # "tomato red", but a tomato alone is a thing
    names = caption_words().union(OBJECTS, colours, *objects.values())
    things = find_things(nouns, names)
    known_objects = KnownObjects(frozenset(names), frozenset(things), tuple(OBJECTS), tuple(GROUNDS))
    write_known_objects(known_objects, options.folder)


if __name__ == "__main__":
    with one_line_errors():
        main()
