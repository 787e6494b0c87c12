"""A lock on the folder of a run, so that no two runs write to it at a time."""

import fcntl
import os
from pathlib import Path

from svqvae_files.outputs import delete_temporary


class FolderLock:
    """Lock on an existing folder. It leaves no file, and ends with the process at the latest.

    Once the lock is held, temporary files in the folder are deleted. No other run can be writing them then, so a run
    that was killed has left them.

    Args:
        folder (`Path`): Folder of a run.

    Raises:
        ValueError: Another run holds the lock.
    """

    def __init__(self, folder: Path):
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(
                f"`{folder}` must not be the folder of another run, but one is writing to it. Wait for its end, or "
                "choose another `--output_dir`."
            ) from error
        delete_temporary(folder.rglob("*.tmp"))

    def release(self) -> None:
        """Lets other runs write to the folder."""
        os.close(self.descriptor)
