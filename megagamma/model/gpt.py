"""Config -> this rank's Megatron-core GPTModel, with our norm, attention core, gate and loss in its spec."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megagamma.config.schema import Config, padded_vocab_size
from megagamma.errors import ConfigurationError
from megagamma.model.attention import (
    ElementwiseGatedAttention,
    HeadwiseGatedAttention,
    RotaryAttention,
    SDPACoreAttention,
)
from megagamma.model.cross_entropy import cross_entropy
from megagamma.model.layer import WholeLayer
from megagamma.model.norm import RMSNorm
from megagamma.model.rotary import RotaryTable
from megagamma.model.swiglu import SwiGLUMLP


def transformer_config(config: Config, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """Megatron's config for ours.

    Args:
        config: resolved and validated.
        dtype: of weights and activations.
        device: of the model.
    """
    model, parallel = config.model, config.parallel
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        attention_output_gate=model.attention_gate != "none",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The hook fills the weights; Megatron's own initialization depends on the layout.
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence,
        # Fusions need CUDA extensions or a compiler.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        # gloo sends from the tensor itself, after the schedule would have freed it.
        deallocate_pipeline_outputs=device.type == "cuda",
        # With two stages the next and the previous stage are one rank: batched sends to them would be mixed up.
        overlap_p2p_comm=bool(parallel.virtual_pipeline and parallel.virtual_pipeline > 1),
        batch_p2p_comm=not (parallel.virtual_pipeline and parallel.virtual_pipeline > 1),
        **recompute,
    )


def layer_spec(config: Config) -> ModuleSpec:
    """Megatron's layer spec with our modules in it, or Transformer Engine's when the config asks for it."""
    model = config.model
    if model.transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm")
        spec.module = WholeLayer
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.mlp = SwiGLUMLP
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = SDPACoreAttention
        if model.qk_norm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
    spec.submodules.self_attention.module = {
        "none": RotaryAttention,
        "elementwise": ElementwiseGatedAttention,
        "headwise": HeadwiseGatedAttention,
    }[model.attention_gate]
    return spec


class GPT(GPTModel):
    """Megatron's GPTModel whose loss leaves out the padded part of the vocabulary.

    The padding exists for tensor parallelism only. Kept in the softmax, it would make the loss depend on the
    padded size, and differ from that of the exported model, which does not have it.
    """

    true_vocab_size: int
    reset_positions: bool = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s]; logits [s, b, padded vocabulary / t]; returns the loss per token [b, s], fp32, in nats."""
        labels = labels.t()
        ranks = self.pg_collection.tp.size()
        if ranks == 1:
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), self.true_vocab_size)
            return loss.view(labels.shape).t()
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        logits = logits.float()
        if first + logits.shape[-1] > self.true_vocab_size:
            padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= self.true_vocab_size
            logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
        loss = vocab_parallel_cross_entropy(logits, labels.contiguous())
        return loss.t()

    def forward(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; position ids are followed when `reset_positions` is set."""
        self.rotary_pos_emb.set_positions(position_ids, consecutive=not self.reset_positions)
        return super().forward(input_ids, position_ids, *args, **kwargs)


def _build_chunk(config: Config, core: TransformerConfig, stage: int | None) -> GPT:
    model, parallel = config.model, config.parallel
    if parallel.pipeline == 1:
        first, last = True, True
    else:
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    spec: Any = layer_spec(config)
    if not model.transformer_engine:
        count = get_num_layers_to_build(core, vp_stage=stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)
    assert model.vocab_size is not None and model.head_dim is not None
    chunk = GPT(
        config=core,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(model),
        max_sequence_length=config.data.sequence_length,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",  # whose module is replaced below
        vp_stage=stage,
    )
    chunk.true_vocab_size = model.vocab_size
    chunk.reset_positions = config.data.reset_positions
    chunk.rotary_pos_emb = RotaryTable(model.head_dim, model.rope_theta, core.params_dtype)
    return chunk


def assert_norms(chunks: list[torch.nn.Module], epsilon: float) -> int:
    """Check that every norm of the built model has the config's epsilon.

    Raises:
        ConfigurationError: naming a norm with another epsilon.

    Returns:
        Number of norms.
    """
    count = 0
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if "norm" not in name.rsplit(".", 1)[-1] or not hasattr(module, "weight"):
                continue
            count += 1
            found = getattr(module, "eps", None)
            if found != epsilon:
                raise ConfigurationError(
                    f"model.norm_epsilon={epsilon:g}, but {name} ({type(module).__name__}) was built with {found}: "
                    "this layer implementation does not honour it: set --model.transformer_engine false"
                )
    return count


def build_model(config: Config, dtype: torch.dtype, device: torch.device) -> list[GPT]:
    """This rank's part of the model, unfilled: one GPTModel, or one per virtual pipeline stage.

    Args:
        config: resolved and validated, vocabulary known; process groups must exist.
        dtype: of the weights.
        device: of the weights.
    """
    core = transformer_config(config, dtype, device)
    stages = config.parallel.virtual_pipeline
    numbers: list[int | None] = list(range(stages)) if stages and stages > 1 else [None]
    chunks = [_build_chunk(config, core, stage).to(device) for stage in numbers]
    assert_norms(list(chunks), config.model.norm_epsilon)
    return chunks


def document_mask(document_ids: Tensor) -> Tensor:
    """Attention mask [b, 1, s, s], True where forbidden: later tokens, and earlier documents of the sequence."""
    same = document_ids.unsqueeze(1) == document_ids.unsqueeze(2)
    causal = torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
    return ~(same & causal).unsqueeze(1)
