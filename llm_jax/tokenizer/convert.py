"""A SentencePiece model as the `tokenizer.json` that gives the same ids, for readers that know only that.

What differs between the two libraries, and what is done about it:

1. BPE: SentencePiece joins any two neighbours that spell a piece, the best score first; `tokenizers` has
   a list of pairs. Every split of a piece into two pieces becomes a pair, in the order of scores.
2. Spaces: SentencePiece turns them into U+2581 and may add one in front, once a text; a Metaspace that
   prepends to the first part does, a normaliser that prepends would do so after every added token.
3. Pieces that are matched first (user-defined ones) become added tokens, if they are longer than a
   character; a single character needs no such thing when no other piece holds it.
4. Unigram: `tokenizers` would match control and byte pieces in text; they get a score that never wins.

What cannot be had: SentencePiece adds 32-bit scores, `tokenizers` 64-bit ones, so that ties between equal
segmentations may be broken the other way. `probe.differences` finds whether a model has such texts.
"""

import json
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import specials
from llm_jax.tokenizer.sentencepiece import (
    SPACE_MARK,
    PieceType,
    SentencePieceTokenizer,
    hide_markers,
    parse_model,
)

NEVER = 100.0  # times the smallest score: below the sum of any text that spells the piece


def to_tokenizer_json(tokenizer: SentencePieceTokenizer) -> bytes:
    """The contents of a `tokenizer.json` for the same text to the same ids; see the head of this file.

    Raises:
      DataError: the model uses something that has no counterpart; the message names it.
    """
    proto = parse_model(tokenizer.files[tokenizer_files.SENTENCEPIECE], "tokenizer.model")
    declared = specials.declared(tokenizer.files)
    hide_markers(proto, declared.special)
    _require_convertible(proto)
    kinds = type(proto.trainer_spec).ModelType
    is_bpe = proto.trainer_spec.model_type == kinds.BPE
    built = tokenizers.Tokenizer(_bpe(proto) if is_bpe else _unigram(proto))
    _set_spaces(built, proto)
    _add_tokens(built, proto, tokenizer.special_ids)
    _add_declared(built, declared, len(proto.pieces))
    if tokenizer.bos_id >= 0:  # how every document begins in training
        bos = tokenizer.piece_of(tokenizer.bos_id)
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_id)],
        )
    text = built.to_str(pretty=False)
    return json.dumps(json.loads(text), ensure_ascii=False, indent=1).encode() + b"\n"


def _require_convertible(proto: Any) -> None:
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = type(spec).ModelType
    unused = [piece.piece for piece in proto.pieces if piece.type == PieceType.UNUSED]
    problem = ""
    if spec.model_type not in (kinds.BPE, kinds.UNIGRAM):
        problem = f"model_type={kinds.Name(spec.model_type).lower()}"
    elif spec.treat_whitespace_as_suffix:
        problem = "treat_whitespace_as_suffix"
    elif not normalizer.escape_whitespaces:
        problem = "escape_whitespaces=false"
    elif unused:
        problem = f"the unused piece {unused[0]!r}"
    if problem:
        raise DataError(
            f"tokenizer.model: {problem} has no counterpart in tokenizer.json; export with --no-tokenizer"
        )


def _bpe(proto: Any) -> models.BPE:
    ids = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    usable = {piece.piece for piece in proto.pieces if piece.type == PieceType.NORMAL}
    learned = [(-piece.score, id, piece.piece) for id, piece in enumerate(proto.pieces)
               if piece.type == PieceType.NORMAL and len(piece.piece) > 1]  # fmt: skip
    merges: list[tuple[str, str]] = []
    for _, _, piece in sorted(learned):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((left, right))
            elif (
                len(piece) == 2
            ):  # two characters, which SentencePiece joins though one is no piece
                lacking = left if left not in usable else right
                raise DataError(
                    f"tokenizer.model: {piece!r} is a piece, but its character {lacking!r} is none, which "
                    "tokenizer.json cannot say; export with --no-tokenizer"
                )
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    return models.BPE(
        vocab=ids,
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> models.Unigram:
    lowest = min(piece.score for piece in proto.pieces if piece.type == PieceType.NORMAL)
    never = min(lowest, -1.0) * NEVER
    scored = [
        (piece.piece, piece.score if _in_text(piece) else never)
        for piece in proto.pieces
    ]  # fmt: skip
    return models.Unigram(
        scored, proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback
    )


def _in_text(piece: Any) -> bool:
    """Whether the model itself matches the piece, not the added tokens in front of it."""
    single = piece.type == PieceType.USER_DEFINED and len(piece.piece) == 1
    return piece.type == PieceType.NORMAL or single


def _set_spaces(built: tokenizers.Tokenizer, proto: Any) -> None:
    """Normaliser, pre-tokeniser and decoder."""
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    back: list[Any] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if spec.add_dummy_prefix and spec.remove_extra_whitespaces:
        # a Metaspace would add none to a text whose first characters were removed
        steps.append(normalizers.Prepend(SPACE_MARK))
    elif spec.add_dummy_prefix:
        # nor to a text that begins with one
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE_MARK}"), SPACE_MARK * 2))
        built.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE_MARK, prepend_scheme="first", split=False
        )
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    built.normalizer = normalizers.Sequence(steps)
    built.decoder = decoders.Sequence(back)


def _add_tokens(built: tokenizers.Tokenizer, proto: Any, special: frozenset[int]) -> None:
    """Control symbols, and pieces that are matched before the model runs. Their ids stay."""
    inside = "".join(piece.piece + " " for piece in proto.pieces if piece.type == PieceType.NORMAL)
    charsmap = proto.normalizer_spec.precompiled_charsmap
    rewritten = normalizers.Precompiled(charsmap).normalize_str if charsmap else str
    for id, piece in enumerate(proto.pieces):
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN) or id in special:
            built.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == PieceType.USER_DEFINED and (
            len(piece.piece) > 1 or piece.piece in inside or rewritten(piece.piece) != piece.piece
        ):
            # one that holds spaces can be found only after they were turned into marks
            marked = SPACE_MARK in piece.piece
            built.add_tokens([AddedToken(piece.piece, normalized=marked)])


def _add_declared(
    built: tokenizers.Tokenizer,
    declared: specials.Declared,
    num_pieces: int,
) -> None:
    """Tokens that companion files add behind the model's own."""
    for id, piece in sorted(declared.added.items()):
        if id < num_pieces:
            continue
        built.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
        if built.token_to_id(piece) != id:
            raise DataError(
                f"added token {piece!r} has id {id}, but tokenizer.json can only give it "
                f"{built.token_to_id(piece)}: ids before it belong to no piece; export with --no-tokenizer"
            )
