"""Text that is there without a network, and that what is held out is not learned from."""

import pytest

from reasoner.corpus import documents, rows
from reasoner.model import char_tokenizer


def test_installed_packages_are_text_enough_to_heal_on():
    texts = documents()
    assert sum(map(len, texts)) > 500_000 and texts == documents()


def test_no_document_is_both_learned_and_held_out():
    tokenizer = char_tokenizer("ab")
    texts = [("b" if i % 8 == 0 else "a") * 90 for i in range(64)]
    learned, heldout = rows(tokenizer, texts, length=20)
    assert set(tokenizer.decode(learned.flatten(), skip_special_tokens=True)) == {"a"}
    assert set(tokenizer.decode(heldout.flatten(), skip_special_tokens=True)) == {"b"}
    assert len(learned) == 56 * 91 // 20 and len(heldout) == 8 * 91 // 20


def test_one_long_file_has_held_out_parts_too(tmp_path):
    (tmp_path / "book.txt").write_text("0123456789" * 5000)
    learned, heldout = rows(char_tokenizer("0123456789"), documents(tmp_path / "book.txt"), 100)
    assert len(learned) > len(heldout) > 10


def test_folder_without_text_and_too_little_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        documents(tmp_path)
    with pytest.raises(ValueError, match="1 documents make no row of 50 tokens"):
        rows(char_tokenizer("0123456789"), ["0123"], 50)
