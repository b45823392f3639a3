"""The demonstration: its text and its model."""

import sysconfig

import pytest

from llmquant import demo
from llmquant.checkpoint import Checkpoint
from llmquant.demo import text
from llmquant.errors import DataError


def test_a_document_is_in_one_split_and_no_text_in_two():
    documents = text.documents()
    assert len(set(documents.values())) == len(documents)
    sizes = {}
    for name, document in documents.items():
        sizes[text.split(name)] = sizes.get(text.split(name), 0) + len(document)
    assert sizes.keys() == {"training", "calibration", "evaluation"}
    assert min(sizes.values()) > 0.1 * sum(sizes.values())


def test_an_implementation_module_shares_the_split_of_what_it_documents():
    assert text._public("_pydatetime") == "datetime"
    assert text._public("_io") == "io"
    assert text._public("json") == "json"


def test_a_python_without_documentation_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(text, "_all", lambda: iter([("a", "a text that is long enough to be a document, nearly")]))
    with pytest.raises(DataError, match="only 1 documented names"):
        text.documents()


def test_the_shipped_model_is_small_and_its_inputs_are_multiples_of_256():
    assert sum(p.stat().st_size for p in demo.MODEL.iterdir()) < 12e6
    matrices = [i for n, i in Checkpoint(demo.MODEL).infos.items() if "proj" in n]
    assert len(matrices) == 6 * 7
    assert all(info.shape[1] % 256 == 0 for info in matrices)
    assert sum(i.numel for i in Checkpoint(demo.MODEL).infos.values()) > 4e6
