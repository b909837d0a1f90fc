"""Rows to batches: what the model's `forward` trains on."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data.rows import NUM_JOINTS, validate_row
from .image_files import open_image
from .processing_chatpose import ChatPoseProcessor
from .rotations import rotvec_to_rotmat


ON_BAD_ROW = ("stop", "skip")


class ChatPoseCollator:
    """
    Makes a batch of rows, as `data_collator` of the HF `Trainer` (with `remove_unused_columns=False`) or by itself.

    A conversation is rendered by the processor's chat template. The answers and their end tokens are the labels. Rows
    are padded on the right, so a row's numbers do not depend on its neighbours'.

    Args:
        processor ([`ChatPoseProcessor`]): of the model that is trained.
        max_length (`int`, *optional*):
            Most tokens of a row, image tokens included. The tail of a longer one is cut off; where that would cut an
            image or a pose, or leave no answer, the row is bad.
        on_bad_row (`str`, *optional*, defaults to `"stop"`):
            What to do about rows that are invalid, have a picture that cannot be read, or are too long: `"stop"` raises;
            `"skip"` leaves them out, and one without labels stands in where none is left.
        report_rows (`bool`, *optional*, defaults to `False`):
            Add `row_report`, which [`read_report`] reads. The model does not take it; `ChatPoseTrainer` does.

    Returns:
        `dict[str, torch.Tensor]`, of `B` rows, `T` tokens, `P` poses, at least one, and `J` joints:

        - `input_ids`, `attention_mask`, `labels` of shape `(B, T)`; labels are -100 outside the answers.
        - `pixel_values` of shape `(num_images, 3, H, W)`, if there are pictures.
        - `pose_labels` of shape `(P, J, 3, 3)`, float32: the poses of all rows in order, camera frame.
        - `pose_mask` of shape `(P, J)`, int: 1 where a joint is supervised.

    Raises:
        ValueError: for a bad row, with its id.
    """

    def __init__(
        self,
        processor: ChatPoseProcessor,
        max_length: int | None = None,
        on_bad_row: str = "stop",
        report_rows: bool = False,
    ):
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"expected `on_bad_row` of {', '.join(ON_BAD_ROW)}, got {on_bad_row!r}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"expected a `max_length` of at least 2 tokens, got {max_length}")
        self.processor = processor
        self.max_length = max_length
        self.on_bad_row = on_bad_row
        self.report_rows = report_rows

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        report: dict[str, list] = {"rows": [], "skipped": [], "truncated": []}
        try:
            encoded = self._encode(rows)  # together: half the time of one by one
        except Exception:
            encoded = []
            for row in rows:
                try:
                    encoded += self._encode([row])
                except Exception as error:  # chat templates raise whatever Jinja does, pictures whatever Pillow does
                    name = row.get("id") if isinstance(row, dict) else None
                    if self.on_bad_row == "stop":
                        raise ValueError(
                            f"cannot train on row {name!r}: {error}; mend or remove it, or leave such rows out with "
                            "`on_bad_row=skip`, which counts them"
                        ) from error
                    report["skipped"].append([str(name), str(error)])
        for item in encoded:
            report["rows"].append(item["id"])
            report["truncated"] += [item["id"]] if item["is_cut"] else []
        return self._collate(encoded or [self._stand_in()], report)

    def _encode(self, rows: Sequence[dict]) -> list[dict[str, Any]]:
        """Rows' tensors, `id`, and `is_cut`, whether its tail was cut off."""
        for row in rows:
            validate_row(row)
        chats = [_open_pictures(row) for row in rows]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
        batch = self.processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
        items = []
        first_image = 0
        for number, row in enumerate(rows):
            is_real = batch["attention_mask"][number] == 1
            input_ids = batch["input_ids"][number][is_real]
            labels = input_ids.masked_fill(batch["assistant_masks"][number][is_real] == 0, -100)
            is_cut = self.max_length is not None and len(input_ids) > self.max_length
            if is_cut:
                input_ids, labels = self._cut(input_ids, labels)
            item = {
                "id": row["id"],
                "is_cut": is_cut,
                "input_ids": input_ids,
                "labels": labels,
                "pose_rotvecs": torch.from_numpy(np.array(row["poses"], dtype=np.float32)).view(-1, NUM_JOINTS, 3),
                "pose_mask": torch.from_numpy(np.array(row["pose_mask"], dtype=np.int32)).view(-1, NUM_JOINTS),
            }
            if row["images"]:
                item["pixel_values"] = batch["pixel_values"][first_image : first_image + len(row["images"])]
                first_image += len(row["images"])
            items.append(item)
        return items

    def _cut(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rest_ids, rest_labels = input_ids[self.max_length :], labels[self.max_length :]
        lost = [
            what
            for what, is_lost in (
                ("an image", (rest_ids == self.processor.image_token_id).any()),
                ("a pose", (rest_labels == self.processor.pose_token_id).any()),
                ("all of the answer", (labels[1 : self.max_length] == -100).all()),
            )
            if is_lost
        ]
        if lost:
            raise ValueError(
                f"it has {len(input_ids)} tokens, and `max_length={self.max_length}` would cut {' and '.join(lost)}"
            )
        return input_ids[: self.max_length], labels[: self.max_length]

    def _stand_in(self) -> dict[str, Any]:
        """In place of a batch of bad rows: two tokens that are no labels."""
        nothing = torch.full((2,), self.processor.tokenizer.pad_token_id)
        return {
            "input_ids": nothing,
            "labels": torch.full_like(nothing, -100),
            "pose_rotvecs": torch.zeros(0, NUM_JOINTS, 3),
            "pose_mask": torch.zeros(0, NUM_JOINTS, dtype=torch.int),
        }

    def _collate(self, items: list[dict[str, Any]], report: dict[str, list]) -> dict[str, Tensor]:
        ids = [item["input_ids"] for item in items]
        pad_token_id = self.processor.tokenizer.pad_token_id
        pose_rotvecs = torch.cat([item["pose_rotvecs"] for item in items])
        pose_mask = torch.cat([item["pose_mask"] for item in items])
        if len(pose_rotvecs) == 0:  # the keys are there in every batch, and no tensor is empty
            pose_rotvecs = torch.zeros(1, NUM_JOINTS, 3)
            pose_mask = torch.zeros(1, NUM_JOINTS, dtype=torch.int)
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100),
            "pose_labels": rotvec_to_rotmat(pose_rotvecs),
            "pose_mask": pose_mask,
        }
        pixel_values = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixel_values:
            batch["pixel_values"] = torch.cat(pixel_values)
        if self.report_rows:
            # A tensor, because loaders that share batches among processes move nothing else.
            batch["row_report"] = torch.tensor(list(json.dumps(report).encode()), dtype=torch.uint8)
        return batch


def read_report(row_report: Tensor) -> dict[str, list]:
    """Of a batch's `row_report`: `rows`, the ids; `skipped`, ids and reasons; `truncated`, ids."""
    return json.loads(bytes(row_report.tolist()))


def _open_pictures(row: dict) -> list[dict]:
    """A row's messages with the pictures in their places."""
    images = iter(row["images"])
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": open_picture(next(images))} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in row["messages"]
    ]


def open_picture(image: Image.Image | dict) -> Image.Image:
    """A picture of a row, as `datasets` gives it, decoded or not."""
    if not isinstance(image, dict):
        return image
    if image.get("bytes"):
        return open_image(io.BytesIO(image["bytes"]), image.get("path") or "its picture")
    return open_image(image["path"])
