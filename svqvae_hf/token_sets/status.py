"""State of a token set: which parts are done, running or failed."""

import json
import os
import time
from dataclasses import dataclass

from svqvae_hf.files.folders import Folder
from svqvae_hf.token_sets.records import OPTIONS_FILE, Claim, PartRecords
from svqvae_hf.token_sets.settings import SETTINGS_FILE

SHOWN = 20  # parts of a kind


@dataclass(frozen=True)
class TokenSetStatus:
    """State of the parts of a token set; `str` formats it.

    Args:
        parts (`int`): Number of parts.
        done (`int`): Number of parts that are done.
        running (`dict[int, Claim]`): Parts that a process is making, as far as one can tell from here.
        failed (`dict[int, str]`): Parts that failed, with the reason, or whose process has died.
        complete (`bool`): Whether the set is complete.
    """

    parts: int
    done: int
    running: dict[int, Claim]
    failed: dict[int, str]
    complete: bool

    def __str__(self) -> str:
        waiting = self.parts - self.done - len(self.running) - len(self.failed)
        lines = [
            f"parts    {self.parts} ({'complete' if self.complete else 'not complete'}; done: {self.done}, running: "
            f"{len(self.running)}, failed: {len(self.failed)}, waiting: {waiting})"
        ]
        running = {
            part: f"{claim.images} images, process {claim.process} on {claim.host}, seen "
            f"{max(0, time.time() - claim.seen):.0f} s ago"
            for part, claim in self.running.items()
        }
        for word, parts in (("running", running), ("failed", self.failed)):
            lines += [f"{word:8} part {part}: {text}" for part, text in list(parts.items())[:SHOWN]]
            if len(parts) > SHOWN:
                lines.append(f"{word:8} and {len(parts) - SHOWN} more")
        return "\n".join(lines)


def read_status(out: str | os.PathLike) -> TokenSetStatus:
    """Reads the state of a token set that is being made, or is complete.

    Args:
        out (`str` or `os.PathLike`): Folder of the set, or its URL for `fsspec`.

    Raises:
        OSError: The folder cannot be read.
        ValueError: It is not a token set.
    """
    folder = Folder(out)
    complete = folder.read(SETTINGS_FILE)
    content = complete or folder.read(OPTIONS_FILE)
    options = json.loads(content or b"{}")
    num_parts = (options.get("options", {}) if complete else options).get("parts")
    if num_parts is None:
        raise ValueError(f"`{folder.url}` must be a token set, but has no record of one. Start it: svqvae tokenize.")
    if complete:
        return TokenSetStatus(num_parts, num_parts, {}, {}, True)
    records = PartRecords(folder, num_parts, SETTINGS_FILE)
    claims = records.read_claims()
    running = {part: claim for part, claim in claims.items() if claim.is_alive()}
    failed = {
        part: claim.failure
        or f"process {claim.process} on {claim.host} has died. Any other process will make the part."
        for part, claim in claims.items()
        if part not in running
    }
    return TokenSetStatus(num_parts, records.count_done(), running, failed, False)
