"""The page of an evaluation: every figure, the best ones in bold, answers beside the truth; no text can break it."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from named_poses import POSES, make_pose
from PIL import Image

from chatpose_hf.body import BodyModel
from chatpose_hf.report import Case, better, make_report


HOSTILE = """</title></style><script>alert(1)</script><img src=http://evil/x onerror="a()">'"{{ 7 * 6 }}\u202egnp\x00\ud800"""
VOID = {"meta", "img"}
RESULTS = {
    "task": "text-to-pose",
    "dataset": "somebody/posescript",
    "split": "test",
    "protocol": "The first caption. One greedy reply.",
    "body": "default",
    "versions": {"torch": "2.13.0"},
    "model": "somebody/chatpose",
    "revision": "0123abc",
    "seed": 12345,
    "counts": {"items": 1234, "unanswered": 5},
    "settings": {"max_new_tokens": 128, "retrieval": {"pool": 32}},
    "notes": ["A first note.", "A second note."],
    "metrics": {
        "model": {
            "pa_mpjpe_mm": {"value": 61.25, "low": 60, "high": 63.5},
            "top5_percent": 23.4,
            "fid": 0.1234,
            "diversity": 1.5,
        },
        "mean_pose": {"pa_mpjpe_mm": 99.5, "top5_percent": 41.7, "diversity": 0},
        "nearest_caption": {"fid": 0.25, "failure_percent": 7.5},
    },
}


class Page(HTMLParser):
    """Elements with their attributes, texts, and the headings; fails where an element is not closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.bold, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        if self._open and self._open[-1] != "style" and text.strip():
            self.texts.append(text.strip())
            if self._open[-1] == "strong":
                self.bold.append(text)

    @property
    def text(self):
        return "\n".join(self.texts)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def picture_of(uri):
    kind, content = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.fixture(scope="module")
def body():
    return BodyModel.load("default")


@pytest.fixture(scope="module")
def poses():
    names = ("left arm raised", "kneeling on the right knee", "running")
    return dict(zip(("truth", "model", "nearest_caption"), (make_pose(POSES[name]) for name in names), strict=True))


def make_case(poses, **changes):
    case = Case("worst", "item 7", "What is the pose?", "It is <POSE>.", None, poses, {"pa_mpjpe_mm": 55.5})
    return case._replace(**changes)


def test_every_value_is_printed(body):
    text = Page(make_report(RESULTS, [], body)).text
    for value in ("61.25", "60 to 63.5", "23.4", "0.1234", "1.5", "99.5", "41.7", "0", "0.25", "7.5"):
        assert value in text.splitlines()
    for fact in ("1,234", "5", "128", '{"pool": 32}', "12345", "2.13.0", "0123abc", "A first note.", "A second note."):
        assert fact in text.splitlines()
    for system in ("model", "mean pose", "nearest caption"):
        assert system in text.splitlines()
    assert RESULTS["protocol"] in text
    sentence = " ".join(text.split())
    assert (
        "What was measured: text-to-pose on somebody/posescript, split test, by the model somebody/chatpose "
        "(revision 0123abc), beside mean pose and nearest caption." in sentence
    )


def test_the_best_of_a_row_is_bold(body):
    # The only failure rate, and diversity, which has no better: none is bold.
    assert Page(make_report(RESULTS, [], body)).bold == ["61.25", "41.7", "0.1234"]


def test_the_true_poses_figure_is_a_bound_and_never_the_best(body):
    metrics = {"model": {"fid": 0.5}, "mean_pose": {"fid": 0.75}, "true_pose": {"fid": 0.0}}
    assert Page(make_report({**RESULTS, "metrics": metrics}, [], body)).bold == ["0.5"]


@pytest.mark.parametrize(("count", "is_open"), [(12, True), (13, False)])
def test_charts_are_shut_where_there_are_many(body, count, is_open):
    metrics = {"model": {f"metric{number}_mm": number + 1.0 for number in range(count)}}
    page = make_report({**RESULTS, "metrics": metrics}, [], body)
    assert ("<details open>" in page) == is_open
    assert page.count('<section class="panel chart">') == count


def test_equal_values_are_all_the_best_and_what_is_no_number_is_none(body):
    nan = float("nan")
    metrics = {
        "model": {"loss": 0.5},
        "a": {"loss": 0.5},
        "b": {"loss": nan},
        "c": {"loss": {"value": 2, "low": None}},
    }
    page = Page(make_report({**RESULTS, "metrics": metrics}, [], body))
    assert page.bold == ["0.5", "0.5"]
    assert "nan" in page.texts
    assert len(page.all("rect")) == 3


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("mpjpe_mm", "lower"),
        ("angle_deg", "lower"),
        ("mpjre_x100", "lower"),
        ("fid", "lower"),
        ("eval_loss", "lower"),
        ("failure_percent", "lower"),
        ("t2p_top5_percent", "higher"),
        ("diversity", None),
        ("diversity_mm", None),
        ("something", None),
    ],
)
def test_the_name_of_a_metric_tells_what_is_better(metric, direction):
    assert better(metric) == direction


def test_bars_start_at_zero_and_share_a_scale(body):
    metrics = {"model": {"fid": {"value": 2.0, "low": 1.0, "high": 4.0}}, "other": {"fid": -1}}
    page = Page(make_report({**RESULTS, "metrics": metrics}, [], body))
    assert [(bar["x"], bar["width"]) for bar in page.all("rect")] == [("20.00", "40.00"), ("0.00", "20.00")]
    assert [path["d"] for path in page.all("path")] == ["M40.00 4v8m0 -4H100.00m0 -4v8"]


@pytest.mark.parametrize("empty", ["absent", "null"])
def test_all_but_three_keys_may_be_missing(body, empty):
    needed = ("task", "dataset", "metrics")
    results = {key: value for key, value in RESULTS.items() if key in needed}
    if empty == "null":
        results = {**dict.fromkeys(RESULTS), **results}
    page = Page(make_report(results, [], body))
    assert "The protocol is not stated." in page.text
    assert "None" not in page.text
    assert "null" not in page.text


def test_one_system_has_nothing_in_bold_and_is_beside_nobody(body):
    metrics = {"model": {"mpjpe_mm": 98.5, "fid": None}}
    page = Page(make_report({**RESULTS, "metrics": metrics}, [], body))
    assert page.bold == []
    assert "beside" not in page.text
    assert page.texts.count("98.5") == 2  # in the table and in the chart
    assert Page(make_report({**RESULTS, "metrics": {}}, [], body)).texts.count("No metric was measured.") == 1


def test_what_is_no_result_is_refused(body):
    with pytest.raises(ValueError, match=r"expected `task` in the results, got \['metrics'\]"):
        make_report({"metrics": {}}, [], body)
    metrics = {"model": {"fid": {"value": "low"}}}
    with pytest.raises(ValueError, match=r"expected a number as `value` of `metrics.model.fid`, got 'low'"):
        make_report({**RESULTS, "metrics": metrics}, [], body)


def test_cases_stand_under_their_ranks_in_order(body, poses):
    cases = [make_case({}, rank=rank) for rank in ("odd", "unanswered", "worst", "best", "median", "best")]
    html = make_report(RESULTS, cases, body)
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == ["Figures", "How it was measured", "best", "median", "worst", "unanswered", "odd"]
    assert len(Page(html).all("article")) == 6


def test_a_case_shows_its_picture_and_its_bodies(body, poses):
    photo = Image.new("RGB", (1600, 800), "red")
    page = Page(make_report(RESULTS, [make_case(poses, picture=photo)], body))
    shown = page.all("img")
    assert [picture["alt"].split(":")[0] for picture in shown] == [
        "the picture of the question",
        "truth",
        "model",
        "nearest caption",
    ]
    assert picture_of(shown[0]["src"]).size == (320, 160)
    strips = [picture_of(picture["src"]) for picture in shown[1:]]
    assert len({strip.size for strip in strips}) == 1
    assert all(strip.mode == "RGBA" and strip.height == 256 for strip in strips)
    for text in ("item 7", "What is the pose?", "It is <POSE>.", "55.5 mm"):
        assert text in page.texts


def test_bodies_of_a_case_are_drawn_in_one_scale(body):
    """One that kneels is smaller beside one that stands than it is alone."""

    def heights(poses):
        page = Page(make_report(RESULTS, [make_case(poses)], body))
        boxes = [
            picture_of(image["src"]).getchannel("A").point(lambda a: a > 200 and 255).getbbox()
            for image in page.all("img")
        ]
        return [box[3] - box[1] for box in boxes]

    standing, kneeling = make_pose(POSES["left arm raised"]), make_pose(POSES["kneeling on the right knee"])
    both = heights({"truth": standing, "model": kneeling})
    assert both[1] < 0.8 * both[0]
    assert both[1] < 0.9 * heights({"model": kneeling})[0]


def test_a_case_without_truth_or_pose_or_with_a_broken_one(body, poses):
    page = Page(make_report(RESULTS, [make_case({"model": poses["model"]})], body))
    assert [picture["alt"].split(":")[0] for picture in page.all("img")] == ["model"]

    others = {"truth": poses["truth"], "nearest_caption": poses["nearest_caption"]}
    page = Page(make_report(RESULTS, [make_case(others, reply=" ", figures={})], body))
    assert len(page.all("img")) == 2
    labels = [text for text in page.texts if text in ("truth", "model", "nearest caption", "no pose in the reply")]
    assert labels[-4:] == ["truth", "no pose in the reply", "model", "nearest caption"]
    assert "(an empty reply)" in page.texts

    broken = {"model": poses["model"] * float("nan")}
    page = Page(make_report(RESULTS, [make_case(broken)], body))
    assert page.all("img") == []
    assert "numbers that are not finite: nothing to draw" in page.texts


def test_pictures_of_any_mode_come_without_what_the_camera_noted(body):
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    photo = Image.new("RGB", (64, 64), "red")
    content = io.BytesIO()
    photo.save(content, "JPEG", exif=exif)
    pictures = [Image.open(content), *(photo.convert(mode) for mode in ("RGBA", "P", "L", "1", "CMYK", "I"))]
    shown = Page(make_report(RESULTS, [make_case({}, picture=picture) for picture in pictures], body)).all("img")
    assert len(shown) == len(pictures)
    assert b"a secret place" not in base64.b64decode(shown[0]["src"].split(",")[1])


@pytest.fixture(scope="module")
def hostile_page(body, poses):
    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(of) for key, of in value.items()} | ({HOSTILE: HOSTILE} if "model" not in value else {})
        if isinstance(value, list):
            return [HOSTILE]
        return HOSTILE if isinstance(value, str) else value

    metrics = {"model": {"fid": 1.0, HOSTILE: 2.0}, HOSTILE: {"fid": 3}}
    results = {**spoil(RESULTS), "metrics": metrics, "counts": {HOSTILE: 5}}
    pose = poses["truth"]
    case = Case(HOSTILE, HOSTILE, HOSTILE, HOSTILE, None, {HOSTILE: pose, "model": pose * torch.nan}, {HOSTILE: 1.0})
    return make_report(results, [case], body)


def test_no_text_becomes_markup(hostile_page):
    page = Page(hostile_page)
    assert page.all("script") == []
    assert [picture for picture in page.all("img") if not picture["src"].startswith("data:image/webp;base64,")] == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # Title, heading, sentence (4), system (3), metric (2), protocol, note, count, run (4), settings, versions, case.
    assert page.text.count("<script>alert(1)</script>") >= 25
    assert "{{ 7 * 6 }}" in page.text
    assert len(page.all("style")) == len(page.all("title")) == 1


def test_characters_that_do_not_print_are_spelt(hostile_page):
    assert r"\u202egnp\u0000\ud800" in hostile_page
    assert all(letter.isprintable() or letter == "\n" for letter in hostile_page)
    hostile_page.encode()


def test_the_page_loads_nothing(hostile_page, body, poses):
    for html in (hostile_page, make_report(RESULTS, [make_case(poses)], body)):
        page = Page(html)
        policy = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
        assert len(policy) == 1
        assert policy[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
        assert {tag for tag, _ in page.elements}.isdisjoint({"a", "link", "iframe", "object", "embed", "form", "base"})
        for _, attributes in page.elements:
            assert {"href", "srcset", "action", "xlink:href", "background"}.isdisjoint(attributes)
            assert attributes.get("src", "data:").startswith("data:")
            assert "url(" not in attributes.get("style", "")
        style = re.search("<style>(.*?)</style>", html, re.S)[1]
        assert "url(" not in style
        assert "@import" not in style
