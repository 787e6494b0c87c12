import os

import pytest

from svqvae_hf.data.image_rows import read_image


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="it must be a file, but is something else"):
        read_image({"path": str(tmp_path / "pipe.png"), "bytes": None})
