"""Fine-tunes a ChatPose or a LLaVA-1.5 on rows with LoRA, in plain steps; `chatpose train` does the same with more care.

    python examples/finetune_lora.py BASE ROWS OUT [--steps 200]

BASE: folder or Hub id (`examples/make_base.py` makes a small one). ROWS: what `chatpose data` wrote, splits train and val.
A base of 1.5 M weights on 2 CPU cores: a minute for 200 steps. LLaVA-1.5-7B needs a GPU; not measured.
"""

import argparse

import torch

from chatpose_hf import ChatPosePipeline, ChatPoseProcessor
from chatpose_hf.adapters import (
    TuningArguments,
    count_parameters,
    format_parameters,
    load_base,
    load_trained,
    prepare_model,
)
from chatpose_hf.data.mixture import Mixture
from chatpose_hf.data.rows import load_rows
from chatpose_hf.trainer import ChatPoseTrainer, ChatPoseTrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder or Hub id of a ChatPose or a LLaVA-1.5")
    parser.add_argument("rows", help="folder or Hub id of rows")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()

    processor = ChatPoseProcessor.from_pretrained(options.base)
    model = load_base(options.base, processor, dtype=torch.bfloat16 if has_gpu else torch.float32)
    model = prepare_model(model, TuningArguments(lora_r=64, lora_alpha=128), base=options.base)
    print(format_parameters(count_parameters(model)))

    args = ChatPoseTrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        warmup_steps=options.steps // 10,
        bf16=has_gpu,
        use_cpu=not has_gpu,
        eval_strategy="steps",
        eval_steps=max(options.steps // 4, 1),
        save_strategy="no",
        report_to="none",
    )
    # The questions of the training rows are drawn anew in every epoch; those of the validation rows stay.
    train_data = Mixture([load_rows(options.rows, decode=False)], weights=[1])
    eval_data = load_rows(options.rows, "val", decode=False)
    trainer = ChatPoseTrainer(model, args, processor, train_data, eval_data)
    trainer.train()
    trainer.save_model()

    merged, processor = load_trained(options.output)
    merged.save_pretrained(f"{options.output}/merged")
    processor.save_pretrained(f"{options.output}/merged")
    pipe = ChatPosePipeline(model=merged, processor=processor, device="cuda" if has_gpu else "cpu")
    question = "There is a person: the left arm is raised. Please output this person's SMPL pose."
    reply = pipe(question, max_new_tokens=32, force_pose=True)
    print(reply["text"], [pose["theta"].shape for pose in reply["poses"]])


if __name__ == "__main__":
    main()
