"""Classes files: names, colours and tables by id, and what is refused before it can mislead."""

import json

import pytest

from spcl_fast.data.classes import read_classes
from spcl_fast.errors import DataError


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be used"),
        ('{"names": ["a"]}', "between 2 and 255 classes"),
        ('{"names": ["a", "b"], "palette": [[0, 0, 0]]}', "1 colours for 2 names"),
        ('{"names": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 256]]}', "colours for 2 names"),
        ('{"names": ["a", "b"], "ignore_index": 0}', "only 255 is supported"),
        ('{"names": ["a", "b"], "from": {"town": {"0": 2}}}', "maps 0 to 2"),
        ('{"names": ["a", "b"], "from": {"town": {"70000": 1}}}', "maps 70000 to 1"),
        ("[]", "holds a list, not an object"),
        ("{}", '"names" is missing'),
        ("[" * 100_000, "brackets are too deep"),
        ('{"names": ["sky", "road", "sky "]}', "two classes are called 'sky'"),
        ('{"names": [{"id": 0, "name": "sky"}, "b"]}', "a name is no text, or empty"),
        ('{"names": ["a", "b"],}', "double quotes"),
        ('{"names": "a b"}', '"names" is a str, not a list'),
        ('{"names": ["tree", "road", "tree"]}', "two classes are called 'tree'"),
        ('{"names": ["a", ""]}', "a name is no text, or empty"),
        ('{"names": ["a", 2]}', "a name is no text, or empty"),
        ('{"names": {"0": "a", "2": "b"}}', 'the ids of "names" are 0, 2; expected each of 0 to 1 once'),
        ('{"names": {"1": "a", "2": "b"}}', "expected each of 0 to 1 once"),
        ('{"names": {"0": "a", "00": "b"}}', "expected each of 0 to 1 once"),
        ('{"names": {"road": "a", "sky": "b"}}', "holds 'road' where a whole number is expected"),
        ('{"names": {"0": "a", "0": "b"}}', "'0' is given twice"),
        ('{"names": ["a", "b"], "names": ["c", "d"]}', "'names' is given twice"),
        ('{"names": ["a", "b"], "pallete": []}', "'pallete' is unknown; did you mean 'palette'"),
        ('{"names": ["a", "b"], "colors": []}', "'colors' is unknown; did you mean 'palette'"),
        ('{"name": ["a", "b"]}', "'name' is unknown; did you mean 'names'"),
        ('{"names": ["a", "b"], "palette": [[0, 0, 0.9], [0, 0, 1]]}', "holds 0.9 where a whole number is expected"),
        ('{"names": ["a", "b"], "palette": [[0, 0], [0, 0, 1]]}', "colours for 2 names"),
        ('{"names": ["a", "b"], "from": "town"}', '"from" is no object of tables'),
        ('{"names": ["a", "b"], "from": {"town": "x"}}', '"from" is no object of tables'),
        ('{"names": ["a", "b"], "from": {"town": {"0": 0.9}}}', "holds 0.9 where a whole number is expected"),
        ('{"names": ["a", "b"], "from": {"town": {"0": true}}}', "holds True where a whole number is expected"),
        ('{"names": ["a", "b"], "from": {"town": {"7": 0, "07": 1}}}', "maps 7 twice"),
        ('{"names": ["a", "b"], "from": {"town": {"7": 0, "7": 1}}}', "'7' is given twice"),
        ('{"names": ["a", "b"], "from": {"town": {"-1": 0}}}', "maps -1 to 0"),
    ],
)
def test_bad_classes_file_is_named(tmp_path, content, told):
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(DataError, match=told) as error:
        read_classes(path)
    assert "classes.json" in str(error.value)


def test_line_ends_and_spaces_around_names_are_no_part_of_them(tmp_path):
    (tmp_path / "classes.json").write_text('{"names": [" sky", "road ", "traffic  light\\r\\n"]}')
    assert read_classes(tmp_path / "classes.json")[0].names == ("sky", "road", "traffic light")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_classes_file_is_read_as_editors_save_it(tmp_path, encoding):
    (tmp_path / "classes.json").write_text('{"names": ["天空", "road"]}', encoding=encoding)
    assert read_classes(tmp_path / "classes.json")[0].names == ("天空", "road")
    (tmp_path / "classes.json").write_bytes('{"names": ["sky",\n"straße"]}'.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is not UTF-8 .byte 0xdf.; save it as UTF-8"):
        read_classes(tmp_path / "classes.json")


def test_names_by_id_are_taken_by_id(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(
        '{"names": {"2": "sky", "0": "road", "1": "car"}, "palette": {"1": [4, 5, 6], "0": [1, 2, 3], "2": [7, 8, 9]}}'
    )
    classes, tables = read_classes(path)
    assert classes.names == ("road", "car", "sky") and tables == {}
    assert classes.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


def test_a_classes_file_may_describe_the_data_set_and_have_a_byte_order_mark(tmp_path):
    path = tmp_path / "classes.json"
    content = {
        "names": ["a", "b"],
        "name": "my set",
        "size": [4, 3],
        "made_from": {"x": "y"},
        "to_cityscapes19": {"0": 3},
    }
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert read_classes(path)[0].names == ("a", "b")


def test_the_shared_classes_files_are_read(shared_dir):
    files = list((shared_dir / "data").glob("**/*classes.json"))
    assert files and all(len(read_classes(file)[0]) >= 2 for file in files)
