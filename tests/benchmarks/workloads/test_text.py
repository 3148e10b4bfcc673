"""Text for the transformer: where it is found, how it is cut, and what is refused."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness.errors import InputError
from benchmarks.workloads import text
from benchmarks.workloads.text import CONTEXT, LIBRARY, load_text, make_dataset

LONG = "".join(chr(97 + index * index % 26) for index in range(4000))


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_labels_are_the_characters_that_follow():
    data = make_dataset("letters", LONG)
    assert data.images.shape == (3600 // CONTEXT, CONTEXT) == data.labels.shape
    assert torch.equal(data.images.flatten()[1:], data.labels.flatten()[:-1])
    # The last tenth is for validation, in numbers that the training part decides.
    assert data.shape == (len(set(LONG[:3600])) + 1, CONTEXT)
    numbers = dict(zip(LONG[: data.images.numel()], data.images.flatten().tolist(), strict=True))
    assert [numbers[c] for c in LONG[3600 : 3600 + CONTEXT]] == data.validation_images[0].tolist()


def test_rare_and_unknown_characters_share_a_number(monkeypatch):
    monkeypatch.setattr(text, "MOST_CHARACTERS", 2)
    data = make_dataset("few", "aabaabc" * 500 + "z" * 400)
    assert data.shape == (3, CONTEXT)
    assert data.images[0, :7].tolist() == [1, 1, 2, 1, 1, 2, 0]
    assert set(data.validation_images[-1].tolist()) == {0}


def test_sequences_are_cut_but_not_their_vocabulary(tmp_path):
    (tmp_path / "t.txt").write_text(LONG)
    whole, part = (load_text(tmp_path / "t.txt", train_sequences=n) for n in (None, 3))
    assert torch.equal(part.images, whole.images[:3])
    assert part.shape == whole.shape
    assert len(part.validation_images) == len(whole.validation_images)


def test_sources_are_tried_in_their_order(tmp_path):
    assert load_text().name == LIBRARY
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.txt").write_text(LONG)
    assert load_text().name == "b.txt"
    (folder / "a.txt").write_text(LONG.upper())
    both = load_text()
    assert both.name == "a.txt, b.txt"
    (tmp_path / "mine").write_text(LONG)
    assert load_text(tmp_path / "mine").name == "mine"
    assert torch.equal(load_text(folder).images, both.images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b" \n\n", "an empty file"),
        (b"\xff\xfe\x00", "not a text in UTF-8"),
        (b"abc\0", "not a text, it has a zero byte"),
        (b"short", "5 characters are too few"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_text(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_wrong_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="--text absent: No such file"):
        load_text(Path("absent"))
    with pytest.raises(InputError, match=r"no \*\.txt file in this directory"):
        load_text(tmp_path)
