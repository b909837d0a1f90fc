"""Descriptions of people in photos by a model, the page that people review them on, and what becomes of a review."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from chat_server import ChatServer
from PIL import Image


pytest.importorskip("openai", reason="needs the package openai")

from chatpose_hf.body import BodyModel
from chatpose_hf.data import prepare
from chatpose_hf.data.endpoint import Endpoint
from chatpose_hf.data.rows import load_rows, validate_row, write_rows
from chatpose_hf.data.rpe import (
    ATTRIBUTES,
    Rpe,
    apply_review,
    load_people,
    mark_person,
    write_review_folder,
    write_review_page,
)
from chatpose_hf.render import render_bodies


HOSTILE = "The person who </script><img src=x onerror=\"document.title='hacked'\"> & <b>é\u2028</b>"


def description(of: str = "waves") -> str:
    return json.dumps({name: f"The person who {of} ({name})." for name in ATTRIBUTES})


def jpeg(width: int = 60, height: int = 40, color: str = "#3060a0") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "JPEG")
    return buffer.getvalue()


def person(id: str, image: str = "photos/a.jpg", **more) -> dict:
    return {"id": id, "image": image, "box": [10, 5, 30, 35], "pose": [0.01 * number for number in range(72)], **more}


def write_people(folder, people: list) -> None:
    (folder / "photos").mkdir(exist_ok=True, parents=True)
    (folder / "people.jsonl").write_text("".join(json.dumps(person) + "\n" for person in people), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    write_people(folder, [person("p1"), person("p2", "photos/b.jpg", split="val"), person("p3", box=[-9, 5, 8.5, 99])])
    (folder / "photos" / "a.jpg").write_bytes(jpeg())
    (folder / "photos" / "b.jpg").write_bytes(jpeg(2000, 1000))
    return folder


def test_rpe_then_five_rows_a_person_with_the_whole_photo_unmarked(folder):
    with ChatServer(lambda *_: description()) as server:
        source = Rpe(folder, endpoint=Endpoint(server.url, "m"))
        assert source.parts() == ["train/00000", "val/00000"]
        rows = list(source)
    assert source.skipped == {}
    assert [row["id"] for row in rows] == [f"{id}/{name}" for id in ("p1", "p3", "p2") for name in ATTRIBUTES]
    for row in rows:
        validate_row(row)
        name = row["id"].split("/")[1]
        assert (row["task"], row["source"]) == ("rpe", "rpe")
        assert row["captions"] == [{"kind": "phrase", "text": f"The person who waves ({name})"}]
        assert f"The person who waves ({name})" in row["messages"][0]["content"][1]["text"]
        photo = "b" if row["id"].startswith("p2") else "a"
        assert row["images"][0]["bytes"] == (folder / "photos" / f"{photo}.jpg").read_bytes()
        np.testing.assert_array_equal(row["poses"][0], np.float32([0.01 * n for n in range(72)]).reshape(24, 3))
    assert source.settings()["model"] == "m"


def test_rpe_when_asked_then_the_model_sees_the_person_marked(folder):
    with ChatServer(lambda *_: description()) as server:
        list(Rpe(folder, endpoint=Endpoint(server.url, "m", concurrency=1)))
    urls = [request["messages"][0]["content"][1]["image_url"]["url"] for request in server.requests]
    seen = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
    assert [picture.size for picture in seen] == [(60, 40), (60, 40), (1024, 512)]
    red = [(np.asarray(picture).astype(int) @ [1, -1, -1] > 0) for picture in seen]
    rows, columns = np.nonzero(red[0])
    assert abs(np.array([columns.min(), rows.min(), columns.max(), rows.max()]) - [10, 5, 30, 35]).max() <= 1
    assert not red[0][10:30, 15:26].any()  # the person is not painted over
    rows, columns = np.nonzero(red[1])  # the box reaches over the photo's edges
    assert abs(np.array([columns.min(), rows.min(), columns.max(), rows.max()]) - [0, 5, 8, 39]).max() <= 1


@pytest.mark.parametrize("box", [[59.9, 39.9, 70, 70], [-5, -5, 0.1, 0.1], [0, 0, 1e30, 1e30], [30, 10, 30.01, 10.01]])
def test_mark_person_when_the_box_is_odd_then_still_a_picture(box):
    assert mark_person(Image.new("RGB", (60, 40)), box, 30).size == (30, 20)


def test_rpe_when_people_are_many_then_parts_of_fifty_with_photos_whole(tmp_path):
    people = [person(f"{photo}-{number}", f"{photo}.jpg") for number in range(6) for photo in range(20)]
    write_people(tmp_path, people)
    source = Rpe(tmp_path, endpoint=Endpoint("http://localhost:1/v1", "m"))
    assert source.parts() == ["train/00000", "train/00001", "train/00002"]
    of_parts = source._people_of_parts()
    assert [len(part) for part in of_parts.values()] == [54, 54, 12]
    photos = [{person["image"] for person in part} for part in of_parts.values()]
    assert sum(map(len, photos)) == len(set.union(*photos)) == 20


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("I see nobody.", {"missing answer: the model gave no JSON object": 1}),
        ("{}", {f"no usable {name} in the model's answer": 1 for name in ATTRIBUTES}),
        (
            json.dumps({"behavior": 5, "outfits": " ", "pose": "x" * 1000, "shape": "a rectangle", "summary": None}),
            {f"no usable {name} in the model's answer": 1 for name in ATTRIBUTES},
        ),
        (json.dumps(dict.fromkeys(ATTRIBUTES, "one <image> more")), None),
        (json.dumps(dict.fromkeys(ATTRIBUTES, "half \ud800")), None),
    ],
)  # fmt: skip
def test_rpe_when_the_model_is_of_no_use_then_skipped_and_the_run_goes_on(folder, bad, reason):
    with ChatServer(
        lambda number, prompt, urls: bad if number == 0 or (bad == "I see nobody." and number < 3) else description()
    ) as server:
        source = Rpe(folder, endpoint=Endpoint(server.url, "m", concurrency=1))
        ids = [row["id"] for row in source]
    assert ids == [f"{id}/{name}" for id in ("p3", "p2") for name in ATTRIBUTES]
    if reason is not None:
        assert source.skipped == reason
    else:
        assert sum(source.skipped.values()) == 5
        assert all(reason.startswith("`") for reason in source.skipped)


def test_rpe_when_samples_are_bad_then_skipped_by_reason_and_never_asked_about(folder):
    people = [
        person("good"),
        person("no file", "photos/none.jpg"),
        person("torn", "photos/torn.jpg"),
        person("text", "photos/text.jpg"),
        person("out", "../secret.jpg"),
        person("absolute", str(folder / "photos" / "a.jpg")),
        person("number", 5),
        person("list", ["photos/a.jpg"]),
        person("long", "x" * 5000),
        person("short", pose=[0.0] * 71),
        person("nan", pose=[float("nan")] * 72),
        person("huge", pose=[1e300] * 72),
        person("words", pose="none"),
        person("thin", box=[10, 5, 10, 35]),
        person("three", box=[10, 5, 10]),
        person("inf", box=[0, 0, float("inf"), 5]),
        person("outside", box=[61, 0, 90, 30]),
        {"id": "nothing"},
    ]  # fmt: skip
    write_people(folder, people)
    (folder.parent / "secret.jpg").write_bytes(jpeg())
    (folder / "photos" / "torn.jpg").write_bytes(jpeg(500, 500)[:600])
    (folder / "photos" / "text.jpg").write_text("hello")
    with ChatServer(lambda *_: description()) as server:
        source = Rpe(folder, endpoint=Endpoint(server.url, "m"))
        assert {row["id"].split("/")[0] for row in source} == {"good"}
    assert len(server.requests) == 1
    assert source.skipped == {
        "missing image": 1,
        "damaged image": 3,
        "refused name of a photo": 4,
        "a person without an image, a box or a pose of 72 numbers": 8,
        "a box outside the photo": 1,
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected the file .*people.jsonl"),
        (b"", "expected people in .*people.jsonl"),
        (b"{", "expected a UTF-8 JSON object on each line"),
        (b"\xff\xfe{}", "expected a UTF-8 JSON object on each line"),
        (b"[]\n", "expected a JSON object on each line"),
        (b'{"id": 5}\n', "expected a text as `id`"),
        (b'{"id": "a"}\n{"id": "a"}\n', "that no other has, got 'a' as number 2"),
        (b'{"id": "a", "split": "../x"}\n', "expected the `split` train, val, test or none"),
        (b'{"id": "a", "split": []}\n', "expected the `split` train, val, test or none"),
    ],
)
def test_rpe_when_people_are_damaged_then_an_error_names_the_file(folder, content, words):
    path = folder / "people.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Rpe(folder, endpoint=Endpoint("http://localhost:1/v1", "m")).parts()


def test_rpe_without_an_endpoint_then_says_that_it_needs_one(folder):
    with pytest.raises(ValueError, match="expected an endpoint"):
        Rpe(folder)


def test_prepare_rows_when_run_again_then_asks_only_what_is_open(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "write_sheet", lambda *_: None)  # takes seconds, and has tests of its own
    bad = True

    def reply(number, prompt, urls):
        return "no idea" if bad and len(urls[0]) > 5000 else description()

    with ChatServer(reply) as server:

        def run():
            endpoint = Endpoint(server.url, "m", "secret-key", cache=tmp_path / "cache.jsonl")
            return prepare.prepare_rows(Rpe(folder, endpoint=endpoint), tmp_path / "out")

        assert [record.rows for record in run()] == [10, 0]
        assert len(server.requests) == 2 + 3
        bad = False
        assert [record.rows for record in run()] == [10, 5]
        assert len(server.requests) == 2 + 3 + 1
        assert [record.rows for record in run()] == [10, 5]
        assert len(server.requests) == 2 + 3 + 1
    assert len(load_rows(tmp_path / "out", "val")) == 5
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret-key" not in path.read_bytes()


@pytest.fixture
def rows(folder):
    def reply(number, prompt, urls):
        return json.dumps(dict.fromkeys(ATTRIBUTES, HOSTILE)) if number == 0 else description()

    with ChatServer(reply) as server:
        return list(Rpe(folder, endpoint=Endpoint(server.url, "m", concurrency=1)))


def test_write_review_page_then_one_file_with_small_pictures_and_nothing_hostile(rows, folder, tmp_path):
    boxes = {person["id"]: person["box"] for person in load_people(folder)}
    write_review_page(rows, tmp_path / "page.html", boxes)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert "<img src=x" not in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    data = json.loads(re.search(r'id="data">(.*)</script>', page).group(1))
    assert [item["text"] for item in data["items"][:5]] == [HOSTILE.replace("\u2028", " ")] * 5
    assert {item["answer"].count("<POSE>") for item in data["items"]} == {1}
    assert [item["person"] for item in data["items"]] == [0] * 5 + [1] * 5 + [2] * 5
    photos, poses = (
        [Image.open(io.BytesIO(base64.b64decode(person[name].split(",")[1]))) for person in data["people"]]
        for name in ("photo", "pose")
    )
    assert [photo.size for photo in photos] == [(60, 40), (60, 40), (512, 256)]
    assert all((np.asarray(photo).astype(int) @ [1, -1, -1] > 0).any() for photo in photos)  # the box
    assert [pose.size for pose in poses] == [(256, 256)] * 3
    body = BodyModel.load("default")
    drawn = render_bodies(body.vertices(torch.tensor(rows[0]["poses"][0])), body.faces, 256, background="white")
    assert abs(np.asarray(poses[0]).astype(int) - np.asarray(drawn.convert("RGB"))).mean() < 2  # as JPEG


def test_review_of_rows_loaded_again_then_the_same(rows, tmp_path):
    write_rows(tmp_path / "rows.parquet", rows)
    loaded = list(load_rows(tmp_path / "rows.parquet"))
    write_review_page(rows, tmp_path / "a.html")
    write_review_page(loaded, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    review = {"p1/pose": {"verdict": "accept", "text": "The person who jumps"}}
    assert [row["messages"] for row in apply_review(loaded, review)] == [
        row["messages"] for row in apply_review(rows, review)
    ]


def test_write_review_folder_then_all_splits_with_their_boxes(rows, folder, tmp_path):
    output = tmp_path / "rows"
    for split, of_split in (("train", rows[:10]), ("val", rows[10:])):
        (output / split).mkdir(parents=True)
        write_rows(output / split / "00000.parquet", of_split)
    assert write_review_folder(output, folder) == output / "review.html"
    write_review_page(rows, tmp_path / "page.html", {person["id"]: person["box"] for person in load_people(folder)})
    assert (output / "review.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_apply_review_then_rejected_rows_go_and_edited_ones_are_asked_anew(rows):
    review = {
        "p1/pose": {"verdict": "reject", "text": None},
        "p2/pose": {"verdict": "accept", "text": "The person who jumps"},
        "p3/pose": {"verdict": "accept", "text": None},
    }
    kept = {row["id"]: row for row in apply_review(rows, review)}
    before = {row["id"]: row for row in rows}
    assert kept.keys() == before.keys() - {"p1/pose"}
    for id, row in kept.items():
        validate_row(row)
        assert (row is before[id]) == (id != "p2/pose")
    edited = kept["p2/pose"]
    assert edited["captions"] == [{"kind": "phrase", "text": "The person who jumps"}]
    asked = edited["messages"][0]["content"][1]["text"]
    assert "The person who jumps" in asked
    assert "waves" not in asked
    assert before["p2/pose"]["captions"][0]["text"] == "The person who waves (pose)"


@pytest.mark.parametrize(
    ("review", "words"),
    [
        ([], "expected a review as an object of ids"),
        ({"p9/pose": {"verdict": "accept", "text": None}}, "1 ids that none of them has, such as 'p9/pose'"),
        ({"p1/pose": "accept"}, 'expected {"verdict"'),
        ({"p1/pose": {"verdict": "maybe", "text": None}}, 'expected {"verdict"'),
        ({"p1/pose": {"verdict": "accept", "text": " "}}, 'expected {"verdict"'),
        ({"p1/pose": {"verdict": "accept", "text": 5}}, 'expected {"verdict"'),
        ({"p1/pose": {"verdict": "accept", "text": "an <image>"}}, "p1/pose"),
    ],
)
def test_apply_review_when_it_is_none_then_says_so(rows, review, words):
    with pytest.raises(ValueError, match=words):
        apply_review(rows, review)


def test_review_page_in_a_browser_then_the_saved_review_applies(browser, rows, tmp_path):
    write_review_page(rows, tmp_path / "page.html")
    tab = browser.new_page(viewport={"width": 1000, "height": 700})
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.goto((tmp_path / "page.html").as_uri())

    articles = tab.locator("article")
    assert articles.count() == 15
    assert tab.locator("h2").all_inner_texts()[:5] == list(ATTRIBUTES)
    first = articles.nth(0)
    assert "</script><img src=x" in first.locator(".question").inner_text()
    assert "</script><img src=x" in first.locator("textarea").input_value()
    assert "<POSE>" in first.locator(".answer").inner_text()
    assert [picture.evaluate("image => image.naturalWidth") for picture in first.locator("img").all()] == [60, 256]

    def button(index, name):
        return articles.nth(index).get_by_role("button", name=name)

    button(0, "reject").click()
    button(1, "reject").click()
    button(1, "accept").click()
    articles.nth(2).locator("textarea").fill("The person who </script> jumps")
    articles.nth(3).locator("textarea").fill("")
    button(4, "accept").click()
    assert button(0, "reject").get_attribute("aria-pressed") == "true"
    assert button(1, "reject").get_attribute("aria-pressed") == "false"
    assert tab.locator("#count").inner_text() == "5 of 15 reviewed"
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == "review.json"
    review = json.loads(download.value.path().read_text(encoding="utf-8"))
    ids = [row["id"] for row in rows]
    assert review == {
        ids[0]: {"verdict": "reject", "text": None},
        ids[1]: {"verdict": "accept", "text": None},
        ids[2]: {"verdict": "accept", "text": "The person who </script> jumps"},
        ids[3]: {"verdict": "reject", "text": None},
        ids[4]: {"verdict": "accept", "text": None},
    }
    kept = apply_review(rows, review)
    assert [row["id"] for row in kept] == [ids[1], ids[2], *ids[4:]]
    assert kept[1]["captions"][0]["text"] == "The person who </script> jumps"
    assert tab.title() == "ChatPose: review of descriptions"
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert errors == []
    tab.close()
