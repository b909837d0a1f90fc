"""`chatpose eval` on tiny models: what is asked, what is measured, and that stops and processes change nothing."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import test_data_hmr2_evaluation as hmr2_tree
import test_data_rpe_refined as rpe_tree
import test_data_threedpw as threedpw_tree
import torch
from filelock import FileLock
from make_smpl_files import make_model as make_smpl
from make_tiny_checkpoint import make_model, make_processor, make_tokenizer
from PIL import Image
from transformers import BertConfig

from chatpose_hf import answers, evaluation, measures
from chatpose_hf.baselines import collect_training_poses, draw_random_poses
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
from chatpose_hf.figures import Figures, format_results
from chatpose_hf.measures import REST_POSE, Judge, measure_captions, measure_chat, measure_poses, normalise_answer
from chatpose_hf.metrics import bootstrap, diversity, frechet_distance, pool_ranks, recall_percent, retrieval_ranks
from chatpose_hf.pose_protocols import PoseRuler, Targets
from chatpose_hf.questions import Questions
from chatpose_hf.retrieval import Retrieval, RetrievalConfig, RetrievalModel
from chatpose_hf.rotations import rotvec_to_rotmat


COUNT = 12
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
    assert any("No baselines that know training poses" in note for note in results["notes"])


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
    assert column(tmp_path / "out", "id") == ["row_0", "row_4", "row_8"]
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
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another run is writing"):
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
        row["source"] = "rpe-refined"
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
        # One item says nothing about others: no interval.
        assert results["metrics"]["model"][f"{attribute}_mpjpe_mm"] == pytest.approx(mean, rel=1e-4)


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
    assert list(results["metrics"]) == ["model", "human_caption", "geometry_caption"]
    assert results["counts"]["texts of human_caption"] == 6
    assert results["counts"]["texts of geometry_caption"] == 3
    values = column(tmp_path / "out", "geometry_caption.t2p_pool3_recall1_percent")
    assert [math.isnan(value) for value in values] == [True, False] * 3
    mean = results["metrics"]["geometry_caption"]["t2p_pool3_recall1_percent"]["value"]
    assert np.nanmean(values) == pytest.approx(mean)
    # A text looks among all poses, of those without such a text too.
    retrieval = Retrieval.load(desk / "retrieval")
    poses = retrieval.embed_poses(torch.tensor([row["poses"][0] for row in rows]))
    for number in (1, 3, 5):
        scores = retrieval.embed_texts([rows[number]["captions"][1]["text"]]) @ poses.T
        hit = (scores > scores[0, number] + 1e-6).sum().item() < 1
        assert column(tmp_path / "out", "geometry_caption.t2p_recall1_percent")[number] == pytest.approx(100.0 * hit)
    # Without a model the captions of the rows alone.
    results = evaluate("captions", settings(desk, tmp_path / "own", data=data, **{**options, "model": None}))
    assert list(results["metrics"]) == ["human_caption", "geometry_caption"]


# -- what is refused --


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("juggling", {}, "expected a task of text-to-pose"),
        ("rpe", {}, r"expected rows for rpe, found none \(13 rows of other tasks\): split val of"),
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


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"limit": 0}, {"pool_size": 0}, {"dtype": "int8"}])
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


# -- in detail, without a model --


def ask(folder, rows, task, **options):
    return Questions(load_rows(write(folder, rows), "val", decode=False), task, **options)


def text_part(text):
    return {"type": "text", "text": text}


def make_long_chat():
    """With a system message, two pictures, the second of them in the last question, and answers that differ."""
    picture = {"type": "image", "text": None}
    said = [
        ("system", [text_part("Be brief.")]),
        ("user", [picture, text_part("Who?")]),
        ("assistant", [text_part("She.")]),
        ("user", [text_part("Where is "), text_part("she?")]),
        ("assistant", [text_part("There.")]),
        ("user", [text_part("And now?"), picture]),
        ("assistant", [text_part("Here.")]),
    ]
    images = [Image.new("RGB", (30, 36), color) for color in ("red", "blue")]
    messages = [{"role": role, "content": content} for role, content in said]
    return {**make_chat(7, picture=False), "messages": messages, "images": images}


def test_chat_then_every_turn_has_its_own_history_pictures_and_answer(tmp_path):
    questions = ask(tmp_path / "rows", [make_row(0), make_long_chat(), make_chat(8, turns=1)], "chat")
    assert [item.row for item in questions.items] == [1, 1, 1, 2]
    assert [item.num_images for item in questions.items] == [1, 1, 2, 1]
    assert questions.true_answers() == ["She.", "There.", "Here.", "The person."]
    assert questions.items[1].question == "Where is she?"
    assert questions.counts == {"items": 4, "rows": 2, "rows of other tasks": 1}
    last, other = questions.make_chats([2, 3])
    assert [message["role"] for message in last] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert last[5]["content"][1]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert len(other) == 1
    assert [row["id"] for row in questions.load_rows([3, 0])] == ["row_8", "row_7"]
    assert questions.open_picture(2).getpixel((0, 0)) == (255, 0, 0), "the first"


def test_question_about_a_row_then_stands_alone_after_the_pictures(tmp_path):
    """Neither the row's own words nor its system message."""
    row = make_row(0, "rpe", ("phrase",), picture=True)
    row["messages"].insert(0, {"role": "system", "content": [text_part("Be brief.")]})
    questions = ask(tmp_path / "rows", [make_row(1), row], "rpe")
    ((message,),) = questions.make_chats([0])
    assert questions.items[0].num_images == 1
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"].startswith("phrase ")
    assert questions.open_picture(0).size == (30, 36)


def test_questions_then_rows_without_one_are_left_out_by_reason(tmp_path):
    two = make_row(2)
    two["poses"], two["pose_mask"] = two["poses"] * 2, two["pose_mask"] * 2
    rows = [
        make_row(0, kinds=("geometry", "human")),
        make_row(1, id="my_row_1"),
        two,
        make_row(3, "spg", ("implicit",)),
        make_row(4, kinds=("phrase",)),
        make_row(5, kinds=("geometry", "geometry")),
        make_row(6, captions=[{"kind": "human", "text": " "}, {"kind": "geometry", "text": "geometry"}]),
    ]
    questions = ask(tmp_path / "rows", rows, "text-to-pose", id_prefix="row_")
    assert [item.caption.split()[0] for item in questions.items] == ["human", "geometry", "geometry"]
    assert questions.counts == {
        "items": 3,
        "rows": 3,
        "rows of other ids": 1,
        "rows without or with several poses": 1,
        "rows of other tasks": 1,
        "rows without a caption of kind human, automatic, geometry": 1,
    }
    rows = [make_row(0, kinds=()), make_row(1), make_row(2, "spg", ("implicit",))]
    questions = ask(tmp_path / "captions", rows, "captions")
    assert questions.counts == {"items": 1, "rows": 1, "rows without captions": 1, "rows of other tasks": 1}
    assert [row["id"] for row in questions.select_rows(["id"])] == ["row_1"]
    with pytest.raises(ValueError, match="expected a picture in every row for rpe"):
        ask(tmp_path / "blind", [make_row(0, "rpe", ("phrase",))], "rpe")


def test_batches_then_pictures_and_long_questions_come_first(tmp_path):
    rows = [make_row(n, "rpe", picture=True, captions=[{"kind": "phrase", "text": "x" * (n + 1)}]) for n in range(4)]
    rows[1]["images"] *= 2
    rows[1]["messages"][0]["content"].insert(0, {"type": "image", "text": None})
    assert ask(tmp_path / "rows", rows, "rpe").make_batches(3) == [[1, 3, 2], [0]]


def test_digest_then_follows_all_that_is_shown(tmp_path):
    chat = make_long_chat()
    changed = {"id": {**chat, "id": "other"}, "picture": {**chat, "images": chat["images"][::-1]}}
    changed["history"] = {**chat, "messages": [{**m} for m in chat["messages"]]}
    changed["history"]["messages"][2] = {"role": "assistant", "content": [text_part("He.")]}
    digests = {name: ask(tmp_path / name, [row], "chat").digest for name, row in {"as it is": chat, **changed}.items()}
    assert len(set(digests.values())) == 4
    assert ask(tmp_path / "again", [chat], "chat").digest == digests["as it is"]
    # Of a row that is asked about what its messages say does not matter; what its caption says does.
    row = make_row(0)
    first = ask(tmp_path / "row", [row], "text-to-pose").digest
    assert ask(tmp_path / "drawn", [{**row, "messages": make_row(1)["messages"]}], "text-to-pose").digest == first
    captions = [{"kind": "human", "text": "Other words."}]
    assert ask(tmp_path / "said", [{**row, "captions": captions}], "text-to-pose").digest != first


def answer_by(monkeypatch, make_record):
    """In place of a model; gives the models that were loaded."""
    loaded = []

    def load(*given, **options):
        loaded.append((*given, options["dtype"]))
        return given[0], None

    def answer(pipe, questions, indices, generation):
        return [make_record(pipe, questions.items[index]) for index in indices]

    monkeypatch.setattr(answers, "load_trained", load)
    monkeypatch.setattr(answers, "ChatPosePipeline", lambda model, **_: model)
    monkeypatch.setattr(answers, "_answer", answer)
    return loaded


def test_answers_then_come_in_the_order_of_the_rows_each_model_in_its_revision(desk, tmp_path, monkeypatch):
    def record(model, item):
        return {"text": f"{item.id} {model[-4:]}", "poses": [], "ce": 1.0, "tokens": 1}

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    loaded = answer_by(monkeypatch, record)
    data = write(tmp_path / "rows", [make_row(0), make_long_chat(), make_chat(1), make_chat(2, turns=1)])
    options = {"before": str(tmp_path / "base"), "revision": "v2", "dtype": "float32", "batch_size": 2}
    evaluate("chat", settings(desk, tmp_path / "out", data=data, **options))
    assert loaded == [(str(desk / "model"), "v2", "float32"), (str(tmp_path / "base"), None, "float32")]
    ids = column(tmp_path / "out", "id")
    assert column(tmp_path / "out", "reply") == [f"{id} odel" for id in ids]
    assert column(tmp_path / "out", "reply_before") == [f"{id} base" for id in ids]
    kept = json.loads((tmp_path / "out" / "answers" / "model" / "settings.json").read_text())
    assert kept["revision"] == answers.find_revision(str(desk / "model"), None)


def test_answers_then_are_greedy_and_losses_are_those_of_the_first_turns(tmp_path, monkeypatch):
    given = {}

    def forward(inputs, **options):
        given.update(options)
        return {"reply": [{"text": "x", "poses": []} for _ in inputs["chat"]]}

    questions = ask(tmp_path / "rows", [make_long_chat(), make_chat(1, turns=1)], "chat")
    monkeypatch.setattr(answers, "_score_answers", lambda pipe, row: {"ce": row["id"]})
    generation = answers.Generation(2, max_new_tokens=7, force_pose=True, dtype="auto")
    records = answers._answer(SimpleNamespace(forward=forward), questions, [1, 3, 0], generation)
    assert given == {"max_new_tokens": 7, "force_pose": True, "do_sample": False, "num_beams": 1}
    assert [record.get("ce") for record in records] == [None, "row_1", "row_7"]


def test_revision_then_is_of_all_weights_and_of_the_branch_that_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    first = answers.find_revision(str(tmp_path), None)
    (tmp_path / "model-2.safetensors").write_bytes(b"three")
    assert answers.find_revision(str(tmp_path), None) != first
    monkeypatch.setattr(answers, "find_adapter_config_file", lambda model, revision: revision)
    monkeypatch.setattr(answers, "hf_hub_download", lambda model, name, revision: f"snapshots/{revision}/{name}")
    assert answers.find_revision("me/poser", "v2") == "v2"


def test_figures_then_intervals_follow_the_seed_and_columns_the_items():
    values = torch.tensor([1.0, 5.0, 2.0, 9.0])
    figures = Figures(3)
    figures.add("model", {"x": values})
    assert figures.metrics["model"]["x"] == bootstrap(values, seed=3) != bootstrap(values, seed=0)
    assert figures.as_columns() == {"model.x": [1.0, 5.0, 2.0, 9.0]}
    results = {
        "protocol": "",
        "counts": {},
        "notes": [],
        "metrics": {"model": {"x": {"value": 2, "low": 1, "high": 3}}},
    }
    assert "2 [1, 3]" in format_results(results)


def test_recalls_then_each_direction_is_its_own_and_pools_follow_the_seed():
    generator = torch.Generator().manual_seed(0)
    texts, poses = (torch.nn.functional.normalize(torch.randn(12, 4, generator=generator)) for _ in range(2))
    judge = Judge(None, pool_size=12, pool_draws=2, seed=5)
    directions = {"t2p": (texts, poses), "p2t": (poses, texts)}
    values = judge.measure_recalls(directions, Figures(0))
    scores = texts @ poses.T
    ranks = {
        "t2p": (scores > scores.diagonal()[:, None]).sum(1),
        "p2t": (scores.diagonal()[:, None] < scores.T).sum(1),
    }
    for name, of in ranks.items():
        for k in (1, 5, 10):
            assert values[f"{name}_recall{k}_percent"].tolist() == (100.0 * (of < k)).tolist()
            # Pools of all are the gallery.
            assert values[f"{name}_pool12_recall{k}_percent"].tolist() == (100.0 * (of < k)).tolist()
    assert ranks["t2p"].tolist() != ranks["p2t"].tolist()
    six = [values[f"{name}_recall{k}_percent"] for name in ranks for k in (1, 5, 10)]
    torch.testing.assert_close(values["mrecall_percent"], torch.stack(six).mean(0))
    judge = Judge(None, pool_size=4, pool_draws=3, seed=5)
    of_pools = recall_percent(pool_ranks(poses, texts, 4, 3, seed=5), 2).mean(0)
    assert judge.measure_recalls(directions, Figures(0))["p2t_pool4_recall2_percent"].equal(of_pools)


def make_desk_of_poses(tmp_path, rows, task="text-to-pose"):
    questions = ask(tmp_path / "rows", rows, task)
    thetas = torch.tensor([row["poses"][0] for row in rows])
    mask = torch.tensor([row["pose_mask"][0] for row in rows])
    return questions, thetas, Targets(rotvec_to_rotmat(thetas), mask, None)


class FlatRetrieval:
    """Whose features are the pose itself; a text's are those of its item."""

    name = "flat"

    def __init__(self, thetas):
        self.thetas = thetas

    def embed_texts(self, texts):
        return self.embed_poses(self.thetas)

    def embed_poses(self, thetas):
        return torch.nn.functional.normalize(rotvec_to_rotmat(thetas).flatten(1).double())


def test_retrieval_then_what_nobody_knows_is_the_same_on_both_sides(tmp_path):
    rows = [make_row(n) for n in range(5)]
    questions, thetas, targets = make_desk_of_poses(tmp_path, rows)
    right, wrong = thetas.clone(), thetas.clone()
    right[:, 22:] = 0.9
    wrong[:, :22] += 3 * torch.randn(5, 22, 3, generator=torch.Generator().manual_seed(0))
    judge, figures = Judge(FlatRetrieval(thetas), 3, 2, 4), Figures(0)
    records = [{"text": "", "poses": [pose.flatten().tolist()]} for pose in right]
    baselines = {"wrong": rotvec_to_rotmat(wrong)}
    measure_poses(questions, records, targets, PoseRuler("smpl-24"), judge, baselines, figures)
    assert figures.metrics["model"]["fid"] == pytest.approx(0, abs=1e-6)
    assert figures.metrics["model"]["t2p_recall1_percent"].value == 100
    assert figures.metrics["model"]["mpjpe_mm"].value == pytest.approx(0, abs=1e-2)
    # What nobody knows is unturned on both sides.
    wrong[:, 22:], hidden = 0.0, thetas.clone()
    hidden[:, 22:] = 0.0
    features = judge.retrieval.embed_poses(wrong)
    true_features = judge.retrieval.embed_poses(hidden)
    texts = judge.retrieval.embed_texts([])
    ranks = [retrieval_ranks(texts, features), retrieval_ranks(features, texts)]
    recalls = [recall_percent(of, 1).tolist() for of in ranks]
    assert [figures.of_items["wrong"][f"{name}_recall1_percent"].tolist() for name in ("t2p", "p2t")] == recalls
    assert recalls[0] != recalls[1]
    assert figures.metrics["wrong"]["fid"] == pytest.approx(frechet_distance(features, true_features), rel=1e-3)
    assert figures.metrics["wrong"]["diversity"] == pytest.approx(diversity(features, seed=4), rel=1e-5)
    assert figures.metrics["wrong"]["mpjpe_mm"].value > 10


def test_answers_then_the_first_pose_counts_and_cases_are_the_best_the_median_and_the_worst(tmp_path):
    """Item n is n steps from the truth; 0 is turned as a whole, which its figure of positions shows and its rank not."""
    rows = [make_row(n, "rpe", ("phrase",), picture=True) for n in range(14)]
    for number, row in enumerate(rows):
        row["images"] = [Image.new("RGB", (30, 36), (10 * number, 0, 0))]
        row["id"] = f"person_{number}/{('pose', 'shape')[number % 2]}"
    questions, thetas, targets = make_desk_of_poses(tmp_path, rows, "rpe")
    targets.mask[1, 0] = False
    said = thetas.clone()
    for number in range(14):
        said[number, 1:22] += 0.02 * number
    said[0, 0] += 1
    records = [{"text": f"reply {n}", "poses": [pose.flatten().tolist()]} for n, pose in enumerate(said)]
    records[2]["poses"].append(thetas[2].flatten().tolist())
    records[12]["poses"] = []
    baselines = {"mean_pose": rotvec_to_rotmat(thetas.flip(0)), "rest_pose": targets.rotmats}
    ruler, figures = PoseRuler("smpl-24"), Figures(0)
    ruler.check = lambda targets: None
    columns, cases = measure_poses(questions, records, targets, ruler, None, baselines, figures)
    assert columns["num_poses"][2] == 2
    assert columns["theta"][2] == records[2]["poses"][0]
    assert columns["theta"][12] is None
    assert figures.counts["answers with several poses"] == 1
    assert figures.counts["answers without a pose"] == 1
    assert figures.of_items["model"]["pa_mpjpe_mm"][2] > 1, "the second would be right"
    assert figures.metrics["model"]["failure_percent"].value == pytest.approx(100 / 14)
    assert {f"{group}_mpjpe_mm" for group in ("pose", "shape")} <= set(figures.metrics["mean_pose"])
    order = figures.of_items["model"]["pa_mpjpe_mm"].argsort().tolist()
    order.remove(12)
    assert order[:2] == [1, 0], "of 1 no joint but the pelvis is known"
    ranked = {
        rank: [int(case.id.split("/")[0][7:]) for case in cases if case.rank == rank]
        for rank in ("best", "median", "worst", "unanswered")
    }
    assert ranked == {
        "best": order[:4],
        "median": order[4:8],
        "worst": [*order[9:][::-1]],
        "unanswered": [12],
    }
    for case in cases:
        number = int(case.id.split("/")[0][7:])
        assert case.reply == f"reply {number}"
        assert case.picture.getpixel((0, 0))[0] == 10 * number
        assert case.figures["mpjpe_mm"] == figures.of_items["model"]["mpjpe_mm"][number].item()
        missing = {1: {"truth"}, 12: {"model"}}.get(number, set())
        assert set(case.poses) == {"truth", "model", "mean_pose"} - missing
        for name, wanted in (("truth", thetas), ("model", said), ("mean_pose", thetas.flip(0))):
            if name in case.poses:
                torch.testing.assert_close(case.poses[name], wanted[number], atol=1e-3, rtol=0)


def test_baselines_then_follow_the_seed_and_the_order_of_the_questions(tmp_path, monkeypatch):
    training = collect_training_poses(
        load_rows(write(tmp_path / "rows", [make_row(n) for n in range(30)]), "val"), torch.zeros(0, 24, 3)
    )
    captions = [make_row(n)["captions"][0]["text"] for n in (4, 2, 9)]
    named = []

    def find_by_sentence(training, texts, encoder, device):
        named.append(encoder)
        return training.rotmats[: len(texts)]

    monkeypatch.setattr(measures, "find_nearest_by_sentence", find_by_sentence)
    found = measures.make_baselines(training, captions, "mine", 5, torch.device("cpu"))
    assert list(found) == ["mean_pose", "random_pose", "nearest_caption", "nearest_sentence", "rest_pose"]
    assert named == ["mine"]
    assert found["random_pose"].equal(draw_random_poses(training, 3, 5))
    assert not found["random_pose"].equal(draw_random_poses(training, 3, 0))
    assert found["nearest_caption"].equal(training.rotmats[[4, 2, 9]])
    found = measures.make_baselines(training, ["", ""], "mine", 5, torch.device("cpu"))
    assert list(found) == ["mean_pose", "random_pose", "rest_pose"], "nothing is said"


def test_captions_then_each_text_is_measured_by_its_own_pose(tmp_path):
    rows = [make_row(n, kinds=("human", "geometry")[: 1 + n % 2]) for n in range(6)]
    questions, thetas, _ = make_desk_of_poses(tmp_path, rows, "captions")

    class Retrieval(FlatRetrieval):
        def embed_texts(self, texts):
            return self.embed_poses(self.thetas[[int(text.split()[-1]) for text in texts]])

    records = [{"text": f"I see {5 - n}"} for n in range(6)]
    judge = Judge(Retrieval(thetas), 2, 2, 0)
    figures = Figures(0)
    columns = measure_captions(questions, records, None, judge, figures)
    values = {system: of["t2p_recall1_percent"].tolist() for system, of in figures.of_items.items()}
    assert values["human_caption"] == [100.0] * 6
    assert "mrecall_percent" not in figures.metrics["human_caption"], "which is of both ways"
    assert [value if value == value else None for value in values["geometry_caption"]] == [None, 100.0] * 3
    assert values["model"] == [0.0] * 6, "it described others"
    assert columns["text_model"][0] == "I see 5"
    assert figures.counts == {"texts of model": 6, "texts of human_caption": 6, "texts of geometry_caption": 3}
    figures = Figures(0)
    measure_captions(questions, None, "geometry", judge, figures)
    assert list(figures.metrics) == ["geometry_caption"]


def test_chat_figures_then_long_conversations_weigh_more(tmp_path):
    questions = ask(tmp_path / "rows", [make_long_chat(), make_chat(1, turns=1)], "chat")
    records = [
        {"text": "SHE", "poses": [[0.0]], "ce": 2.0, "tokens": 1},
        {"text": "where", "poses": []},
        {"text": "gone", "poses": []},
        {"text": "a person", "poses": [], "ce": 12.0, "tokens": 3},
    ]
    before = [{**record, "text": "nothing"} for record in records]
    figures = Figures(0)
    columns, cases = measure_chat(questions, {"model": records, "before": before}, figures)
    assert figures.metrics["model"]["loss"].value == pytest.approx(14 / 4)
    assert figures.of_items["model"]["exact_match_percent"].tolist() == [100.0, 0.0, 0.0, 100.0]
    assert figures.metrics["before"]["exact_match_percent"].value == 0
    assert figures.of_items["model"]["pose_answer_percent"].tolist() == [100.0, 0.0, 0.0, 0.0]
    assert columns["reply_before"] == ["nothing"] * 4
    assert [(case.rank, case.id) for case in cases] == [
        *(("best", id) for id in ("row_7#0", "row_1#0")),
        *(("worst", id) for id in ("row_7#1", "row_7#2")),
    ]
    assert cases[2].reply == "where\n(expected: There.)"


def test_settings_then_reach_what_they_are_about(desk, tmp_path, monkeypatch):
    """Rows, training rows, seeds, the question, the sentence encoder."""
    answer_by(monkeypatch, lambda model, item: {"text": "", "poses": []})
    seen = []

    def load(name, split, **options):
        seen.append((Path(name).name, split, options.get("revision")))
        return load_rows(name, split, decode=options["decode"])

    monkeypatch.setattr(evaluation, "load_rows", load)
    monkeypatch.setattr(
        measures, "find_nearest_by_sentence", lambda training, texts, *_: training.rotmats[[0] * len(texts)]
    )
    other = write(tmp_path / "other", [make_row(n) for n in range(200, 207)], "seen")
    options = {
        "data_revision": "v1",
        "train_data": str(other),
        "train_split": "seen",
        "sentence_encoder": "mine",
        "question": "Show {sent}",
        "retrieval": str(desk / "retrieval"),
        "pool_size": 3,
        "pool_draws": 1,
    }
    results = [evaluate("text-to-pose", settings(desk, tmp_path / "out", seed=seed, **options)) for seed in (0, 7)]
    evaluate("text-to-pose", settings(desk, tmp_path / "own", data_revision="v1"))
    assert seen[:2] == [("rows", "val", "v1"), ("other", "seen", None)]
    assert seen[-1] == ("rows", "train", "v1"), "of data's own"
    assert results[0]["counts"]["training poses"] == 7
    assert results[0]["settings"]["question"] == "Show {sent}"
    assert column(tmp_path / "out", "question")[0].startswith("Show human")
    assert "nearest_sentence" in results[0]["metrics"]
    for system, metric in (("random_pose", "mpjpe_mm"), ("true_pose", "t2p_pool3_recall1_percent")):
        values = [result["metrics"][system][metric]["value"] for result in results]
        assert values[0] != values[1], f"other {metric} by another seed"
    low = [result["metrics"]["rest_pose"]["mpjpe_mm"]["low"] for result in results]
    assert low[0] != low[1], "other draws"


def test_results_then_are_written_last(desk, tmp_path, monkeypatch):
    answer_by(monkeypatch, lambda model, item: {"text": "", "poses": []})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "make_report", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate("text-to-pose", settings(desk, tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()


def test_rows_when_of_several_sources_and_a_truth_then_are_refused(desk, tmp_path):
    rows = photo_rows("rpe", 2)
    rows[1]["source"] = "rpe-refined"
    options = {"protocol": "rpe-22", "truth": str(tmp_path)}
    with pytest.raises(ValueError, match="expected rows of one source with `truth`, got rpe-refined, test"):
        evaluate("rpe", settings(desk, tmp_path / "out", data=write(tmp_path / "rows", rows), **options))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("captions", {}, "expected pictures in all rows for captions by a model"),
        ("text-to-pose", {"limit": 1}, "expected at least 2 items to retrieve among, got 1"),
    ],
)
def test_retrieval_when_it_cannot_be_then_is_refused_before_the_model_is_asked(
    desk, tmp_path, monkeypatch, task, options, message
):
    monkeypatch.setattr(answers, "load_trained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match=message):
        evaluate(task, settings(desk, tmp_path / "out", retrieval=str(desk / "retrieval"), **options))


def test_training_rows_when_they_were_named_and_are_not_there_then_are_refused(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "load_trained", lambda *_, **__: pytest.fail("asked"))
    options = {"train_data": str(desk / "rows"), "train_split": "lost"}
    with pytest.raises(FileNotFoundError, match="lost"):
        evaluate("text-to-pose", settings(desk, tmp_path / "out", **options))


def test_device_when_there_are_several_processes_then_is_refused(desk, tmp_path):
    with pytest.raises(ValueError, match="expected no device for 2 processes"):
        evaluate("chat", settings(desk, tmp_path / "out", device="cpu"), SimpleNamespace(num_processes=2))


# -- what a review found --


@pytest.mark.parametrize("is_file", [True, False])
def test_baselines_then_do_not_know_the_rows_that_are_evaluated(desk, tmp_path, monkeypatch, is_file):
    """A Parquet file is taken whatever the split; and `--split train` is the split that baselines know."""
    answer_by(monkeypatch, lambda model, item: {"text": "", "poses": []})
    data = write(tmp_path / "rows", [make_row(n) for n in range(5)], "train")
    results = evaluate(
        "text-to-pose",
        settings(desk, tmp_path / "out", data=data / "train" / "part.parquet" if is_file else data, split="train"),
    )
    assert "nearest_caption" not in results["metrics"]


def test_caption_kind_when_the_task_asks_by_none_then_is_refused(tmp_path):
    """A baseline would be told what the model is not."""
    rows = [make_row(n, "pose_estimation", picture=True) for n in range(3)]
    with pytest.raises(ValueError, match="expected no caption kind for pose-estimation"):
        ask(tmp_path / "rows", rows, "pose-estimation", caption_kind="human")


def test_results_then_say_which_rows_and_captions_were_asked_about(desk, tmp_path, monkeypatch):
    answer_by(monkeypatch, lambda model, item: {"text": "", "poses": []})
    options = {"caption_kind": "geometry", "id_prefix": "row_"}
    results = evaluate("text-to-pose", settings(desk, tmp_path / "out", **options))
    assert options.items() <= results["settings"].items()


def test_exact_match_when_the_answer_is_the_letter_a_then_is_not_silence():
    assert normalise_answer("A") != normalise_answer("")


def test_question_when_a_placeholder_is_left_then_is_refused(tmp_path):
    with pytest.raises(ValueError, match="phrase"):
        ask(tmp_path / "rows", [make_row(0)], "text-to-pose", template="Show {phrase}, please")


def test_question_when_for_a_chat_then_is_refused(tmp_path):
    with pytest.raises(ValueError, match="question"):
        ask(tmp_path / "rows", [make_row(0, "vqa")], "chat", template="Hello?")


def test_loss_when_every_token_costs_the_same_then_its_interval_is_empty(tmp_path):
    questions = ask(tmp_path / "rows", [make_chat(n, turns=1, picture=False) for n in range(20)], "chat")
    records = [{"text": "", "poses": [], "ce": 2.0 * size, "tokens": size} for size in [1, 100] * 10]
    figures = Figures(0)
    measure_chat(questions, {"model": records}, figures)
    loss = figures.metrics["model"]["loss"]
    assert (loss.low, loss.high) == (pytest.approx(2), pytest.approx(2))


def test_exact_match_then_its_interval_is_over_conversations(tmp_path):
    """Turns of one conversation are not independent."""
    questions = ask(tmp_path / "rows", [make_chat(n, turns=10, picture=False) for n in range(8)], "chat")
    records = [
        {"text": "person" if item.row % 2 else "", "poses": [], "ce": 1.0, "tokens": 1} for item in questions.items
    ]
    name, units = questions.find_units()
    assert name == "conversations"
    figures = Figures(0, units)
    measure_chat(questions, {"model": records}, figures)
    found = figures.metrics["model"]["exact_match_percent"]
    of_conversations = bootstrap(torch.tensor([0.0, 100.0] * 4))
    assert found.high - found.low == pytest.approx(of_conversations.high - of_conversations.low, rel=0.2)


def test_captions_when_nobody_knows_the_pose_then_are_left_out(tmp_path):
    rows = [make_row(0), {**make_row(1), "pose_mask": [[False] * 24]}]
    assert len(ask(tmp_path / "rows", rows, "captions").items) == 1


def test_captions_when_of_a_kind_model_then_are_not_the_models(tmp_path):
    questions, thetas, _ = make_desk_of_poses(tmp_path, [make_row(n, kinds=("model",)) for n in range(3)], "captions")
    figures = Figures(0)
    measure_captions(questions, [{"text": "x"}] * 3, None, Judge(FlatRetrieval(thetas), 9, 1, 0), figures)
    assert list(figures.metrics) == ["model", "model_caption"]


def test_picture_when_damaged_then_the_row_is_named(tmp_path):
    row = photo_rows("pose_estimation", 1)[0]
    questions = ask(tmp_path / "rows", [{**row, "images": [{"bytes": b"no", "path": None}]}], "pose-estimation")
    with pytest.raises(ValueError, match="row_0"):
        questions.make_chats([0])


def test_training_rows_when_nobody_knows_their_poses_then_there_is_a_note(desk, tmp_path, monkeypatch):
    answer_by(monkeypatch, lambda model, item: {"text": "", "poses": []})
    unknown = {**make_row(9), "pose_mask": [[False] * 24]}
    data = write(write(tmp_path / "rows", [make_row(n) for n in range(3)]), [unknown], "train")
    results = evaluate("text-to-pose", settings(desk, tmp_path / "out", data=data))
    assert list(results["metrics"]) == ["model", "rest_pose"]


def test_revision_when_the_weights_are_no_safetensors_then_follows_them_too(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    first = answers.find_revision(str(tmp_path), None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert answers.find_revision(str(tmp_path), None) != first


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("pose-estimation", {"retrieval": "nowhere"}),
        ("chat", {"protocol": "nonsense"}),
        ("chat", {"truth": "nowhere"}),
        ("chat", {"train_data": "nowhere"}),
    ],
)
def test_settings_when_the_task_does_not_look_at_them_then_are_refused(desk, tmp_path, monkeypatch, task, options):
    answer_by(monkeypatch, lambda model, item: {"text": "", "poses": [], "ce": 1.0, "tokens": 1})
    rows = photo_rows("pose_estimation", 2) if task != "chat" else [make_chat(0)]
    with pytest.raises((ValueError, OSError), match=next(iter(options))):
        evaluate(task, settings(desk, tmp_path / "out", data=write(tmp_path / "rows", rows), **options))


def test_answer_when_not_finite_then_the_item_is_named_at_once(tmp_path):
    class Pipe:
        def forward(self, inputs, **kwargs):
            return {"reply": [{"text": "", "poses": [{"theta": torch.full((72,), math.nan)}]} for _ in inputs["chat"]]}

    questions = ask(tmp_path / "rows", [make_row(0)], "text-to-pose")
    with pytest.raises(ValueError, match=r"pose of 'row_0', got NaN .* float32"):
        answers._answer(Pipe(), questions, [0], answers.Generation(1, 4, True, "float16"))


def test_chat_when_rows_hold_poses_then_they_are_left_out(tmp_path):
    questions = ask(tmp_path / "rows", [make_row(0, "vqa", ()), make_chat(1)], "chat")
    assert {item.row for item in questions.items} == {1}
    assert questions.counts["rows with poses"] == 1


def test_units_when_several_descriptions_are_of_one_picture_then_they_are_drawn_together(tmp_path):
    rows = photo_rows("rpe", 3)
    rows.append({**rows[1], "id": "another description"})
    name, units = ask(tmp_path / "rows", rows, "rpe").find_units()
    assert (name, units.tolist()) == ("pictures", [0, 1, 2, 1])
