"""A ChatPose to train, from any causal language model and a new vision tower: pictures will need much training.

    python examples/make_base.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-base
    python examples/make_base.py FOLDER smollm2-base --gguf SmolLM2-135M-Instruct.Q4_1.gguf    # needs the package gguf

2 CPU cores: half a minute, 1.5 GB. For a tower that sees already, name one (`--vision openai/clip-vit-base-patch16`).
"""

import argparse

import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers import CLIPImageProcessorPil as CLIPImageProcessor

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text_model", help="folder or Hub id of a causal language model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--gguf", metavar="FILE", help="the model's file, where it is in GGUF")
    parser.add_argument("--vision", metavar="DIR_OR_ID", help="a CLIP vision tower (default: a small new one)")
    options = parser.parse_args()

    from_file = {"gguf_file": options.gguf} if options.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(options.text_model, **from_file)
    text_model = AutoModelForCausalLM.from_pretrained(options.text_model, dtype=torch.float32, **from_file)
    torch.manual_seed(0)
    if options.vision:
        vision_tower = CLIPVisionModel.from_pretrained(options.vision, dtype=torch.float32)
        image_processor = AutoImageProcessor.from_pretrained(options.vision)
    else:
        size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
        vision_tower = CLIPVisionModel(CLIPVisionConfig(**size, image_size=128, patch_size=16))
        image_processor = CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})
    processor = ChatPoseProcessor(
        image_processor,
        tokenizer,
        patch_size=vision_tower.config.patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    model = ChatPoseForConditionalGeneration.from_llava(
        text_model=text_model, vision_tower=vision_tower, processor=processor
    )
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"{model.num_parameters():,} weights; wrote {options.output}")


if __name__ == "__main__":
    main()
