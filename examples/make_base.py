"""A ChatPose to train: from any causal language model, or from nothing, for a laptop.

    python examples/make_base.py smollm2-base --text-model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/make_base.py smollm2-base --text-model FOLDER --gguf MODEL.gguf     # needs the package gguf
    python examples/make_base.py tiny-base --rows rows/cmu                              # some 1.5 M new weights, no download

The vision tower is new and small, so pictures need much training; for one that sees already, `--vision
openai/clip-vit-base-patch16`. 2 CPU cores: half a minute, 1.5 GB for SmolLM2.
"""

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor, vicuna_chat_template
from chatpose_hf.data.rows import caption_texts, load_rows


def load_text_model(name, gguf):
    from_file = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(name, **from_file)
    return tokenizer, AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **from_file), None


def read_texts(rows_name):
    """What the rows say and are said to be."""
    for row in load_rows(rows_name, decode=False).select_columns(["messages", "captions"]):
        yield from (part["text"] or "" for message in row["messages"] for part in message["content"])
        yield from caption_texts(row)


def make_text_model(texts, vocab_size=2000, hidden_size=192, layers=2, heads=6, dropout=0.0):
    """A byte-level BPE of the texts' words, a new LLaMA, and a chat template without a long system prompt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    size = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    size |= {"num_attention_heads": heads, "attention_dropout": dropout, "max_position_embeddings": 1024}
    text_model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(tokenizer)))
    return tokenizer, text_model, vicuna_chat_template(system_prompt="A chat.")


def load_vision_tower(name):
    return CLIPVisionModel.from_pretrained(name, dtype=torch.float32), AutoImageProcessor.from_pretrained(name)


def make_vision_tower(image_size=64, patch_size=8, hidden_size=64, layers=4, heads=2):
    size = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    size["num_attention_heads"] = heads
    tower = CLIPVisionModel(CLIPVisionConfig(**size, image_size=image_size, patch_size=patch_size))
    square = {"height": image_size, "width": image_size}
    return tower, CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    language = parser.add_mutually_exclusive_group(required=True)
    language.add_argument("--text-model", metavar="DIR_OR_ID", help="a causal language model")
    language.add_argument("--rows", metavar="DIR_OR_ID", help="rows whose words a new small one is made for")
    parser.add_argument("--gguf", metavar="FILE", help="the language model's file, where it is in GGUF")
    parser.add_argument("--vision", metavar="DIR_OR_ID", help="a CLIP vision tower (default: a small new one)")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.rows:
        tokenizer, text_model, template = make_text_model(read_texts(options.rows))
    else:
        tokenizer, text_model, template = load_text_model(options.text_model, options.gguf)
    vision_tower, image_processor = load_vision_tower(options.vision) if options.vision else make_vision_tower()
    patch_size = vision_tower.config.patch_size
    processor = ChatPoseProcessor(image_processor, tokenizer, patch_size=patch_size, num_additional_image_tokens=1)
    processor.chat_template = template or processor.chat_template
    model = ChatPoseForConditionalGeneration.from_llava(
        text_model=text_model, vision_tower=vision_tower, processor=processor
    )
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"{model.num_parameters():,} weights; wrote {options.output}")


if __name__ == "__main__":
    main()
