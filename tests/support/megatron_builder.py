"""A GPTModel as Megatron-LM's pretrain_gpt.py builds it: the same calls of Megatron-core, none of this project's modules.

Megatron-core's package has no trainer; what stands here is what `model_provider` and `get_model` do with these arguments.
"""

from __future__ import annotations

from typing import Any


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, tie: bool = False, **changes: Any
) -> Any:
    """One chunk of a small model; `changes` of TransformerConfig."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "ffn_hidden_size": 96, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False, "normalization": "RMSNorm", "qk_layernorm": True, "use_cpu_initialization": True,
        "bias_activation_fusion": False, "bias_dropout_fusion": False, "masked_softmax_fusion": False,
        "persist_layer_norm": False, "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "pipeline_dtype": torch.float32,
        **changes,
    }  # fmt: skip
    config = TransformerConfig(**values)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=128,
        max_sequence_length=32,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=tie,
        position_embedding_type="rope",
        rotary_base=10000,
        vp_stage=vp_stage,
    )


def get_model(tie: bool = False, **changes: Any) -> list[Any]:
    """This rank's chunks: one, or one per virtual stage."""
    from megatron.core import parallel_state as state

    stages = state.get_virtual_pipeline_model_parallel_world_size()
    if state.get_pipeline_model_parallel_world_size() > 1 and stages:
        return [
            model_provider(
                state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                stage,
                tie,
                **changes,
            )
            for stage in range(stages)
        ]
    return [model_provider(state.is_pipeline_first_stage(), state.is_pipeline_last_stage(), None, tie, **changes)]
