"""The chat app: words and pictures in, words and 3D bodies out, in a browser; no request to any host but its own."""

import html
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from .body import BodyModel
from .export import POSE_TOKEN, Turn, make_messages, save_reply, stand_side_by_side
from .image_files import open_upload
from .pipeline_chatpose import ChatPosePipeline


if TYPE_CHECKING:
    import gradio as gr


logger = logging.getLogger(__name__)

MAX_FILE_SIZE = "32mb"
MAX_WAITING = 32  # questions in the queue; who comes next is told so
# Chats in memory, an hour beyond their page's end; over it, the one that was quiet longest is forgotten.
MAX_SESSIONS = 256
CACHE_SECONDS = 24 * 60 * 60

EXAMPLES = [
    "A person stands on one leg, arms stretched out to the sides. Can you give the SMPL pose of this person?",
    "What is the human pose in this image? Please respond with SMPL pose.",
]
# The hidden buttons of a message would, on a Space, send its picture to huggingface.co.
CSS = """
.gradio-container { max-width: 1500px !important; }
#chat { height: calc(100vh - 12rem) !important; min-height: 20rem; }
#chat .message-buttons { display: none; }
#chat .message img { max-height: 14rem; object-fit: contain; }
#body { height: calc(100vh - 20rem) !important; min-height: 18rem; }
#picture img { max-height: 13rem; object-fit: contain; }
@media (max-width: 48rem) { #chat { height: 55vh !important; } #body { height: 50vh !important; } }
"""

_generating = threading.Lock()


def make_app(pipe: ChatPosePipeline, body: BodyModel, max_new_tokens: int = 512) -> "gr.Blocks":
    """
    Builds the app.

    Args:
        pipe ([`ChatPosePipeline`]): answers, one question at a time.
        body ([`BodyModel`]): drawn in the pose.
        max_new_tokens (`int`, *optional*, defaults to 512): length limit of an answer.

    Returns:
        `gradio.Blocks`: wants the settings that [`launch_app`] launches it with.

    Raises:
        ImportError: without Gradio; names the extra that brings it.
    """
    gr = _import_gradio()
    stops: dict[str, threading.Event] = {}  # by session, while its answer is being made

    def answer(draft: dict, force_pose: bool, turns: list[Turn], request: gr.Request):
        """Yields what changes on the page. A question that fails goes back into its box, whole."""
        stop = stops[request.session_hash] = threading.Event()
        try:
            images = [(path, open_upload(path)) for path in draft["files"]]
            turn = Turn(draft["text"].strip(), images, {"text": "", "poses": []})
            yield {
                chat: show_chat([*turns, turn]),
                box: gr.MultimodalTextbox({"text": ""}, submit_btn=False, stop_btn=True),
            }
            for reply in stream_reply(pipe, [*turns, turn], stop, max_new_tokens, force_pose=force_pose):
                turn = turn._replace(reply=reply)
                yield {chat: show_chat([*turns, turn])}
            # The box is left with what was typed meanwhile.
            yield {state: [*turns, turn], box: gr.MultimodalTextbox(submit_btn=True, stop_btn=False)}
            return
        except ValueError as error:
            message = str(error)
        except Exception as error:
            # Such as a GPU without memory. The session goes on, and the operator gets the trace.
            logger.exception("no answer")
            message = f"The server met a problem ({type(error).__name__}) and has logged it. Your question is kept."
        finally:
            stops.pop(request.session_hash, None)
        yield {chat: show_chat(turns), box: gr.MultimodalTextbox(draft, submit_btn=True, stop_btn=False)}
        # Not raised, for then Gradio covers the chat. It renders messages as HTML, but file names are text.
        gr.Warning(html.escape(message), duration=20)

    def show_files(turns: list[Turn]) -> dict:
        """The right side. An answer without a pose leaves the last body there; the label says whose it is."""
        if not turns:  # the first question failed, or "New chat" came first
            return {folder: None}
        kept = TemporaryDirectory(prefix="chatpose_")
        files = {path.name: path for path in save_reply(kept.name, turns, body)}
        shown = {
            button: gr.DownloadButton(value=files[name], interactive=True)
            for name, button in buttons.items()
            if name in files
        }
        if count := len(turns[-1].thetas):
            total = sum(len(turn.thetas) for turn in turns)
            label = f"Pose {total}" if count == 1 else f"Poses {total - count + 1} to {total}, left to right"
            row = stand_side_by_side(body.vertices(torch.stack(turns[-1].thetas)))
            width, height, depth = (row.amax((0, 1)) - row.amin((0, 1))).tolist()
            # Far enough away for all of it: left to itself, the viewer cuts off raised hands, and feet that come towards it.
            distance = 1.35 * max(width, height) + depth / 2
            shown[model] = gr.Model3D(value=files["body.glb"], label=label, camera_position=(None, None, distance))
            shown[picture] = gr.Image(value=files["picture.png"], visible=True)
        return {folder: kept, **shown}

    def start_afresh() -> dict:
        return {
            chat: [],
            box: gr.MultimodalTextbox({"text": ""}, submit_btn=True, stop_btn=False),
            state: [],
            folder: None,
            model: gr.Model3D(value=None, label="Pose"),
            picture: gr.Image(value=None, visible=False),
            **{button: gr.DownloadButton(value=None, interactive=False) for button in buttons.values()},
        }

    def stop_answer(request: gr.Request) -> None:
        if request.session_hash in stops:
            stops[request.session_hash].set()

    def use_example(event: gr.SelectData) -> dict:
        return {"text": event.value["text"]}

    with gr.Blocks(title="ChatPose", analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as demo:
        state = gr.State([])
        # The last reply's files, until the next one's come or the session ends. Gradio serves copies, from its cache.
        folder = gr.State(None)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    render_markdown=False,
                    buttons=[],
                    placeholder="Ask for a pose, or show a picture and ask about it.",
                    examples=[{"text": example} for example in EXAMPLES],
                )
                box = gr.MultimodalTextbox(
                    elem_id="question",
                    show_label=False,
                    placeholder="Ask for a pose",
                    file_types=["image"],
                    file_count="multiple",
                    max_plain_text_length=1_000_000,  # a longer text would become a file
                    autofocus=True,
                )
                with gr.Row(equal_height=True):
                    force = gr.Checkbox(label="Force a pose", container=False, min_width=140)
                    new = gr.Button("New chat", size="sm", scale=0, min_width=120)
            with gr.Column(scale=2, min_width=320):
                model = gr.Model3D(
                    elem_id="body", label="Pose", interactive=False, clear_color=(0.93, 0.95, 0.97, 1.0)
                )
                picture = gr.Image(
                    elem_id="picture", show_label=False, type="filepath", interactive=False, visible=False, buttons=[]
                )
                with gr.Row():
                    buttons = {
                        name: gr.DownloadButton(name, size="sm", interactive=False, min_width=90)
                        for name in ("pose.npz", "body.glb", "page.html")
                    }

        asking = box.submit(
            answer,
            [box, force, state],
            [chat, box, state],
            show_progress="minimal",  # who waits sees the place in the queue
            show_progress_on=chat,
            api_visibility="private",
        )
        # A step of its own, because Gradio 6.31 draws no 3D model that comes from a generator.
        files_shown = [folder, model, picture, *buttons.values()]
        # One after the other, so that a cancelled chat's files cannot come back into the new one.
        in_turn = {"concurrency_id": "files", "show_progress": "hidden", "api_visibility": "private"}
        showing = asking.then(show_files, state, files_shown, **in_turn)
        # First the end of the answer, then the new chat: together, a late word would bring the old chat back.
        gr.on([new.click, chat.clear], None, cancels=[asking, showing], api_visibility="private").then(
            start_afresh, None, [chat, box, state, *files_shown], **in_turn
        )
        box.stop(stop_answer, queue=False, api_visibility="private")
        chat.example_select(use_example, outputs=box, queue=False, api_visibility="private")
    # One answer at a time: two at once would share one processor's time and memory.
    return demo.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)


def launch_app(
    pipe: ChatPosePipeline,
    body: BodyModel,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_new_tokens: int = 512,
    **launch_kwargs,
) -> "gr.Blocks":
    """
    Serves the app until it is interrupted.

    Args:
        pipe, body, max_new_tokens: as in [`make_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`): address to listen at; `"0.0.0.0"` for other machines too.
        port (`int`, *optional*, defaults to 7860): to listen at.
        launch_kwargs: for `gradio.Blocks.launch`; win over this function's own settings.

    Returns:
        `gradio.Blocks`: the app; at once with `prevent_thread_lock=True`.
    """
    gr = _import_gradio()
    settings = {
        "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css": CSS,
        "max_file_size": MAX_FILE_SIZE,
        "state_session_capacity": MAX_SESSIONS,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,  # would keep chats in the browser, for whoever sits there next
        "footer_links": [],
    }
    demo = make_app(pipe, body, max_new_tokens)
    demo.launch(server_name=host, server_port=port, **{**settings, **launch_kwargs})
    return demo


def _import_gradio():
    # Otherwise Gradio tells its makers of each app that is built, launched or fails.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # And with each question it makes a table of the last 10,000, for a page that is turned off here.
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the chat app needs the package gradio; pip install 'chatpose_hf[app]'") from error
    return gradio


def stream_reply(
    pipe: ChatPosePipeline, turns: Sequence[Turn], stop: threading.Event, max_new_tokens: int, **generate_kwargs
) -> Iterator[dict]:
    """
    Answers the last turn's prompt; its own reply is not read. Setting `stop`, or closing the iterator, ends the answer.

    Yields:
        `dict`: `{"text": ..., "poses": []}` as the text grows, then the reply.

    Raises:
        ValueError: for a chat that cannot be answered; whatever else the model raises.
    """
    _check_question(turns[-1], pipe.processor.image_token)
    messages = make_messages(turns, pipe.processor.image_token)
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    is_stopped = StoppingCriteriaList([lambda ids, *_, **__: torch.full(ids.shape[:1], stop.is_set()).to(ids.device)])
    outcome: Future = Future()

    def generate() -> None:
        try:
            with _generating:  # an answer that nobody waits for may still be at its last token
                reply = pipe(
                    messages,
                    streamer=streamer,
                    stopping_criteria=is_stopped,
                    max_new_tokens=max_new_tokens,
                    reuse_prefix=True,
                    **generate_kwargs,
                )
            outcome.set_result(reply)
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            streamer.end()

    # A daemon, so that Ctrl-C need not wait for the answer's end.
    threading.Thread(target=generate, daemon=True).start()
    try:
        text = ""
        for piece in streamer:
            text += piece
            yield {"text": text, "poses": []}
        yield outcome.result()
    finally:
        stop.set()


def _check_question(turn: Turn, image_token: str) -> None:
    if not turn.prompt:
        raise ValueError("Please write a question, about a picture too.")
    if image_token in turn.prompt:
        raise ValueError(
            f"Please leave out {image_token}, the model's own sign for a picture, and upload the picture."
        )


def show_chat(turns: Sequence[Turn]) -> list[dict]:
    """The chat as `gradio.Chatbot` takes it, `[pose 1]`, `[pose 2]`, ... in place of the poses."""
    # Escaped, because Gradio renders HTML even where Markdown is off: a remote picture would be fetched.
    shown = []
    count = 0
    for turn in turns:
        shown.append(
            {"role": "user", "content": [*({"path": path} for path, _ in turn.images), html.escape(turn.prompt)]}
        )
        text, *others = turn.reply["text"].split(POSE_TOKEN)
        for piece in others:
            count += 1
            text += f"[pose {count}]{piece}"
        shown.append({"role": "assistant", "content": html.escape(text) or "..."})
    return shown
