"""The bytes each token adds to the decoded text."""

from __future__ import annotations

from tokenizers import Tokenizer


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> tuple[bytes, ...]:
    """Bytes of the token ids 0..``vocab_size`` - 1 of a byte-level BPE tokenizer.

    Joined and decoded as UTF-8 with errors replaced they are what ``tokenizer.decode`` gives with
    special tokens skipped. Special tokens and ids that the tokenizer does not have are empty.
    """
    added = tokenizer.get_added_tokens_decoder()
    byte_of = _byte_of_character()
    pieces = []
    for token_id in range(vocab_size):
        if token_id in added:
            special, text = added[token_id].special, added[token_id].content
            pieces.append(b"" if special else text.encode())
        else:
            token = tokenizer.id_to_token(token_id) or ""
            # As the byte-level decoder does: a token with any other character is plain text.
            known = all(character in byte_of for character in token)
            pieces.append(bytes(map(byte_of.__getitem__, token)) if known else token.encode())
    return tuple(pieces)


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 characters stand for themselves,
    the other bytes, ascending, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | stand_ins
