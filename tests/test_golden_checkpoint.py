"""A checkpoint that release 0.1.0 saved loads, and answers as it did then.

`tests/goldens/checkpoint/` was written by `python tests/make_tiny_checkpoint.py` and `python tests/test_golden_checkpoint.py` (what it
answered) with transformers 5.24.0, torch 2.13.0; the code files are left out. It is never written again.
"""

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor


GOLDEN = ROOT / "tests" / "goldens" / "checkpoint"


def answers():
    """Tokens and poses of a question in words and of one about a picture, and what the loading said."""
    model, info = ChatPoseForConditionalGeneration.from_pretrained(GOLDEN, output_loading_info=True)
    processor = ChatPoseProcessor.from_pretrained(GOLDEN)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8))
    said = {}
    for name, parts in (("words", []), ("picture", [{"type": "image", "image": picture}])):
        content = [*parts, {"type": "text", "text": "Can you predict the SMPL pose of the person?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.eval().generate(
            **inputs, max_new_tokens=8, do_sample=False, force_pose=True, return_dict_in_generate=True
        )
        said[f"{name}_sequence"] = output.sequences.numpy()
        said[f"{name}_pose_rotmats"] = output.pose_rotmats.numpy()
    return said, info


def test_the_first_release_s_checkpoint_loads_and_answers_as_then():
    said, info = answers()
    assert not any(info.values()), "no weight is missing, left over, or of another shape"
    with np.load(GOLDEN / "answers.npz", allow_pickle=False) as expected:
        assert said.keys() == set(expected)
        for name in expected:
            if name.endswith("sequence"):
                np.testing.assert_array_equal(said[name], expected[name])
            else:
                assert len(expected[name]) > 0
                np.testing.assert_allclose(said[name], expected[name], atol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez(GOLDEN / "answers.npz", **answers()[0])
