"""The pipeline "image-text-to-pose": words and pictures in, words and SMPL poses out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, Pipeline

from .modeling_chatpose import ChatPoseForConditionalGeneration
from .processing_chatpose import ChatPoseProcessor


_ABOUT_CACHES = ("num_beams", "num_return_sequences", "use_cache", "cache_implementation")


class _Prefix(NamedTuple):
    """
    What the last chat left: its tokens `(T,)`, its pictures `(N, 3, H, W)`, the keys and values of all but the last token, and
    what `generate` calls those.
    """

    ids: Tensor
    pixel_values: Tensor | None
    cache: DynamicCache
    cache_name: str


class ChatPosePipeline(Pipeline):
    """
    Answers texts, texts with pictures, and chats; batches, runs on any device, streams over data sets.

    Args:
        kwargs: as in [`~transformers.Pipeline`]; `model` and `processor` are needed.

    Example:

    ```python
    pipe = pipeline("image-text-to-pose", model=folder, trust_remote_code=True)
    reply = pipe("a man proposing marriage, can you give the SMPL pose of this person?")
    reply["text"], reply["poses"][0]["theta"]
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    model: ChatPoseForConditionalGeneration
    processor: ChatPoseProcessor
    _prefix: _Prefix | None = None

    def _sanitize_parameters(self, generate_kwargs=None, skip_special_tokens=None, **kwargs):
        forward_kwargs = {**(generate_kwargs or {}), **kwargs}
        if skip_special_tokens is not None:
            forward_kwargs["skip_special_tokens"] = skip_special_tokens
        return {}, forward_kwargs, {}

    def __call__(self, inputs=None, images=None, text=None, **kwargs):
        """
        Args:
            inputs (`str`, `dict`, `list[dict]`, or a list, generator or data set of these):
                A question; a dict of `text` and, optionally, `images` (one or a list); or a chat, a list of messages
                with `role` and `content`. Pictures are PIL images or file names.
            images (picture or `list`, *optional*): pictures of a single question.
            text (`str`, *optional*): a single question, instead of `inputs`.
            kwargs:
                `batch_size`, `num_workers`, and anything that `generate` takes (`max_new_tokens`, 512 by default, and fewer
                where the model reads no more, `do_sample`, `num_beams`, `force_pose`, ...). `reuse_prefix=True` keeps the
                keys and values of a chat, for one at a time: the next turn is charged for what is new in it alone.

        Returns:
            For each input what [`ChatPoseProcessor.post_process_poses`] gives: `{"text": ..., "poses": [...]}`; a list
            of them where `num_return_sequences` is more than 1. A list for lists, an iterator for generators and
            data sets.

        Raises:
            ValueError: for what is no question or chat, and for chats longer than the model reads.
        """
        if inputs is not None and text is not None:
            raise ValueError("expected the question as `inputs` or as `text`, got both")
        inputs = text if inputs is None else inputs
        if inputs is None:
            raise ValueError("expected a question, got none; pass a text, a chat, or a dict with `text` and `images`")
        if images is not None:
            if not isinstance(inputs, str):
                raise ValueError(
                    f"`images` go with a single text, got {type(inputs).__name__}; put pictures into the messages, or "
                    'pass a list of `{"text": ..., "images": ...}`'
                )
            inputs = {"text": inputs, "images": images}
        # Wrapped, because the base class tells chats from lists of inputs differently from version to version.
        if isinstance(inputs, list):
            inputs = {"messages": inputs} if _is_chat(inputs) else [_wrap_chat(item) for item in inputs]
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs) -> dict:
        inputs = _wrap_chat(inputs)
        if isinstance(inputs, str):
            inputs = {"text": inputs}
        if not isinstance(inputs, dict) or not ("messages" in inputs or isinstance(inputs.get("text"), str)):
            raise ValueError(
                f"expected a text, a chat (a list of messages), or a dict with `text` or `messages`, got {inputs!r}"
            )
        if "messages" in inputs:
            return {"chat": list(inputs["messages"])}
        images = inputs.get("images", inputs.get("image"))
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": inputs["text"]}]
        return {"chat": [{"role": "user", "content": content}]}

    def _forward(self, model_inputs, skip_special_tokens=True, reuse_prefix=False, **generate_kwargs) -> dict:
        is_single = _is_chat(model_inputs["chat"])
        chats = [model_inputs["chat"]] if is_single else model_inputs["chat"]
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        if not {"max_new_tokens", "max_length"} & generate_kwargs.keys():
            # 512 is the original chat program's limit.
            generate_kwargs["max_new_tokens"] = config.max_new_tokens or 512
        batch = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, dtype=self.model.dtype)
        # Beyond the lengths that it was trained on, a model babbles.
        limit, used = self.model.config.text_config.max_position_embeddings, int(batch["attention_mask"].sum(-1).max())
        if used >= limit:
            raise ValueError(
                f"expected a chat of fewer than {limit} tokens, as many as the model reads, got {used}; begin a new chat, or "
                "ask something shorter"
            )
        if generate_kwargs.get("max_new_tokens") is not None:
            generate_kwargs["max_new_tokens"] = min(generate_kwargs["max_new_tokens"], limit - used)
        if reuse_prefix:
            said = {name: generate_kwargs.get(name, getattr(config, name, None)) for name in _ABOUT_CACHES}
            if len(chats) * (said["num_beams"] or 1) * (said["num_return_sequences"] or 1) > 1:
                raise ValueError(
                    "expected one chat, one beam and one answer with `reuse_prefix`, got more; leave it out"
                )
            # Other caches, such as static ones, have no end that could be cut.
            reuse_prefix = said["use_cache"] is not False and said["cache_implementation"] is None
        asked = self._take_prefix(batch) if reuse_prefix else batch
        output = self.model.generate(**asked, **{**generate_kwargs, "return_dict_in_generate": True})
        if reuse_prefix:
            name = "cache" if "cache" in output else "past_key_values"  # renamed in transformers 5.24
            cache = output.get(name)
            if type(cache) is DynamicCache and not any(layer.is_sliding for layer in cache.layers):
                self._prefix = _Prefix(output.sequences[0], batch.get("pixel_values"), cache, name)
        replies = self.processor.post_process_poses(output, skip_special_tokens=skip_special_tokens)
        answers_each = len(replies) // len(chats)
        if answers_each > 1:
            replies = [replies[start : start + answers_each] for start in range(0, len(replies), answers_each)]
        return {"reply": replies[0] if is_single else replies}

    def _take_prefix(self, batch) -> dict[str, Any]:
        """
        The batch for a chat that begins as the last one did: with that one's keys and values, cut to the tokens that are the
        same, and without the pictures among those. As it is where nothing is the same.
        """
        prefix, self._prefix = self._prefix, None  # it grows as it is used
        if prefix is None:
            return dict(batch)
        ids, pixel_values = batch["input_ids"][0], batch.get("pixel_values")
        # At least one token is left to be asked about, and the last one of an answer was never read.
        length = min(len(ids) - 1, len(prefix.ids) - 1, prefix.cache.get_seq_length())
        differs = (ids[:length] != prefix.ids[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
        num_pictures = 0 if pixel_values is None else len(pixel_values)
        places = (ids == self.model.config.image_token_id).nonzero().view(num_pictures, -1) if num_pictures else ()
        num_same = 0
        for place in places:  # tokens do not tell which picture they stand for
            is_known = prefix.pixel_values is not None and num_same < len(prefix.pixel_values)
            is_same = is_known and torch.equal(pixel_values[num_same], prefix.pixel_values[num_same])
            if not is_same or place[-1] >= length:
                length = min(length, int(place[0]))
                break
            num_same += 1
        if length == 0:
            return dict(batch)
        for layer in prefix.cache.layers:  # `crop` means another thing from version to version
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        asked = {**batch, prefix.cache_name: prefix.cache}
        if num_same:
            del asked["pixel_values"]
        if num_same < num_pictures:
            asked["pixel_values"] = pixel_values[num_same:]
        return asked

    def postprocess(self, model_outputs):
        return model_outputs["reply"]

    def save_pretrained(self, save_directory, **kwargs):
        """Saves model, processor and code (the base class leaves the processor out)."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _is_chat(value) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _wrap_chat(value):
    messages = getattr(value, "messages", value)
    return {"messages": messages} if _is_chat(messages) else value
