import argparse
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_rows import make_row, write_splits
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel, EvalPrediction

from chatpose_hf.data.rows import load_rows
from chatpose_hf.pose_files import turn_frame
from chatpose_hf.retrieval import (
    PoseScriptModel,
    Retrieval,
    RetrievalConfig,
    RetrievalModel,
    contrastive_loss,
    load_posescript,
    to_retrieval_frame,
)
from chatpose_hf.rotations import rotmat_to_rotvec, rotvec_to_rotmat
from chatpose_hf.train_retrieval import _EpochCallback, _Pairs, compute_recalls, make_tokenizer, train_retrieval


TEXTS = ["The left arm is raised.", "Both knees are bent.", "the person stands", "The right leg is in front."]
SMALL_BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS)


def make_model(tokenizer, seed=0, **settings):
    torch.manual_seed(seed)
    text_config = BertConfig(vocab_size=len(tokenizer), **SMALL_BERT)
    return RetrievalModel(
        RetrievalConfig(text_config=text_config, latent_size=8, pose_hidden_size=16, pose_depth=1, **settings)
    )


@pytest.fixture
def retrieval(tokenizer):
    return Retrieval(make_model(tokenizer), tokenizer, "small")


def draw_poses(count=5, seed=0):
    """Axis-angle, camera frame, in any orientation."""
    generator = torch.Generator().manual_seed(seed)
    poses = 0.5 * torch.randn(count, 24, 3, generator=generator)
    poses[:, 0] *= 3
    return poses


def turn_about_vertical(poses, angle):
    """In the camera frame, whose y points down."""
    turn = rotvec_to_rotmat(torch.tensor([0.0, angle, 0.0], dtype=torch.float64))
    turned = poses.double().clone()
    turned[:, 0] = rotmat_to_rotvec(turn @ rotvec_to_rotmat(turned[:, 0]))
    return turned


# -- frame --


def test_frame_of_an_upright_person_is_amass_without_yaw():
    upright = torch.zeros(1, 24, 3, dtype=torch.float64)
    upright[0, 0, 0] = math.pi  # camera frame: upright, facing the camera
    for angle in (0.0, 0.7, -2.5):
        frame = to_retrieval_frame(turn_about_vertical(upright, angle))
        torch.testing.assert_close(frame[0, 0], torch.tensor([math.pi / 2, 0, 0], dtype=torch.float64))


def test_frame_of_an_amass_pose_without_yaw_is_the_pose():
    amass = draw_poses().double()
    amass[:, 0] = torch.tensor([1.2, 0.0, 0.0])
    torch.testing.assert_close(to_retrieval_frame(turn_frame(amass, "z-up")), amass)


@pytest.mark.parametrize("poses", [torch.zeros(2, 72), torch.zeros(2, 22, 3), torch.zeros(24, 3)])
def test_poses_of_another_shape_are_refused(poses, retrieval):
    with pytest.raises(ValueError, match=r"expected `poses` of shape \(N, 24, 3\)"):
        retrieval.embed_poses(poses)


def test_poses_that_are_not_finite_are_refused(retrieval):
    with pytest.raises(ValueError, match="expected finite `poses`"):
        retrieval.embed_poses(torch.full((1, 24, 3), torch.nan))


# -- the model --


def test_embeddings_are_unit_float32_whatever_the_batches(retrieval):
    texts, poses = [*TEXTS, "A much longer text than the others, with many more words."], draw_poses()
    for embeds, one_by_one in (
        (retrieval.embed_texts(texts), retrieval.embed_texts(texts, batch_size=1)),
        (retrieval.embed_poses(poses), retrieval.embed_poses(poses, batch_size=2)),
    ):
        assert embeds.shape == (5, retrieval.latent_size) == (5, 8)
        assert embeds.dtype == torch.float32
        assert not embeds.requires_grad
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(embeds, one_by_one, atol=1e-6, rtol=0)
        assert torch.pdist(embeds).min() > 1e-3


def test_no_texts_and_no_poses_give_no_embeddings(retrieval):
    assert retrieval.embed_texts([]).shape == retrieval.embed_poses(torch.zeros(0, 24, 3)).shape == (0, 8)


def test_one_text_for_a_list_is_refused(retrieval):
    with pytest.raises(ValueError, match="expected a list of texts"):
        retrieval.embed_texts("The left arm is raised.")


def test_yaw_changes_nothing(retrieval):
    poses = draw_poses()
    for angle in (0.3, -2.0, math.pi):
        torch.testing.assert_close(
            retrieval.embed_poses(turn_about_vertical(poses, angle)), retrieval.embed_poses(poses), atol=1e-5, rtol=0
        )


def test_pitch_changes_the_embedding(retrieval):
    poses = draw_poses()
    pitched = poses.clone()
    pitched[:, 0] = rotmat_to_rotvec(rotvec_to_rotmat(torch.tensor([0.5, 0, 0])) @ rotvec_to_rotmat(poses[:, 0]))
    assert (retrieval.embed_poses(pitched) - retrieval.embed_poses(poses)).abs().max() > 1e-3


@pytest.mark.parametrize("ignored", [(22, 23), (10, 11, 22, 23)])
def test_exactly_the_ignored_joints_change_nothing(tokenizer, ignored):
    retrieval = Retrieval(make_model(tokenizer, ignored_joints=ignored), tokenizer, "small")
    pose = draw_poses(1)
    changed = pose.repeat(24, 1, 1)
    changed[torch.arange(24), torch.arange(24)] += 0.5
    differs = (retrieval.embed_poses(changed) - retrieval.embed_poses(pose)).abs().amax(1) > 1e-6
    assert (~differs).nonzero().flatten().tolist() == list(ignored)


def test_saved_model_loads_as_it_was(retrieval, tmp_path):
    folder = tmp_path / "small"
    retrieval.model.save_pretrained(folder)
    retrieval.tokenizer.save_pretrained(folder)
    loaded = Retrieval.load(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    torch.testing.assert_close(loaded.embed_texts(TEXTS), retrieval.embed_texts(TEXTS), atol=0, rtol=0)
    torch.testing.assert_close(loaded.embed_poses(draw_poses()), retrieval.embed_poses(draw_poses()), atol=0, rtol=0)
    assert loaded.name.startswith("small (sha256 ")
    assert loaded.name == Retrieval.load(folder).name

    other = make_model(retrieval.tokenizer, seed=1)
    other.save_pretrained(folder)
    assert Retrieval.load(folder).name != loaded.name


def test_other_models_are_refused(tmp_path, tokenizer):
    BertModel(BertConfig(vocab_size=len(tokenizer), **SMALL_BERT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="got a model of type 'bert'"):
        Retrieval.load(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a folder that `chatpose train-retrieval` wrote"):
        Retrieval.load(tmp_path / "empty")


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pose_depth": 2}))
    with pytest.raises(ValueError, match=r"missing_keys.*pose_encoder\.3"):
        Retrieval.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_size": 0}, "`latent_size` must be at least 1"),
        ({"pose_depth": 0}, "`pose_depth` must be at least 1"),
        ({"dropout": 1.0}, "`dropout` must be"),
        ({"initial_temperature": 0.0}, "`initial_temperature` must be"),
        ({"ignored_joints": [22]}, "`ignored_joints` must be"),
        ({"ignored_joints": [22, 23, 24]}, "`ignored_joints` must be"),
        ({"ignored_joints": list(range(24))}, "`ignored_joints` must be"),
        ({"text_config": {"hidden_size": 8}}, "a `model_type` of transformers, got None"),
        ({"text_config": {"model_type": "t5"}}, "got 't5', which is none"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**settings)


# -- the loss --


def naive_loss(texts, poses, temperature, names):
    """InfoNCE by loops: for each true pair, its share among the candidates."""
    total = 0.0
    for queries, gallery in ((texts, poses), (poses, texts)):
        for i, query in enumerate(queries):
            candidates = [j for j in range(len(gallery)) if j == i or names[j] != names[i]]
            weights = {j: math.exp(temperature * float(np.dot(query, gallery[j]))) for j in candidates}
            total -= math.log(weights[i] / sum(weights.values())) / len(queries)
    return total / 2


def test_loss_equals_naive_loops_also_where_texts_repeat():
    generator = torch.Generator().manual_seed(0)
    texts, poses = torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=generator).double(), dim=-1)
    for names in ("abcdef", "abacda", "aaaaaa"):
        is_same = torch.tensor([[a == b for a in names] for b in names])
        loss = contrastive_loss(texts, poses, torch.tensor(7.0).double(), is_same)
        assert loss.item() == pytest.approx(naive_loss(texts.numpy(), poses.numpy(), 7.0, names), abs=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_finds_the_texts_that_repeat(tokenizer, side):
    model = make_model(tokenizer).eval()
    texts = [*TEXTS[:3], TEXTS[0], "the", "the the"]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    rotmats = rotvec_to_rotmat(draw_poses(6))
    with torch.no_grad():
        output = model(batch["input_ids"], batch["attention_mask"], rotmats)
        silent = model(batch["input_ids"], batch["attention_mask"], rotmats, return_loss=False)
    wanted = naive_loss(output.text_embeds.numpy(), output.pose_embeds.numpy(), 10.0, texts)
    assert output.loss.item() == pytest.approx(wanted, abs=1e-5)
    assert silent.loss is None


def test_gradients_reach_all_that_trains(tokenizer):
    model = make_model(tokenizer)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model(batch["input_ids"], batch["attention_mask"], rotvec_to_rotmat(draw_poses(4))).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # Rows of the embeddings are left alone, but no whole matrix. Softmax does not see what all keys have in common.
    assert [name for name in without if not name.endswith("key.bias")] == []


def test_temperature_has_a_ceiling(tokenizer):
    model = make_model(tokenizer)
    assert model.temperature.item() == pytest.approx(10)
    model.log_temperature.data += 100
    assert model.temperature.item() == 100


# -- recalls --


def test_recalls_of_a_hand_made_ranking():
    texts = np.eye(3, dtype=np.float32)
    poses = texts[[0, 2, 1]]  # the first pair is right, the other two are swapped
    recalls = compute_recalls(EvalPrediction((texts, poses), None))
    assert recalls["t2p_r1"] == recalls["p2t_r1"] == pytest.approx(100 / 3)
    assert recalls["t2p_r5"] == recalls["p2t_r10"] == pytest.approx(100)
    assert recalls["mrecall"] == pytest.approx((2 * 100 / 3 + 4 * 100) / 6)


# -- training --


def make_pair_row(number):
    row = make_row(number, num_poses=1)
    words = np.random.default_rng(number).choice(["left", "right", "arm", "knee", "bent", "up"], size=4)
    kinds = ("geometry", "human", "implicit")
    row["captions"] = [{"kind": kind, "text": f"The {' '.join(words)} {kind}."} for kind in kinds]
    row["pose_mask"] = [[joint not in (10, 11, 22, 23) for joint in range(24)]]
    return row


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    train = [make_pair_row(n) for n in range(40)]
    bare = make_pair_row(100) | {"captions": [{"kind": "implicit", "text": "Tired."}]}
    again = train[3] | {"id": "again"}
    left_out = [make_row(n, num_poses) for n, num_poses in ((101, 0), (102, 2))]
    return write_splits(
        tmp_path_factory.mktemp("rows") / "tiny",
        [*train, bare, again, *left_out],
        [make_pair_row(n) for n in range(50, 62)],
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(3)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SMALL_BERT)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(rows, output, *more):
    return [
        *("--train_data", str(rows), "--output_dir", str(output), "--per_device_train_batch_size", "16"),
        *("--disable_tqdm", "True", "--use_cpu", "True", *more),
    ]


def weights_of(folder):
    return RetrievalModel.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def trained(rows, bert, tmp_path_factory):
    """A run of five steps, in the second of its epochs when it ends, with a checkpoint after the fourth."""
    output = tmp_path_factory.mktemp("trained") / "run"
    more = ("--eval_data", str(rows), "--max_steps", "5", "--save_strategy", "steps", "--save_steps", "4")
    train_retrieval(arguments(rows, output, "--text_model", str(bert), *more))
    return output


def test_training_writes_model_tokenizer_and_record(trained, rows, bert):
    retrieval = Retrieval.load(trained)
    assert retrieval.embed_texts(TEXTS).shape == (4, 512)
    record = json.loads((trained / "retrieval.json").read_text())
    assert record["train_data"] == {
        "names": ["tiny"],
        "split": "train",
        "pairs": 40,
        "left_out": {
            "no caption of kind human, automatic, geometry": 1,
            "the pose of a row before": 1,
            "not one pose": 2,
        },
    }
    assert record["eval_data"]["pairs"] == 12
    assert record["steps"] == 5
    assert record["seed"] == 42
    assert "transformers" in record["versions"]
    # What training evaluated is what the loaded model gives for the first caption of each row.
    val = load_rows(rows, "val", decode=False)
    texts = retrieval.embed_texts([row["captions"][0]["text"] for row in val])
    poses = retrieval.embed_poses(torch.tensor([row["poses"][0] for row in val]))
    wanted = compute_recalls(EvalPrediction((texts.numpy(), poses.numpy()), None))
    assert record["metrics"] == pytest.approx(wanted)
    # Toes and hands: no row knows them.
    assert list(retrieval.model.config.ignored_joints) == [10, 11, 22, 23]


def test_training_leaves_no_pickled_settings_and_no_other_files(trained):
    files = {path.name for path in trained.iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "retrieval.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "checkpoint-4",
        "checkpoint-5",
    }
    assert list(trained.rglob("training_args.bin")) == []


def test_training_changes_both_encoders_and_the_temperature(trained, bert):
    old, new = BertModel.from_pretrained(bert).state_dict(), weights_of(trained)
    assert not torch.equal(
        old["embeddings.word_embeddings.weight"], new["text_encoder.embeddings.word_embeddings.weight"]
    )
    assert new["log_temperature"].item() != pytest.approx(math.log(10), abs=1e-6)


def test_training_goes_on_bit_for_bit(trained, rows, bert, tmp_path, capsys):
    """In the middle of the second epoch: order and captions are drawn by it."""
    shutil.copytree(trained / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    more = ("--max_steps", "5", "--save_strategy", "steps", "--save_steps", "4")
    with pytest.raises(ValueError, match="holds the checkpoints of a training"):
        train_retrieval(arguments(rows, tmp_path / "run", "--text_model", str(bert), *more))
    train_retrieval(arguments(rows, tmp_path / "run", "--text_model", str(bert), "--resume", *more))
    # From the start the weights would be the same.
    assert f"going on from {tmp_path / 'run' / 'checkpoint-4'}" in capsys.readouterr().out
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(trained), atol=0, rtol=0)


def test_best_checkpoint_is_what_is_written(rows, bert, tmp_path, monkeypatch):
    recalls = iter([1.0, 5.0, 2.0, 3.0, 5.0])
    monkeypatch.setattr("chatpose_hf.train_retrieval.compute_recalls", lambda prediction: {"mrecall": next(recalls)})
    every_step = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "mrecall", "--save_total_limit", "2")
    more = ("--eval_data", str(rows), "--max_steps", "4", *every_step, *best)
    train_retrieval(arguments(rows, tmp_path, "--text_model", str(bert), *more))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    torch.testing.assert_close(weights_of(tmp_path), weights_of(tmp_path / "checkpoint-2"), atol=0, rtol=0)
    assert not torch.equal(
        weights_of(tmp_path)["log_temperature"], weights_of(tmp_path / "checkpoint-4")["log_temperature"]
    )


def test_tokenizer_of_the_same_texts_is_the_same():
    vocabularies = [make_tokenizer(TEXTS).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_order_and_captions_are_told_the_epoch_also_in_its_middle():
    told = []
    sampler, dataset = (
        SimpleNamespace(set_epoch=lambda epoch, name=name: told.append((name, epoch))) for name in "sd"
    )
    callback = _EpochCallback(SimpleNamespace(sampler=sampler, train_dataset=dataset))
    for epoch in (0, 1.5):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert told == [("s", 0), ("d", 0), ("s", 1), ("d", 1)]


def test_captions_are_drawn_anew_by_epoch_and_alike_by_seed():
    rotmats = rotvec_to_rotmat(draw_poses(20))

    def draw(seed, epoch):
        pairs = _Pairs([[f"{i}a", f"{i}b", f"{i}c"] for i in range(20)], rotmats, [], seed)
        pairs.set_epoch(epoch)
        return [pairs[i]["text"] for i in range(20)]

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1) != draw(1, 1)
    assert {text[-1] for text in draw(0, 0)} == {"a", "b", "c"}
    assert draw(None, 0) == draw(None, 1) == [f"{i}a" for i in range(20)]


def test_frozen_text_encoder_stays_and_yaml_settings_are_taken(rows, bert, tmp_path):
    settings = {"train_data": str(rows), "text_model": str(bert), "freeze_text": True, "caption_kinds": "human"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings | {"output_dir": "unused", "max_steps": 2}))
    train_retrieval([str(tmp_path / "run.yaml"), *arguments(rows, tmp_path / "run")[2:]])
    old, new = BertModel.from_pretrained(bert).state_dict(), weights_of(tmp_path / "run")
    for name, weight in old.items():
        if not name.startswith("pooler."):
            torch.testing.assert_close(new[f"text_encoder.{name}"], weight, atol=0, rtol=0)
    record = json.loads((tmp_path / "run" / "retrieval.json").read_text())
    assert record["caption_kinds"] == ["human"]
    assert record["metrics"] == {}


def test_text_encoder_from_nothing_trains_with_a_tokenizer_of_the_captions(rows, tmp_path):
    train_retrieval(arguments(rows, tmp_path, "--max_steps", "1"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("The LEFT knee") == ["Ġthe", "Ġleft", "Ġknee"]
    assert tokenizer.decode(tokenizer("naïve 人")["input_ids"], skip_special_tokens=True).strip() == "naïve 人"
    assert Retrieval.load(tmp_path).embed_texts(["The left knee."]).shape == (1, 512)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--caption_kinds", "novel"), "got 0; see `caption_kinds`"),
        (("--freeze_text",), "expected `text_model` with `freeze_text`"),
        (("--dataloader_drop_last", "True"), "expected no `dataloader_drop_last`"),
        (("--eval_strategy", "epoch"), "expected `eval_data`"),
        (("--dataloader_persistent_workers", "True", "--dataloader_num_workers", "1"), "expected no `dataloader_pers"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(rows, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train_retrieval(arguments(rows, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a", "expected settings as `name: value`"), ("a: [", "is no YAML file"), ("trian_data: x", "got trian_data")],
)
def test_bad_settings_files_are_refused(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        train_retrieval([str(tmp_path / "run.yaml")])


# -- PoseScript --

DISTILBERT = DistilBertConfig(vocab_size=300, dim=12, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=32)


def fill(shapes):
    """Weights of the release's names; all of them matter."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) + 0.5
        if "running_var" in name
        else torch.tensor(7)
        if "num_batches" in name
        else 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def posescript_weights(hidden=10, bottleneck=6, latent=8, feedforward=16, positions=40):
    """Written down from the release's source, not from our module."""
    shapes = {"loss_weight": (1,)}
    for index, width in ((1, 156), (4, hidden)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"pose_encoder.encoder.{index}.{name}"] = (width,)
        shapes[f"pose_encoder.encoder.{index}.num_batches_tracked"] = ()
    linears = {"pose_encoder.encoder.2": (hidden, 156), "pose_encoder.encoder.6": (hidden, hidden)}
    linears |= {"pose_encoder.encoder.7": (hidden, hidden), "pose_encoder.encoder.8": (bottleneck, hidden)}
    linears |= {"pose_encoder.encoder.10": (latent, bottleneck), "text_encoder.projection.1": (latent, 12)}
    for index in range(4):
        layer = f"text_encoder.transformer_encoder.layers.{index}"
        linears |= {f"{layer}.linear1": (feedforward, latent), f"{layer}.linear2": (latent, feedforward)}
        linears[f"{layer}.self_attn.out_proj"] = (latent, latent)
        shapes[f"{layer}.self_attn.in_proj_weight"] = (3 * latent, latent)
        shapes[f"{layer}.self_attn.in_proj_bias"] = (3 * latent,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}.{norm}.weight": (latent,), f"{layer}.{norm}.bias": (latent,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes["text_encoder.positional_encoding.pe"] = (positions, 1, latent)
    torch.manual_seed(5)
    text = {
        f"text_encoder.pretrained_text_encoder.{name}": weight
        for name, weight in DistilBertModel(DISTILBERT).state_dict().items()
    }
    return fill(shapes) | text


def settings(**changes):
    return argparse.Namespace(
        **{"text_encoder_name": "distilbertUncased", "transformer_topping": "avgp", "latentD": 8} | changes
    )


def save_release(path, weights, args=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 3, "model": weights, "optimizer": {}, "args": args or settings(), "best_val_loss": 1.0}, path)
    return path


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("distilbert")
    torch.manual_seed(6)
    DistilBertModel(DISTILBERT).save_pretrained(folder)
    make_tokenizer(["a b"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory, distilbert):
    folder = tmp_path_factory.mktemp("release") / "ret_distilbert" / "seed1"
    save_release(folder / "checkpoint_best.pth", posescript_weights())
    return folder


def naive_pose_encoder(weights, pose):
    """By numpy, of one pose of 156 numbers."""
    w = {name.removeprefix("pose_encoder.encoder."): value.double().numpy() for name, value in weights.items()}

    def normed(x, i):
        return (x - w[f"{i}.running_mean"]) / np.sqrt(w[f"{i}.running_var"] + 1e-5) * w[f"{i}.weight"] + w[f"{i}.bias"]

    def linear(x, i):
        return w[f"{i}.weight"] @ x + w[f"{i}.bias"]

    hidden = linear(normed(pose, 1), 2)
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    hidden = linear(linear(normed(hidden, 4), 6), 7)
    latent = linear(np.maximum(linear(hidden, 8), 0), 10)
    return latent / np.sqrt((latent**2).sum())


def naive_text_encoder(weights, text_states):
    """The transformer above DistilBERT's states of one text without padding, `(T, 12)`, by numpy."""
    w = {name.removeprefix("text_encoder."): value.double().numpy() for name, value in weights.items()}

    def normed(x, name):
        centred = x - x.mean(1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = linear(np.maximum(text_states, 0), "projection.1")
    x = x + w["positional_encoding.pe"][: len(x), 0]
    for index in range(4):
        layer = f"transformer_encoder.layers.{index}"
        projected = x @ w[f"{layer}.self_attn.in_proj_weight"].T + w[f"{layer}.self_attn.in_proj_bias"]
        query, key, value = np.split(projected, 3, axis=1)
        heads = []
        for head in range(4):
            part = slice(2 * head, 2 * head + 2)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(2))
            heads.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
        x = normed(x + linear(np.concatenate(heads, axis=1), f"{layer}.self_attn.out_proj"), f"{layer}.norm1")
        inner = linear(x, f"{layer}.linear1")
        inner = inner * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(inner)
        x = normed(x + linear(inner, f"{layer}.linear2"), f"{layer}.norm2")
    mean = x.mean(0)
    return mean / np.sqrt((mean**2).sum())


def test_posescript_poses_equal_the_naive_encoder(release, distilbert):
    retrieval = Retrieval.load(release, text_model=distilbert)
    poses = draw_poses()
    embeds = retrieval.embed_poses(poses)
    for pose, embed in zip(to_retrieval_frame(poses), embeds, strict=True):
        full = np.zeros((52, 3))
        full[:22] = pose[:22]
        wanted = naive_pose_encoder(posescript_weights(), full.reshape(156))
        np.testing.assert_allclose(embed.numpy(), wanted, atol=1e-5)
    hands = poses.clone()
    hands[:, 22:] += 1
    torch.testing.assert_close(retrieval.embed_poses(hands), embeds, atol=0, rtol=0)
    torch.testing.assert_close(retrieval.embed_poses(turn_about_vertical(poses, 1.0)), embeds, atol=1e-5, rtol=0)


def test_posescript_texts_equal_the_naive_encoder(release, distilbert):
    retrieval = load_posescript(release / "checkpoint_best.pth", distilbert)
    texts = ["a b b a", "b", "a a a b a b a"]
    weights = posescript_weights()
    prefix = "text_encoder.pretrained_text_encoder."
    encoder = DistilBertModel(DISTILBERT).eval()
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    for text, embed in zip(texts, retrieval.embed_texts(texts), strict=True):
        with torch.no_grad():
            states = encoder(**retrieval.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        wanted = naive_text_encoder(weights, states.last_hidden_state[0].double().numpy())
        np.testing.assert_allclose(embed.numpy(), wanted, atol=1e-5)


def test_posescript_without_distilbert_takes_the_folder_s(distilbert, tmp_path):
    weights = {name: value for name, value in posescript_weights().items() if "pretrained_text" not in name}
    retrieval = load_posescript(save_release(tmp_path / "a.pth", weights), distilbert)
    wanted = DistilBertModel.from_pretrained(distilbert).state_dict()
    torch.testing.assert_close(retrieval.model.text_encoder["pretrained_text_encoder"].state_dict(), wanted)


def test_posescript_takes_old_position_numbers(distilbert, tmp_path):
    weights = posescript_weights()
    weights["text_encoder.pretrained_text_encoder.embeddings.position_ids"] = torch.arange(32)[None]
    assert load_posescript(save_release(tmp_path / "a.pth", weights), distilbert).latent_size == 8


def test_posescript_name_tells_model_and_weights(release, distilbert):
    name = Retrieval.load(release, text_model=distilbert).name
    assert name.startswith("ret_distilbert/seed1/checkpoint_best.pth (sha256 ")
    assert isinstance(Retrieval.load(release / "checkpoint_best.pth", distilbert).model, PoseScriptModel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pose_encoder.encoder.7.weight": None}, "1 others: no `pose_encoder.encoder.7.weight`"),
        ({"pose_encoder.encoder.2.weight": None}, "got no `pose_encoder.encoder.2.weight`"),
        ({"text_encoder.augm_tokens.0": torch.zeros(8)}, "1 others: an unknown `text_encoder.augm_tokens.0`"),
        (
            {"pose_encoder.encoder.1.bias": torch.zeros(66)},
            r"`pose_encoder.encoder.1.bias` of shape \(66,\) for \(156,\)",
        ),
        (
            {"text_encoder.pretrained_text_encoder.embeddings.LayerNorm.bias": None},
            "no `text_encoder.pretrained_text_encoder.embeddings.LayerNorm.bias`",
        ),
        ({"loss_weight": "10"}, "expected the tensors of a model"),
    ],
)
def test_posescript_layers_that_differ_are_refused_by_name(change, message, distilbert, tmp_path):
    weights = {name: value for name, value in (posescript_weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_posescript(save_release(tmp_path / "a.pth", weights), distilbert)


def test_posescript_models_of_other_kinds_are_refused(distilbert, tmp_path, bert):
    for changes in ({"transformer_topping": "augtokens"}, {"text_encoder_name": "glovebigru_vocPSA2H2"}):
        path = save_release(tmp_path / "a.pth", posescript_weights(), settings(**changes))
        with pytest.raises(ValueError, match=f"got {next(iter(changes.values()))!r}"):
            load_posescript(path, distilbert)
    torch.save(posescript_weights(), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="expected a checkpoint of PoseScript"):
        load_posescript(tmp_path / "b.pth", distilbert)
    with pytest.raises(ValueError, match="expected a DistilBERT"):
        load_posescript(save_release(tmp_path / "c.pth", posescript_weights()), bert)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_posescript_file_with_code_is_refused_and_not_run(distilbert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_release(tmp_path / "a.pth", posescript_weights(), settings(extra=Hostile()))
    with pytest.raises(ValueError, match="It was not run"):
        load_posescript(path, distilbert)
    assert not (tmp_path / "hacked").exists()
    (tmp_path / "b.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read"):
        load_posescript(tmp_path / "b.pth", distilbert)


def test_posescript_module_is_the_release_s_by_name():
    """The module's own table against the one written down above."""
    model = PoseScriptModel(DistilBertModel(DISTILBERT), 10, 6, 8, 16, 40)
    shapes = {name: value.shape for name, value in posescript_weights().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert isinstance(model.pose_encoder["encoder"][3], nn.LeakyReLU)
