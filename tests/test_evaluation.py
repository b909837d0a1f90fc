"""`chatpose eval` on tiny models: what is asked, what is measured, and that stops and processes change nothing."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import test_data_hmr2_evaluation as hmr2_tree
import test_data_rpe_refined as rpe_tree
import test_data_threedpw as threedpw_tree
import torch
from make_smpl_files import make_model as make_smpl
from make_tiny_checkpoint import make_model, make_processor, make_tokenizer
from PIL import Image
from transformers import BertConfig

from chatpose_hf import answers, evaluation
from chatpose_hf.body import BodyModel
from chatpose_hf.card import make_card
from chatpose_hf.cli import main
from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.hmr2_evaluation import Hmr2Evaluation
from chatpose_hf.data.prompts import IMAGE_QUESTIONS
from chatpose_hf.data.rows import load_rows, write_rows
from chatpose_hf.data.rpe_refined import RpeRefined
from chatpose_hf.data.threedpw import ThreeDPW
from chatpose_hf.evaluation import EvaluationArguments, evaluate
from chatpose_hf.figures import format_results
from chatpose_hf.measures import REST_POSE, normalise_answer
from chatpose_hf.questions import Questions
from chatpose_hf.retrieval import Retrieval, RetrievalConfig, RetrievalModel
from chatpose_hf.rotations import rotvec_to_rotmat


COUNT = 9
SYSTEMS = ["model", "mean_pose", "random_pose", "nearest_caption", "rest_pose", "true_pose"]
RECORD = ("results.json", "predictions.parquet", "report.html")


def make_row(
    number, task="text_to_pose", kinds=("human", "geometry"), picture=False, answer="It is <POSE>.", **changes
):
    rng = np.random.default_rng(number)
    words = " ".join(rng.choice(["left", "arm", "knee", "raises", "bends", "person", "right"], size=5))
    image = Image.fromarray(rng.integers(0, 255, (36, 30, 3), dtype=np.uint8))
    before, after = answer.split("<POSE>")
    return {
        "id": f"row_{number}",
        "source": "test",
        "task": task,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}] * picture + [{"type": "text", "text": f"{words}?"}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": before},
                    {"type": "pose", "text": None},
                    {"type": "text", "text": after},
                ],
            },
        ],
        "images": [image] * picture,
        "poses": [(0.4 * rng.standard_normal((24, 3))).tolist()],
        "pose_mask": [[joint < 22 for joint in range(24)]],
        "captions": [{"kind": kind, "text": f"{kind} {words} {number}"} for kind in kinds],
        "licence": "none",
        **changes,
    }


def make_chat(number, turns=2, picture=True):
    row = make_row(number, "vqa", (), picture, poses=[], pose_mask=[])
    question = {"role": "user", "content": [{"type": "text", "text": "Is it a person?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "The person."}]}
    return {**row, "messages": [row["messages"][0], answer, *[question, answer] * (turns - 1)]}


def write(folder, rows, split="val"):
    (folder / split).mkdir(parents=True)
    write_rows(folder / split / "part.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A model, a retrieval model, and rows to be asked about."""
    desk = tmp_path_factory.mktemp("evaluation")
    processor = make_processor()
    make_model(processor).save_pretrained(desk / "model")
    processor.save_pretrained(desk / "model")
    rows = [make_row(n) for n in range(COUNT)]
    others = [make_row(100), make_row(101), make_row(102, kinds=("geometry",)), make_row(103)]
    write(write(desk / "rows", [*rows, make_row(50, "spg", ("implicit",))]), others, "train")
    torch.manual_seed(0)
    text = BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    RetrievalModel(RetrievalConfig(text_config=text, latent_size=8, pose_hidden_size=16)).save_pretrained(
        desk / "retrieval"
    )
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(desk / "retrieval")
    return desk


def settings(desk, output, data="rows", **options):
    given = {"model": str(desk / "model"), "split": "val", "max_new_tokens": 4, "batch_size": 4, "force_pose": True}
    return EvaluationArguments(data=str(desk / data), output=str(output), **{**given, **options})


def column(output, name):
    return pq.read_table(output / "predictions.parquet").column(name).to_pylist()


@pytest.fixture(scope="module")
def text_run(desk, tmp_path_factory):
    output = tmp_path_factory.mktemp("text") / "out"
    options = {"retrieval": str(desk / "retrieval"), "pool_size": 4}
    return output, evaluate("text-to-pose", settings(desk, output, **options))


# -- what is measured --


def test_text_to_pose_then_every_system_is_measured_on_every_item(text_run):
    output, results = text_run
    assert json.loads((output / "results.json").read_text()) == results
    assert list(results["metrics"]) == SYSTEMS
    assert results["counts"]["items"] == COUNT
    assert results["counts"]["rows of other tasks"] == 1
    assert results["counts"]["training poses"] == 4
    for system in SYSTEMS[:-1]:
        assert {"mpjpe_mm", "pa_mpjpe_mm", "pve_mm", "mpjre_deg", "t2p_recall5_percent", "fid"} <= set(
            results["metrics"][system]
        )
    assert "retrieval (sha256" in results["protocol"]
    assert results["body"] == "default"
    assert results["revision"].startswith("sha256:")
    # The same number of the same people stands in the table of single items.
    for system in SYSTEMS[:-1]:
        for metric in ("mpjpe_mm", "mrecall_percent"):
            value = results["metrics"][system][metric]
            assert np.mean(column(output, f"{system}.{metric}")) == pytest.approx(value["value"])
            assert value["low"] <= value["value"] <= value["high"]


def test_text_to_pose_then_the_models_figures_are_those_of_its_answers(text_run):
    """Again from the answers and the rows alone."""
    output, results = text_run
    body = BodyModel.load()
    errors = []
    for number in range(COUNT):
        theta = torch.tensor(column(output, "theta")[number]).view(24, 3)
        truth = torch.tensor(make_row(number)["poses"][0])
        theta[22:] = truth[22:]
        joints, true_joints = body.joints(theta), body.joints(truth)
        errors.append(((joints - joints[0]) - (true_joints - true_joints[0])).norm(dim=-1).mean().item() * 1000)
    assert np.mean(errors) == pytest.approx(results["metrics"]["model"]["mpjpe_mm"]["value"], rel=1e-5)


def test_retrieval_then_is_that_of_captions_and_answered_poses(desk, text_run):
    output, results = text_run
    retrieval = Retrieval.load(desk / "retrieval")
    texts = retrieval.embed_texts([make_row(number)["captions"][0]["text"] for number in range(COUNT)])
    poses = torch.tensor(column(output, "theta")).view(-1, 24, 3)
    scores = texts @ retrieval.embed_poses(poses).T
    hits = [(scores[n] > scores[n, n]).sum().item() < 5 for n in range(COUNT)]
    assert results["metrics"]["model"]["t2p_recall5_percent"]["value"] == pytest.approx(100 * np.mean(hits))
    assert results["metrics"]["true_pose"]["fid"] == pytest.approx(0, abs=1e-6)
    # All answers the same: by chance.
    for direction in ("t2p", "p2t"):
        value = results["metrics"]["mean_pose"]["t2p_recall1_percent"]["value"]
        assert direction == "p2t" or value == pytest.approx(100 / COUNT)


def test_questions_then_are_of_the_first_caption_of_the_first_kind(text_run):
    output, _ = text_run
    assert column(output, "question")[3] == f"{make_row(3)['captions'][0]['text']}. Give the SMPL pose."


def test_report_then_shows_cases_and_the_card_takes_the_results(text_run):
    output, results = text_run
    page = (output / "report.html").read_text()
    assert page.count("<h3") + page.count("row_") > 3
    card = make_card({}, [results], is_adapter=False)
    assert "text-to-pose" in card
    assert "pa_mpjpe_mm" in card


def test_table_then_has_every_figure(text_run):
    _, results = text_run
    text = format_results(results)
    value = results["metrics"]["model"]["pa_mpjpe_mm"]["value"]
    assert re.search(rf"pa_mpjpe_mm +{value:.4g}", text)
    assert all(system in text for system in SYSTEMS)


def test_answers_without_a_pose_then_count_as_the_rest_pose(desk, tmp_path):
    """A model that is not forced says something else."""
    results = evaluate("text-to-pose", settings(desk, tmp_path / "out", force_pose=False, max_new_tokens=2))
    answered = [bool(count) for count in column(tmp_path / "out", "num_poses")]
    assert results["counts"]["answers without a pose"] == answered.count(False) > 0
    assert results["metrics"]["model"]["failure_percent"]["value"] == pytest.approx(
        100 * answered.count(False) / COUNT
    )
    for item, has_pose in enumerate(answered):
        if not has_pose:
            assert column(tmp_path / "out", "theta")[item] is None
            assert (
                column(tmp_path / "out", "model.mpjpe_mm")[item]
                == column(tmp_path / "out", "rest_pose.mpjpe_mm")[item]
            )
    assert any("No retrieval model" in note for note in results["notes"])
    assert "t2p_recall5_percent" not in results["metrics"]["model"]
    assert "unanswered" in (tmp_path / "out" / "report.html").read_text().lower()


def test_spg_then_asks_by_the_situation(desk, tmp_path):
    data = write(tmp_path / "rows", [make_row(n, "spg", ("geometry", "implicit")) for n in range(3)])
    results = evaluate("spg", settings(desk, tmp_path / "out", data=data))
    assert column(tmp_path / "out", "question")[0].startswith("implicit ")
    assert column(tmp_path / "out", "question")[0].endswith(", can you give the SMPL pose of this person?")
    assert list(results["metrics"]) == ["model", "rest_pose"]
    assert any("no split train" in note for note in results["notes"])


def test_revision_when_on_the_hub_then_is_the_commit(tmp_path, monkeypatch):
    """As the cache has it: offline too."""
    file = tmp_path / "snapshots" / "0123abc" / "config.json"
    monkeypatch.setattr(answers, "find_adapter_config_file", lambda *_, **__: None)
    monkeypatch.setattr(answers, "hf_hub_download", lambda *_, **__: str(file))
    assert answers.find_revision("me/poser", None) == "0123abc"


def test_revision_when_a_folder_then_follows_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = answers.find_revision(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert answers.find_revision(str(tmp_path), None) != first


def test_limit_then_rows_are_evenly_chosen(desk, tmp_path):
    results = evaluate("text-to-pose", settings(desk, tmp_path / "out", limit=3))
    assert column(tmp_path / "out", "id") == ["row_0", "row_3", "row_6"]
    assert results["counts"]["rows left out by the limit, evenly"] == COUNT - 3


# -- stops, processes --


def test_measuring_again_then_asks_nothing(desk, tmp_path, monkeypatch):
    evaluate("text-to-pose", settings(desk, tmp_path / "out"))
    before = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr(answers, "load_trained", lambda *_, **__: pytest.fail("asked again"))
    evaluate("text-to-pose", settings(desk, tmp_path / "out"))
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    # By another measure too.
    results = evaluate(
        "text-to-pose", settings(desk, tmp_path / "out", retrieval=str(desk / "retrieval"), pool_size=2)
    )
    assert "fid" in results["metrics"]["model"]


@pytest.mark.parametrize(
    ("changes", "name"), [({"max_new_tokens": 5}, "max_new_tokens"), ({"caption_kind": "geometry"}, "questions")]
)
def test_folder_when_it_holds_other_answers_then_is_refused(desk, tmp_path, changes, name):
    evaluate("text-to-pose", settings(desk, tmp_path / "out", limit=4))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"made with other settings: .*{name}"):
        evaluate("text-to-pose", settings(desk, tmp_path / "out", limit=None if name == "questions" else 4, **changes))
    assert {path: path.read_bytes() for path in before} == before


def test_folder_when_another_run_writes_to_it_then_is_refused(desk, tmp_path):
    (tmp_path / "out").mkdir()
    with evaluation.FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another run is writing"):
        evaluate("text-to-pose", settings(desk, tmp_path / "out"))


def command(desk, output, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        *(sys.executable, *(launcher if processes > 1 else []), "-m", "chatpose_hf.cli", "eval", "text-to-pose"),
        *("--model", str(desk / "model"), "--data", str(desk / "rows"), "--split", "val", "--output", str(output)),
        *("--retrieval", str(desk / "retrieval"), "--pool_size", "4", "--max_new_tokens", "4", "--batch_size", "1"),
        *("--force_pose", "true"),
    ]


def test_run_when_killed_and_started_with_two_processes_then_the_results_are_the_same(desk, tmp_path):
    """Killed as soon as some answers are there, gone on with by two processes; beside it one that nothing stopped."""
    whole = subprocess.Popen(
        command(desk, tmp_path / "whole"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed = subprocess.Popen(
        command(desk, tmp_path / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "out" / "answers" / "model" / "process-0.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len(log.read_bytes().splitlines()) < COUNT, "it had come to its end"
    assert not (tmp_path / "out" / "results.json").exists()
    again = subprocess.run(command(desk, tmp_path / "out", processes=2), capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr[-3000:]
    text, _ = whole.communicate(timeout=100)
    assert whole.returncode == 0, text[-3000:]
    assert (tmp_path / "out" / "answers" / "model" / "process-1.jsonl").stat().st_size
    for name in RECORD:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again.stdout.count("pa_mpjpe_mm") == 1, "one process reports"


# -- pictures --


def photo_rows(task, count=6, **changes):
    return [make_row(n, task, ("phrase",), picture=True, **changes) for n in range(count)]


def test_pose_estimation_then_shows_the_picture(desk, tmp_path):
    data = write(tmp_path / "rows", photo_rows("pose_estimation"))
    results = evaluate("pose-estimation", settings(desk, tmp_path / "out", data=data))
    assert column(tmp_path / "out", "question")[0] == IMAGE_QUESTIONS[0]
    # Other pictures, other answers.
    assert len({tuple(theta) for theta in column(tmp_path / "out", "theta")}) == 6
    assert list(results["metrics"]) == ["model", "rest_pose"]


def test_rpe_then_figures_are_by_attribute_too(desk, tmp_path):
    rows = photo_rows("rpe")
    for number, row in enumerate(rows):
        row["id"] = f"{('behavior', 'outfits')[number % 2]}/3DPW/imageFiles/walk_0{number}/image_00001.jpg/{number}"
    results = evaluate("rpe", settings(desk, tmp_path / "out", data=write(tmp_path / "rows", rows)))
    of_items = column(tmp_path / "out", "model.mpjpe_mm")
    for attribute, values in (("behavior", of_items[::2]), ("outfits", of_items[1::2])):
        assert results["counts"][f"items of {attribute}"] == 3
        value = results["metrics"]["model"][f"{attribute}_mpjpe_mm"]["value"]
        assert value == pytest.approx(np.mean(values))
    assert results["metrics"]["model"]["mpjpe_mm"]["value"] == pytest.approx(np.mean(of_items))


@pytest.fixture
def smpl_folder(tmp_path):
    folder = tmp_path / "smpl"
    folder.mkdir()
    for seed, gender in enumerate(("NEUTRAL", "MALE", "FEMALE")):
        arrays = {name: value for name, value in make_smpl("smpl", vertices=96, seed=seed).items() if name[:2] != "bs"}
        np.savez(folder / f"SMPL_{gender}.npz", **arrays)
    return folder


def test_readers_when_of_3dpw_by_hmr2_then_feed_the_evaluation(desk, tmp_path, smpl_folder):
    joints = np.random.default_rng(0).normal(0, 0.3, (3, 19, 4))
    joints[..., 3] = 1
    tree = tmp_path / "tree"
    hmr2_tree.write(
        tree, hmr2_tree.labels([hmr2_tree.FIRST, hmr2_tree.SECOND, hmr2_tree.FIRST], extra_keypoints_3d=joints)
    )
    data = write(tmp_path / "rows", list(Hmr2Evaluation(tree, image_size=28)), "test")
    regressor = np.abs(np.random.default_rng(1).normal(size=(19, 96)))
    np.save(tmp_path / "J19.npy", regressor / regressor.sum(1, keepdims=True))
    options = {"split": "test", "truth": str(tree), "body": str(smpl_folder / "SMPL_NEUTRAL.npz")}
    results = evaluate(
        "pose-estimation",
        settings(
            desk, tmp_path / "out", data=data, protocol="hmr2-14", regressor=str(tmp_path / "J19.npy"), **options
        ),
    )
    assert results["counts"]["items"] == 3
    assert results["protocol"].startswith("hmr2-14")
    assert results["body"] == "SMPL (SMPL_NEUTRAL.npz)"
    # Of the answers, from the file, with numpy alone but for the body.
    body, weights = BodyModel.load(smpl_folder / "SMPL_NEUTRAL.npz"), np.load(tmp_path / "J19.npy")
    for item, index in enumerate(int(id.split("/")[-1]) for id in column(tmp_path / "out", "id")):
        found = weights @ body.vertices(torch.tensor(column(tmp_path / "out", "theta")[item])).numpy()
        rows = [*range(13), 18]
        error = (found - found[14])[rows] - (joints[index, :, :3] - joints[index, 14, :3])[rows]
        mean = 1000 * np.linalg.norm(error, axis=-1).mean()
        assert column(tmp_path / "out", "model.mpjpe_mm")[item] == pytest.approx(mean, rel=1e-4)


def test_readers_when_raw_3dpw_then_feed_the_evaluation(desk, tmp_path, smpl_folder):
    tree = tmp_path / "tree"
    threedpw_tree.write(tree, threedpw_tree.sequence(), split="test")
    data = write(tmp_path / "rows", list(ThreeDPW(tree, image_size=28)), "test")
    options = {"split": "test", "truth": str(tree), "body": str(smpl_folder)}
    results = evaluate("pose-estimation", settings(desk, tmp_path / "out", data=data, protocol="3dpw-24", **options))
    assert results["counts"]["items"] == 2 * threedpw_tree.FRAMES
    assert {"mpjae_deg", "mpjae_pa_deg", "pck50_percent", "auc_percent", "pve_mm"} <= set(results["metrics"]["model"])


def test_readers_when_rpe_refined_then_feed_the_evaluation(desk, tmp_path):
    """Its own layout; photos of one name in two folders are two items."""
    tree = tmp_path / "tree"
    joints = np.random.default_rng(0).normal(0, 0.3, (2, 24, 3)).tolist()
    for attribute, photo, fitted in (("behavior", rpe_tree.BUS, joints[0]), ("pose", rpe_tree.CAFE, joints[1])):
        rpe_tree.put(tree, photo, rpe_tree.jpeg(len(attribute)))
        item = rpe_tree.make_item(image=photo)
        item["ground_truth"]["fitted_joint_cam"] = fitted
        rpe_tree.write(tree, [item], attribute)
    data = write(tmp_path / "rows", list(RpeRefined(tree)), "test")
    options = {"split": "test", "protocol": "rpe-22", "truth": str(tree)}
    results = evaluate("rpe", settings(desk, tmp_path / "out", data=data, **options))
    assert (
        column(tmp_path / "out", "question")[0]
        == "The man is about to sit down, can you give the SMPL pose of this person?"
    )
    body = BodyModel.load()
    for item, (attribute, fitted) in enumerate(zip(("behavior", "pose"), np.array(joints), strict=True)):
        found = body.joints(torch.tensor(column(tmp_path / "out", "theta")[item])).numpy()[:22]
        mean = 1000 * np.linalg.norm(found - found[0] - (fitted[:22] - fitted[0]), axis=-1).mean()
        assert results["metrics"]["model"][f"{attribute}_mpjpe_mm"]["value"] == pytest.approx(mean, rel=1e-4)


# -- words --


def test_chat_then_loss_and_matches_are_those_of_the_conversations(desk, tmp_path, processor, model):
    rows = [make_chat(0, turns=3), make_chat(1, turns=1), make_chat(2, picture=False)]
    data = write(tmp_path / "rows", rows)
    options = {"before": str(desk / "model"), "force_pose": False}
    results = evaluate("chat", settings(desk, tmp_path / "out", data=data, **options))
    assert column(tmp_path / "out", "id") == ["row_0#0", "row_0#1", "row_0#2", "row_1#0", "row_2#0", "row_2#1"]
    assert results["counts"] == {"items": 6, "rows": 3}
    with torch.no_grad():
        batch = ChatPoseCollator(processor)(rows)
        loss = model.eval()(**batch)["ce_loss"].item()
    assert results["metrics"]["model"]["loss"]["value"] == pytest.approx(loss, rel=1e-4)
    # The same model before and after.
    assert results["metrics"]["before"] == results["metrics"]["model"]
    assert results["body"] is None
    replies = column(tmp_path / "out", "reply")
    matches = [normalise_answer(reply) == "person" for reply in replies]
    assert results["metrics"]["model"]["exact_match_percent"]["value"] == pytest.approx(100 * np.mean(matches))
    assert (tmp_path / "out" / "report.html").exists()


def test_chat_then_a_later_turn_is_asked_after_the_true_answers(tmp_path):
    row = make_chat(0, turns=2)
    questions = Questions(load_rows(write(tmp_path / "rows", [row]), "val", decode=False), "chat")
    (chat,) = questions.make_chats([1])
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]
    assert chat[1]["content"] == [{"type": "text", "text": "The person."}]
    assert chat[2]["content"] == [{"type": "text", "text": "Is it a person?"}]
    assert chat[0]["content"][0]["image"].size == row["images"][0].size
    assert chat[0]["content"][1]["text"] == row["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    ("text", "wanted"), [("The  Cat.", "cat"), ("a dog, an owl", "dog owl"), ("theatre", "theatre"), ("", "")]
)
def test_exact_match_then_leaves_out_what_says_nothing(text, wanted):
    assert normalise_answer(text) == wanted


def test_captions_then_kinds_are_compared_by_the_poses_that_they_find(desk, tmp_path):
    rows = [make_row(n, "pose_estimation", ("human", "geometry")[: 1 + n % 2], picture=True) for n in range(6)]
    data = write(tmp_path / "rows", rows)
    options = {"retrieval": str(desk / "retrieval"), "pool_size": 3, "force_pose": False}
    results = evaluate("captions", settings(desk, tmp_path / "out", data=data, **options))
    assert list(results["metrics"]) == ["model", "human", "geometry"]
    assert results["counts"]["texts of human"] == 6
    assert results["counts"]["texts of geometry"] == 3
    values = column(tmp_path / "out", "geometry.t2p_pool3_recall1_percent")
    assert [math.isnan(value) for value in values] == [True, False] * 3
    mean = results["metrics"]["geometry"]["t2p_pool3_recall1_percent"]["value"]
    assert np.nanmean(values) == pytest.approx(mean)
    # Without a model the captions of the rows alone.
    results = evaluate("captions", settings(desk, tmp_path / "own", data=data, **{**options, "model": None}))
    assert list(results["metrics"]) == ["human", "geometry"]


# -- what is refused --


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("juggling", {}, "expected a task of text-to-pose"),
        ("rpe", {}, r"expected rows for rpe, found none \(10 rows of other tasks\): split val of"),
        ("text-to-pose", {"model": None}, "expected a model for text-to-pose"),
        ("text-to-pose", {"protocol": "smpl-25"}, "expected a protocol of smpl-24"),
        ("text-to-pose", {"protocol": "rpe-22"}, "expected the data set's own folder as `truth` for rpe-22"),
        ("text-to-pose", {"truth": "."}, "expected no `truth` for smpl-24"),
        ("text-to-pose", {"before": "x"}, "expected `before` for chat alone"),
        ("text-to-pose", {"caption_kind": "sung"}, "without a caption of kind sung"),
        ("text-to-pose", {"train_data": "nowhere"}, "nowhere"),
        ("captions", {"model": None}, "expected a retrieval model for captions"),
    ],
)
def test_settings_when_they_do_not_fit_then_are_refused_before_the_model_is_asked(
    desk, tmp_path, monkeypatch, task, options, message
):
    monkeypatch.setattr(answers, "load_trained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(task, settings(desk, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "results.json").exists()


def test_pool_when_larger_than_the_gallery_then_there_is_none(desk, tmp_path):
    results = evaluate("text-to-pose", settings(desk, tmp_path / "out", retrieval=str(desk / "retrieval")))
    assert results["notes"].count("Fewer than 32 items: no pools.") == 1
    assert not any("pool" in name for name in results["metrics"]["model"])
    assert "t2p_recall5_percent" in results["metrics"]["model"]


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"limit": 0}, {"dtype": "int8"}])
def test_arguments_when_out_of_range_then_are_refused(desk, changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
        settings(desk, "out", **changes)


def test_human36m_rows_when_measured_by_their_poses_then_are_refused(desk, tmp_path):
    rows = [{**row, "pose_mask": [[False] * 24]} for row in photo_rows("pose_estimation", 2)]
    with pytest.raises(ValueError, match="expected rows with known poses for smpl-24, got 2 of 2 without"):
        evaluate("pose-estimation", settings(desk, tmp_path / "out", data=write(tmp_path / "rows", rows)))


def test_command_then_prints_the_table(desk, tmp_path, capsys):
    flags = ["--data", str(desk / "rows"), "--split", "val", "--output", str(tmp_path / "out"), "--limit", "2"]
    status = main(["eval", "text-to-pose", "--model", str(desk / "model"), *flags, "--max-new-tokens", "2"])
    assert status == 0
    assert "pa_mpjpe_mm" in capsys.readouterr().out


def test_command_when_the_task_is_unknown_then_usage(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "juggling", "--data", "x", "--output", "y"])
    assert "text-to-pose" in capsys.readouterr().err


def test_rest_pose_then_is_upright_and_faces_the_camera():
    joints = BodyModel.load().joints(rotvec_to_rotmat(REST_POSE))
    head, pelvis, left, right = joints[15], joints[0], joints[16], joints[17]
    assert head[1] < pelvis[1], "y is down"
    assert left[0] > right[0], "its left is at the viewer's right"
