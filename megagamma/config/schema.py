"""Every option of a run, once, with its bounds: the dataclasses below are the schema, the `--help` and the file format.

A run is described by YAML files plus `--section.key value` on the command line (`megagamma.config.io`). The bounds and
the rules between options are checked by `megagamma.config.rules`, before a process group or the data is opened.
Tags in the docstrings say where a default comes from: [P] stated by the paper (arXiv 2606.17945),
[3P] by a third party that read it, [PRE] by earlier work of its authors, [REF] by work that it cites,
[INF] our inference, [practice] what Megatron-LM, Llama or OLMo users expect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megagamma.config.bounds import option

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
    steps: int | None = option(None, minimum=1, limit=10**9)
    """Optimizer steps to train. Unit: steps. Give this or run.tokens; with neither, 1000."""
    tokens: float | None = option(None, minimum=1, limit=1e18)
    """Token budget in place of run.steps. Unit: tokens; rounded up to whole steps. 20 per parameter is a common choice."""
    seed: int = option(1234, minimum=0, maximum=2**64 - 1, rule="must be at least 0 and below 2^64")
    """Seed of the initial weights and of the data order."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the newest complete checkpoint of the folder, else start; never: refuse a folder that
    holds a run; must: fail when there is no checkpoint."""
    branch_from: str = ""
    """A checkpoint, or a run (its newest), whose weights, Adam state, step and place in the data a new run starts from, such
    as the trunk of schedule.shape wsd from which every token budget branches. run.steps and run.tokens count from the
    trunk's first step. Once the run has a checkpoint of its own it resumes from that."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. auto: cuda when there is one, else cpu."""
    threads: int = option(0, minimum=0, limit=10**5)
    """CPU threads per process. 0: OMP_NUM_THREADS when set (torchrun sets it to 1), else cores / processes on this node."""
    timeout_minutes: float = option(30.0, above=0, limit=1e6)
    """Deadline of every collective operation. Unit: minutes. [practice]"""
    start_minutes: float = option(10.0, above=0, limit=1e6)
    """Deadline for all processes to come to the start; those that are missing then are named. Unit: minutes."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse what lies between matrix products (norms, rotation, SwiGLU, gate) by torch's compiler. auto: where it saves more
    time in this run than it takes."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on a GPU (slower). CPU runs are deterministic in any case."""


@dataclass
class ModelConfig:
    """Shape of the decoder: pre-norm RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases [INF from method 3.3]."""

    hidden_size: int = option(256, minimum=1, limit=2**20)
    """Width d of the residual stream. Unit: features."""
    num_layers: int = option(4, minimum=1, limit=10_000)
    """Number of transformer layers."""
    num_attention_heads: int = option(4, minimum=1, limit=2**16)
    """Query heads per layer."""
    num_query_groups: int | None = option(None, minimum=1, limit=2**16)
    """Key-value heads per layer (grouped-query attention). Default: num_attention_heads."""
    head_dim: int | None = option(None, minimum=2, limit=2**16)
    """Features per head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = option(None, minimum=1, limit=2**24)
    """Width of the SwiGLU. Default: 8/3 of hidden_size, rounded up to a multiple of 64."""
    vocab_size: int | None = option(None, minimum=2, limit=2**28)
    """True vocabulary. Unit: tokens. Default: the tokenizer's."""
    vocab_size_multiple: int = option(128, minimum=1, limit=2**20)
    """The embedding is padded to a multiple of this, which every tensor-parallel degree must divide, so that the
    padded size does not depend on the layout. [practice: Megatron's make-vocab-size-divisible-by]"""
    tie_embeddings: bool = False
    """Share the embedding with the output head."""
    norm_epsilon: float = option(1e-12, above=0)
    """Epsilon of every RMSNorm: block norms, q/k norms and the final norm. The common 1e-5 saturates the norms of a
    model drawn small and hides its gain [3P: 1e-5 -> 1e-12]."""
    qk_norm: bool = True
    """RMSNorm on each head's queries and keys, before RoPE."""
    attention_gate: Literal["none", "elementwise", "headwise"] = "elementwise"
    """Output gate on attention, y * sigmoid(x W), from the block's normed input: one gate per feature or per head
    [3P: relaxes attention sinks; REF: arXiv 2505.06708, G1]."""
    allow_gate_without_qk_norm: bool = False
    """A gate without q/k-norm exports to no stock Hugging Face class; set this to train one all the same."""
    rope_theta: float = option(10000.0, above=1)
    """Base of the rotary embedding. [REF]"""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, attention only, or whole layers."""
    transformer_engine: bool = False
    """Use Transformer Engine's layers in place of the local ones. Needs a GPU and the package."""


_EXPONENT_RULE = (
    "must lie between 0 and 4: it is the exponent of std = d_in^-gamma; 0.5 is the usual scale and 1 the small one"
)


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
        "mup",
    ] = "gamma"
    """How the std of a matrix follows from its role and d_in: gamma is the method, the others are baselines. Formulas
    and sources: docs/initialization.md; their values for a model: inspect_init --compare."""
    gamma: float = option(1.0, minimum=0, maximum=4, rule=_EXPONENT_RULE)
    """Exponent of the standard deviation for every role. 1: small [3P]; 0.5: the usual 1/sqrt(d_in)."""
    exponents: dict[str, float] = option({}, minimum=0, maximum=4, rule=_EXPONENT_RULE)
    """Exponents of single roles in place of init.gamma, such as {embedding: 0.5}; `--init.embedding 0.5` is short for
    one. Roles: embedding, query, key, value, gate (of the attention output), attention_output, mlp_gate, mlp_up,
    mlp_down, head. For embedding and head d_in is hidden_size [PRE]."""
    std: float = option(0.02, above=0)
    """Standard deviation of the schemes fixed and fixed_depth. [REF: Megatron's default]"""
    mup_base_width: int = option(128, minimum=1)
    """Hidden size at which scheme mup is inverse_sqrt with one learning rate for all roles; from there std and learning rates
    follow the width. [REF: arXiv 2203.03466, table 3]"""
    residual_fan_in: Literal["d_in", "hidden"] = "d_in"
    """d_in of the two matrices that write to the residual stream: their true fan-in (the paper group's text), or
    hidden_size (the group's code) [PRE]."""
    depth_scale: bool = True
    """Divide the std of the two residual-writing matrices by sqrt(2 num_layers), with scheme gamma or inverse_sqrt.
    [PRE: the group's code; INF: kept in the paper, which uses Megatron-LM]"""
    distribution: Literal["normal", "truncated"] = "normal"
    """normal [PRE], or truncated at init.truncate_at standard deviations and rescaled to the target std."""
    truncate_at: float = option(3.0, above=0)
    """Cut of the truncated normal. Unit: standard deviations. [REF: OLMo-2]"""
    max_z: float = option(6.0, above=0)
    """A run refuses to start when the measured std of a matrix is further from the target than this many standard
    errors."""


@dataclass
class DataConfig:
    """Token files, how they are mixed, and how batches are cut from them."""

    paths: list[str] = field(default_factory=list)
    """Folders written by tools/prepare_data.py. Their train split is trained on, and their validation split is
    validated on unless validation.paths says otherwise."""
    corpus: Literal["", "sotu", "tiny"] = ""
    """In place of paths: an embedded text, prepared on first use in data.cache."""
    toy: Literal["", "composite_anchors", "anchor_kinds", "permutations", "condensation"] = ""
    """In place of paths: a small task whose answer is known, see docs/toys.md and configs/toys/."""
    toy_options: dict[str, float] = option({}, minimum=0, limit=10**12)
    """Options of the task, such as {samples: 100000}."""
    cache: str = "data"
    """Folder for embedded texts that are prepared on first use."""
    weights: list[float] | None = None
    """Share of each of data.paths in training, any positive numbers. Default: by their tokens."""
    sequence_length: int = option(256, minimum=2, limit=2**27)
    """Tokens per sample. Unit: tokens."""
    global_batch_size: int = option(32, minimum=1, limit=2**27)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = option(8, minimum=1, limit=2**24)
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
    verify: Literal["auto", "index", "full"] = "auto"
    """What of the token files is checked at the start. index: sizes and every number of the indices. full: also the
    checksum of all tokens, by one process per host, at some 0.3 to 0.9 GB/s; where that takes longer than
    run.timeout_minutes, raise it. auto: full for folders of up to 1 GiB, index for larger ones. The ids of every batch
    are checked in any case."""


@dataclass
class TokenizerConfig:
    """Tokenizer of an embedded corpus; prepared folders bring their own."""

    vocab_size: int | None = option(None, minimum=2, limit=2**28)
    """Vocabulary to train for data.corpus. Unit: tokens. Default: 4096 for sotu, 512 for tiny."""
    path: str = ""
    """A SentencePiece .model that the data must have been encoded with; checked by fingerprint."""


@dataclass
class OptimizerConfig:
    """AdamW [P]."""

    lr: float = option(2.5e-4, minimum=0)
    """Peak learning rate. [PRE: 2608.30315]"""
    betas: tuple[float, float] = option((0.9, 0.95), minimum=0, below=1)
    """Decay of Adam's two moments. [INF]"""
    eps: float = option(1e-8, above=0)
    """Adam's epsilon. [INF]"""
    weight_decay: float = option(0.1, minimum=0)
    """Decoupled weight decay. [REF]"""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices only [practice], or norm gains too [PRE: the group's code]."""
    clip_grad: float = option(1.0, minimum=0)
    """Largest global gradient norm; 0 does not clip. [REF]"""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Learning-rate factor per role, such as {embedding: 2.0}. Roles as in `init`, and `norm`."""


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then the shape."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, then a linear decay over the last decay_ratio of the run."""
    warmup_ratio: float = option(0.03, minimum=0, maximum=1)
    """Share of the steps spent warming up. [PRE]"""
    warmup_steps: int | None = option(None, minimum=0, limit=10**9)
    """Warm-up in steps, in place of the ratio."""
    min_lr_ratio: float = option(0.1, minimum=0, maximum=1)
    """Last learning rate over the peak. [PRE]"""
    decay_ratio: float = option(0.1, minimum=0, maximum=1)
    """Share of the steps that wsd spends decaying. [practice]"""


@dataclass
class ParallelConfig:
    """How the model is laid over ranks. The rest of the world is data parallel, split by DeepSpeed's ZeRO stage."""

    tensor: int = option(1, minimum=1, limit=2**20)
    """Tensor-parallel ranks (t)."""
    pipeline: int = option(1, minimum=1, limit=10_000)
    """Pipeline stages (p)."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are split over the tensor-parallel ranks."""
    virtual_pipeline: int | None = option(None, minimum=1, limit=10_000)
    """Virtual stages per pipeline rank (interleaved schedule)."""
    context: int = option(1, minimum=1, limit=2**20)
    """Context-parallel ranks."""
    memory_gib: float | None = option(None, above=0)
    """Memory of one rank's device. Unit: GiB. With it a layout that cannot fit is refused before launch, see
    docs/memory.md. Default: not checked."""


@dataclass
class PrecisionConfig:
    """Numeric format of weights and activations; the optimizer's state is fp32 in any case."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU; on a CPU too, where it multiplies this model's matrices in bf16 several times as fast (AMX, AVX-512
    bf16, Arm) and no gamma is above 0.5; else fp32, and under a DeepSpeed file with ZeRO 0, which keeps no master weights."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    interval: int = option(0, minimum=0)
    """Steps between checkpoints. 0: only at the end and when the run is told to stop."""
    keep_last: int = option(3, minimum=0)
    """Newest checkpoints kept; 0 keeps all. Permanent ones are not counted."""
    permanent: list[int] = option([], minimum=0, limit=10**9)
    """Steps whose checkpoints are written and never deleted."""
    log_spaced: bool = False
    """Also write permanent checkpoints at steps 1, 2, 4, 8, ..., for studies of training dynamics. [practice: Pythia]"""
    save_initial: bool = False
    """Also write the untrained model, step 0, permanently."""
    at_end: bool = True
    """Write a checkpoint after the last step."""
    asynchronous: bool = False
    """Copy the state to memory and write it while training continues. Costs memory for one rank's share."""
    on_damage: Literal["stop", "previous"] = "stop"
    """When the newest checkpoint is corrupt on resume: stop and name it, or go back to the one before."""


@dataclass
class ValidationConfig:
    """Held-out loss, in nats per token and bits per byte of text."""

    paths: dict[str, str] = field(default_factory=dict)
    """Name and prepared folder of each set. Default: the validation split of every training folder."""
    interval: int = option(100, minimum=0)
    """Steps between validations. 0: only at the end."""
    windows: int = option(64, minimum=0, limit=10**12)
    """Windows of sequence_length per set; 0 uses all of it."""
    at_end: bool = True
    """Validate after the last step."""
    full_at_end: bool = False
    """After the last step, also use all of every set, recorded as val/<set>_full."""
    harness_tasks: list[str] = field(default_factory=list)
    """Benchmarks of lm-eval to score the model on as it trains: presets (reasoning, knowledge, quick), tasks, groups or
    tags, with `name:5` for five examples in the prompt. Recorded as harness/<task>/<metric>. What fails only warns."""
    harness_interval: int = option(0, minimum=0)
    """Steps between scorings. 0: only after the last step. They are slow: a forward pass per choice or generated token."""
    harness_limit: int = option(0, minimum=0)
    """Documents of each task to score; 0 uses all."""
    harness_mirror: str = ""
    """Folder filled by tools/fetch_benchmarks.py, for machines without a network. Default: MEGAGAMMA_MIRROR, or the hub."""
    harness_include_path: str = ""
    """Folder of lm-eval task YAMLs of your own."""
    trust_tasks: bool = False
    """The tasks in harness_include_path may run code: their functions, templates and scripts. Without it such tasks are
    refused, and what they would run is listed."""


INSTRUMENTS = ("weights", "spectrum", "heads", "motion", "embeddings", "activations")
NEED_TEXT = ("embeddings", "activations")
"""Instruments that need held-out text."""


@dataclass
class DynamicsConfig:
    """Numbers of every weight matrix while a run trains, in dynamics.jsonl: see docs/dynamics.md."""

    interval: int = option(0, minimum=0)
    """Steps between measurements. 0: only those of dynamics.log_spaced."""
    log_spaced: bool = False
    """Also measure at steps 0, 1, 2, 4, 8, ... and after the last one."""
    instruments: list[str] = field(default_factory=lambda: ["weights", "heads", "motion"])
    """weights: condensation, ranks, norms, distances from the start; spectrum: singular values, and ranks of large matrices
    too; heads: norm and stable rank of each; motion: gradients, updates, moments; embeddings: geometry of the 200 most frequent
    tokens of held-out text; activations: the residual stream, norms, attention and gates on eight held-out samples."""
    alarm_interval: int = option(10, minimum=0)
    """Steps between looks at the size of Adam's updates over the learning rate. One far above the recent ones is reported
    (event update_alarm) before the loss shows it. 0: never."""
    alarm_sigma: float = option(6.0, above=0)
    """Standard deviations above the mean of the last 64 looks that are too far."""


@dataclass
class GuardConfig:
    """What happens when the loss or the gradients stop making sense."""

    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run (the last checkpoint is kept), or leave the step out."""
    on_spike: Literal["report", "stop", "skip"] = "report"
    """A loss far above its recent mean: report it, stop the run, or leave the step out."""
    spike_sigma: float = option(6.0, above=0)
    """A spike is a loss more than this many standard deviations above the mean of the last spike_window steps."""
    spike_window: int = option(64, minimum=2, limit=10**6)
    """Steps that the mean and deviation are taken over; no spike is called before they are full."""
    max_skips: int = option(10, minimum=0)
    """Steps in a row that may be left out before the run stops, for a loss or for gradients that are not finite alike. A
    run whose last 3 steps (or all of fewer) were left out ends with exit code 3 in any case."""
    replica_interval: int = option(100, minimum=0)
    """Steps between checks that copies are equal over ranks: of weights, Adam's moments and gradients, where they are
    replicated. 0: never."""
    replay_interval: int = option(0, minimum=0)
    """Steps between replays: the step's forward and backward passes run twice, and their results must agree, to the bit
    on a CPU or with run.deterministic, else to 1e-4 (fp32) or 1e-2 (bf16) of every norm. Finds faulty devices; a replayed
    step takes about twice its time. 0: never."""


@dataclass
class LoggingConfig:
    """Console, files and wandb. The local files are the truth."""

    interval: int = option(1, minimum=1)
    """Steps between lines of metrics.jsonl."""
    console_interval: int = option(10, minimum=1)
    """Steps between console lines."""
    sample_interval: int = option(0, minimum=0)
    """Steps between text samples; 0: one at the end."""
    sample_prompt: str = "The "
    """Text that samples continue."""
    sample_tokens: int = option(64, minimum=0, limit=10**6)
    """Length of a sample; 0 writes none. Unit: tokens."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """wandb mirrors the metrics; a failure of it only warns."""
    wandb_project: str = "megagamma"
    """wandb project."""
    wandb_group: str = ""
    """wandb group, such as the sweep that the run is a point of. Empty: none."""


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
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed_config: str = "auto"
    """DeepSpeed's own JSON file; its "auto" values are filled from the options, contradictions are refused. auto: what
    configs/deepspeed/zero1.json holds, or zero0.json for fp32 on one data-parallel rank, which leaves ZeRO nothing to
    shard."""


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
