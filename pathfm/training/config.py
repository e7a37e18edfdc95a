"""Settings of the trainer: recipe groups `train` and `optim`, named as in DINOv2."""

from typing import Annotated, Literal

from pydantic import Field

from pathfm.config import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]


class TrainConfig(Section):
    """What is trained on, in which batches, from which seed."""

    dataset_path: str = ""  # a data set string, e.g. Pathology:root=/data:subset=train
    output_dir: str = ""  # the run directory; empty: runs/NAME
    batch_size_per_gpu: int = Field(64, ge=1)  # DINOv2 ssl_default_config
    global_batch_size: int | None = Field(None, ge=1)  # None: batch_size_per_gpu x ranks, fixed at the first start
    epoch_length: int | None = Field(None, ge=1)  # steps; None: samples of an epoch // global batch
    cohorts: dict[str, Weight] = Field(default_factory=dict)  # how often an epoch has each sample of a cohort (1)
    cohort_cap: int | None = Field(None, ge=1)  # samples that a cohort gives to an epoch at most
    seed: int = Field(0, ge=0)
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the forward and backward pass; weights, losses stay fp32
    # below: speed and reporting only
    # Samples that pass a rank's network at once; a larger share of the batch passes in equal parts, whose gradients are
    # added up to the same step. None: batch_size_per_gpu, so that a run goes on with fewer GPUs of the same memory.
    micro_batch_size: int | None = Field(None, ge=1)
    num_workers: int = Field(8, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True  # on CUDA: the same numbers each time; false allows faster attention kernels
    log_every_steps: int = Field(10, ge=1)
    stall_after_s: float = Field(300.0, gt=0)  # without progress: then every rank writes down what it is doing
    examine: bool = True  # every node, before the first step of a run on several ranks or in a Slurm job
    lost_after_s: float = Field(120.0, gt=0)  # without a sign of life from a rank: then the others leave


class OptimConfig(Section):
    """AdamW and its schedules. Keys that end in _pct are fractions: 0.1 is 10 % of all steps."""

    epochs: float = Field(100, gt=0)
    total_steps: int | None = Field(None, ge=1)  # None: epochs x epoch length
    base_lr: float = Field(4e-3, gt=0)  # for the batch size of the scaling rule
    scaling_rule: Literal["sqrt_wrt_1024", "linear_wrt_256"] = "sqrt_wrt_1024"
    min_lr: float = Field(1e-6, ge=0)
    warmup_pct: Fraction = 0.1
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    clip_grad: float = Field(3.0, ge=0)  # 0: no clipping
    clip_grad_of: Literal["part", "parameter"] = "part"  # each part (backbone, heads) by itself as DINOv2, or as DINO
    freeze_last_layer_pct: Fraction = 0.01
    patch_embed_lr_mult: float = Field(0.2, ge=0)
    layerwise_decay: float = Field(0.9, gt=0, le=1)
    adamw_beta1: float = Field(0.9, ge=0, lt=1)
    adamw_beta2: float = Field(0.999, ge=0, lt=1)
    # Steps in a row without a finite loss and gradient before the run goes back to a checkpoint and leaves them out,
    # and how often it goes back to the same one before it ends.
    max_skipped_steps: int = Field(5, ge=1)
    max_roll_backs: int = Field(2, ge=0)
