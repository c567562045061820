"""Motion Mamba (Zhang et al. 2024, arXiv:2403.07487): a denoiser over the latent tokens of a motion VAE.

No code or weights of the paper exist. Where its text leaves a point open, the default here is the reading argued for in
the argument's description, and the other readings are options.
"""

# B batch, n latent_tokens, T tokens (condition and latents), C hidden_size, E inner width, K scans of a block

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.layers import DenoiserOutput, LayerNorm, RMSNorm
from genssm.layers.buffers import table_device
from genssm.layers.condition_tokens import ConditionTokens
from genssm.layers.isolated_scans import SCAN_PLANS, IsolatedScans, scan_counts, two_ways
from genssm.layers.skip_transformer import SequencePositions, TransformerLayer, from_torch_layers
from genssm.paths import check_choice

NORMS = {"layer": LayerNorm, "rms": RMSNorm}
AGGREGATIONS = ("sum", "concat")
BI_SCANS = ("block", "layer", "single")


class HierarchicalTemporalMamba(nn.Module):
    """HTM: K isolated scans along the tokens (section 3.3 of the paper).

        [a, z] = W_in norm(x);   out = W_out((sum_i scan_i(a)) * silu(z))

    Args:
        hidden_size: width C.
        scans: K.
        inner_size: E.
        gate: multiply with silu(z); without it there is no z.
        aggregate: "sum" of the scans, or "concat": ``W_out`` reads all of them, K E wide.
        norm: "layer" or "rms".
        scan: further arguments of :class:`genssm.layers.isolated_scans.IsolatedScans`.
    """

    def __init__(
        self, hidden_size: int, scans: int, inner_size: int, gate: bool, aggregate: str, norm: str, **scan: Any
    ) -> None:
        super().__init__()
        self.inner_size, self.gate, self.aggregate = inner_size, gate, aggregate
        self.norm = NORMS[norm](hidden_size, 1e-5)
        self.in_proj = nn.Linear(hidden_size, inner_size * (2 if gate else 1), bias=False)
        self.scans = IsolatedScans(inner_size, scans, **scan)
        self.out_proj = nn.Linear(inner_size * (scans if aggregate == "concat" else 1), hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C); a token sees itself and those before it."""
        a = self.in_proj(self.norm(x))
        a, z = a.chunk(2, dim=-1) if self.gate else (a, None)  # (B, T, E) each
        if self.aggregate == "sum":
            return self.out_proj(self.scans(a, z))
        y = self.scans(a, z, reduce="none")  # (B, K, T, E)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class BidirectionalSpatialMamba(nn.Module):
    """BSM: scans along the channels, whose features are the tokens (section 3.4 of the paper).

        v = norm(x)^T;   [a, z] = W_in v;   out = (W_out((scan(a) + scan_backward(a)) * silu(z)))^T

    The norm is taken over the channels, before transposing: over a handful of tokens it would leave nothing but signs.
    The linear layers fix the number of tokens.

    Args:
        hidden_size: channels C, the length of the scans.
        tokens: T.
        inner_size: E.
        directions: "both", "forward" or "backward" along the channels.
        norm: "layer" or "rms".
        scan: further arguments of :class:`genssm.layers.isolated_scans.IsolatedScans`.
    """

    def __init__(self, hidden_size: int, tokens: int, inner_size: int, directions: str, norm: str, **scan: Any) -> None:
        super().__init__()
        self.directions = directions
        rows = {"both": [0, 1], "forward": [0], "backward": [1]}[directions]
        self.register_buffer("orders", two_ways(hidden_size, table_device())[rows], persistent=False)  # (1 or 2, C)
        self.norm = NORMS[norm](hidden_size, 1e-5)
        self.in_proj = nn.Linear(tokens, 2 * inner_size, bias=False)
        self.scans = IsolatedScans(inner_size, 2 if directions == "both" else 1, **scan)
        self.out_proj = nn.Linear(inner_size, tokens, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C)."""
        v = self.norm(x).transpose(1, 2)  # (B, C, T)
        a, z = self.in_proj(v).chunk(2, dim=-1)  # (B, C, E) each
        return self.out_proj(self.scans(a, z, self.orders)).transpose(1, 2)  # (B, T, C)


class MotionMambaBlock(nn.Module):
    """BSM(HTM(x)) * Linear(x), and + x where asked for (figure 2 of the paper draws no sum).

    Args:
        hidden_size: width C.
        residual: add x.
        htm: arguments of :class:`HierarchicalTemporalMamba`.
        bsm: arguments of :class:`BidirectionalSpatialMamba`.
    """

    def __init__(self, hidden_size: int, residual: bool, htm: Mapping[str, Any], bsm: Mapping[str, Any]) -> None:
        super().__init__()
        self.residual = residual
        self.htm = HierarchicalTemporalMamba(hidden_size, **htm)
        self.bsm = BidirectionalSpatialMamba(hidden_size, **bsm)
        self.gate = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C)."""
        y, gate = self.bsm(self.htm(x)), self.gate(x)
        return torch.addcmul(x, y, gate) if self.residual else y * gate


class MotionMamba(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Motion Mamba: N blocks down, an attention mixer, N blocks up with concatenated skips, over [time, text, latents].

    Args:
        latent_tokens: latent tokens n of a clip, 2 in the paper; fixed by the BSM.
        hidden_size: width C.
        num_layers: 2 N + 1, odd: blocks down, mixer, blocks up. The paper's "11 layers" are read as this total, like
            the 9 of MLD; 23 is the literal reading of its N = 11.
        scan_plan: scans of the blocks down ("2N-1..1", "1..2N-1", "N..1", "1..N"; those up mirror them), or a list.
        bi_scan: BSM scans both ways in each "block", in turn from "layer" to layer, or in a "single" direction.
        expand: inner width E of HTM = expand C. 1 gives a layer the quarter of an encoder layer's parameters that the
            paper states.
        bsm_width: inner width of BSM; None takes E, the paper's letter for both.
        d_state, d_conv: of all scans.
        dt_rank: of HTM; "auto" means ceil(C / 16).
        bsm_dt_rank: of BSM; "auto" means ceil(T / 16).
        htm_gate: gate HTM with silu(z), as algorithm 1 computes z without using it.
        aggregate: how HTM's scans are joined, "sum" or "concat".
        norm: of the blocks, "layer" or "rms".
        block_residual: add a block's input to its output. The paper draws none; deep variants train more safely with.
        condition_first: [time, text, latents]. HTM is causal: behind the latents, as in MLD, the condition could reach
            them through BSM and the mixer only.
        num_heads, ff_size, activation, dropout: of the mixer, one post-norm transformer layer.
        context_dim: width of the one (pooled) text token; 0 for a model without text.
        num_classes: action classes in place of text, one more is the null class; 0 for none.
        num_positions: rows of the table of learned positions; None means T.
        sine_first, time_shift: convention of the time's sinusoids, see :func:`genssm.layers.sinusoidal_features`.
    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["MotionMambaBlock"]
    _no_split_modules: ClassVar[list[str]] = ["MotionMambaBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "D", "dt_bias"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["condition", "positions", "norm", "scans"]

    @register_to_config
    def __init__(
        self,
        latent_tokens: int = 2,
        hidden_size: int = 256,
        num_layers: int = 11,
        scan_plan: str | Sequence[int] = "2N-1..1",
        bi_scan: str = "block",
        expand: float = 1,
        bsm_width: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | str = "auto",
        bsm_dt_rank: int | str = "auto",
        htm_gate: bool = True,
        aggregate: str = "sum",
        norm: str = "layer",
        block_residual: bool = False,
        condition_first: bool = True,
        num_heads: int = 4,
        ff_size: int = 1024,
        activation: str = "gelu",
        dropout: float = 0.1,
        context_dim: int = 768,
        num_classes: int = 0,
        num_positions: int | None = None,
        sine_first: bool = False,
        time_shift: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("bi_scan", bi_scan, BI_SCANS)
        check_choice("aggregate", aggregate, AGGREGATIONS)
        check_choice("norm", norm, tuple(NORMS))
        if num_layers % 2 == 0 or num_layers < 3:
            raise ValueError(
                f"num_layers is {num_layers}; expected an odd number from 3: blocks down, mixer, blocks up"
            )
        half = num_layers // 2
        down = scan_counts(scan_plan, half)
        counts = [*down, *reversed(down)]
        tokens = latent_tokens + 1 + int(bool(context_dim or num_classes))
        inner = round(expand * hidden_size)
        htm = {
            "inner_size": inner, "gate": htm_gate, "aggregate": aggregate, "norm": norm,
            "d_state": d_state, "d_conv": d_conv, "dt_rank": _rank(dt_rank, hidden_size),
        }  # fmt: skip
        bsm = {
            "tokens": tokens, "inner_size": inner if bsm_width is None else bsm_width, "norm": norm,
            "d_state": d_state, "d_conv": d_conv, "dt_rank": _rank(bsm_dt_rank, tokens),
        }  # fmt: skip
        directions = _directions(bi_scan, 2 * half)
        blocks = [
            MotionMambaBlock(hidden_size, block_residual, {**htm, "scans": count}, {**bsm, "directions": direction})
            for count, direction in zip(counts, directions)
        ]
        self.gradient_checkpointing = False
        self.condition = ConditionTokens(hidden_size, context_dim, num_classes, sine_first, time_shift)
        self.positions = SequencePositions(hidden_size, "learned", num_positions or tokens)
        self.input_blocks = nn.ModuleList(blocks[:half])
        self.middle_block = TransformerLayer(hidden_size, num_heads, ff_size, dropout, activation)
        self.linear_blocks = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in range(half))
        self.output_blocks = nn.ModuleList(blocks[half:])
        self.norm_out = LayerNorm(hidden_size, 1e-5)

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None for a model without classes."""
        return self.condition.null_label

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            hidden_states: noisy latents, (B, n, C).
            timestep: (B,) or one number, 0..1000, fractions allowed.
            encoder_hidden_states: one text token per clip, (B, 1, context_dim).
            class_labels: (B,) int64; None means the null class.
            return_dict: return an output object rather than a tuple.
        Returns:
            :class:`genssm.layers.DenoiserOutput` whose ``sample`` has the shape and dtype of ``hidden_states``.
        Raises:
            ValueError: shapes do not fit the model, or text is missing.
        """
        self._check(hidden_states, encoder_hidden_states)
        c = self.condition(timestep, encoder_hidden_states, class_labels, hidden_states)  # (B, 1 or 2, C)
        x = hidden_states.to(c.dtype)
        first = self.config.condition_first
        x = self.positions(torch.cat([c, x] if first else [x, c], dim=1))  # (B, T, C)
        skips = []
        for block in self.input_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self.middle_block(x)
        for merge, block in zip(self.linear_blocks, self.output_blocks):
            x = self._run(block, merge(torch.cat([x, skips.pop()], dim=-1)))
        x = self.norm_out(x).narrow(1, c.shape[1] if first else 0, hidden_states.shape[1])  # (B, n, C)
        x = x.to(hidden_states.dtype)
        return DenoiserOutput(sample=x) if return_dict else (x,)

    def _run(self, block: MotionMambaBlock, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, x)
        return block(x)

    def _check(self, hidden_states: torch.Tensor, context: torch.Tensor | None) -> None:
        expected = (self.config.latent_tokens, self.config.hidden_size)
        if hidden_states.dim() != 3 or hidden_states.shape[1:] != expected:
            takes = f"(B, {expected[0]}, {expected[1]})"
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes {takes}")
        if context is not None and (context.dim() != 3 or context.shape[1] != 1):
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(context.shape)}; expected (B, 1, {self.config.context_dim}): "
                "the number of tokens is fixed, pool the text"
            )


def _rank(rank: int | str, features: int) -> int:
    if rank == "auto":
        return math.ceil(features / 16)
    if isinstance(rank, str) or rank < 1:
        raise ValueError(f'dt_rank is {rank!r}; expected a positive integer or "auto"')
    return rank


def _directions(bi_scan: str, blocks: int) -> list[str]:
    """Direction of the BSM of each block."""
    if bi_scan == "layer":
        return ["forward" if i % 2 == 0 else "backward" for i in range(blocks)]
    return ["both" if bi_scan == "block" else "forward"] * blocks


MOTION_MAMBA_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "expand2": {"expand": 2},
    "literal11": {"num_layers": 23},
    "literal11_expand2": {"num_layers": 23, "expand": 2},
    "residual": {"block_residual": True},
    "tiny": {"hidden_size": 32, "num_layers": 5, "d_state": 4, "num_heads": 2, "ff_size": 64},
} | {
    f"layers{layers}": {"num_layers": layers} for layers in (9, 27, 37)
} | {
    f"latents{n}": {"latent_tokens": n} for n in (1, 5, 7, 10)
}  # fmt: skip

# Keys of the reading in our design notes (MLD's, where it has the part) -> ours.
_PUBLISHED_KEYS = {
    r"^time_embedding\.linear_1\.": "condition.time_embed.linear_in.",
    r"^time_embedding\.linear_2\.": "condition.time_embed.linear_out.",
    r"^emb_proj\.1\.": "condition.context_embed.",
    r"^query_pos\.": "positions.",
    r"\.dt_proj\.bias$": ".dt_bias",
    r"^norm\.": "norm_out.",
}


def convert_motion_mamba_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate weights that go on with MLD's names to the keys of :class:`MotionMamba`.

    Args:
        state_dict: ``time_embedding``, ``emb_proj``, ``query_pos``, ``input_blocks``, ``middle_block``, ... as tensors.
    """
    converted = {}
    for key, value in from_torch_layers(state_dict).items():
        for pattern, name in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, name, key)
        converted[key] = value.squeeze(1) if key == "positions.pe" else value
    return converted


def motion_mamba_config_from_published(
    state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the arguments of :class:`MotionMamba` off such weights.

    Args:
        state_dict: as for :func:`convert_motion_mamba_state_dict`.
        given: arguments known from elsewhere; the tensors do not show ``num_heads``, ``condition_first``,
            ``block_residual``, ``activation``, ``dropout``, the convention of the times, and which of "layer" and
            "single" an unidirectional BSM follows.
    Raises:
        ValueError: these are not such weights.
    """
    if "input_blocks.0.htm.scans.A_log" not in state_dict:
        raise ValueError("no input_blocks.0.htm.scans.A_log among the weights; they are not a Motion Mamba's")
    first = {key[15:]: value for key, value in state_dict.items() if key.startswith("input_blocks.0.")}
    width, context = state_dict["time_embedding.linear_1.weight"].shape
    tokens, half = first["bsm.in_proj.weight"].shape[1], 0
    counts = []
    while f"input_blocks.{half}.htm.scans.A_log" in state_dict:
        counts.append(len(state_dict[f"input_blocks.{half}.htm.scans.A_log"]))
        half += 1
    _, inner, d_state = first["htm.scans.A_log"].shape
    scans, bsm_inner, _ = first["bsm.scans.A_log"].shape
    rank, bsm_rank = (first[f"{part}.scans.dt_proj.weight"].shape[2] for part in ("htm", "bsm"))
    plans = [name for name, plan in SCAN_PLANS.items() if plan(half) == counts]
    named = given.get("scan_plan") in plans or not plans
    config: dict[str, Any] = {
        "latent_tokens": tokens - 2,
        "hidden_size": width,
        "num_layers": 2 * half + 1,
        "scan_plan": given.get("scan_plan", counts) if named else plans[0],
        "expand": inner // width if inner % width == 0 else inner / width,
        "bsm_width": None if bsm_inner == inner else bsm_inner,
        "d_state": d_state,
        "d_conv": first["htm.scans.conv1d.weight"].shape[-1],
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "bsm_dt_rank": "auto" if bsm_rank == math.ceil(tokens / 16) else bsm_rank,
        "htm_gate": len(first["htm.in_proj.weight"]) == 2 * inner,
        "aggregate": "sum",
        "norm": "layer" if "htm.norm.bias" in first else "rms",
        "ff_size": len(state_dict["middle_block.linear1.weight"]),
        "context_dim": context,
        "num_positions": None if len(state_dict["query_pos.pe"]) == tokens else len(state_dict["query_pos.pe"]),
        "bi_scan": "block" if scans == 2 else given.get("bi_scan", "single"),
    }
    if counts[0] > 1 and first["htm.out_proj.weight"].shape[1] == counts[0] * inner:
        config["aggregate"] = "concat"
    return config
