"""Names and suffixes of the files that commands and the package read and write."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "svqvae_hf"
DEFAULT_MODEL = str(PACKAGE / "pretrained")  # folder of the small bundled model
DEFAULT_GENERATOR = str(PACKAGE / "pretrained_scenes")  # of the bundled language model that draws
BUNDLED = {"bundled": DEFAULT_MODEL, "scenes": DEFAULT_GENERATOR}  # names that commands and scripts take for them

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".webp", ".avif")
ARCHIVE_SUFFIXES = (".zip", ".rar", ".7z")  # which must be unpacked first
TIFF_SUFFIXES = (".tif", ".tiff")
TOKEN_SUFFIXES = (".safetensors", ".svqz")  # of plain and of compressed token files
TOKEN_SET_FILE = "svqvae_tokens.json"  # settings of a token set, in its folder
STARTED_TOKEN_SET_FILE = "parts/options.json"  # options of a token set until it is complete, in its folder
TOKEN_SET_MANIFEST = "manifest.jsonl"  # a line per part of a complete token set, in its folder
TOKEN_SET_DATA = "data"  # Parquet files of a token set, in its folder
TOKEN_SET_RECORDS = "parts/" + 7 * "[0-9]" + ".json"  # pattern of the records of finished parts, until it is complete

REPO_ID = r"\w[\w.-]*/\w[\w.-]*"  # regular expression of `org/name` on the Hub
