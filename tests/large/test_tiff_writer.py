import numpy as np
import tifffile

from svqvae_hf.large.tiff_writer import TiffWriter
from svqvae_hf.models.image_processing_svqvae import load_image


def test_windows_in_any_order_make_a_tiled_bigtiff(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (300, 530, 3), dtype=np.uint8)
    path = tmp_path / "a.tif"
    with TiffWriter(path, 300, 530) as writer:
        for top in range(200, -1, -100):
            for left in range(0, 530, 265):
                writer.write(top, left, values[top : top + 100, left : left + 265])
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert file.pages[0].is_tiled
        assert np.array_equal(file.asarray(), values)
    assert np.array_equal(np.asarray(load_image(path)), values)
