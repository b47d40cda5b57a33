"""Data sets of masks and boxes in archives, lists and data sets: the same as in a folder."""
import io
import tarfile
import zipfile

import pytest
from dense_data import make_voc

from selfpatch.errors import ConfigError
from selfpatch.evaluation.object_discovery import find_box_data


def write_odd_tar(root, path):
    """A .tar whose annotations are links, and which ends with a small zip."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            name = file.relative_to(root.parent)
            if file.suffix == ".xml":
                link = tarfile.TarInfo(str(name))
                link.type, link.linkname = tarfile.SYMTYPE, f"../boxes/{file.name}"
                archive.addfile(link)
                name = name.parent.parent / "boxes" / file.name
            archive.add(file, name)
        small, member = io.BytesIO(), tarfile.TarInfo("voc/extras.zip")
        with zipfile.ZipFile(small, "w") as zipped:
            zipped.writestr("a.txt", "x")
        member.size = len(small.getvalue())
        archive.addfile(member, io.BytesIO(small.getvalue()))


def write_odd_zip(root, path):
    """A .zip with backslashes and a text that is encrypted, in a folder of another kind."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.writestr(str(file.relative_to(root.parent)).replace("/", "\\"), file.read_bytes())
        archive.writestr("voc\\secret.txt", "x" * 30)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")  # the last member's entry in the directory
    data[at + 8] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name, write", [("voc.tar", write_odd_tar), ("voc.zip", write_odd_zip)])
def test_texts_in_archives_of_other_programs(tmp_path, name, write):
    root = make_voc(tmp_path / "voc")
    write(root, tmp_path / name)
    ours, expected = (find_box_data(f"voc:{place}") for place in (tmp_path / name, root))
    assert [one.boxes.tolist() for one in ours] == [one.boxes.tolist() for one in expected]


def test_a_damaged_text_in_an_archive_is_one_line(tmp_path):
    root = make_voc(tmp_path / "voc")
    with zipfile.ZipFile(tmp_path / "voc.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
        start = archive.getinfo("Annotations/000001.xml").header_offset
    data = bytearray((tmp_path / "voc.zip").read_bytes())
    start += 30 + len("Annotations/000001.xml")
    data[start:start + 4] = b"\xff" * 4
    (tmp_path / "voc.zip").write_bytes(data)
    with pytest.raises(ConfigError, match="cannot read .*voc.zip/Annotations/000001.xml .Error -3"):
        find_box_data(f"voc:{tmp_path / 'voc.zip'}")
