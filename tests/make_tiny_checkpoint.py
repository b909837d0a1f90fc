"""Tiny random ChatPose parts for tests: everything a real checkpoint has, in a few thousand weights, made offline.

`python tests/make_tiny_checkpoint.py DIR` writes one as a folder.
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from chatpose_hf import ChatPoseConfig, ChatPoseForConditionalGeneration, ChatPoseProcessor


CORPUS = [
    "A chat between a curious human and an artificial intelligence assistant. USER: ASSISTANT:",
    "Can you predict the SMPL pose of the person in this image? It is. Sure, the SMPL pose is.",
    "The person raises the left arm and bends the right knee. What is the person doing?",
]
# A language model's own template, for strings only, as SmolLM2's.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide, so that differences between paths show
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}


def make_tokenizer(chatml: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE: LLaMA-like with `<s>`, or ChatML-like (no begin token, `<|im_end|>` ends) with a template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chatml else ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if chatml:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<|endoftext|>",
            eos_token="<|im_end|>",
            chat_template=CHATML_TEMPLATE,
        )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def make_processor(chatml: bool = False) -> ChatPoseProcessor:
    return ChatPoseProcessor(
        make_image_processor(), make_tokenizer(chatml), patch_size=14, num_additional_image_tokens=1
    )


def make_text_model(vocab_size: int, tie: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=vocab_size, tie_word_embeddings=tie)).eval()


def make_vision_tower(seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    return CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()


def make_model(processor: ChatPoseProcessor, seed: int = 0, **fields) -> ChatPoseForConditionalGeneration:
    torch.manual_seed(seed)
    config = ChatPoseConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(processor.tokenizer)},
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        pose_token_id=processor.pose_token_id,
        pose_lead_in_ids=processor.pose_lead_in_ids,
        **fields,
    )
    model = ChatPoseForConditionalGeneration(config).eval()
    model.generation_config.update(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    # A start at the rest pose would make all poses nearly equal; let the head say something about its state.
    with torch.no_grad():
        model.pose_head.linear_2.weight.normal_(std=0.5)
    return model


if __name__ == "__main__":
    tiny_processor = make_processor()
    make_model(tiny_processor).save_pretrained(sys.argv[1])
    tiny_processor.save_pretrained(sys.argv[1])
