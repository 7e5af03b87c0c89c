"""Every knob of a run, once: the dataclasses below are the schema, the `--help` and the file format.

A run is described by YAML files plus `--section.key value` on the command line (`megagamma.config.io`).
Rules between knobs are checked by `megagamma.config.rules` before a file or a process group is opened.
Tags in the docstrings tell where a default comes from: [P] stated by the paper (arXiv 2606.17945),
[3P] by a third party that read it, [PRE] by earlier work of its authors, [REF] by work that it cites,
[INF] our inference, [practice] what Megatron-LM, Llama or OLMo users expect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# The roles of weight matrices, in the order of reports. Norm gains have the role "norm" and are always 1.
ROLES = (
    "embedding",
    "query",
    "key",
    "value",
    "gate",
    "attention_output",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "head",
)


@dataclass
class RunConfig:
    """What is run, for how long, and where it is written."""

    name: str = "run"
    """Name of the run in reports and in wandb."""
    folder: str = "runs/{name}"
    """Folder of the run's files; `{name}` is replaced by run.name."""
    steps: int | None = None
    """Optimizer steps to train. Unit: steps. Give this or run.tokens; with neither, 1000."""
    tokens: float | None = None
    """Token budget in place of run.steps. Unit: tokens; rounded up to whole steps. 20 per parameter is a common choice."""
    seed: int = 1234
    """Seed of the initial weights and of the data order."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest complete checkpoint of the folder, else start; never: refuse a folder that
    holds a run; must: fail when there is no checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. auto: cuda when there is one, else cpu."""
    threads: int = 0
    """CPU threads per process. 0: OMP_NUM_THREADS when set (torchrun sets it to 1), else cores / processes on this node."""
    timeout_minutes: float = 30.0
    """Deadline of every collective operation. Unit: minutes. [practice]"""
    start_minutes: float = 10.0
    """Deadline for all processes to come to the start; those that are missing then are named. Unit: minutes."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on a GPU (slower). CPU runs are deterministic in any case."""


@dataclass
class ModelConfig:
    """Shape of the decoder: pre-norm RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases [INF from method 3.3]."""

    hidden_size: int = 256
    """Width d of the residual stream. Unit: features."""
    num_layers: int = 4
    """Number of transformer layers."""
    num_attention_heads: int = 4
    """Query heads per layer."""
    num_query_groups: int | None = None
    """Key-value heads per layer (grouped-query attention). Default: num_attention_heads."""
    head_dim: int | None = None
    """Features per head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Width of the SwiGLU. Default: 8/3 of hidden_size, rounded up to a multiple of 64."""
    vocab_size: int | None = None
    """True vocabulary. Unit: tokens. Default: the tokenizer's."""
    vocab_size_multiple: int = 128
    """The embedding is padded to a multiple of this, which every tensor-parallel degree must divide, so that the
    padded size does not depend on the layout. [practice: Megatron's make-vocab-size-divisible-by]"""
    tie_embeddings: bool = False
    """Share the embedding with the output head."""
    norm_epsilon: float = 1e-12
    """Epsilon of every RMSNorm: block norms, q/k norms and the final norm. The common 1e-5 saturates the norms of a
    model drawn small and hides its gain [3P: 1e-5 -> 1e-12]."""
    qk_norm: bool = True
    """RMSNorm on each head's queries and keys, before RoPE."""
    attention_gate: Literal["none", "elementwise", "headwise"] = "elementwise"
    """Output gate on attention, y * sigmoid(x W), from the block's normed input: one gate per feature or per head
    [3P: relaxes attention sinks; REF: arXiv 2505.06708, G1]."""
    allow_gate_without_qk_norm: bool = False
    """A gate without q/k-norm exports to no stock Hugging Face class; set this to train one all the same."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding. [REF]"""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, attention only, or whole layers."""
    transformer_engine: bool = False
    """Use Transformer Engine's layers in place of the local ones. Needs a GPU and the package."""


@dataclass
class InitConfig:
    """The method: std = d_in^-gamma per matrix, d_in the fan-in of the whole matrix, never of a shard [P, PRE]."""

    scheme: Literal[
        "gamma",
        "fixed",
        "fixed_depth",
        "deepseek",
        "inverse_sqrt",
        "megatron",
        "neox_small",
    ] = "gamma"
    """gamma: std = d_in^-gamma; fixed: init.std everywhere; fixed_depth: the same with 1/sqrt(2L) on the two
    residual-writing matrices; deepseek: 0.006 everywhere; inverse_sqrt: 1/sqrt(d_in); megatron: 0.02 with
    1/sqrt(2L); neox_small: sqrt(2/(5d)) with 2/(L sqrt(d)) on the residual-writing matrices [REF]."""
    gamma: float = 1.0
    """Exponent of the standard deviation for every role. 1: small [3P]; 0.5: the usual 1/sqrt(d_in)."""
    embedding: float | None = None
    """Exponent for the token embedding (d_in = hidden_size [PRE]). Default: init.gamma."""
    query: float | None = None
    """Exponent for query projections. Default: init.gamma."""
    key: float | None = None
    """Exponent for key projections. Default: init.gamma."""
    value: float | None = None
    """Exponent for value projections. Default: init.gamma."""
    gate: float | None = None
    """Exponent for the attention output gate. Default: init.gamma. [INF]"""
    attention_output: float | None = None
    """Exponent for the attention output projection. Default: init.gamma."""
    mlp_gate: float | None = None
    """Exponent for the SwiGLU's gate projection. Default: init.gamma."""
    mlp_up: float | None = None
    """Exponent for the SwiGLU's up projection. Default: init.gamma."""
    mlp_down: float | None = None
    """Exponent for the SwiGLU's down projection. Default: init.gamma."""
    head: float | None = None
    """Exponent for the untied output head (d_in = hidden_size). Default: init.gamma."""
    std: float = 0.02
    """Standard deviation of the schemes fixed and fixed_depth. [REF: Megatron's default]"""
    residual_fan_in: Literal["d_in", "hidden"] = "d_in"
    """d_in of the two matrices that write to the residual stream: their true fan-in (the paper group's text), or
    hidden_size (the group's code) [PRE]."""
    depth_scale: bool = True
    """Divide the std of the two residual-writing matrices by sqrt(2 num_layers), with scheme gamma or inverse_sqrt.
    [PRE: the group's code; INF: kept in the paper, which uses Megatron-LM]"""
    distribution: Literal["normal", "truncated"] = "normal"
    """normal [PRE], or truncated at init.truncate_at standard deviations and rescaled to the asked std."""
    truncate_at: float = 3.0
    """Cut of the truncated normal. Unit: standard deviations. [REF: OLMo-2]"""
    max_z: float = 6.0
    """A run refuses to start when the measured std of a matrix is further from the asked one than this many
    standard errors."""


@dataclass
class DataConfig:
    """Token files, how they are mixed, and how batches are cut from them."""

    paths: list[str] = field(default_factory=list)
    """Folders written by tools/prepare_data.py. Their train split is trained on, and their validation split is
    validated on unless validation.paths says otherwise."""
    corpus: Literal["", "sotu", "tiny"] = ""
    """In place of paths: an embedded text, prepared on first use in data.cache."""
    cache: str = "data"
    """Folder for embedded texts that are prepared on first use."""
    weights: list[float] | None = None
    """Share of each of data.paths in training, any positive numbers. Default: by their tokens."""
    sequence_length: int = 256
    """Tokens per sample. Unit: tokens."""
    global_batch_size: int = 32
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Samples per forward pass of one rank."""
    batch_ramp: list[int] | None = None
    """[start, increment, samples]: begin with global batch `start` and raise it by `increment`, evenly over the first
    `samples` samples, up to global_batch_size. [practice: Megatron's rampup-batch-size]"""
    reset_positions: bool = False
    """Count positions from 0 again after each end of document."""
    reset_attention: bool = False
    """Let no token attend to an earlier document of its window."""
    mask_eod_loss: bool = False
    """No loss where the input is an end-of-document token, whose successor belongs to an unrelated document."""


@dataclass
class TokenizerConfig:
    """Tokenizer of an embedded corpus; prepared folders bring their own."""

    vocab_size: int | None = None
    """Vocabulary to train for data.corpus. Unit: tokens. Default: 4096 for sotu, 512 for tiny."""
    path: str = ""
    """A SentencePiece .model that the data must have been encoded with; checked by fingerprint."""


@dataclass
class OptimizerConfig:
    """AdamW [P]."""

    lr: float = 2.5e-4
    """Peak learning rate. [PRE: 2608.30315]"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two moments. [INF]"""
    eps: float = 1e-8
    """Adam's epsilon. [INF]"""
    weight_decay: float = 0.1
    """Decoupled weight decay. [REF]"""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices only [practice], or norm gains too [PRE: the group's code]."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip. [REF]"""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Learning-rate factor per role, such as {embedding: 2.0}. Roles as in `init`, and `norm`."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then the shape."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, then a linear decay over the last decay_ratio of the run."""
    warmup_ratio: float = 0.03
    """Share of the steps spent warming up. [PRE]"""
    warmup_steps: int | None = None
    """Warm-up in steps, in place of the ratio."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak. [PRE]"""
    decay_ratio: float = 0.1
    """Share of the steps that wsd spends decaying. [practice]"""


@dataclass
class ParallelConfig:
    """How the model is laid over ranks. The rest of the world is data parallel, split by DeepSpeed's ZeRO stage."""

    tensor: int = 1
    """Tensor-parallel ranks (t)."""
    pipeline: int = 1
    """Pipeline stages (p)."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are split over the tensor-parallel ranks."""
    virtual_pipeline: int | None = None
    """Virtual stages per pipeline rank (interleaved schedule)."""
    context: int = 1
    """Context-parallel ranks."""
    memory_gib: float | None = None
    """Memory of one rank's device. Unit: GiB. With it a layout that cannot fit is refused before launch, see
    docs/memory.md. Default: not checked."""


@dataclass
class PrecisionConfig:
    """Numeric format of weights and activations; the optimizer's state is fp32 in any case."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. bf16 on a CPU warns with the measured speed ratio."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    interval: int = 0
    """Steps between checkpoints. 0: only at the end and when the run is told to stop."""
    keep_last: int = 3
    """Newest checkpoints kept; 0 keeps all. Permanent ones are not counted."""
    permanent: list[int] = field(default_factory=list)
    """Steps whose checkpoints are written and never deleted."""
    log_spaced: bool = False
    """Also write permanent checkpoints at steps 1, 2, 4, 8, ..., for studies of training dynamics. [practice: Pythia]"""
    save_initial: bool = False
    """Also write the untrained model, step 0, permanently."""
    at_end: bool = True
    """Write a checkpoint after the last step."""
    asynchronous: bool = False
    """Copy the state to memory and write it while training goes on. Costs memory for one rank's share."""
    on_damage: Literal["stop", "previous"] = "stop"
    """When the newest checkpoint is damaged on resume: stop and name it, or go back to the one before."""


@dataclass
class ValidationConfig:
    """Held-out loss, in nats per token and bits per byte of text."""

    paths: dict[str, str] = field(default_factory=dict)
    """Name and prepared folder of each set. Default: the validation split of every training folder."""
    interval: int = 100
    """Steps between validations. 0: only at the end."""
    windows: int = 64
    """Windows of sequence_length per set; 0 uses all of it."""
    at_end: bool = True
    """Validate after the last step."""
    full_at_end: bool = False
    """After the last step, also use all of every set, recorded as val/<set>_full."""
    harness_tasks: list[str] = field(default_factory=list)
    """Benchmarks of lm-eval to score the model on as it trains: presets (reasoning, knowledge, quick), tasks, groups or
    tags, with `name:5` for five examples in the prompt. Recorded as harness/<task>/<metric>. What fails only warns."""
    harness_interval: int = 0
    """Steps between scorings. 0: only after the last step. They are slow: a forward pass per choice or generated token."""
    harness_limit: int = 0
    """Documents of each task to score; 0 uses all."""
    harness_mirror: str = ""
    """Folder filled by tools/fetch_benchmarks.py, for machines without a network. Default: MEGAGAMMA_MIRROR, or the hub."""
    harness_include_path: str = ""
    """Folder of lm-eval task YAMLs of your own."""


@dataclass
class GuardConfig:
    """What happens when the loss or the gradients stop making sense."""

    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run (the last checkpoint is kept), or leave the step out."""
    on_spike: Literal["report", "stop", "skip"] = "report"
    """A loss far above its recent mean: report it, stop the run, or leave the step out."""
    spike_sigma: float = 6.0
    """A spike is a loss more than this many standard deviations above the mean of the last spike_window steps."""
    spike_window: int = 64
    """Steps that the mean and deviation are taken over; no spike is called before they are full."""
    max_skips: int = 10
    """Steps in a row that may be left out before the run stops."""
    replica_interval: int = 100
    """Steps between checks that the copies of replicated weights are equal over ranks. 0: never."""


@dataclass
class LoggingConfig:
    """Console, files and wandb. The local files are the truth."""

    interval: int = 1
    """Steps between lines of metrics.jsonl."""
    console_interval: int = 10
    """Steps between console lines."""
    sample_interval: int = 0
    """Steps between text samples; 0: one at the end."""
    sample_prompt: str = "The "
    """Text that samples continue."""
    sample_tokens: int = 64
    """Length of a sample; 0 writes none. Unit: tokens."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """wandb mirrors the metrics; a failure of it only warns."""
    wandb_project: str = "megagamma"
    """wandb project."""


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed_config: str = "auto"
    """DeepSpeed's own JSON file; its "auto" values are filled from the knobs, contradictions are refused. auto:
    configs/deepspeed/zero1.json, or zero0.json for fp32 on one data-parallel rank, which leaves ZeRO nothing to shard."""


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Fill in place the model's derived defaults (groups, head size, SwiGLU width); returns it."""
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    if model.head_dim is None and model.num_attention_heads > 0:
        model.head_dim = model.hidden_size // model.num_attention_heads
    if model.ffn_hidden_size is None:
        model.ffn_hidden_size = round_up(-(-8 * model.hidden_size // 3), 64)
    return model


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding, independent of the layout. The vocabulary must be known."""
    if model.vocab_size is None:
        raise ValueError("the vocabulary is not known yet: read the tokenizer first")
    return round_up(model.vocab_size, model.vocab_size_multiple)
