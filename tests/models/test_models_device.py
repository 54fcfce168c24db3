import pytest
import torch

from mechreward.errors import InputError
from mechreward.models import find_device


@pytest.mark.parametrize(("there", "found"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch, there: bool, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert find_device("auto") == torch.device(found)


def test_a_name_is_taken_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(find_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("toaster", "device: 'toaster' is not a torch device"),
        ("cuda:2", "device: cuda:2 is not there; this machine has 2"),
    ],
)
def test_a_device_that_is_none_is_one_sentence(monkeypatch, name: str, sentence: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=sentence):
        find_device(name)
