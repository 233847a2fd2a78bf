"""WordPiece tokens by Hugging Face `tokenizers`, lower-cased as BERT's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from shards.errors import DataError
from shards.store import objects

# The library's threads gain little on short sentences, and it warns of any fork after their use.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Characters that a trained vocabulary keeps, the most frequent ones; BERT's trainer did the same.
_ALPHABET = 1000


def make_tokenizer(vocab: Sequence[str]) -> Tokenizer:
    """A tokenizer over `vocab` (id = index). It adds no special tokens, and knows none in text:
    a sentence that says "[MASK]" is split as any other text."""
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def parse_vocab(data: bytes, where: str | Path) -> list[str]:
    """Tokens of a vocab.txt, one a line. DataError naming `where` and the line for duplicates,
    empty lines and absent special tokens."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the vocabulary {where} is not UTF-8 text: {error}") from None
    tokens = [line.removesuffix("\r") for line in lines]
    if tokens and not tokens[-1]:
        tokens.pop()
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens, 1):
        if not token:
            raise DataError(f"the vocabulary {where} has an empty line {i}")
        if token in seen:
            raise DataError(
                f"the vocabulary {where} has {token!r:.60} in line {seen[token]} and line {i}"
            )
        seen[token] = i
    for token in SPECIAL:
        if token not in seen:
            raise DataError(f"the vocabulary {where} has no {token}: add it as a line")
    return tokens


def load_vocab(vocab: str | Path) -> list[str]:
    """Tokens of a vocab.txt (path or URL), as `parse_vocab`."""
    return parse_vocab(objects.read_bytes(str(vocab)), vocab)


def load_tokenizer(vocab: str | Path) -> Tokenizer:
    """The tokenizer of a vocab.txt (path or URL). DataError naming the file, as `parse_vocab`."""
    return make_tokenizer(load_vocab(vocab))


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> list[list[int]]:
    """WordPiece ids of each text without [CLS] and [SEP], the first `limit` of them."""
    return [e.ids[:limit] for e in tokenizer.encode_batch_fast(list(texts))]


def train_vocab(sentences: Iterable[str], size: int, min_count: int = 2) -> list[str]:
    """A WordPiece vocabulary of at most `size` tokens: the special tokens ([PAD] is 0), the
    alphabet, then merges of at least `min_count` occurrences. The same words give the same bytes.

    The library numbers `##c` characters in the order of a randomly seeded hash map, and breaks
    ties of merges by these numbers; the alphabet is handed over as leading special tokens, sorted,
    so that nothing is left to that order.
    """
    words = _count_words(sentences)
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for c in word:
            counts[c] += n
    kept = sorted(c for c, _ in sorted(counts.items(), key=lambda e: (-e[1], e[0]))[:_ALPHABET])
    leading = [*SPECIAL, *kept, *(f"##{c}" for c in kept)]
    if len(leading) > size:
        raise DataError(
            f"a vocabulary of {size} tokens has no room for its {len(leading)} special tokens and "
            "characters: ask for a larger one"
        )
    alphabet = set(kept)
    usable = {w: n for w, n in sorted(words.items()) if alphabet.issuperset(w)}
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_count,
        special_tokens=leading,
        show_progress=False,
        continuing_subword_prefix="##",
    )
    tokenizer = make_tokenizer(SPECIAL)
    tokenizer.train_from_iterator(_repeated(usable), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda token: ids[token])


def _count_words(sentences: Iterable[str]) -> Counter[str]:
    normalizer, pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for sentence in sentences:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(sentence)):
            words[word] += 1
    return words


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Each word as often as it occurs, in lines of bounded length."""
    for word, n in words.items():
        for begin in range(0, n, 1000):
            yield f"{word} " * min(1000, n - begin)
