"""Worker processes of loaders."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """Ends this process when its parent has ended in any way.

    A worker whose results nobody reads would wait for room in their pipe forever.
    """
    threading.Thread(target=_end_after, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # `sys.exit` would end this thread alone
