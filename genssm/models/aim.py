"""AiM (Li et al. 2024, arXiv:2408.12245): images drawn code by code by Mamba-2 layers, in plain raster order."""

# B batch, V vocab_size codes, h w grid of codes, T = h w codes of an image, D hidden_size, G groups, M vectors of a
# layer's modulation, S context tokens, L tokens of a call

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.layers import (
    ContextEmbedding,
    LabelEmbedding,
    LayerNorm,
    Modulation,
    RMSNorm,
    TokenOutput,
    make_mixer,
    mixer_options,
    modulate,
    upcast,
)

NORMS = {"rms": RMSNorm, "layer": LayerNorm}
MLP_MULTIPLE = 128

Vectors = tuple[torch.Tensor, ...]  # shift, scale and gate of the mixer, or of mixer and MLP; (B, 1, D) each
# What a layer adds to the stream, (B, L, D), and its gate, (B, 1, D).
Update = tuple[torch.Tensor, torch.Tensor | None]


class CodeTable(nn.Module):
    """The vectors of the codes, (V, D): embeddings at the input and, tied, the matrix of the output."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(vocab_size, hidden_size))

    def forward(self) -> torch.Tensor:
        """Hand the weight out; by a call, so that offloading hooks notice."""
        return self.weight


class GatedMLP(nn.Module):
    """W_out (a silu(b)) with [a, b] = W_in x, without biases.

    Args:
        hidden_size: width D.
        inner: width between the two.
    """

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.proj_out = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., D) to (..., D)."""
        a, b = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(a * F.silu(b))


class AiMBlock(nn.Module):
    """One layer of the residual stream: x + gate * mixer(modulate(norm(x))), then the same with an MLP if there is one.

    The last sum is left to whoever normalises the stream next, since stream update and norm are one operator.

    Args:
        hidden_size: width D.
        mixer: Mamba or Mamba2.
        mlp_hidden: inner width of the MLP; 0 for none.
        grouped: shift, scale and gate are those of the block's group plus a table of its own; else they are a
            projection of the condition by the block itself.
        norm: "rms" or "layer".
        norm_eps: eps of that norm.
        mlp_residual: "stream", or "as_released_unfused": see :class:`AiM`.
    """

    def __init__(
        self,
        hidden_size: int,
        mixer: nn.Module,
        *,
        mlp_hidden: int,
        grouped: bool,
        norm: str,
        norm_eps: float,
        mlp_residual: str,
    ) -> None:
        super().__init__()
        self.mlp_residual = mlp_residual
        count = 6 if mlp_hidden else 3
        self.modulation = None if grouped else Modulation(hidden_size, count)
        self.table = nn.Parameter(torch.randn(1, count, hidden_size) / math.sqrt(hidden_size)) if grouped else None
        self.norm = NORMS[norm](hidden_size, norm_eps)
        self.mixer = mixer
        self.norm_mlp = NORMS[norm](hidden_size, norm_eps) if mlp_hidden else None
        self.mlp = GatedMLP(hidden_size, mlp_hidden) if mlp_hidden else None

    def vectors(self, conditioning: torch.Tensor, group: Vectors | None) -> Vectors:
        """Shifts, scales and gates, (B, 1, D) each, from the condition (B, D) or the vectors of the block's group."""
        if self.modulation is not None:
            return self.modulation(conditioning)
        return tuple(row + own for row, own in zip(group, self.table.split(1, dim=1)))

    def forward(
        self, hidden_states: torch.Tensor, vectors: Vectors, state: Any = None, update: Update | None = None
    ) -> tuple[torch.Tensor, Update]:
        """Go through one layer.

        Args:
            hidden_states: residual stream (B, L, D), float32.
            vectors: see :meth:`vectors`.
            state: the mixer's state, read and updated in place; None starts anew.
            update: what the layer before adds to the stream; None for the first layer.

        Returns:
            The stream, (B, L, D), float32, and what this layer adds to it.
        """
        if self.mlp is None:
            shift, scale, gate = vectors
        else:
            shift, shift_mlp, scale, scale_mlp, gate, gate_mlp = vectors
        if update is None:
            x = self.norm(hidden_states, shift, scale)
        else:
            hidden_states, x = self.norm(hidden_states, shift, scale, add=update[0], gate=update[1])
        x = self.mixer(x, state=state)
        if self.mlp is None:
            return hidden_states, (x, gate)
        if self.mlp_residual == "as_released_unfused":
            _, normed = self.norm_mlp(hidden_states, add=x, gate=gate)
            return upcast(normed), (self.mlp(modulate(gate * x, shift_mlp, scale_mlp)), gate_mlp)
        hidden_states, x = self.norm_mlp(hidden_states, shift_mlp, scale_mlp, add=x, gate=gate)
        return hidden_states, (self.mlp(x), gate_mlp)


@dataclass
class AiMCache:
    """What decoding keeps between codes: buffers made once and updated in place, so that a captured graph sees them.

    Args:
        states: of each layer's mixer.
        vectors: modulation of each layer (M, B, 1, D) and of the output (2, B, 1, D), set when an image is begun.
        position: how many codes have been read, (1,), int64.
        begun: whether the condition has been read.
    """

    states: list[Any]
    vectors: list[torch.Tensor]
    position: torch.Tensor
    begun: bool = False

    def begin(self) -> None:
        """Forget everything."""
        for state in self.states:
            state.conv.zero_()
            state.ssm.zero_()
        self.position.zero_()
        self.begun = False


class AiM(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Next-code model of images: class-conditional, text-conditional or neither.

    The sequence is [text tokens,] condition, code 0, code 1, ...; the condition is the class vector plus the mean of
    the text. Every layer is modulated by it. What differs from the released code: one position rule for training and
    decoding, null label and null text only where they are asked for, logits without guidance (the pipeline's work), a
    text prefix.

    Args:
        sample_size: rows and columns of codes; one number for a square.
        vocab_size: codes V.
        num_classes: classes; 0 for a model without class labels.
        context_dim: width of the text tokens; 0 for a model without text.
        context_length: text tokens S before the codes; shorter texts are filled up with the null token.
        hidden_size: width D.
        num_layers: number of blocks.
        mixer: "mamba2" or "mamba".
        d_state, d_conv, expand: sizes of the mixer.
        headdim, ngroups: of mixer "mamba2", see :class:`genssm.layers.Mamba2`; None for its own.
        dt_rank: of mixer "mamba", see :class:`genssm.layers.Mamba`.
        num_groups: groups whose layers share a projection of the condition (layer i is of group i mod num_groups) and
            add a table of their own; 0 gives each layer its own projection, 1 shares one among all.
        mlp_hidden: inner width of a gated MLP after each mixer, rounded up to a multiple of 128; 0 for none.
        mlp_residual: "stream": the MLP reads the normalised stream and adds to it. "as_released_unfused": it reads what
            the mixer has added, and adds to the normalised stream, as the released code does without fused norms.
        norm: "rms" or "layer".
        norm_eps: eps of the norms.
        position_offset: code i has row i + position_offset of the position table. 1 is the rule of the released
            samples (the condition counts as a position), 0 that of the released training code.
        tie_embeddings: use the codes' embeddings as the output matrix.

    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["AiMBlock"]
    _no_split_modules: ClassVar[list[str]] = ["AiMBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "D", "dt_bias"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["label_embed", "context_embed", "code_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 16,
        vocab_size: int = 16384,
        num_classes: int = 1000,
        context_dim: int = 0,
        context_length: int = 77,
        hidden_size: int = 768,
        num_layers: int = 24,
        mixer: str = "mamba2",
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int | None = None,
        ngroups: int | None = None,
        dt_rank: int | str = "auto",
        num_groups: int = 0,
        mlp_hidden: int = 0,
        mlp_residual: str = "stream",
        norm: str = "rms",
        norm_eps: float = 1e-5,
        position_offset: int = 1,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        choices = (("norm", norm, NORMS), ("mlp_residual", mlp_residual, ("stream", "as_released_unfused")))
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        if position_offset not in (0, 1):
            raise ValueError(f"position_offset is {position_offset}; expected 0 or 1")
        self.gradient_checkpointing = False
        self.grid = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        mlp_hidden = MLP_MULTIPLE * math.ceil(mlp_hidden / MLP_MULTIPLE)

        self.code_embed = CodeTable(vocab_size, hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn(self.num_tokens + 1, hidden_size))
        self.label_embed = LabelEmbedding(num_classes, hidden_size)
        self.context_embed = ContextEmbedding(context_dim, context_length, hidden_size) if context_dim else None

        options = mixer_options(
            mixer, dt_rank=dt_rank, headdim=headdim, ngroups=ngroups,
            d_state=d_state, d_conv=d_conv, expand=expand, out_scale=num_layers**-0.5,
        )  # fmt: skip
        count = 6 if mlp_hidden else 3
        self.group_modulation = Modulation(hidden_size, count * num_groups, zero=False) if num_groups else None
        self.blocks = nn.ModuleList(
            AiMBlock(
                hidden_size,
                make_mixer(hidden_size, **options),
                mlp_hidden=mlp_hidden,
                grouped=bool(num_groups),
                norm=norm,
                norm_eps=norm_eps,
                mlp_residual=mlp_residual,
            )
            for _ in range(num_layers)
        )
        self.norm_out = NORMS[norm](hidden_size, norm_eps)
        self.norm_final = RMSNorm(hidden_size, norm_eps)
        self.modulation_out = Modulation(hidden_size, 2)
        self.proj_out = None if tie_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)

    @property
    def num_tokens(self) -> int:
        """Codes T of an image."""
        return math.prod(self.grid)

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None for a model without classes."""
        return self.label_embed.null_label if self.config.num_classes else None

    @property
    def has_null_text(self) -> bool:
        """Whether the model knows what no text is; it does if it reads text."""
        return self.context_embed is not None

    @property
    def null_encoder_hidden_states(self) -> torch.Tensor | None:
        """The learned null text token, (context_dim,); None without text."""
        return None if self.context_embed is None else self.context_embed.null

    def forward(
        self,
        codes: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: AiMCache | None = None,
        return_dict: bool = True,
    ) -> TokenOutput | tuple[torch.Tensor]:
        """Logits of the next code, after the condition and after each code given.

        Args:
            codes: first codes of the images, (B, L), int64, in raster order, 0 <= L < T; None means L = 0.
            class_labels: (B,), int64; None means the null class.
            encoder_hidden_states: text tokens, (B, S', context_dim) with S' <= context_length; None means null text.
            encoder_attention_mask: (B, S'), True (or 1) where a text token counts; None means everywhere.
            cache: from :meth:`new_cache`. The first call with it reads condition and codes; each later one takes the
                next code alone, (B, 1), and no condition.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`genssm.layers.TokenOutput` whose ``logits``, (B, L + 1, V), predict codes 0 .. L; in later calls
            with a cache (B, 1, V).

        Raises:
            ValueError: shapes do not fit the model.
        """
        if cache is not None and cache.begun:
            logits = self._step(codes, cache)
        else:
            logits = self._read(codes, class_labels, encoder_hidden_states, encoder_attention_mask, cache)
        return TokenOutput(logits=logits) if return_dict else (logits,)

    def _read(
        self,
        codes: torch.Tensor | None,
        labels: torch.Tensor | None,
        text: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: AiMCache | None,
    ) -> torch.Tensor:
        """Logits (B, L + 1, V) of a sequence from its beginning."""
        batch, length = self._check_input(codes, labels, text)
        c = self.label_embed(labels, batch)  # (B, D)
        parts = []
        if self.context_embed is not None:
            tokens, mean = self.context_embed(text, mask, batch)  # (B, S, D), (B, D)
            c = c + mean
            parts.append(tokens)
        parts.append(c[:, None])
        if length:
            first = self.config.position_offset
            rows = self.positions[first : first + length]
            parts.append(upcast(F.embedding(codes, self.code_embed())) + rows)
        x = torch.cat([upcast(part) for part in parts], dim=1)  # (B, S + 1 + L, D)

        vectors, update = self._vectors(c), None
        for layer, block in enumerate(self.blocks):
            state = None if cache is None else cache.states[layer]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, update = self._gradient_checkpointing_func(block, x, vectors[layer], state, update)
            else:
                x, update = block(x, vectors[layer], state, update)  # (B, S + 1 + L, D)
        if cache is not None:
            for kept, new in zip(cache.vectors, vectors):
                kept.copy_(torch.stack(new))
            cache.position.fill_(length)
            cache.begun = True
        last, gate = update
        return self._logits(x[:, -length - 1 :], (last[:, -length - 1 :], gate), vectors[-1])

    def _step(self, codes: torch.Tensor, cache: AiMCache) -> torch.Tensor:
        """Logits (B, 1, V) after one code more; nothing here depends on values, so a graph can be captured of it."""
        row = upcast(self.positions[self.config.position_offset :][cache.position])  # (1, D)
        x = row.expand(len(codes), 1, -1)
        update = self.code_embed()[codes], None  # what an embedding looks up is added by the first norm
        for block, vectors, state in zip(self.blocks, cache.vectors, cache.states):
            x, update = block(x, vectors.unbind(0), state, update)  # (B, 1, D)
        cache.position.add_(1)
        return self._logits(x, update, cache.vectors[-1].unbind(0))

    def _vectors(self, conditioning: torch.Tensor) -> list[Vectors]:
        """Modulation of each layer and of the output from the condition (B, D)."""
        groups: list[Vectors | None] = [None]
        if self.group_modulation is not None:
            rows, count = self.group_modulation(conditioning), self.blocks[0].table.shape[1]
            groups = [rows[i : i + count] for i in range(0, len(rows), count)]
        per_layer = [block.vectors(conditioning, groups[i % len(groups)]) for i, block in enumerate(self.blocks)]
        return [*per_layer, self.modulation_out(conditioning)]

    def _logits(self, x: torch.Tensor, update: Update, vectors: Vectors) -> torch.Tensor:
        _, x = self.norm_out(x, add=update[0], gate=update[1])
        x = self.norm_final(x, *vectors)
        return F.linear(x, self.code_embed()) if self.proj_out is None else self.proj_out(x)

    def new_cache(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> AiMCache:
        """Buffers for decoding ``batch_size`` sequences (twice the images under guidance).

        Args:
            batch_size: B.
            device: None means that of the parameters.
            state_dtype: what the scans' states are kept in from one code to the next; steps read and write little else,
                and compute in float32 all the same. None means float16 for weights in half precision: it rounds eight
                times finer than bfloat16, far below what such weights' activations are rounded to. Others keep float32.
        """
        width, device, dtype = self.config.hidden_size, device or self.device, self.dtype
        if state_dtype is None:
            state_dtype = torch.float16 if dtype in (torch.bfloat16, torch.float16) else torch.float32
        counts = [6 if self.config.mlp_hidden else 3] * len(self.blocks) + [2]
        return AiMCache(
            states=[block.mixer.allocate_state(batch_size, device, state_dtype) for block in self.blocks],
            vectors=[torch.zeros(count, batch_size, 1, width, device=device, dtype=dtype) for count in counts],
            position=torch.zeros(1, dtype=torch.int64, device=device),
        )

    def _check_input(
        self, codes: torch.Tensor | None, labels: torch.Tensor | None, text: torch.Tensor | None
    ) -> tuple[int, int]:
        """Batch size and number of codes of an input that fits the model."""
        if labels is not None and not self.config.num_classes:
            raise ValueError("class_labels are given but this model has no classes (num_classes is 0); leave them out")
        if text is not None and self.context_embed is None:
            raise ValueError("encoder_hidden_states are given but this model reads no text (context_dim is 0)")
        given = next((x for x in (codes, labels, text) if x is not None), None)
        if given is None:
            raise ValueError("neither codes, class_labels nor encoder_hidden_states are given; pass one of them")
        batch = len(given)
        if codes is not None and (codes.dim() != 2 or not 0 <= codes.shape[1] < self.num_tokens):
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; expected ({batch}, L) with L < {self.num_tokens}, the codes "
                "of an image: the last one predicts nothing"
            )
        return batch, 0 if codes is None else codes.shape[1]


# Constructor arguments by name: 256x256 images of ImageNet, 16x16 codes. "1B" is named in the paper; its width and
# depth are those that its 1.3 billion parameters suggest, no weights are public.
AIM_PRESETS: dict[str, dict[str, Any]] = {
    "B": {"hidden_size": 768, "num_layers": 24},
    "L": {"hidden_size": 1024, "num_layers": 48, "num_groups": 4},
    "XL": {"hidden_size": 1536, "num_layers": 48, "num_groups": 4},
    "1B": {"hidden_size": 2048, "num_layers": 48, "num_groups": 4},
}

# Published key -> ours, in this order.
_PUBLISHED_KEYS = {
    r"^mamba\.": "",
    r"^lm_head\.": "proj_out.",
    r"^backbone\.embeddings\.word_embeddings\.": "code_embed.",
    r"^backbone\.embeddings\.position_embeddings\.weight$": "positions",
    r"^backbone\.cls_embed\.embedding_table\.": "label_embed.table.",
    r"^backbone\.adaln_group\.1\.": "group_modulation.linear.",
    r"^backbone\.norm_f\.": "norm_out.",
    r"^backbone\.final_layer\.norm_final\.": "norm_final.",
    r"^backbone\.final_layer\.adaLN_modulation\.1\.": "modulation_out.linear.",
    r"^backbone\.layers\.": "blocks.",
    r"\.scale_shift_table$": ".table",
    r"\.adaLN_modulation\.1\.": ".modulation.linear.",
    r"\.norm2\.": ".norm_mlp.",
    r"\.mlp\.fc1\.": ".mlp.proj_in.",
    r"\.mlp\.fc2\.": ".mlp.proj_out.",
    r"\.mixer\.dt_proj\.bias$": ".mixer.dt_bias",
}


def _sequence_part(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sequence model's weights without ``mamba.`` in front; a tied output matrix is left out."""
    part = {k.removeprefix("mamba."): v for k, v in state_dict.items() if not k.startswith("vqvae.")}
    words, head = part.get("backbone.embeddings.word_embeddings.weight"), part.get("lm_head.weight")
    if words is not None and head is not None and (head is words or torch.equal(head, words)):
        del part["lm_head.weight"]
    return part


def convert_aim_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the weights of an AiM checkpoint of the released code to the keys of :class:`AiM`.

    Args:
        state_dict: tensors under their published names (with or without ``mamba.`` in front; the tokenizer's weights
            beside them are passed over).

    Returns:
        The same tensors under our names.
    """
    converted = {}
    for key, value in _sequence_part(state_dict).items():
        for pattern, ours in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, ours, key)
        converted[key] = value
    return converted


def aim_config_from_published(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of :class:`AiM` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_aim_state_dict`.
        given: arguments known from elsewhere: ``sample_size`` of a grid that is not square, ``ngroups`` other than 1,
            ``norm_eps``, ``position_offset``, ``mlp_residual``.

    Returns:
        All arguments that the tensors show.

    Raises:
        ValueError: this is not an AiM checkpoint, or an argument that the tensors do not show is missing.
    """
    part = _sequence_part(state_dict)
    words = part.get("backbone.embeddings.word_embeddings.weight")
    if words is None or "backbone.layers.0.mixer.in_proj.weight" not in part:
        raise ValueError("no backbone.embeddings.word_embeddings or backbone.layers.0.mixer; not a checkpoint of AiM")
    layer = {k.removeprefix("backbone.layers.0."): v for k, v in part.items() if k.startswith("backbone.layers.0.")}
    width = words.shape[1]
    inner = layer["mixer.out_proj.weight"].shape[1]
    config: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "num_classes": len(part["backbone.cls_embed.embedding_table.weight"]) - 1,
        "hidden_size": width,
        "num_layers": 1 + max(int(key.split(".")[2]) for key in part if key.startswith("backbone.layers.")),
        "mixer": "mamba" if "mixer.x_proj.weight" in layer else "mamba2",
        "d_conv": layer["mixer.conv1d.weight"].shape[-1],
        "expand": inner // width,
        "mlp_hidden": layer["mlp.fc2.weight"].shape[1] if "mlp.fc2.weight" in layer else 0,
        "norm": "layer" if "norm.bias" in layer else "rms",
        "num_groups": 0,
        "tie_embeddings": "lm_head.weight" not in part,
    }
    if "backbone.adaln_group.1.bias" in part:
        count = layer["scale_shift_table"].shape[1]
        config["num_groups"] = len(part["backbone.adaln_group.1.bias"]) // (count * width)
    if config["mixer"] == "mamba":
        rank = layer["mixer.dt_proj.weight"].shape[1]
        config["d_state"] = layer["mixer.A_log"].shape[1]
        config["dt_rank"] = "auto" if rank == math.ceil(width / 16) else rank
    else:
        config["headdim"] = inner // len(layer["mixer.A_log"])
        config["d_state"] = (len(layer["mixer.conv1d.weight"]) - inner) // (2 * (given.get("ngroups") or 1))
    tokens = len(part["backbone.embeddings.position_embeddings.weight"]) - 1
    if math.isqrt(tokens) ** 2 == tokens:
        config["sample_size"] = math.isqrt(tokens)
    elif "sample_size" not in given:
        raise ValueError(f"{tokens} codes are no square; give sample_size, [rows, columns], in the configuration")
    return config
