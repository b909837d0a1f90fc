"""LLaVA's instruction data: conversations as rows, pictures kept as they are, and a large file read in pieces."""

import io
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.data import llava
from chatpose_hf.data.llava import LlavaInstruct
from chatpose_hf.data.rows import validate_row


def jpeg(seed=0, size=(40, 30), mode="RGB"):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def chat(*values, first="human"):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write(folder, entries, place=""):
    put(folder, f"{place}llava_v1_5_mix665k.json", json.dumps(entries).encode())
    return LlavaInstruct(folder)


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "text": None}
COCO = "coco/train2017/000000033471.jpg"


def test_rows_when_the_file_has_pictures_and_texts_then_each_is_a_conversation(tmp_path):
    put(tmp_path, COCO, jpeg(1))
    put(tmp_path, "vg/VG_100K/7.jpg", jpeg(2, mode="L"))
    source = write(
        tmp_path,
        [
            {
                "id": "000000033471",
                "image": COCO,
                "conversations": chat("<image>\nWhat colour?", "Red.", "Sure?", "Yes."),
            },
            {
                "id": "000000033471",
                "image": "vg/VG_100K/7.jpg",
                "conversations": chat("Who is it?\n<image>", "A man."),
            },
            {"id": "wR1aX_0", "conversations": chat("Hi, {x}", 'A "quoted"\nline, é')},
            {"id": 3, "image": COCO, "conversations": chat("<image>", "A street.")},
        ],
    )
    assert source.parts() == ["train/0000"]
    rows = list(source)
    for row in rows:
        validate_row(row)
    assert source.skipped == {}
    assert [row["id"] for row in rows] == [
        "000000/000000033471",
        "000001/000000033471",
        "000002/wR1aX_0",
        "000003/3",
    ]
    assert {row["task"] for row in rows} == {"vqa"}
    assert [row["messages"] for row in rows] == [
        [
            {"role": "user", "content": [IMAGE, text("What colour?")]},
            {"role": "assistant", "content": [text("Red.")]},
            {"role": "user", "content": [text("Sure?")]},
            {"role": "assistant", "content": [text("Yes.")]},
        ],
        [
            {"role": "user", "content": [IMAGE, text("Who is it?")]},
            {"role": "assistant", "content": [text("A man.")]},
        ],
        [
            {"role": "user", "content": [text("Hi, {x}")]},
            {"role": "assistant", "content": [text('A "quoted"\nline, é')]},
        ],
        [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [text("A street.")]}],
    ]
    images = [[image["bytes"] for image in row["images"]] for row in rows]
    assert images == [[jpeg(1)], [jpeg(2, mode="L")], [], [jpeg(1)]]
    ends = ["COCO 2017 (Flickr's terms)", "Visual Genome (CC BY 4.0)", "no picture", "COCO 2017 (Flickr's terms)"]
    for row, end in zip(rows, ends, strict=True):
        assert row["licence"].startswith("LLaVA-v1.5-mix665k: ")
        assert row["licence"].endswith(end)


def test_rows_when_turns_have_no_partner_then_they_are_left_out(tmp_path):
    source = write(
        tmp_path,
        [
            {"id": "a", "conversations": chat("I am here.", "Where?", "Here.", first="gpt")},
            {"id": "b", "conversations": chat("One?", "1", "Two?")},
        ],
    )
    texts = [[message["content"][0]["text"] for message in row["messages"]] for row in source]
    assert texts == [["Where?", "Here."], ["One?", "1"]]
    assert source.skipped == {}


def test_rows_when_the_file_is_in_llava_dataset_then_pictures_are_still_seen_from_the_folder(tmp_path):
    put(tmp_path, COCO, jpeg())
    source = write(
        tmp_path, [{"id": "a", "image": COCO, "conversations": chat("<image>\nWhat?", "This.")}], "llava_dataset/"
    )
    assert [row["images"][0]["bytes"] for row in source] == [jpeg()]


GOOD = {"id": "good", "conversations": chat("Well?", "Well.")}
UNUSABLE = {
    "no conversation": ({"id": "x"}, "no conversation of human and gpt"),
    "a text": ({"conversations": "hello"}, "no conversation of human and gpt"),
    "unknown speaker": ({"conversations": [{"from": "bard", "value": "x"}]}, "no conversation of human and gpt"),
    "speaker is a list": ({"conversations": [{"from": [], "value": "x"}]}, "no conversation of human and gpt"),
    "no value": ({"conversations": [{"from": "human"}]}, "no conversation of human and gpt"),
    "twice the same": (
        {"conversations": [*chat("a"), *chat("b", "c")]},
        "two turns of one speaker in a row",
    ),
    "no answer": ({"conversations": chat("a")}, "no question with an answer"),
    "empty": ({"conversations": []}, "no question with an answer"),
    "question is a number": ({"conversations": chat(3, "a")}, "no question with an answer"),
    "answer is a number": ({"conversations": chat("a", 3)}, "`messages`: expected a text in a text part"),
    "empty answer": ({"conversations": chat("a", "")}, "`messages`: expected a text in a text part"),
    "pose in a text": (
        {"conversations": chat("a", "It is <POSE>.")},
        "`messages`: expected no `<image>` or `<POSE>` in a text part",
    ),
    "placeholder without picture": (
        {"conversations": chat("<image>\na", "b")},
        "`messages`: expected no `<image>` or `<POSE>` in a text part",
    ),
    "second placeholder": (
        {"image": COCO, "conversations": chat("<image>\na <image>", "b")},
        "`messages`: expected no `<image>` or `<POSE>` in a text part",
    ),
    "placeholder late": (
        {"image": COCO, "conversations": chat("a", "b", "<image>", "c")},
        "a picture, but no <image> in the first question",
    ),
    "half a surrogate pair": ({"conversations": chat("a", "\ud83d")}, "`messages`: expected text that UTF-8 can write"),
    "missing": ({"image": "gqa/images/1.jpg", "conversations": chat("<image>", "c")}, "missing image of gqa"),
    "missing elsewhere": ({"image": "x/1.jpg", "conversations": chat("<image>", "c")},
                          "missing image of other folders"),
    "a folder": ({"image": "coco/train2017", "conversations": chat("<image>", "c")}, "missing image of coco"),
    "a dot": ({"image": ".", "conversations": chat("<image>", "c")}, "missing image of other folders"),
    "a long name": ({"image": "vg/" + "x" * 3000, "conversations": chat("<image>", "c")}, "missing image of vg"),
    "a name that is no text": ({"image": "vg/\ud83d.jpg", "conversations": chat("<image>", "c")}, "missing image of vg"),
    "out of the folder": (
        {"image": "coco/../../secret.jpg", "conversations": chat("<image>", "c")},
        "refused name of a picture",
    ),
    "absolute": ({"image": "/etc/passwd", "conversations": chat("<image>", "c")}, "refused name of a picture"),
    "several": ({"image": [COCO, COCO], "conversations": chat("<image>", "c")}, "refused name of a picture"),
    "cut off": ({"image": "coco/cut.jpg", "conversations": chat("<image>", "c")}, "damaged image of coco"),
    "no picture": ({"image": "vg/text.jpg", "conversations": chat("<image>", "c")}, "damaged image of vg"),
    "narrow": ({"image": "vg/line.jpg", "conversations": chat("<image>", "c")}, "a picture narrower than 20 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNUSABLE)
def test_rows_when_an_entry_is_unusable_then_it_alone_is_skipped_with_a_reason(fault, tmp_path):
    folder = tmp_path / "data"
    put(tmp_path, "secret.jpg", jpeg())
    put(folder, COCO, jpeg())
    put(folder, "coco/cut.jpg", jpeg()[:-60])
    put(folder, "vg/text.jpg", b"<html>404</html>")
    put(folder, "vg/line.jpg", jpeg(size=(210, 10)))
    entry, reason = UNUSABLE[fault]
    source = write(folder, [GOOD, {"id": "bad", **entry}, GOOD])
    assert [row["id"] for row in source] == ["000000/good", "000002/good"]
    assert source.skipped == {reason: 1}


def test_decode_picture_when_it_is_a_jpeg_that_is_cut_off_anywhere_then_refuses():
    content = jpeg(size=(200, 150))
    assert llava._decode_picture(content) == (200, 150)
    for length in range(0, len(content) - 1, 501):
        with pytest.raises(ValueError, match="cannot read the picture"):
            llava._decode_picture(content[:length])


def many(count):
    return [
        {"id": f"{index}", "conversations": chat(f"{index}?", f'{{[\\"é {index} \u2028 😀]}}')}
        for index in range(count)
    ]


def test_parts_when_there_are_many_entries_then_each_is_read_once(tmp_path):
    source = write(tmp_path, many(5002))
    assert source.parts() == ["train/0000", "train/0001"]
    ids = [[row["id"] for row in source.rows(part)] for part in source.parts()]
    assert [len(names) for names in ids] == [5000, 2]
    assert ids[0] + ids[1] == [f"{index:06d}/{index}" for index in range(5002)]


def test_read_part_when_the_object_is_new_or_from_another_process_then_rows_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "_ENTRIES_PER_PART", 3)
    source = write(tmp_path, many(8))
    copy = pickle.loads(pickle.dumps(source))
    expected = list(source.rows(source.parts()[2]))
    assert [row["id"] for row in expected] == ["000006/6", "000007/7"]
    assert list(LlavaInstruct(tmp_path).rows("train/0002")) == expected
    assert list(copy.rows("train/0002")) == expected
    listed = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(llava, "_find_entries", lambda path: pytest.fail("looked through the file again"))
    assert list(listed.rows("train/0002")) == expected


def test_parts_when_entries_are_long_then_a_part_has_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "_MAX_PART", 1000)
    source = write(tmp_path, [{"id": index, "conversations": chat("a", "b" * 700)} for index in range(3)])
    assert len(source.parts()) == 3
    assert [row["id"] for row in source] == ["000000/0", "000001/1", "000002/2"]


@pytest.mark.parametrize("block", [1, 7, 64, 2**22])
@pytest.mark.parametrize("form", ["ascii", "utf-8", "indented", "mark", "tight"])
def test_find_entries_when_blocks_end_anywhere_then_offsets_are_the_entries(form, block, tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "_BLOCK", block)
    entries = many(4)
    content = {
        "ascii": json.dumps(entries).encode(),
        "utf-8": json.dumps(entries, ensure_ascii=False).encode(),
        "indented": json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", "\r\n").encode() + b"\n\n",
        "mark": json.dumps(entries).encode("utf-8-sig"),
        "tight": json.dumps(entries, separators=(",", ":")).encode(),
    }[form]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    pieces = [content[start:end] for start, end in llava._find_entries(path)]
    assert [json.loads(piece) for piece in pieces] == entries
    assert all(piece[:1] == b"{" and piece[-1:] == b"}" for piece in pieces)


def test_parts_when_the_file_is_large_then_memory_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "_BLOCK", 2**16)
    source = write(tmp_path, [{"id": index, "conversations": chat("a" * 1000, "b" * 9000)} for index in range(800)])
    tracemalloc.start()
    source.parts()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # of 8 MB


def test_parts_when_the_array_is_empty_then_there_are_none(tmp_path):
    assert write(tmp_path, []).parts() == []


CONTENT = json.dumps(many(3)).encode()
DAMAGED = {
    "empty": (b"", "after 0 entries, at byte 0"),
    "cut off in an entry": (CONTENT[:-30], "after 2 entries, at byte"),
    "cut off after an entry": (CONTENT[:-1], f"after 3 entries, at byte {len(CONTENT) - 1}"),
    "cut off after a comma": (b'[{"id": 1},', "after 1 entries, at byte 11"),
    "comma missing": (b'[{"id": 1} {"id": 2}]', "after 1 entries, at byte 11.*expected ','"),
    "an object": (b'{"id": 1}', "after 0 entries, at byte 0.*expected '\\['"),
    "not JSON": (b"version https://git-lfs.github.com/spec/v1", "after 0 entries, at byte 0.*layout"),
    "array of texts": (b'["a", "b"]', "expected JSON objects in .*another value at byte 1"),
    "two arrays": (b'[{"id": 1}]\n[{"id": 2}]', "expected nothing after the JSON array in .*byte 11"),
    "nested": (b'[{"a": ' + b"[" * 100_000, "after 0 entries, at byte 1"),
    "long number": (b'[{"a": ' + b"9" * 10_000 + b"}]", "after 0 entries, at byte 1"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_parts_when_the_file_is_damaged_then_the_error_names_file_and_place(fault, tmp_path):
    content, message = DAMAGED[fault]
    put(tmp_path, "llava_v1_5_mix665k.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        LlavaInstruct(tmp_path).parts()
    assert "llava_v1_5_mix665k.json" in str(caught.value)


def test_parts_when_an_entry_never_ends_then_the_file_is_not_taken_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "_BLOCK", 2**12)
    monkeypatch.setattr(llava, "_MAX_ENTRY", 2**14)
    put(tmp_path, "llava_v1_5_mix665k.json", b'[{"id": "' + b"x" * 2_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="after 0 entries"):
        LlavaInstruct(tmp_path).parts()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_read_part_when_the_text_is_no_utf_8_then_the_error_names_file_and_byte(tmp_path):
    content = json.dumps([GOOD, GOOD]).encode().replace(b"Well.", b"W\xe9ll.")
    put(tmp_path, "llava_v1_5_mix665k.json", content)
    source = LlavaInstruct(tmp_path)
    with pytest.raises(ValueError, match=rf"UTF-8 in .*llava_v1_5_mix665k.json.* byte {content.index(0xE9)}"):
        list(source.rows(source.parts()[0]))


def test_read_part_when_the_file_was_cut_after_listing_then_raises(tmp_path):
    source = write(tmp_path, many(3))
    parts = source.parts()
    put(tmp_path, "llava_v1_5_mix665k.json", CONTENT[:100])
    with pytest.raises(ValueError, match=r"expected JSON in .*llava_v1_5_mix665k.json from byte 1"):
        list(source.rows(parts[0]))


def test_source_when_the_file_is_absent_then_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*llava_v1_5_mix665k.json or .*llava_dataset"):
        LlavaInstruct(tmp_path)
