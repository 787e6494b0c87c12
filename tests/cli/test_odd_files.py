"""A picture whose decoder raises is named and skipped, even if it is the first that its process decodes."""

import odd_files
import processes
import pytest

SAMPLE = ("run_lengths.bmp", "PNG_RGB_half.png", "TIFF_I16_half.tiff")


@pytest.mark.slow
@pytest.mark.parametrize("command", odd_files.RESULTS)
def test_no_picture_ends_a_run(command, saved_model, tmp_path, monkeypatch):
    monkeypatch.setattr(odd_files, "PRELOADED", processes.PRELOADED)
    files = odd_files.odd_files()
    for name in SAMPLE:
        assert odd_files.check(command, name, files[name], saved_model, tmp_path / name) == "skipped"
    assert len(files) > 300
