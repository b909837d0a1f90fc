"""A Hugging Face Space: the chat app for the checkpoint that the Space's variable CHATPOSE_MODEL names, else chatpose-tiny."""

import os
import sys

from chatpose_hf import CHATPOSE_TINY
from chatpose_hf.cli import main


model = os.environ.get("CHATPOSE_MODEL") or CHATPOSE_TINY
# Spaces are reached from outside their container, at the address and port that these name.
host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
port = os.environ.get("GRADIO_SERVER_PORT", "7860")
sys.exit(main(["app", "--model", model, "--host", host, "--port", port]))
