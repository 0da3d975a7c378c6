"""The tokenizer.json of a stock classifier: its own, or one made from the vocabulary files of older checkpoints."""

import json
from collections.abc import Mapping
from typing import Any, get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from de3.model_store.families.encoder import Encoder
from de3.model_store.tokenizer_check import TokenizerError, check_tokenizer, check_values

MAX_WORDS = 2**22
WORD_PIECE = ("bert", "distilbert", "electra")
BYTE_LEVEL = ("roberta",)


def tokenizer_of(files: Mapping[str, bytes], options: Mapping[str, Any], family: type[Encoder]) -> bytes:
    """The contents of a tokenizer.json without padding and truncation; raises ValueError if none can be used.

    files: contents by file name. options: contents of tokenizer_config.json.
    """
    if "tokenizer.json" in files:
        data = files["tokenizer.json"]
    elif "vocab.txt" in files and _is_one_of(family, WORD_PIECE):
        data = _word_piece(files["vocab.txt"], options)
    elif {"vocab.json", "merges.txt"} <= files.keys() and _is_one_of(family, BYTE_LEVEL):
        data = _byte_level(files["vocab.json"], files["merges.txt"], options)
    else:
        raise ValueError(
            "it has no tokenizer.json: save one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    try:
        check_tokenizer(data)
    except TokenizerError as error:
        raise ValueError(f"its tokenizer.json cannot be used: {error}") from None
    return json.dumps(json.loads(data) | {"padding": None, "truncation": None}, ensure_ascii=False).encode()


def _is_one_of(family: type[Encoder], types: tuple[str, ...]) -> bool:
    return not set(types).isdisjoint(get_args(family.model_fields["type"].annotation))


def _word_piece(vocabulary: bytes, options: Mapping[str, Any]) -> bytes:
    """BERT's tokenizer, as transformers makes it from vocab.txt; raises ValueError for an unusable file."""
    try:
        words = vocabulary.decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"its vocab.txt is not UTF-8: {error}") from None
    ids = {word: i for i, word in enumerate(words[: MAX_WORDS + 1])}
    unknown, first, last = "[UNK]", "[CLS]", "[SEP]"
    if len(words) > MAX_WORDS or not {unknown, first, last} <= ids.keys():
        raise ValueError(f"its vocab.txt lacks {unknown}, {first} or {last}, or is too long")
    accents = options.get("strip_accents")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(options.get("tokenize_chinese_chars", True)),
        strip_accents=None if accents is None else bool(accents),
        lowercase=bool(options.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(first, ids[first]), (last, ids[last])],
    )
    tokenizer.add_special_tokens([word for word in ("[PAD]", unknown, first, last, "[MASK]") if word in ids])
    return str(tokenizer.to_str()).encode()


def _byte_level(vocabulary: bytes, merges: bytes, options: Mapping[str, Any]) -> bytes:
    """RoBERTa's tokenizer, as transformers makes it from these files; raises ValueError for unusable ones."""
    try:
        check_values(vocabulary)
        ids = json.loads(vocabulary)
        lines = merges.decode().splitlines()
        if len(lines) > MAX_WORDS:
            raise ValueError(f"more than {MAX_WORDS} lines")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its vocab.json or merges.txt cannot be read: {error}") from None
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    sound = (
        isinstance(ids, dict)
        and len(ids) <= MAX_WORDS
        and all(type(i) is int and 0 <= i < MAX_WORDS for i in ids.values())
    )
    if not sound or not {"<s>", "</s>", "<unk>"} <= ids.keys() or any(len(pair) != 2 for pair in pairs):
        raise ValueError("its vocab.json and merges.txt are not those of a RoBERTa tokenizer")
    space = bool(options.get("add_prefix_space", False))
    tokenizer = Tokenizer(
        models.BPE(ids, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=space, trim_offsets=True
    )
    special = [word for word in ("<s>", "<pad>", "</s>", "<unk>") if word in ids]
    mask = [AddedToken("<mask>", lstrip=True, special=True)] if "<mask>" in ids else []
    tokenizer.add_special_tokens([*special, *mask])
    return str(tokenizer.to_str()).encode()
