"""Processor of ChatPose: pictures and chats in, tensors out; generated tokens in, words and SMPL parameters out."""

import json
import reprlib
from functools import cache

import torch
from transformers import AddedToken, LlavaProcessor
from transformers.utils import logging

from .person_crop import crop_person
from .rotations import rotmat_to_rotvec, rotvec_to_rotmat


logger = logging.get_logger(__name__)

# The system prompt of the original's chat program (conversation template `llava_v1`).
SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

_VICUNA_TEMPLATE = """\
{%- set ns = namespace(separator=' ', system=SYSTEM_PROMPT, chat=messages) -%}
{%- macro render(content, keep_pose) -%}
{%- if content is string -%}
{{- content if keep_pose else content HISTORY_FILTER -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{- IMAGE_PLACEHOLDER -}}
{%- elif part.type == 'text' -%}{{- part.text if keep_pose else part.text HISTORY_FILTER -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set ns.system = render(messages[0].content, true) -%}
{%- set ns.chat = messages[1:] -%}
{%- endif -%}
{{- ns.system -}}
{%- for message in ns.chat -%}
{%- if message.role == 'user' -%}
{{- ns.separator + 'USER: ' + render(message.content, true) -}}
{%- set ns.separator = ' ' -%}
{%- elif message.role == 'assistant' -%}
{{- ' ASSISTANT:' -}}
{%- generation -%}
{{- ' ' + render(message.content, not add_generation_prompt) + eos_token -}}
{%- endgeneration -%}
{%- set ns.separator = '' -%}
{%- else -%}
{{- raise_exception('expected the roles system (first), user and assistant, got ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""

# Goes before a template that knows only strings (most language models' own): turns lists of parts into strings.
_FLATTEN_PARTS = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set flat.text = flat.text + IMAGE_PLACEHOLDER -%}
{%- elif part.type == 'text' -%}{%- set flat.text = flat.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def _fill_template(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(name, json.dumps(value))
    return template


def vicuna_chat_template(
    system_prompt: str = SYSTEM_PROMPT,
    image_placeholder: str = "<image>\n",
    pose_token: str = "<POSE>",
    pose_in_history: str | None = None,
) -> str:
    """
    The chat template of LLaVA-1.5 and ChatPose: `SYSTEM USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:`.

    Args:
        system_prompt (`str`, *optional*): used where a chat has no system message.
        image_placeholder (`str`, *optional*): what stands for a picture.
        pose_token (`str`, *optional*): the pose token.
        pose_in_history (`str`, *optional*):
            What stands for a pose in earlier answers when an answer is asked for; the pose token itself by default.
            The original's chat program wrote `[POSE]` there, as plain text, and no blank between two of them.

    Returns:
        `str`: a Jinja template.
    """
    history_filter = ""
    if pose_in_history is not None:
        # Twice, because a run of three or more shares its blanks.
        join = "| replace(POSE ~ ' ' ~ POSE, POSE ~ POSE)".replace("POSE", json.dumps(pose_token))
        history_filter = f"{join} {join} | replace({json.dumps(pose_token)}, {json.dumps(pose_in_history)})"
    return _fill_template(
        _VICUNA_TEMPLATE.replace("HISTORY_FILTER", history_filter),
        SYSTEM_PROMPT=system_prompt,
        IMAGE_PLACEHOLDER=image_placeholder,
    )


class ChatPoseProcessor(LlavaProcessor):
    """
    A [`~transformers.LlavaProcessor`] that knows `<POSE>`. Made from a base without one (a LLaVA, a language model's
    tokenizer), it adds the token, a pad token where none is set, left padding, and a chat template.

    The base's own chat template is kept if it closes each answer with the end token, made to take pictures if it
    knows only strings; otherwise [`vicuna_chat_template`] is used, because a model trained on answers without an end
    never stops.

    Args:
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, image_token:
            As in [`~transformers.LlavaProcessor`].
        chat_template (`str`, *optional*): Jinja template of chats.
        num_additional_image_tokens (`int`, *optional*, defaults to 0): 1 where the tower has a class token.
        pose_token (`str`, *optional*, defaults to `"<POSE>"`): the word that stands for a pose.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy="default",
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        pose_token="<POSE>",
        **kwargs,
    ):
        vocabulary = tokenizer.get_vocab()
        if image_token not in vocabulary:
            tokenizer.add_tokens(AddedToken(image_token, special=True, normalized=False), special_tokens=True)
        if pose_token not in vocabulary:
            # Not a special token: those are cut from every decoded reply.
            tokenizer.add_tokens(AddedToken(pose_token, special=False, normalized=False))
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what gets saved
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
            chat_template = _adapt_chat_template(tokenizer, chat_template or tokenizer.chat_template, image_token)
        self.pose_token = pose_token
        self.pose_token_id = tokenizer.convert_tokens_to_ids(pose_token)
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @property
    def _image_size(self) -> dict:
        return getattr(self.image_processor, "crop_size", None) or self.image_processor.size

    @property
    def num_image_tokens(self) -> int:
        """How many tokens one picture takes."""
        size = self._image_size
        patches = (size["height"] // self.patch_size) * (size["width"] // self.patch_size)
        return patches + self.num_additional_image_tokens - (self.vision_feature_select_strategy == "default")

    @property
    def pose_lead_in_ids(self) -> list[int]:
        """Ids of the words "It is", the lead-in to a pose in the original's answers, between a sentence and `<POSE>`."""
        before = self.tokenizer.encode("Yes.", add_special_tokens=False)
        ids = self.tokenizer.encode(f"Yes. It is {self.pose_token}", add_special_tokens=False)
        return ids[len(before) : ids.index(self.pose_token_id)]

    def __call__(self, images=None, text=None, poses=None, **kwargs):
        """
        Turns texts, pictures and poses into the model's inputs.

        Args:
            images (picture, `list`, or `list[list]`, *optional*):
                One picture for each `<image>`, nested by row or flat in order. Rows without pictures are welcome.
            text (`str` or `list[str]`):
                Prompts, with `<image>` where a picture belongs and `<POSE>` for poses.
            poses (`list`, *optional*):
                For each row the poses of its `<POSE>` tokens, axis-angle of shape `(J, 3)` in radians, camera frame;
                for a single text, its poses.
            kwargs: as in [`~transformers.LlavaProcessor`] (`padding`, `return_tensors`, ...).

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask`, `pixel_values` if there are pictures, and `pose_labels`
            of shape `(P, J, 3, 3)` if `poses` are given.

        Raises:
            ValueError: when pictures or poses and their placeholders disagree; names the row and both counts.
        """
        rows = [text] if isinstance(text, str) else text
        if rows is not None:
            if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, str) for row in rows):
                raise ValueError(f"expected a text or a list of at least one, got {reprlib.repr(text)}")
            try:
                "".join(rows).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"expected text that UTF-8 can write, got half of a character: {error}") from error
            self._check_images(rows, images)
        pose_labels = None
        if poses is not None:
            pose_labels = self._pose_labels(rows or [], [poses] if isinstance(text, str) else poses)
        batch = super().__call__(images=images, text=text, **kwargs)
        if pose_labels is not None:
            batch["pose_labels"] = pose_labels
        return batch

    def crop_person(self, image, box):
        """
        The square around one person of a photo, cut as the training photos are, at the vision tower's size.

        Args:
            image (`PIL.Image.Image`): the photo.
            box (`(left, top, right, bottom)`): the person's, in pixels of the photo; may reach over its edge.

        Returns:
            `PIL.Image.Image`: to ask about instead of the photo.
        """
        return crop_person(image, box, self._image_size["height"])

    def _check_images(self, rows: list[str], images) -> None:
        counts = [row.count(self.image_token) for row in rows]
        if isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
            given = [len(row) if isinstance(row, (list, tuple)) else 1 for row in images]
            if len(given) != len(rows):
                raise ValueError(
                    f"expected a list of pictures for each of the {len(rows)} texts, got {len(given)} lists"
                )
            for row, (wanted, got) in enumerate(zip(counts, given, strict=True)):
                if wanted != got:
                    raise ValueError(
                        f"expected one picture for each `{self.image_token}`, got {got} pictures for {wanted} "
                        f"placeholders in row {row}; check `images` against the text"
                    )
            return
        given = 0 if images is None else len(images) if isinstance(images, (list, tuple)) else 1
        if given != sum(counts):
            raise ValueError(
                f"expected one picture for each `{self.image_token}`, got {given} pictures for {sum(counts)} "
                f"placeholders ({', '.join(f'{n} in row {row}' for row, n in enumerate(counts))}); pass pictures "
                "nested by row, `[[first row's], [second row's], ...]`, to see which row is wrong"
            )

    def _pose_labels(self, rows: list[str], poses) -> torch.Tensor:
        if not hasattr(poses, "__len__") or not all(hasattr(each, "__len__") for each in poses):
            raise ValueError(f"expected a list of poses for each of the {len(rows)} texts, got {reprlib.repr(poses)}")
        if len(poses) != len(rows):
            raise ValueError(f"expected a list of poses for each of the {len(rows)} texts, got {len(poses)} lists")
        for row, (text, row_poses) in enumerate(zip(rows, poses, strict=True)):
            if (count := text.count(self.pose_token)) != len(row_poses):
                raise ValueError(
                    f"expected one pose for each `{self.pose_token}`, got {len(row_poses)} poses for {count} tokens in "
                    f"row {row}; check `poses` against the text"
                )
        try:
            flat = [torch.as_tensor(pose, dtype=torch.float32) for row_poses in poses for pose in row_poses]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"expected poses as axis-angle of shape (joints, 3): {error}") from error
        for pose in flat:
            if pose.ndim != 2 or pose.shape[-1] != 3 or pose.shape != flat[0].shape:
                raise ValueError(f"expected poses as axis-angle of shape (joints, 3), got {tuple(pose.shape)}")
        rotmats = rotvec_to_rotmat(torch.stack(flat)) if flat else torch.zeros(0, 24, 3, 3)
        if not torch.isfinite(rotmats).all():
            raise ValueError("expected poses of finite angles in radians, got others")
        return rotmats

    def apply_chat_template(self, conversation, chat_template=None, return_assistant_tokens_mask=False, **kwargs):
        """
        Renders one chat or a list of chats and, with `tokenize=True, return_dict=True`, makes the model's inputs.

        Beside transformers' parts (`{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`), content may
        hold `{"type": "pose"}`, which becomes `<POSE>`.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): messages of `role` and `content`.
            chat_template (`str`, *optional*): instead of the processor's own.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`):
                Also return `assistant_masks` of shape `(B, T)`: 1 on the tokens of every answer and its end token.
                Labels are `input_ids` where it is 1 and -100 elsewhere. Works with pictures, with padding, and with
                templates that have no generation marks.
            kwargs: as in transformers' `apply_chat_template` (`add_generation_prompt`, `tokenize`, ...).

        Returns:
            `str`, `list[str]` or `BatchFeature`, as in transformers.

        Raises:
            ValueError: for what is no chat, content of an unknown kind, roles that the template refuses, and where answers
                cannot be told from the template's text.
        """
        is_batched = isinstance(conversation, (list, tuple)) and conversation and not isinstance(conversation[0], dict)
        chats = [_copy_chat(row, chat) for row, chat in enumerate(conversation if is_batched else [conversation])]
        for row, chat in enumerate(chats):
            self._write_poses_as_text(row, chat)
        if return_assistant_tokens_mask and not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            raise ValueError("`return_assistant_tokens_mask=True` needs `tokenize=True` and `return_dict=True`")
        try:
            output = super().apply_chat_template(chats if is_batched else chats[0], chat_template, **kwargs)
        except Exception as error:
            # By name: a file beside weights should not need to import jinja2.
            if not type(error).__module__.startswith("jinja2"):
                raise
            raise ValueError(f"the chat template refuses the chat: {error}") from error
        if return_assistant_tokens_mask:
            self._add_assistant_masks(output, chats, chat_template)
        return output

    def _write_poses_as_text(self, row: int, chat: list[dict]) -> None:
        """Joins neighbouring texts and poses, in place: templates may put anything between two parts."""
        for index, message in enumerate(chat):
            if not isinstance(message.get("content"), list):
                continue
            parts = []
            for part in message["content"]:
                kind = part.get("type")
                if kind not in ("text", "pose", "image", "image_url"):
                    raise ValueError(
                        f"expected content of type text, image or pose, got {kind!r} in message {index} of row {row}"
                    )
                if kind == "pose":
                    part = {"type": "text", "text": self.pose_token}
                if part["type"] == "text" and not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"expected a text, got {reprlib.repr(part.get('text'))} in message {index} of row {row}"
                    )
                if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                    parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
                else:
                    parts.append(part)
            message["content"] = parts

    def _render(self, chat: list[dict], chat_template, **options) -> str:
        return super().apply_chat_template(chat, chat_template, **options)

    def _answer_header(self, chat_template) -> str:
        """What a template asks for an answer with."""
        question = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
        asking = self._render(question, chat_template, add_generation_prompt=True)
        return asking[len(self._render(question, chat_template)) :]

    def _answer_spans(
        self, row: int, chat: list[dict], chat_template, header: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat and where its answers stand, end tokens included."""
        text = self._render(chat, chat_template)

        @cache  # rendering is most of the time that a row takes
        def length(count: int) -> int:
            """Of the text of so many messages."""
            if count in (0, len(chat)):
                return len(text) if count else 0
            return len(self._render(chat[:count], chat_template))

        spans = []
        for index in (index for index, message in enumerate(chat) if message["role"] == "assistant"):
            start, end = length(index), length(index + 1)
            if not text[start:end].startswith(header):
                raise ValueError(
                    f"cannot find the answer in message {index} of row {row}: the chat template does not begin it with "
                    f"{header!r}, as it does when it asks for one; use a template whose text only grows with the chat"
                )
            turn_end = text.rfind(self.tokenizer.eos_token, start, end)
            spans.append((start + len(header), turn_end + len(self.tokenizer.eos_token) if turn_end >= 0 else end))
        return text, spans

    def _add_assistant_masks(self, output, chats: list[list[dict]], chat_template) -> None:
        """
        Marks the answers' tokens: found by their characters in the text before pictures are expanded, where each
        `<image>` is one token, then spread over the expanded rows. (transformers up to 5.17 marks nothing in chats
        with pictures, and needs marks in the template.)
        """
        header, masks = self._answer_header(chat_template), []
        answers = [self._answer_spans(row, chat, chat_template, header) for row, chat in enumerate(chats)]
        bos, texts = self.tokenizer.bos_token, [text for text, _ in answers]
        has_bos = bool(bos) and all(text.startswith(bos) for text in texts)
        tokens = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=not has_bos)
        for row, (_, spans) in enumerate(answers):
            token_ids, offsets = tokens["input_ids"][row], tokens["offset_mapping"][row]
            ids = torch.as_tensor(output["input_ids"][row])
            real = torch.as_tensor(output["attention_mask"][row]).bool()
            num_images = token_ids.count(self.image_token_id)
            per_image = int((ids == self.image_token_id).sum()) // max(num_images, 1)
            mask = []
            for token_id, (start, end) in zip(token_ids, offsets, strict=True):
                is_answer = any(start < span_end and end > span_start for span_start, span_end in spans)
                mask += [int(is_answer)] * (per_image if token_id == self.image_token_id else 1)
            if len(mask) != int(real.sum()):
                raise ValueError(
                    f"row {row} has {len(mask)} tokens but only {int(real.sum())} were kept: truncation cut it; shorten "
                    "the chat or raise `max_length`"
                )
            padded = torch.zeros_like(ids)
            padded[real] = torch.tensor(mask, dtype=padded.dtype)
            masks.append(padded)
        is_tensor = isinstance(output["input_ids"], torch.Tensor)
        output["assistant_masks"] = torch.stack(masks) if is_tensor else [mask.tolist() for mask in masks]

    def post_process_poses(self, outputs, skip_special_tokens: bool = True) -> list[dict]:
        """
        Words and SMPL parameters of each generated sequence.

        Args:
            outputs ([`ChatPoseGenerateOutput`]): what `generate(..., return_dict_in_generate=True)` returned.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): leave out end and padding tokens.

        Returns:
            `list[dict]`, one for each sequence, with `text`, the answer (`<POSE>` where a pose was given), and
            `poses`, in the order of the `<POSE>` tokens, each a dict of float32 CPU tensors in the camera frame:
            `theta` (72,), axis-angle in radians, joint 0 first; `global_orient_rotvec` (1, 3), `body_pose_rotvec`
            (23, 3); `global_orient_rotmat` (1, 3, 3), `body_pose_rotmat` (23, 3, 3).
        """
        if getattr(outputs, "pose_rotmats", None) is None or getattr(outputs, "prompt_length", None) is None:
            raise ValueError(
                f"expected the output of `generate(..., return_dict_in_generate=True)`, got {type(outputs).__name__}"
            )
        answers = outputs.sequences[:, outputs.prompt_length :]
        texts = self.tokenizer.batch_decode(
            answers, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        replies = [{"text": text.strip(), "poses": []} for text in texts]
        rotmats = outputs.pose_rotmats.detach().float().cpu()
        for sequence, rotmat in zip(outputs.pose_sequence_index.tolist(), rotmats, strict=True):
            rotvec = rotmat_to_rotvec(rotmat)
            replies[sequence]["poses"].append(
                {
                    "theta": rotvec.flatten(),
                    "global_orient_rotvec": rotvec[:1],
                    "body_pose_rotvec": rotvec[1:],
                    "global_orient_rotmat": rotmat[:1],
                    "body_pose_rotmat": rotmat[1:],
                }
            )
        return replies


def _copy_chat(row: int, chat: list[dict]) -> list[dict]:
    """Messages and parts are copied, pictures are not."""
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"expected a chat, a list of messages, in row {row}, got {reprlib.repr(chat)}")
    copied = []
    for index, message in enumerate(chat):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        is_parts = isinstance(content, (list, tuple)) and all(isinstance(part, dict) for part in content)
        if not isinstance(role, str) or not (isinstance(content, str) or is_parts):
            raise ValueError(
                f"expected `role` and `content`, a text or a list of parts, in message {index} of row {row}, got "
                f"{reprlib.repr(message)}"
            )
        copied.append({**message, "content": [dict(part) for part in content] if is_parts else content})
    return copied


def _adapt_chat_template(tokenizer, template: str | dict | None, image_token: str) -> str:
    """The base's template, made to take pictures, or ours; see the class."""
    if isinstance(template, dict):
        template = template.get("default")
    ours = vicuna_chat_template(image_placeholder=f"{image_token}\n")
    if template is None:
        return ours
    flatten = _fill_template(_FLATTEN_PARTS, IMAGE_PLACEHOLDER=f"{image_token}\n")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}
    for candidate in (template, flatten + template):
        try:
            text = tokenizer.apply_chat_template([question, answer], chat_template=candidate, tokenize=False)
        except Exception:  # templates raise whatever Jinja raises; one that fails here is one that cannot be used
            continue
        if image_token in text and "'type'" not in text and text.rfind(str(tokenizer.eos_token)) > text.find("answer"):
            return candidate
    logger.warning(
        "The base's chat template takes no pictures or does not end answers with the end token; "
        "ChatPose's own (LLaVA-1.5's conversation format) is used instead."
    )
    return ours


ChatPoseProcessor.register_for_auto_class()
