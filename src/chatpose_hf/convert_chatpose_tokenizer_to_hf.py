"""Conversion of an original ChatPose or LLaVA tokenizer folder into a fast tokenizer with the same ids and texts.

The original used the slow SentencePiece LLaMA tokenizer of transformers 4.31, split the prompt at `<image>` and
tokenised the parts one by one. That class is gone, and the LLaMA class of transformers 5 gives other ids (it keeps
white space around added tokens and treats the leading blank differently). Here the old behaviour is written into
`tokenizer.json`, and into `ChatPoseTokenizer` what that file has no means for.
"""

import json
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

SEG_TOKEN = "[SEG]"  # name of the pose token in the published checkpoints
UNDERLINE = "\u2581"  # SentencePiece writes a blank this way
VERY_LONG = int(1e30)  # what transformers itself takes for "no limit"

# Unicode noncharacters, free for internal use. The decoder frames tokens of the base vocabulary (`</s>`) and added ones.
BASE_OPEN, BASE_CLOSE, ADDED_OPEN, ADDED_CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
BREAK = "\ufdd4\ufdd5"  # two, so that nobody types it: no piece reaches across, and it leaves no piece itself

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
    for key, default in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", None), ("additional", None)):
        key = "additional_special_tokens" if key == "additional" else f"{key}_token"
        in_map = key in special_map
        entry = special_map[key] if in_map else (config.get(key) or default)
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
    """The added tokens by id. Plain ones strip white space on both sides; the newer layout writes the flags out."""
    ids = _read_json(folder / "added_tokens.json")
    if ids:
        return {index: special.get(content, _Token(content)) for content, index in ids.items()}
    added = {}
    for index, item in config.get("added_tokens_decoder", {}).items():
        flags = (item.get("lstrip", False), item.get("rstrip", False), item.get("special", False))
        added[int(index)] = _Token(item["content"], *flags)
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
                merges.append((-sp.get_score(i), normal[left], normal[right], left, right))
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
    surfaces = [piece.replace(UNDERLINE, " ") for i, piece in enumerate(pieces)]
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


class ChatPoseTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer that also repeats how transformers 4.31 cut the first word after an added or special token.

    With `legacy: false` that version tokenised such a word with a blank in front and took the blank off the first
    piece: `two` became `t`, `w`, `o` (from `_t`, `w`, `o`) though alone it is `tw`, `o`; and a first piece that is in
    the vocabulary only with its blank became `<unk>`. A `tokenizer.json` cannot express this, as BPE cannot give two
    pieces one id. So such a word gets a `BREAK` behind its first piece before the text goes to the backend. Loaded as
    a plain `PreTrainedTokenizerFast` the same files differ from the original in such words only.
    """

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        split_special = kwargs.get("split_special_tokens")
        if kwargs.get("is_split_into_words") or (
            self.split_special_tokens if split_special is None else split_special
        ):
            return super()._encode_plus(text, text_pair, *args, **kwargs)
        origins: dict[str, list[int]] = {}
        marked, marked_pair = self._mark(text, origins), self._mark(text_pair, origins)
        output = super()._encode_plus(marked, marked_pair, *args, **kwargs)
        if origins and "offset_mapping" in output:
            self._restore_offsets(output, marked, marked_pair, origins)
        return output

    def _mark(self, text: Any, origins: dict[str, list[int]]) -> Any:
        """Set the breaks; for a changed text, `origins` gets the place in the old text of every place in the new."""
        if not isinstance(text, str):
            return type(text)(self._mark(item, origins) for item in text) if isinstance(text, (list, tuple)) else text
        added = sorted(self.added_tokens_decoder.values(), key=lambda token: -len(token.content))
        known = {token.content: token for token in added if token.normalized}  # none with legacy: true
        matches = list(re.finditer("|".join(re.escape(token.content) for token in added), text)) if known else []
        new, origin, done = "", [], 0
        for match, following in zip_longest(matches, matches[1:]):
            if (token := known.get(match.group())) is None:
                continue  # the image token, behind which a text begins anew
            start, end = match.end(), following.start() if following else len(text)
            part = text[start:end]
            if following and (nearby := known.get(following.group())) is not None and nearby.lstrip:
                part = part.rstrip()
            if token.rstrip:
                start += len(part) - len(part.lstrip())
                part = part.lstrip()
            word = re.split(f"[ {UNDERLINE}]", part, maxsplit=1)[0]
            cut = self._first_piece(word) if word else None
            if cut is not None:
                length, text_of_piece = cut
                new += text[done:start] + text_of_piece + BREAK
                origin += range(done, start)
                done = start + length
                same = len(text_of_piece) == length
                origin += [*range(start, done)] if same else [start] * len(text_of_piece)
                origin += [done] * len(BREAK)
        if not done:
            return text
        new += text[done:]
        origins[new] = [*origin, *range(done, len(text) + 1)]
        return new

    def _first_piece(self, word: str) -> tuple[int, str] | None:
        """Length of the first piece of a word and what to put in its place, or None if the word needs no break."""
        model = self.backend_tokenizer.model
        first, *rest = [token.value for token in model.tokenize(UNDERLINE + word)]
        first = first.removeprefix(UNDERLINE)
        if not first or [first, *rest] == [token.value for token in model.tokenize(word)]:
            return None
        return len(first), first if model.token_to_id(first) is not None else self.unk_token

    @staticmethod
    def _restore_offsets(output: BatchEncoding, text: Any, pair: Any, origins: dict[str, list[int]]) -> None:
        """Make the offsets count in the text that was given, not in the marked one."""
        samples = [(text, pair)] if isinstance(text, str) else [*zip_longest(text, pair or [])]
        rows = output["offset_mapping"]
        if isinstance(rows, list) and isinstance(rows[0], tuple):  # a single text has no batch dimension
            rows = [rows]
        numbers = output.get("overflow_to_sample_mapping", range(len(rows)))
        for row, number, encoding in zip(rows, numbers, output.encodings, strict=True):
            sample = samples[int(number)]
            sample = sample[0] if isinstance(sample[0], (list, tuple)) else sample  # a batch of pairs
            for j, (sequence, (start, end)) in enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True)):
                origin = None if sequence is None else origins.get(sample[sequence])
                if origin and isinstance(row, list):
                    row[j] = (origin[start], origin[end])
                elif origin:  # a tensor or an array
                    row[j, 0], row[j, 1] = origin[start], origin[end]


def convert_tokenizer(
    checkpoint_dir: str | Path, pose_token: str = "<POSE>", image_token: str = "<image>"
) -> ChatPoseTokenizer:
    """Convert the tokenizer of an original checkpoint.

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
        padding_side="left",
        model_max_length=VERY_LONG,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
