"""Tokenizer of converted original checkpoints, for the one rule of theirs that `tokenizer.json` has no means for."""

import re
from itertools import zip_longest
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast


UNDERLINE = "\u2581"  # SentencePiece writes a blank this way
# Unicode noncharacters, free for internal use; two, so that nobody types them. No piece reaches across a break.
BREAK = "\ufdd4\ufdd5"


class ChatPoseTokenizer(PreTrainedTokenizerFast):
    """
    Fast tokenizer of converted original checkpoints: it also cuts the first word after a token as transformers 4.31.

    With `legacy: false` that version tokenised such a word with a blank in front and took the blank off the first
    piece: `two` became `t`, `w`, `o` (from `_t`, `w`, `o`) though alone it is `tw`, `o`; and a first piece that is in
    the vocabulary only with its blank became `<unk>`. A `tokenizer.json` cannot express this, as BPE cannot give two
    pieces one id. So such a word gets a `BREAK` behind its first piece before the text goes to the backend, whose
    first pre-tokenizer takes it out. Loaded as a plain `PreTrainedTokenizerFast` the same files differ from the
    original in such words only.

    Args:
        first_piece_breaks (`bool`, *optional*, defaults to `False`):
            Whether to do so; needs a `tokenizer.json` that splits at `BREAK`. Kept in tokenizer_config.json.
    """

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        split_special = kwargs.get("split_special_tokens")
        split_special = self.split_special_tokens if split_special is None else split_special
        if not self.init_kwargs.get("first_piece_breaks") or kwargs.get("is_split_into_words") or split_special:
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
        known = {token.content: token for token in added if token.normalized}
        text = text.replace(UNDERLINE, " ")  # as the normalizer does
        matches = list(re.finditer("|".join(re.escape(token.content) for token in added), text))
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
            word = part.split(" ", maxsplit=1)[0]
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


ChatPoseTokenizer.register_for_auto_class("AutoTokenizer")
