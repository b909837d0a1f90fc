"""Converts the tokenizer of an original ChatPose or LLaVA checkpoint into a fast one with the same ids and texts.

The original used the slow SentencePiece LLaMA tokenizer of transformers 4.31, split the prompt at `<image>` and
tokenised the parts one by one. That class is gone, and the LLaMA class of transformers 5 gives other ids (it keeps
white space around added tokens and treats the leading blank differently). Here the old behaviour is written into
`tokenizer.json`, and into `ChatPoseTokenizer` what that file has no means for.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .tokenization_chatpose import BREAK, UNDERLINE, ChatPoseTokenizer


SEG_TOKEN = "[SEG]"  # name of the pose token in the published checkpoints
VERY_LONG = int(1e30)  # what transformers itself takes for "no limit"

# Unicode noncharacters, free for internal use. The decoder frames tokens, those of the base vocabulary and added ones.
BASE_OPEN, BASE_CLOSE, ADDED_OPEN, ADDED_CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"

PROBES = (
    "Hello, world! It's the person's pose; 12345 67.",
    " a  b   c    ",
    "line\nbreak\r\n\ttab\n\n",
    "na\u00efve caf\u00e9 \u00dcber \u00e9 e\u0301 \ufb01 \uff21 \u00bd",
    "\U0001f600 \U0001f468\u200d\U0001f469 \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \u0928\u092e",
    "def f(x): return {'a': [1, 2]} # ==== ---- ....",
    "aaaa aaaaa lllll ........ ------ =========",
)


@dataclass
class _Token:
    """One token that the text is split at, and how it treats the white space beside it."""

    content: str
    lstrip: bool = True
    rstrip: bool = True
    special: bool = False


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> tuple[dict[str, str], dict[str, _Token]]:
    """Names and stripping of the special tokens. 4.31 let special_tokens_map.json win over tokenizer_config.json."""
    names: dict[str, str] = {}
    tokens: dict[str, _Token] = {}
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for key in (*defaults, "pad_token", "additional_special_tokens"):
        in_map = key in special_map
        entry = special_map[key] if in_map else (config.get(key) or defaults.get(key))
        for item in entry if isinstance(entry, list) else [entry] if entry else []:
            if isinstance(item, dict):
                token = _Token(item["content"], item.get("lstrip", False), item.get("rstrip", False), True)
            else:
                # A bare string from the map stayed a string in 4.31, and those strip white space on both sides; the
                # constructor turned a bare string from the config into a token that does not.
                strip = in_map or key == "additional_special_tokens"
                token = _Token(item, strip, strip, True)
            if not isinstance(entry, list):
                names[key] = token.content
            if token.content not in tokens or isinstance(item, dict):
                tokens[token.content] = token
    names.setdefault("pad_token", names["unk_token"])  # what the original sets at run time
    return names, tokens


def _added_tokens(folder: Path, config: dict[str, Any], special: dict[str, _Token]) -> dict[int, _Token]:
    """The added tokens by id. In 4.31 plain ones strip white space on both sides; later files have the flags."""
    ids = _read_json(folder / "added_tokens.json")
    if ids:
        return {index: special.get(content, _Token(content)) for content, index in ids.items()}
    added = {}
    for index, item in config.get("added_tokens_decoder", {}).items():
        is_special = item.get("special", False) or item["content"] in special
        added[int(index)] = _Token(item["content"], item.get("lstrip", False), item.get("rstrip", False), is_special)
        if item["content"] in special:  # a bare string in special_tokens_map.json means nothing here
            special[item["content"]] = added[int(index)]
    return added


def _bpe(sp: Any, unk_token: str) -> models.BPE:
    """The SentencePiece BPE model: every split of a piece into two pieces is a merge, the best piece merges first."""
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    marks = [i for i in vocab.values() if sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i)]
    normal = {piece: i for piece, i in vocab.items() if i not in set(marks)}
    if any(sp.get_score(i) != int(sp.get_score(i)) for i in normal.values()):
        raise ValueError("tokenizer.model is not a BPE model (its scores are no ranks); only LLaMA tokenizers convert")
    merges = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                # Of two ways to make a piece SentencePiece takes the leftmost: the one with the longer left half.
                merges.append((-sp.get_score(i), -cut, left, right))
    merges.sort()
    has_bytes = any(sp.is_byte(i) for i in marks)
    pairs = [(left, right) for *_, left, right in merges]
    return models.BPE(vocab=vocab, merges=pairs, unk_token=unk_token, fuse_unk=True, byte_fallback=has_bytes)


def _normalizer(legacy: bool, tokens: list[_Token]) -> normalizers.Normalizer:
    """The blank that SentencePiece puts in front of a text; real blanks, so that tokens can still strip them."""
    if legacy:  # every part between tokens gets one
        return normalizers.Prepend(" ")
    # Otherwise only a part at the very beginning gets one, and a part that begins with a blank anyway. The tokens
    # themselves go through the normalizer too when they are registered, and must come out unchanged.
    any_token = "|".join(re.escape(t.content) for t in tokens)
    steps = [normalizers.Replace(UNDERLINE, " "), normalizers.Replace(Regex(rf"\A(?!{any_token})"), " ")]
    keeping = "|".join(re.escape(t.content) for t in tokens if not t.rstrip)
    if keeping:
        steps.append(normalizers.Replace(Regex(f"(?<={keeping})(?= )"), " "))
    return normalizers.Sequence(steps)


def _decoder(base: list[str], added: list[str]) -> decoders.Decoder:
    """The text of ids as 4.31 wrote it, see the comments. Texts have no blank before `Fuse`, so blanks are ours."""
    frames = [(token, BASE_OPEN, BASE_CLOSE) for token in base] + [(t, ADDED_OPEN, ADDED_CLOSE) for t in added]
    steps = [decoders.Replace(Regex(rf"\A{re.escape(t)}\z"), before + t + after) for t, before, after in frames]
    text = f"[^{BASE_OPEN}{BASE_CLOSE}{ADDED_OPEN}{ADDED_CLOSE}]"
    starts = rf"(?:\A|(?<={BASE_CLOSE}|{ADDED_CLOSE} ))"
    not_after_added = f"(?<=[^{ADDED_CLOSE}])(?={ADDED_OPEN})"
    opening = "|".join(f"{before}(?={re.escape(t)}{after})" for t, before, after in frames)
    closing = "|".join(f"(?<={before}{re.escape(t)}){after}" for t, before, after in frames)
    steps += [
        decoders.ByteFallback(),
        decoders.Fuse(),
        # one blank on either side of an added token
        decoders.Replace(Regex(rf"(?<={ADDED_CLOSE})(?!\z)|{not_after_added}"), " "),
        # a text in front of a token of the base vocabulary starts with a blank (sic), every other text without
        decoders.Replace(Regex(f"{starts}(?!{UNDERLINE})(?={text}+{BASE_OPEN})"), " "),
        decoders.Replace(Regex(f"{starts}{UNDERLINE}(?!{text}*{BASE_OPEN})"), ""),
        decoders.Replace(UNDERLINE, " "),
        # Only frames around a token go, so that nothing that somebody typed gets lost.
        decoders.Replace(Regex(f"{opening}|{closing}"), ""),
    ]
    return decoders.Sequence(steps)


def _check(tokenizer: Tokenizer, sp: Any, contents: list[str]) -> None:
    """Compare with SentencePiece on fixed texts and on all pieces of the vocabulary."""
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size()) if not (sp.is_control(i) or sp.is_unknown(i))]
    surfaces = [piece.replace(UNDERLINE, " ") for piece in pieces]
    joined = [" ".join(surfaces[i : i + 200]) for i in range(0, len(surfaces), 200)]
    for probe in (*PROBES, *joined):
        for content in contents:
            probe = probe.replace(content, "")
        ids = tokenizer.encode(probe, add_special_tokens=False).ids
        if ids != sp.encode(probe) or sp.decode(ids) != probe or tokenizer.decode(ids) != probe:
            raise ValueError(
                "tokenizer.model cannot be converted: it is no plain BPE model (identity normalisation, white space "
                f"kept, blank put in front); it differs on {probe[:80]!r}"
            )


def has_pose_token(checkpoint_dir: str | Path, pose_token: str = "<POSE>") -> bool:
    """Whether the checkpoint's tokenizer knows a pose token already: ChatPose's does, a plain LLaVA's does not."""
    folder = Path(checkpoint_dir)
    added = _added_tokens(folder, _read_json(folder / "tokenizer_config.json"), {})
    return any(token.content in (SEG_TOKEN, pose_token) for token in added.values())


def convert_tokenizer(
    checkpoint_dir: str | Path, pose_token: str = "<POSE>", image_token: str = "<image>"
) -> ChatPoseTokenizer:
    """Converts the tokenizer of an original checkpoint.

    The ids of the checkpoint stay. `[SEG]` is renamed to `pose_token`; a checkpoint without it (plain LLaVA) gets
    `pose_token` as a new last token. Then follows `image_token`, unless the checkpoint has it already. The prompt is
    to be given whole: the tokenizer itself splits it at `image_token` as the original code does. Saved with
    `save_pretrained`, it loads through `AutoTokenizer` with the same results.

    Args:
        checkpoint_dir: folder with `tokenizer.model`, `tokenizer_config.json` and, where the checkpoint has them,
            `special_tokens_map.json` and `added_tokens.json`.
        pose_token: name for the pose token, not special: decoding keeps it.
        image_token: name of the image placeholder, special.

    Returns:
        The tokenizer. It pads on the left and has no length limit (the 512 of the original checkpoints cut prompts).

    Raises:
        ImportError: the package sentencepiece is not installed.
        FileNotFoundError: there is no `tokenizer.model`.
        ValueError: `tokenizer.model` is of another kind than LLaMA's, or the added tokens contradict it.

    Source:
        `LlamaTokenizer` and `PreTrainedTokenizer` of transformers 4.31.0; `tokenizer_image_token` of LLaVA.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            "Reading tokenizer.model needs the package sentencepiece: pip install chatpose_hf[convert]"
        ) from error

    folder = Path(checkpoint_dir)
    model_file = folder / "tokenizer.model"
    if not model_file.is_file():
        raise FileNotFoundError(f"no tokenizer.model in {folder}")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    config = _read_json(folder / "tokenizer_config.json")
    names, special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    added = _added_tokens(folder, config, special)

    contents = {token.content for token in added.values()}
    if pose_token in contents and SEG_TOKEN in contents and pose_token != SEG_TOKEN:
        raise ValueError(f"the checkpoint has both {SEG_TOKEN} and {pose_token}")
    for index, token in added.items():
        if token.content in (SEG_TOKEN, pose_token):
            added[index] = _Token(pose_token, token.lstrip, token.rstrip)

    size = sp.get_piece_size()
    base = {sp.id_to_piece(i): i for i in range(size)}
    tokens = [token for content, token in special.items() if content in base]
    for index, token in sorted(added.items()):
        if base.get(token.content, len(base)) != index:
            raise ValueError(f"added token {token.content!r} has id {index}, which does not follow {len(base) - 1}")
        if index >= size:  # the newer layout lists tokens of the base vocabulary, too
            base[token.content] = index
            tokens.append(token)
        elif token.content not in special:
            tokens.append(token)
    # special tokens without an id got the next one in 4.31; then ours
    renamed = {SEG_TOKEN, pose_token}
    new = [token for content, token in special.items() if content not in base and content not in renamed]
    known = {token.content for token in (*tokens, *new)}
    new += [_Token(pose_token)] if pose_token not in known else []
    new += [_Token(image_token)] if image_token not in known else []
    for token in new:
        if token.content in base:
            raise ValueError(f"{token.content!r} is a piece of the vocabulary already")
        base[token.content] = len(base)
    tokens += new
    texts = [token for token in tokens if token.content != image_token]

    legacy = bool(config.get("legacy", True))
    backend = Tokenizer(_bpe(sp, names["unk_token"]))
    backend.normalizer = _normalizer(legacy, texts)
    blanks = pre_tokenizers.Metaspace(replacement=UNDERLINE, prepend_scheme="never", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(BREAK, "removed"), blanks])
    inside = [token.content for token in tokens if base[token.content] < size]
    backend.decoder = _decoder(inside, [token.content for token in tokens if base[token.content] >= size])
    for token in sorted(tokens, key=lambda token: base[token.content]):
        image = token.content == image_token
        # The image token and, with `legacy`, all tokens split the raw text, so that every part gets normalised on its
        # own. The others are looked for in the normalised part, which thus knows where it begins.
        strip = {} if image else {"lstrip": token.lstrip, "rstrip": token.rstrip}
        backend.add_tokens(
            [AddedToken(token.content, special=image or token.special, normalized=not (image or legacy), **strip)]
        )
        if backend.token_to_id(token.content) != base[token.content]:
            raise ValueError(f"could not give {token.content!r} the id {base[token.content]}")
    _check(backend, sp, [token.content for token in tokens])

    before = [names["bos_token"]] if config.get("add_bos_token", True) else []
    after = [names["eos_token"]] if config.get("add_eos_token", False) else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(t, base[t]) for t in dict.fromkeys((*before, *after))],
        )
    return ChatPoseTokenizer(
        tokenizer_object=backend,
        **names,
        first_piece_breaks=not legacy,
        padding_side="left",
        model_max_length=VERY_LONG,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
