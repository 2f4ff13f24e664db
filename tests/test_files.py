"""Files of awkward names, and links that somebody else may have laid."""

import json

import pytest

from snnkern.files import replacing, write_json

NAMES = ["with space", "Zürich \N{SNOWMAN}", "two\nlines", "'quoted' $HOME; `id`", "-rf", "%s{0}"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write_json(folder / name, {"kept": name})
    assert json.loads((folder / name).read_text()) == {"kept": name}
    assert [path.name for path in folder.iterdir()] == [name]


def test_links_are_replaced_and_never_written_through(tmp_path):
    other, ours = tmp_path / "other", tmp_path / "ours.json"
    other.write_text("of somebody else")
    ours.symlink_to(other)
    write_json(ours, {"number": 1})
    assert not ours.is_symlink() and json.loads(ours.read_text()) == {"number": 1}
    (tmp_path / "ours.json.part").symlink_to(other)
    with pytest.raises(OSError, match=r"symbolic links.*ours\.json"), replacing(ours) as file:
        file.write(b"never")
    assert other.read_text() == "of somebody else" and json.loads(ours.read_text()) == {"number": 1}
    write_json(ours, {"number": 2})  # the link is gone
    assert json.loads(ours.read_text()) == {"number": 2}
