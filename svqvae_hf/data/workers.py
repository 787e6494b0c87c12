"""Worker processes of loaders."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def usable_cores() -> int:
    """Number of cores that this process may use. `taskset`, Slurm or a container may leave it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Ends this process when its parent has ended in any way.

    A worker whose results nobody reads would wait for room in their pipe forever.
    """
    threading.Thread(target=_end_after, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    """Waits until the parent has ended, and then ends this process from a thread of it."""
    parent.join()
    # `sys.exit` would end this thread alone, and a signal would wait for the main thread, which may be blocked while
    # it writes to the pipe. Nothing needs to be cleaned up, because a worker only reads files.
    os._exit(1)
