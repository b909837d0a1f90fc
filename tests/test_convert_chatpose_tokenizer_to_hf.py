"""The converted tokenizer against the original's ids and texts."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import OFFICIAL
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatpose_hf import ChatPoseProcessor, ChatPoseTokenizer
from chatpose_hf.convert_chatpose_tokenizer_to_hf import convert_tokenizer


if not OFFICIAL.is_dir():
    pytest.skip(f"needs the original's fixture at {OFFICIAL}", allow_module_level=True)
pytest.importorskip("sentencepiece", reason="needs the extra `convert`")

GOLDEN = json.loads((OFFICIAL / "golden.json").read_text(encoding="utf-8"))
TOKENIZATION = GOLDEN["tokenization"]
FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def build(folder: Path, added: dict | None = None, **config) -> Path:
    """A copy of the fixture's tokenizer folder with other added tokens and settings."""
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(OFFICIAL / "checkpoint" / name, folder / name)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def reload(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "chatpose"}')
    return AutoTokenizer.from_pretrained(folder)


def renamed(text: str) -> str:
    return text.replace("[SEG]", "<POSE>")


def official(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [-200 if i == image else i for i in tokenizer(renamed(text)).input_ids]


@pytest.fixture(scope="module")
def tokenizer() -> ChatPoseTokenizer:
    return convert_tokenizer(OFFICIAL / "checkpoint")


@pytest.mark.parametrize("saved", [False, True], ids=["converted", "reloaded"])
@pytest.mark.parametrize("name", TOKENIZATION["variants"])
def test_ids_of_every_variant(name: str, saved: bool, tmp_path: Path) -> None:
    variant = TOKENIZATION["variants"][name]
    converted = convert_tokenizer(build(tmp_path / "old", variant["added_tokens"], legacy=variant["legacy"]))
    converted = reload(converted, tmp_path / "new") if saved else converted
    assert isinstance(converted, ChatPoseTokenizer)
    assert converted.convert_tokens_to_ids("<POSE>") == variant["added_tokens"]["[SEG]"]
    assert (
        converted.convert_tokens_to_ids("<image>") == len(converted) - 1 == max(variant["added_tokens"].values()) + 1
    )
    for text, ids in zip(TOKENIZATION["strings"], variant["ids"], strict=True):
        assert official(converted, text) == ids, text


@pytest.mark.parametrize("saved", [False, True], ids=["converted", "reloaded"])
def test_texts(saved: bool, tokenizer: ChatPoseTokenizer, tmp_path: Path) -> None:
    converted = reload(tokenizer, tmp_path / "new") if saved else tokenizer
    for case in GOLDEN["decoding"]:
        assert converted.decode(case["ids"]) == renamed(case["text"])
        assert converted.decode(case["ids"], skip_special_tokens=True) == renamed(case["text_skip_special"])


def test_history_of_the_chat_program(converted) -> None:
    """An answer goes back into the prompt as the original's chat program wrote it."""
    processor = ChatPoseProcessor.from_pretrained(converted)
    for case in GOLDEN["decoding"]:
        answer = processor.tokenizer.decode(case["ids"], skip_special_tokens=True)
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        text = processor.apply_chat_template([*chat, {"role": "user", "content": "b"}], add_generation_prompt=True)
        history = text.split("USER: a ASSISTANT: ")[1].removesuffix("</s>USER: b ASSISTANT:")
        assert history == case["chat_text"].removeprefix("<s> ")


@pytest.mark.parametrize("name", GOLDEN["samples"])
def test_samples(name: str, tokenizer: ChatPoseTokenizer) -> None:
    sample = GOLDEN["samples"][name]
    assert official(tokenizer, sample["prompt"]) == sample["input_ids"]
    assert tokenizer.decode(sample["generated_ids"]) == renamed(sample["text"])
    for training in (sample["train_conversation"], sample["train_conversation_chat_system"]):
        assert official(tokenizer, training["conversation"]) == training["input_ids"]


def test_plain_texts_survive_a_round_trip(tokenizer: ChatPoseTokenizer) -> None:
    for text in ("It is fine.", " two  blanks ", "line\nbreak", "na\u00efve \U0001f600", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids) == "<s>" + text
    odd = "\ufdd0\ufdd1 \ufdd2\ufdd3 \ufdd4"  # what the decoder uses itself; nothing gets lost
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True).strip() == odd


def test_first_word_after_a_token(tokenizer: ChatPoseTokenizer, tmp_path: Path) -> None:
    """The original cut it with a blank in front; the plain class cannot, and differs there only."""

    def pieces(with_class: PreTrainedTokenizerFast, text: str) -> list[str]:
        return with_class.convert_ids_to_tokens(with_class(text, add_special_tokens=False).input_ids)

    text = "<im_end>\ntwo two"
    assert pieces(tokenizer, text) == ["<im_end>", "t", "w", "o", "\u2581t", "w", "o"]
    assert pieces(tokenizer, "<im_end>\ncan you")[1] == "<unk>"  # a piece with its blank only
    tokenizer.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert pieces(plain, text) == ["<im_end>", "tw", "o", "\u2581t", "w", "o"]


@pytest.mark.parametrize("legacy", [False, True])
def test_offsets(legacy: bool, tmp_path: Path) -> None:
    converted = convert_tokenizer(build(tmp_path / "old", legacy=legacy))
    first = "USER: <im_start><image><im_end>\n two\u2581can\n</s> can you, \U0001f600 <POSE> ."
    pairs = [[first, "<im_end> can two"], ["a  b", "c"]]
    for texts, output in (
        ([[first]], converted(first, return_offsets_mapping=True)),
        (pairs, converted(pairs, return_offsets_mapping=True)),
        (pairs, converted(*zip(*pairs, strict=True), return_offsets_mapping=True, padding=True, return_tensors="pt")),
    ):
        mapping = output["offset_mapping"]
        mapping = [mapping] if len(texts) == 1 else [[tuple(map(int, span)) for span in row] for row in mapping]
        for row, sample, encoding in zip(mapping, texts, output.encodings, strict=True):
            last = {}
            for span, token, sequence in zip(row, encoding.tokens, encoding.sequence_ids, strict=True):
                if sequence is None:
                    continue
                assert last.get(sequence, (0, 0))[0] <= span[0] <= span[1] <= len(sample[sequence])
                last[sequence] = span
                surface = token.removeprefix("\u2581")
                if not token.startswith("<0x") and token != "<unk>":
                    assert surface in sample[sequence][slice(*span)]
                if token == "<unk>":
                    assert sample[sequence][slice(*span)] == "can"


def test_settings(tokenizer: ChatPoseTokenizer, tmp_path: Path) -> None:
    for converted in (tokenizer, reload(tokenizer, tmp_path / "new")):
        assert (converted.padding_side, converted.pad_token, converted.pad_token_id) == ("left", "<unk>", 0)
        assert converted.model_max_length > 10**9
        assert (converted.bos_token_id, converted.eos_token_id, converted.unk_token_id) == (1, 2, 0)
        batch = converted(["a b c d", "a"], padding=True)
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["input_ids"][1][0] == 0
        assert batch["attention_mask"][1][-2:] == [1, 1]
        assert len(converted("a " * 3000).input_ids) > 3000
        assert converted("a", add_special_tokens=False).input_ids == converted("a").input_ids[1:]
        assert converted("a", "a").input_ids == converted("a").input_ids * 2
        assert converted.decode([900, 903], skip_special_tokens=True) == "<POSE>"
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "ChatPoseTokenizer"


def test_bos_can_be_off(tmp_path: Path) -> None:
    converted = reload(convert_tokenizer(build(tmp_path / "old", add_bos_token=False)), tmp_path / "new")
    assert converted("It is").input_ids == [535, 272]
    converted = reload(convert_tokenizer(build(tmp_path / "old2", add_eos_token=True)), tmp_path / "new2")
    assert converted("It is").input_ids == [1, 535, 272, 2]


def test_plain_llava(tmp_path: Path) -> None:
    folder = build(tmp_path / "old")
    (folder / "added_tokens.json").unlink()
    converted = convert_tokenizer(folder)
    assert converted.convert_tokens_to_ids(["<POSE>", "<image>"]) == [900, 901]
    assert converted("It is <POSE> .").input_ids == [1, 535, 272, 900, 821]


def test_newer_layout(tmp_path: Path) -> None:
    """`added_tokens_decoder` says itself who strips."""
    entry = {"normalized": False, "single_word": False}
    decoder = {
        "1": {"content": "<s>", "lstrip": False, "rstrip": False, "special": True, **entry},
        "900": {"content": "[SEG]", "lstrip": True, "rstrip": True, "special": False, **entry},
        "901": {"content": "<image>", "lstrip": False, "rstrip": False, "special": True, **entry},
    }
    folder = build(tmp_path / "old", added_tokens_decoder=decoder)
    (folder / "added_tokens.json").unlink()
    converted = convert_tokenizer(folder)
    assert len(converted) == 902
    assert converted.convert_tokens_to_ids("<image>") == 901
    assert converted("It is <POSE> .").input_ids == [1, 535, 272, 900, 821]


def test_more_added_tokens(tmp_path: Path) -> None:
    added = {"<pad>": 900, "<im_start>": 901, "[SEG]": 902, "[MORE]": 903}
    folder = build(tmp_path / "old", added)
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    converted = reload(convert_tokenizer(folder), tmp_path / "new")
    tokens = ["<pad>", "<im_start>", "<POSE>", "[MORE]", "<image>"]
    assert converted.convert_tokens_to_ids(tokens) == [900, 901, 902, 903, 904]
    assert converted.pad_token_id == 900
    assert converted.decode([900, 902, 903, 535], skip_special_tokens=True) == "<POSE> [MORE] It"


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not follow"):
        convert_tokenizer(build(tmp_path / "gap", {"[SEG]": 905}))
    with pytest.raises(ValueError, match="both"):
        convert_tokenizer(build(tmp_path / "both", {"[SEG]": 900, "<POSE>": 901}))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        convert_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"chatpose_hf\[convert\]"):
        convert_tokenizer(OFFICIAL / "checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "not a BPE model"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "differs on"),
        ({"model_type": "bpe", "remove_extra_whitespaces": True}, "differs on"),
        ({"model_type": "bpe", "add_dummy_prefix": False}, "differs on"),
    ],
)
def test_other_models_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    import sentencepiece

    folder = build(tmp_path / "old", {})
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TOKENIZATION["strings"]))
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        minloglevel=2,
        **{**settings, **options},
    )
    with pytest.raises(ValueError, match=message):
        convert_tokenizer(folder)
