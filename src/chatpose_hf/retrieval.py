"""Which text says which pose: a model that puts both into one space, for retrieval and for distances between poses.

Ours ([`RetrievalModel`], which `chatpose train-retrieval` trains) or PoseScript's released one, behind [`Retrieval`].
"""

import argparse
import hashlib
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file

from .card import public_name
from .pose_files import remove_yaw, turn_frame
from .rotations import rotmat_to_rot6d, rotvec_to_rotmat


NUM_JOINTS = 24
# SMPL's two hand joints. No motion capture has them, and what a model says for them nobody can check: PoseScript's rule
# of zero hands on both sides of a comparison.
HANDS = (22, 23)
_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")
_HIGHEST_TEMPERATURE = 100.0  # CLIP's; above it the loss of one mistaken pair is all of the gradient

POSESCRIPT_FILE = "checkpoint_best.pth"
DISTILBERT = "distilbert/distilbert-base-uncased"
_POSESCRIPT_JOINTS = 52  # SMPL-H's: SMPL's first 22, then fingers
_POSESCRIPT_TEXT = "text_encoder.pretrained_text_encoder."


def to_retrieval_frame(poses: Tensor) -> Tensor:
    """
    Poses as retrieval models see them: AMASS's world (z up) without yaw, which no description tells.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle in radians, camera frame.

    Returns:
        `torch.Tensor` of shape `(N, 24, 3)`: float64 axis-angle; an upright person's global orientation is
        `(pi / 2, 0, 0)`.
    """
    if poses.ndim != 3 or poses.shape[1:] != (NUM_JOINTS, 3):
        raise ValueError(f"expected `poses` of shape (N, {NUM_JOINTS}, 3), axis-angle, got {tuple(poses.shape)}")
    if not torch.isfinite(poses).all():
        raise ValueError("expected finite `poses`, got NaN or infinity; leave out what is no pose")
    return remove_yaw(turn_frame(poses.double(), "z-up", inverse=True))


@strict
class RetrievalConfig(PreTrainedConfig):
    r"""
    Configuration of a [`RetrievalModel`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Of the text encoder, any encoder that `AutoModel` makes; by default a BERT of one layer of 128.
        latent_size (`int`, *optional*, defaults to 512): size of the space.
        pose_hidden_size (`int`, *optional*, defaults to 512): width of the pose encoder.
        pose_depth (`int`, *optional*, defaults to 3): its residual layers.
        dropout (`float`, *optional*, defaults to 0.1): in the pose encoder; the text encoder has its own.
        initial_temperature (`float`, *optional*, defaults to 10.0):
            What similarities are multiplied by, before training (value of PoseScript's code).
        ignored_joints (`list[int]`, *optional*, defaults to `(22, 23)`):
            Joints that the pose encoder does not look at; the hands are always among them.

    Raises:
        ValueError: when a value has no meaning; the message names the field, the value and what is allowed.
    """

    model_type = "chatpose_retrieval"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - the name and the type that transformers reads

    text_config: dict | PreTrainedConfig | None = None
    latent_size: int = 512
    pose_hidden_size: int = 512
    pose_depth: int = 3
    dropout: float | int = 0.1
    initial_temperature: float | int = 10.0
    ignored_joints: list[int] | tuple[int, ...] = HANDS

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = BertConfig(
                vocab_size=4000,
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=512,
                # Dropout takes half of the time on a CPU.
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        elif isinstance(self.text_config, dict):
            kind = self.text_config.get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"expected a `text_config` with a `model_type` of transformers, got {kind!r}")
            self.text_config = CONFIG_MAPPING[kind](**self.text_config)
        super().__post_init__(**kwargs)
        size = getattr(self.text_config, "hidden_size", None)
        if self.text_config.is_encoder_decoder or not isinstance(size, int):
            raise ValueError(
                f"expected the `text_config` of a text encoder, got {self.text_config.model_type!r}, which is none; take "
                "a BERT or one of its kin"
            )
        for name in ("latent_size", "pose_hidden_size", "pose_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout}")
        if not 0 < self.initial_temperature <= _HIGHEST_TEMPERATURE:
            raise ValueError(
                f"`initial_temperature` must be positive and at most {_HIGHEST_TEMPERATURE}, got "
                f"{self.initial_temperature}"
            )
        joints = set(self.ignored_joints)
        if not joints < set(range(NUM_JOINTS)) or not joints.issuperset(HANDS):
            raise ValueError(
                f"`ignored_joints` must be of 0 to {NUM_JOINTS - 1}, {HANDS[0]} and {HANDS[1]} among them and not all, "
                f"got {list(self.ignored_joints)}"
            )


@dataclass
class RetrievalOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): see [`contrastive_loss`].
        text_embeds, pose_embeds (`torch.Tensor` of shape `(N, D)`): unit vectors.
    """

    loss: Tensor | None = None
    text_embeds: Tensor | None = None
    pose_embeds: Tensor | None = None


def contrastive_loss(text_embeds: Tensor, pose_embeds: Tensor, temperature: Tensor, is_same_text: Tensor) -> Tensor:
    """
    Symmetric InfoNCE: each text has to find its pose among the batch's, and each pose its text.

    What has the same text as the true one is no candidate: for one text, two poses are both right. Poses that are alike
    under texts that differ stay candidates.

    Args:
        text_embeds, pose_embeds (`torch.Tensor` of shape `(N, D)`): unit vectors; row i of one belongs to row i of the
            other.
        temperature (`torch.Tensor` of shape `()`): what similarities are multiplied by.
        is_same_text (`torch.Tensor` of shape `(N, N)`, bool): which texts are alike.

    Returns:
        `torch.Tensor` of shape `()`: mean of the two directions' cross entropies.
    """
    scores = temperature * text_embeds @ pose_embeds.T
    itself = torch.arange(len(scores), device=scores.device)
    is_other = is_same_text & (itself[:, None] != itself[None])
    scores = scores.masked_fill(is_other, -torch.inf)
    to_pose = nn.functional.cross_entropy(scores, itself)
    return (to_pose + nn.functional.cross_entropy(scores.T, itself)) / 2


class _ResidualLayer(nn.Module):
    def __init__(self, size: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.dropout(nn.functional.gelu(self.linear(self.norm(states))))


class RetrievalModel(PreTrainedModel):
    """
    A text encoder whose states are averaged and projected, and an MLP on joint rotations, with one space for both.

    The pose encoder does not see the hands (joints 22 and 23) nor the rest of `config.ignored_joints`: they count as
    unturned, whatever is given.
    """

    config_class = RetrievalConfig
    base_model_prefix = "retrieval"
    main_input_name = "input_ids"

    def __init__(self, config: RetrievalConfig):
        super().__init__(config)
        self.text_encoder = AutoModel.from_config(config.text_config)
        # BERT's state of the first token for another task: weights that nothing here would train.
        if getattr(self.text_encoder, "pooler", None) is not None:
            self.text_encoder.pooler = None
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.latent_size)
        self._seen_joints = sorted(set(range(NUM_JOINTS)) - set(config.ignored_joints))
        self.pose_encoder = nn.Sequential(
            nn.Linear(6 * len(self._seen_joints), config.pose_hidden_size),
            *(_ResidualLayer(config.pose_hidden_size, config.dropout) for _ in range(config.pose_depth)),
            nn.LayerNorm(config.pose_hidden_size),
            nn.Linear(config.pose_hidden_size, config.latent_size),
        )
        # As a logarithm: steps of an optimizer change it by a share of itself.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.initial_temperature)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # The text encoder's small weights would let the signal of an MLP fade.
            init.xavier_uniform_(module.weight)
        elif isinstance(module, RetrievalModel):
            init.constant_(module.log_temperature, math.log(self.config.initial_temperature))

    @property
    def temperature(self) -> Tensor:
        """What similarities are multiplied by; shape `()`."""
        return self.log_temperature.exp().clamp(max=_HIGHEST_TEMPERATURE)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(N, T)`): as in transformers, padded on either side.

        Returns:
            `torch.Tensor` of shape `(N, latent_size)`: unit vectors.
        """
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(self.text_projection(mean), dim=-1)

    def encode_poses(self, pose_rotmats: Tensor) -> Tensor:
        """
        Args:
            pose_rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`): see [`to_retrieval_frame`].

        Returns:
            `torch.Tensor` of shape `(N, latent_size)`: unit vectors.
        """
        rot6d = rotmat_to_rot6d(pose_rotmats[:, self._seen_joints])
        states = self.pose_encoder(rot6d.flatten(1).to(self.pose_encoder[0].weight.dtype))
        return nn.functional.normalize(states, dim=-1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pose_rotmats: Tensor, return_loss: bool = True
    ) -> RetrievalOutput:
        """
        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(N, T)`): texts.
            pose_rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`): the pose of each; see [`to_retrieval_frame`].
            return_loss (`bool`, *optional*, defaults to `True`): with [`contrastive_loss`] over this batch.
        """
        text_embeds = self.encode_texts(input_ids, attention_mask)
        pose_embeds = self.encode_poses(pose_rotmats)
        loss = None
        if return_loss:
            # Of one batch, which is padded to one length, the same tokens are the same text.
            tokens = input_ids.masked_fill(attention_mask == 0, -1)
            is_same_text = (tokens[:, None] == tokens[None]).all(-1)
            loss = contrastive_loss(text_embeds, pose_embeds, self.temperature, is_same_text)
        return RetrievalOutput(loss=loss, text_embeds=text_embeds, pose_embeds=pose_embeds)


class PoseScriptModel(nn.Module):
    """
    The network of PoseScript's retrieval models of the kind `ret_distilbert`, for inference; names as in its files.

    Poses: batch norm on the 156 numbers of 52 joints, a linear layer, leaky ReLU, batch norm, two linear layers (the
    encoder of VPoser), and a bottleneck. Texts: DistilBERT's last states, ReLU, a projection, sinusoidal positions, four
    transformer layers (4 heads, norm after, GELU), the mean over the tokens.

    Args:
        text_encoder (`nn.Module`): a DistilBERT.
        pose_hidden_size, bottleneck_size, latent_size (`int`): 512, 32 and 512 in the release.
        feedforward_size (`int`): of the transformer's layers; 1024 in the release.
        num_positions (`int`): 5000 in the release.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        pose_hidden_size: int,
        bottleneck_size: int,
        latent_size: int,
        feedforward_size: int,
        num_positions: int,
    ):
        super().__init__()
        size = 3 * _POSESCRIPT_JOINTS
        layers = nn.Sequential(
            nn.Flatten(),
            nn.BatchNorm1d(size),
            nn.Linear(size, pose_hidden_size),
            nn.LeakyReLU(),
            nn.BatchNorm1d(pose_hidden_size),
            nn.Dropout(0.1),
            nn.Linear(pose_hidden_size, pose_hidden_size),
            nn.Linear(pose_hidden_size, pose_hidden_size),
            nn.Linear(pose_hidden_size, bottleneck_size),
            nn.ReLU(),
            nn.Linear(bottleneck_size, latent_size),
        )
        positions = nn.Module()
        positions.register_buffer("pe", torch.zeros(num_positions, 1, latent_size))
        layer = nn.TransformerEncoderLayer(latent_size, 4, feedforward_size, activation="gelu", batch_first=True)
        self.pose_encoder = nn.ModuleDict({"encoder": layers})
        self.text_encoder = nn.ModuleDict(
            {
                "pretrained_text_encoder": text_encoder,
                "projection": nn.Sequential(nn.ReLU(), nn.Linear(text_encoder.config.hidden_size, latent_size)),
                "positional_encoding": positions,
                "transformer_encoder": nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            }
        )
        self.loss_weight = nn.Parameter(torch.zeros(1))

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Of shape `(N, D)` from two of shape `(N, T)`, padded on the right."""
        part = self.text_encoder
        states = part["pretrained_text_encoder"](input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = part["projection"](states) + part["positional_encoding"].pe[: states.shape[1], 0]
        states = part["transformer_encoder"](states, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def encode_poses(self, poses: Tensor) -> Tensor:
        """Of shape `(N, D)` from axis-angle of shape `(N, 24, 3)`, see [`to_retrieval_frame`]; hands and fingers zero."""
        full = poses.new_zeros(len(poses), _POSESCRIPT_JOINTS, 3)
        full[:, :22] = poses[:, :22]
        return nn.functional.normalize(self.pose_encoder["encoder"](full), dim=-1)


def load_posescript(path: str | Path, text_model: str | Path = DISTILBERT) -> "Retrieval":
    """
    A retrieval model that PoseScript released, such as `ret_distilbert_dataPSA2ftPSH2/seed1/checkpoint_best.pth`.

    The file is a pickle: only tensors, plain containers and `argparse.Namespace` are made from it.

    Args:
        path (`str` or `Path`): the `.pth` file.
        text_model (`str` or `Path`, *optional*, defaults to `"distilbert/distilbert-base-uncased"`):
            Folder or Hub id of DistilBERT: its tokenizer and configuration, and its weights where the file has none.

    Raises:
        ValueError: for a file that is none of these models.
    """
    path = Path(path)
    weights = _read_posescript(path)
    config = AutoConfig.from_pretrained(text_model)
    if config.model_type != "distilbert":
        raise ValueError(f"expected a DistilBERT as `text_model`, got {text_model}, a {config.model_type}")
    has_text_weights = any(name.startswith(_POSESCRIPT_TEXT) for name in weights)
    text_encoder = AutoModel.from_config(config) if has_text_weights else AutoModel.from_pretrained(text_model)
    # Of transformers before 4.31: the numbers 0, 1, 2 ...
    weights.pop(f"{_POSESCRIPT_TEXT}embeddings.position_ids", None)
    model = PoseScriptModel(
        text_encoder,
        pose_hidden_size=_first_size(weights, "pose_encoder.encoder.2.weight", path),
        bottleneck_size=_first_size(weights, "pose_encoder.encoder.8.weight", path),
        latent_size=_first_size(weights, "pose_encoder.encoder.10.weight", path),
        feedforward_size=_first_size(weights, "text_encoder.transformer_encoder.layers.0.linear1.weight", path),
        num_positions=_first_size(weights, "text_encoder.positional_encoding.pe", path),
    )
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not has_text_weights:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(_POSESCRIPT_TEXT)}
    faults = [f"no `{name}`" for name in sorted(wanted.keys() - weights.keys())]
    faults += [f"an unknown `{name}`" for name in sorted(weights.keys() - wanted.keys())]
    faults += [
        f"`{name}` of shape {tuple(weights[name].shape)} for {tuple(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape
    ]
    if faults:
        raise ValueError(
            f"expected the layers of PoseScript's ret_distilbert with the DistilBERT of {text_model} in {path}, got "
            f"{len(faults)} others: {', '.join(faults[:10])}"
        )
    model.load_state_dict(weights, strict=has_text_weights)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return Retrieval(model, tokenizer, _name("/".join(path.resolve().parts[-3:]), path))


def _read_posescript(path: Path) -> dict[str, Tensor]:
    """The weights, after a look at what the model is."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"cannot read {path}: {str(error)[:500]}. It was not run; get the file again from PoseScript's site"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
        raise ValueError(f"expected a checkpoint of PoseScript, with `model` and `args`, in {path}")
    settings = vars(content["args"])
    for name, wanted in (("text_encoder_name", "distilbertUncased"), ("transformer_topping", "avgp")):
        if settings.get(name) != wanted:
            raise ValueError(f"expected a model with {name}={wanted} in {path}, got {settings.get(name)!r:.100}")
    weights = content.get("model")
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"expected the tensors of a model as `model` in {path}")
    return dict(weights)


def _first_size(weights: dict[str, Tensor], name: str, path: Path) -> int:
    if name not in weights or weights[name].ndim == 0:
        raise ValueError(f"expected the layers of PoseScript's ret_distilbert in {path}, got no `{name}`")
    return len(weights[name])


class Retrieval:
    """
    A trained retrieval model with its tokenizer: texts and poses in, unit vectors out, whose dot product is the score.

    Example:

    ```python
    >>> retrieval = Retrieval.load("retrieval-cmu")
    >>> scores = retrieval.embed_texts(["A person kneels."]) @ retrieval.embed_poses(poses).T
    ```

    Attributes:
        name (`str`): for records: where it comes from and a hash of its weights; figures of different models cannot be
            compared.
        latent_size (`int`): `D`, the vectors' size.
        model ([`RetrievalModel`] or [`PoseScriptModel`]), tokenizer: what it consists of.
    """

    def __init__(self, model: RetrievalModel | PoseScriptModel, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._is_posescript = isinstance(model, PoseScriptModel)
        last = model.pose_encoder["encoder"][-1] if self._is_posescript else model.pose_encoder[-1]
        self.latent_size: int = last.out_features

    @classmethod
    def load(cls, name: str | Path, text_model: str | Path = DISTILBERT) -> "Retrieval":
        """
        Args:
            name (`str` or `Path`):
                A folder or Hub id that `chatpose train-retrieval` wrote; or of PoseScript a `.pth` file, or a folder with
                `checkpoint_best.pth`.
            text_model (`str` or `Path`, *optional*): for PoseScript; see [`load_posescript`].

        Raises:
            ValueError: for what is no retrieval model.
        """
        path = Path(name)
        if (path / POSESCRIPT_FILE).is_file():
            return load_posescript(path / POSESCRIPT_FILE, text_model)
        if path.suffix == ".pth" and path.is_file():
            return load_posescript(path, text_model)
        if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
            raise ValueError(
                f"expected a folder that `chatpose train-retrieval` wrote, or PoseScript's `.pth` file, got {name}"
            )
        kind = RetrievalConfig.get_config_dict(name)[0].get("model_type")
        if kind != RetrievalConfig.model_type:
            raise ValueError(
                f"expected a retrieval model in {name}, got a model of type {kind!r}; make one with "
                "`chatpose train-retrieval`"
            )
        model, info = RetrievalModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if faults := {kind: sorted(map(str, info[kind])) for kind in _FAULTS if info[kind]}:
            raise ValueError(f"the weights in {name} are not those of its configuration: {faults}; train it again")
        weights = cached_file(name, "model.safetensors")
        return cls(model, AutoTokenizer.from_pretrained(name), _name(public_name(str(name)), Path(weights)))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """
        Args:
            texts (`Sequence[str]`): descriptions; what is past the model's longest text is cut off.
            batch_size (`int`, *optional*, defaults to 64): texts at a time.

        Returns:
            `torch.Tensor` of shape `(N, D)`: float32 unit vectors, on the CPU.
        """
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, got one text, {texts[:100]!r}")

        def embed() -> Iterator[Tensor]:
            for start in range(0, len(texts), batch_size):
                batch = self.tokenizer(
                    list(texts[start : start + batch_size]),
                    padding=True,
                    padding_side="right",
                    truncation=True,
                    return_tensors="pt",
                ).to(self._device)
                yield self.model.encode_texts(batch["input_ids"], batch["attention_mask"])

        return self._collect(embed())

    def embed_poses(self, poses: Tensor, batch_size: int = 1024) -> Tensor:
        """
        Args:
            poses (`torch.Tensor` of shape `(N, 24, 3)`):
                Axis-angle in radians, camera frame. The yaw changes nothing; nor do the hands, joints 22 and 23.
            batch_size (`int`, *optional*, defaults to 1024): poses at a time.

        Returns:
            `torch.Tensor` of shape `(N, D)`: float32 unit vectors, on the CPU.
        """
        poses = to_retrieval_frame(poses.detach().cpu())
        inputs = (poses if self._is_posescript else rotvec_to_rotmat(poses)).float()
        return self._collect(self.model.encode_poses(batch.to(self._device)) for batch in inputs.split(batch_size))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _collect(self, batches: Iterable[Tensor]) -> Tensor:
        return torch.cat([torch.empty(0, self.latent_size), *(batch.float().cpu() for batch in batches)])


def _name(label: str, weights: Path) -> str:
    with weights.open("rb") as file:
        return f"{label} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"
