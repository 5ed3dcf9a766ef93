import pytest

from qwlib.errors import QwlibError
from qwlib.models import embedded, texts


def test_the_embedded_text_is_the_default():
    assert texts.read() == (embedded.text(), embedded.text_name())


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße\r\n".encode())
    assert texts.read(str(tmp_path / "a.txt")) == ("Grüße\r\n", "a.txt")


def test_what_can_not_be_read_is_told(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt").write_text("  \n")
    for name, message in (("b.txt", "can't read"), ("c.txt", "is empty"), ("d.txt", "can't read"), ("", "can't read")):
        with pytest.raises(QwlibError, match=message):
            texts.read(str(tmp_path / name))


def test_wikitext_is_joined_as_papers_do_or_rebuilt_as_the_file_was(monkeypatch):
    monkeypatch.setattr(texts, "_wikitext_rows", lambda: ["", " = Title = \n", "", " Text . \n"])
    assert texts.read("wikitext2") == ("\n\n = Title = \n\n\n\n\n Text . \n", "wikitext2 test")
    assert texts.read("wikitext2-raw") == (" \n = Title = \n \n Text . \n", "wikitext2-raw test")
