import gzip
import os
import subprocess
import tarfile

import datasets
import pytest
from numbered_images import crop_loader, encode, numbered, numbers, write_tar

from svqvae_hf.data.image_rows import read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.untrusted import tars


def sample(number, kind="png", **labels):
    """Members of a sample: an image of a number, and labels by their suffix."""
    labels = {"cls": str(number), "txt": f"caption {number}", "json": f'{{"n": {number}}}'} | labels
    image = (f"{number:04}.{kind}", encode(numbered(number), {"jpg": "jpeg"}.get(kind, kind)))
    return [image, *((f"{number:04}.{suffix}", text.encode()) for suffix, text in labels.items())]


def members_of(numbers, **labels):
    return [member for number in numbers for member in sample(number, ("jpg", "png", "webp")[number % 3], **labels)]


def faults(images):
    found = {}
    for row in images:
        try:
            read_image(row)
        except ValueError as error:
            found[row.key] = str(error)
    return found


def test_an_empty_file_is_not_blamed_for_the_damage_of_the_next_one(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    (tmp_path / "b.tar").write_bytes(b"damaged" * 100)
    with pytest.raises(ValueError, match=r"tar files must hold images, but `.*a.tar` has none: it is empty\.$"):
        open_images([str(tmp_path)])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_images_of_several_kinds_with_their_labels(tmp_path, mode):
    write_tar(tmp_path / "a.tar", members_of(range(6)), mode)
    images = open_images([str(tmp_path / "a.tar")])
    integer, text = datasets.Value("int64"), datasets.Value("string")
    assert images.features == {"cls": integer, "txt": text, "json": text}
    rows = list(images)
    assert [row.key for row in rows] == ["0000.jpg", "0001.png", "0002.webp", "0003.jpg", "0004.png", "0005.webp"]
    assert rows[4].values == {"cls": 4, "txt": "caption 4", "json": '{"n": 4}'}
    assert not faults(images)


def test_a_missing_label_is_none_and_other_members_are_kept_if_named(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample(0, url="a/b"), ("0001.png", encode(numbered(1))), ("notes", b"")])
    assert "url" not in open_images([str(tmp_path)]).features
    rows = list(open_images([str(tmp_path)], columns=["url"]))
    assert [row.values["url"] for row in rows] == ["a/b", None]
    assert rows[1].values["cls"] is None
    with pytest.raises(ValueError, match="The set has no column author, but only png, cls, txt, json, url"):
        open_images([str(tmp_path)], columns=["author"])


def test_one_of_several_images_is_chosen_by_its_suffix(tmp_path):
    members = [("0.left.png", encode(numbered(1))), ("0.jpg", encode(numbered(2), "jpeg"))]
    write_tar(tmp_path / "a.tar", members)
    assert [row.key for row in open_images([str(tmp_path)])] == ["0.jpg"]
    assert [row.key for row in open_images([str(tmp_path)], image_column="left.png")] == ["0.left.png"]
    with pytest.raises(ValueError, match=r"--image-column must be one of left.png, jpg, got `right`"):
        open_images([str(tmp_path)], image_column="right")
    write_tar(tmp_path / "a.tar", [*members, ("0.png", encode(numbered(3)))])
    with pytest.raises(ValueError, match="the samples have several images: jpg, png. Choose one with"):
        open_images([str(tmp_path)])
    for more, columns in (("0.jpg", []), ("0.txt", ["txt"])):  # two files of a name
        write_tar(tmp_path / "a.tar", [*members, ("0.txt", b"one"), (more, b"two"), *sample(1, txt="three")])
        assert [*faults(open_images([str(tmp_path)], columns=columns))] == ["0"]


def test_samples_that_cannot_be_read_are_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 10_000)
    members = members_of(range(200))
    members += [("a.txt", b"no image"), *sample(201, cls="x"), ("c.png", bytes(20_000)), ("d.png", b"")]
    write_tar(tmp_path / "a.tar", members)
    assert faults(open_images([str(tmp_path)])) == {
        "a": "the sample must hold one image, its files side by side, one of each kind, got txt.",
        "0201.png": "a label beside it cannot be read: it must be an integer, but is b'x'.",
        "c.png": "the image is too large for a member of a tar file.",
        "d.png": "the image (0 bytes) is not a readable image. It must be intact, in one of the formats BMP, GIF, "
        "JPEG, PNG, PPM, TIFF, WEBP, AVIF (BMP without run-length encoding).",
    }


def pack(folder, path, *options):
    subprocess.run(["tar", "--sort=name", *options, "-cf", path, "-C", folder, "."], check=True)


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("linked", ["png", "cls"])
def test_links_are_named_with_the_way_to_pack_their_content(tmp_path, linked, prefix):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in [*sample(0), *sample(1), *sample(2), *sample(3)]:
        (folder / name).write_bytes(content)
    (folder / f"0001.{linked}").unlink()
    os.link(folder / f"0000.{linked}", folder / f"0001.{linked}")
    (folder / f"0002.{linked}").unlink()
    (folder / f"0002.{linked}").symlink_to(f"0000.{linked}")
    (folder / "folder.v1").symlink_to(tmp_path)
    pack(folder, tmp_path / "links.tar")
    images = open_images([f"{prefix}{tmp_path}/links.tar"])
    assert images.features["cls"] == datasets.Value("int64")
    assert [row.key for row in images] == ["./0000.png", "./0001.png", "./0002.png", "./0003.png", "./folder"]
    assert [*faults(images)] == ["./0001.png", "./0002.png", "./folder"]
    assert f"its {linked} is a link in the tar file, which is not followed. Pack" in faults(images)["./0001.png"]
    (folder / "folder.v1").unlink()
    pack(folder, tmp_path / "contents.tar", "--dereference", "--hard-dereference")
    images = open_images([f"{prefix}{tmp_path}/contents.tar"])
    assert len(list(images)) == 4
    assert not faults(images)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_rest_of_a_truncated_file_is_one_unreadable_row(tmp_path, mode):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", members_of(range(12)), mode)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: int(len(content) * 0.57) + 5])
    images = open_images([str(tmp_path)])
    rows = list(images.parts[0].read())
    assert 2 < len(rows) < 12
    assert [*faults(images)] == ["a.tar"]
    assert "the tar file ends early" in faults(images)["a.tar"]
    batches = list(crop_loader(open_images([str(tmp_path)], copy=True), num_steps=24))
    assert {key for batch in batches for key, _ in batch.skipped} == {"a.tar"}
    assert {number for batch in batches for number in numbers(batch)}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_headers_that_take_unbounded_memory_or_recursion_are_refused(tmp_path, monkeypatch, kind, prefix):
    monkeypatch.setattr(tars, "MAX_HEADER_BYTES", 1000)

    def header(size):
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = kind, size
        return member.tobuf(tarfile.GNU_FORMAT) + b"1" * (-(-size // 512) * 512)

    for name, headers, reason in (
        ("large", header(2000), "a header of 2000 bytes"),
        ("many", header(3) * 5000, ""),  # recursion, or from Python 3.13 on an invalid header
    ):
        write_tar(tmp_path / f"{name}.tar", sample(0))
        (part,) = open_images([f"{prefix}{tmp_path}/{name}.tar"]).parts
        with tarfile.open(tmp_path / f"{name}.tar") as tar:
            end = tar.getmembers()[-1].offset_data + 512
        content = (tmp_path / f"{name}.tar").read_bytes()
        (tmp_path / f"{name}.tar").write_bytes(content[:end] + headers + content[end:])
        ((found, fault),) = faults(part.read()).items()
        assert found == f"{name}.tar"
        assert f"the tar file ends early: {reason}" in fault


def spoil_checksum(content, header):
    content[header + tarfile.LENGTH_NAME] ^= 1


def zero_header(content, header):
    content[header : header + tarfile.BLOCKSIZE] = bytes(tarfile.BLOCKSIZE)


def cut_within(content, header):
    del content[header + 7 :]


@pytest.mark.parametrize(("damage", "mode"), [(spoil_checksum, "w"), (zero_header, "w:gz"), (cut_within, "w")])
def test_a_damaged_header_is_not_the_end(tmp_path, damage, mode):
    """`tarfile` ends there in silence."""
    path = tmp_path / "a.tar"
    write_tar(path, members_of(range(12)))
    with tarfile.open(path) as tar:
        header = tar.getmember("0008.webp").offset
    content = bytearray(path.read_bytes())
    damage(content, header)
    path.write_bytes(gzip.compress(content) if mode == "w:gz" else content)
    for place in (str(path), f"file://{path}"):
        (part,) = open_images([place]).parts
        assert [row.key for row in part.read()][:7] == [f"{n:04}.{('jpg', 'png', 'webp')[n % 3]}" for n in range(7)]
        assert [*faults(part.read())] == ["a.tar"]


@pytest.mark.parametrize("place", ["later members", "later shard"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_label_that_the_first_samples_have_not_is_an_error_or_kept_if_named(tmp_path, place, prefix):
    images = [(f"{number:04}.png", encode(numbered(number))) for number in range(110)]
    labelled = [("9999.png", encode(numbered(0))), ("9999.txt", b"caption")]
    if place == "later shard":
        write_tar(tmp_path / "0.tar", images)
        write_tar(tmp_path / "1.tar", labelled)
    else:
        write_tar(tmp_path / "1.tar", images + labelled)
    with pytest.raises(ValueError, match="1.tar` has `9999.txt`, but the first 100 samples of the set have no txt"):
        list(open_images([f"{prefix}{tmp_path}"]))
    rows = list(open_images([f"{prefix}{tmp_path}"], columns=["txt"]))
    assert [row.values["txt"] for row in rows] == [None] * 110 + ["caption"]
    assert len(list(open_images([f"{prefix}{tmp_path}"], keep_labels=False))) == 111


@pytest.mark.parametrize("count", [30, 130])
@pytest.mark.parametrize("order", [("png", "txt", "cls"), ("txt", "png")])
def test_a_tar_of_images_and_then_texts_is_an_error_that_says_how_to_pack_it(tmp_path, count, order):
    contents = {"png": encode(numbered(0)), "txt": b"caption", "cls": b"1"}
    members = [(f"{number:04}.{suffix}", contents[suffix]) for suffix in order for number in range(count)]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match="stand side by side.*`tar --sort=name`"):
        list(open_images([str(tmp_path)]))
