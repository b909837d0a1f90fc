"""
Talks about one photo: asks for the pose, then changes it by words, and saves every reply.

    python examples/chat_about_a_photo.py CHECKPOINT photo.png out

Hardware: any; the 13B checkpoint wants a GPU of 32 GB or more in its half precision. Time: seconds a turn on a GPU.
"""

import sys
from pathlib import Path

from PIL import Image
from transformers import pipeline

from chatpose_hf.body import BodyModel
from chatpose_hf.export import Turn, save_reply


checkpoint, photo, output = sys.argv[1:]
pipe = pipeline("image-text-to-pose", model=checkpoint, dtype="auto", trust_remote_code=True)

questions = [
    "Can you predict the SMPL pose of the person in this image?",
    "Now the person sits down on a chair. What is the SMPL pose?",
]
body = BodyModel.load()
messages, turns = [], []
for question in questions:
    images = [] if turns else [(photo, Image.open(photo))]
    content = [*({"type": "image", "image": image} for _, image in images), {"type": "text", "text": question}]
    messages.append({"role": "user", "content": content})
    reply = pipe(messages, max_new_tokens=128)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": reply["text"]}]})
    print(f"{question}\n  {reply['text']}  ({len(reply['poses'])} poses)")
    turns.append(Turn(question, images, reply))
    save_reply(Path(output) / f"turn_{len(turns)}", turns, body)
