"""The pipelines: ours, and transformers' own for pictures and text."""

import pytest
import torch
from transformers import GenerationConfig, pipeline

from chatpose_hf import ChatPosePipeline


@pytest.fixture(scope="module")
def pipe(model, processor):
    return ChatPosePipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def questions(images):
    return [
        {"text": "What is the pose?", "images": images[0]},
        "The person raises the left arm.",
        {"text": "Both?", "images": images[1:3]},
        [{"role": "user", "content": [{"type": "image", "image": images[3]}, {"type": "text", "text": "q"}]}],
    ]


def assert_same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one["text"] == other["text"]
        assert len(one["poses"]) == len(other["poses"]) > 0
        for pose, other_pose in zip(one["poses"], other["poses"], strict=True):
            torch.testing.assert_close(pose["theta"], other_pose["theta"], atol=1e-3, rtol=0)


OPTIONS = {"max_new_tokens": 6, "force_pose": True}


def test_every_kind_of_input_alone_and_batched(pipe, questions):
    alone = [pipe(question, **OPTIONS) for question in questions]
    assert all(reply["poses"][0]["theta"].shape == (72,) for reply in alone)
    assert_same(pipe(questions, **OPTIONS), alone)
    assert_same(pipe(questions, batch_size=3, **OPTIONS), alone)
    assert_same(list(pipe((question for question in questions), batch_size=2, **OPTIONS)), alone)


def test_equals_generate(pipe, model, processor, images):
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}], add_generation_prompt=True
    )
    batch = processor(text=text, images=images[0], return_tensors="pt")
    output = model.generate(**batch, return_dict_in_generate=True, **OPTIONS)
    assert_same([pipe(text="q", images=images[0], **OPTIONS)], processor.post_process_poses(output))


def test_several_sequences_each(pipe):
    replies = pipe(["a", "b"], num_return_sequences=3, do_sample=True, batch_size=2, **OPTIONS)
    assert [len(reply) for reply in replies] == [3, 3]
    assert len(pipe("a", num_return_sequences=2, num_beams=2, **OPTIONS)) == 2


def test_dataset_streams_without_reading_ahead(pipe):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield {"text": "What is the pose?"}

    replies = pipe(Endless(), batch_size=2, **OPTIONS)
    assert len([next(iter(replies)) for _ in range(3)]) == 3


def test_generate_kwargs_are_not_changed(pipe):
    options = {"max_new_tokens": 2}
    pipe("a", generate_kwargs=options)
    assert options == {"max_new_tokens": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a question, got none"),
        ({"inputs": "a", "text": "b"}, "got both"),
        ({"inputs": ["a"], "images": ["b"]}, "`images` go with a single text"),
        ({"inputs": {"question": "a"}}, "expected a text, a chat"),
    ],
)
def test_unclear_inputs_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_answers_end_where_the_model_reads_no_more(pipe):
    limit = pipe.model.config.text_config.max_position_embeddings
    word = "word "
    words = limit // 2 // len(pipe.processor.tokenizer(10 * word)["input_ids"]) * 10
    lengths = []
    layer = pipe.model.model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    never_ends = {"suppress_tokens": [pipe.processor.tokenizer.eos_token_id]}
    try:
        for options in ({}, {"max_new_tokens": 4 * limit}):
            lengths.clear()
            pipe(words * word, **never_ends, **options)
            assert limit - 2 <= sum(lengths) <= limit
        lengths.clear()
        pipe("a", generation_config=GenerationConfig(max_new_tokens=3, do_sample=False))
        assert len(lengths) <= 3
        with pytest.raises(ValueError, match=f"fewer than {limit} tokens"):
            pipe(2 * limit * word)
    finally:
        hook.remove()


def test_save_writes_the_processor_too(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "tokenizer.json", "model.safetensors", "pipeline_chatpose.py"} <= names
    loaded = pipeline("image-text-to-pose", model=str(tmp_path), trust_remote_code=True)
    assert_same([loaded("a", **OPTIONS)], [pipe("a", **OPTIONS)])


def test_the_pipeline_of_transformers_works_too(model, processor, images):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "q"}]}]
    reply = pipe(text=chat, max_new_tokens=4, return_full_text=False)
    assert isinstance(reply[0]["generated_text"], str)


def test_reused_prefix_when_a_chat_goes_on_then_only_what_is_new_is_read_and_the_answers_are_the_same(pipe, images):
    widths = []
    layer = pipe.model.model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda _, inputs, output: widths.append(output.shape[1]))

    def say(text, *pictures):
        return [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]

    def ask(*questions, **options):
        """A chat's replies, and of each how many tokens of the prompt were read for it."""
        messages, replies, read = [], [], []
        for question in questions:
            messages.append({"role": "user", "content": question})
            widths.clear()
            replies.append(pipe(list(messages), **OPTIONS, **options))
            read.append(widths[0])
            messages.append({"role": "assistant", "content": [{"type": "text", "text": replies[-1]["text"]}]})
        return replies, read

    chats = {
        "text": [say("He kneels."), say("Now the other leg."), say("And up.")],
        "pictures": [say("Who is it?", images[0]), say("And here?", images[1]), say("Thanks.")],
        "another picture, the same words": [say("Who is it?", images[1]), say("And here?", images[1])],
        "another chat": [say("She jumps.")],
    }
    plain = {name: ask(*chat) for name, chat in chats.items()}
    reusing = {name: ask(*chat, reuse_prefix=True) for name, chat in chats.items()}
    hook.remove()
    for name in chats:
        assert_same(reusing[name][0], plain[name][0])
    for name in ("text", "pictures"):
        whole, new = plain[name][1], reusing[name][1]
        for turn in (1, 2):
            assert new[turn] < whole[turn] - whole[turn - 1] + 8, "no more than the last answer and the question"
    name = "another picture, the same words"  # tokens do not say which picture they stand for
    chat = [{"role": "user", "content": chats[name][0]}]
    ids = pipe.processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    assert plain[name][1][0] - reusing[name][1][0] == ids.index(pipe.model.config.image_token_id)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_reused_prefix_when_there_is_more_than_one_answer_then_is_refused(pipe, options):
    message = "expected one chat, one beam and one answer with `reuse_prefix`"
    with pytest.raises(ValueError, match=message):
        pipe("a", reuse_prefix=True, **OPTIONS, **options)
    with pytest.raises(ValueError, match=message):
        pipe(["a", "b"], batch_size=2, reuse_prefix=True, **OPTIONS)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_reused_prefix_when_there_is_none_to_keep_then_the_answers_are_the_same(pipe, options):
    want = pipe("He kneels.", **OPTIONS)
    for _ in range(2):
        assert_same([pipe("He kneels.", reuse_prefix=True, **OPTIONS, **options)], [want])
