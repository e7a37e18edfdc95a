"""Settings of the trainer: recipe groups `train` and `optim`, named as in DINOv2."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pathfm.config import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
ALL_OF_A_CLASS = -1


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
    # Of the forward and backward pass; weights and losses stay fp32. fp8: bf16, and linear layers of blocks in 8 bits.
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
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


class KnnConfig(Section):
    """The classifier that tells what features are worth."""

    nb_knn: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100, 200)  # DINOv2's evaluation
    temperature: float = Field(0.07, gt=0)  # DINO, arXiv 2104.14294, appendix F
    n_per_class_list: tuple[int, ...] = (-1,)  # labelled samples of each class; -1: all of them
    n_tries: int = Field(1, ge=1)  # drawings of a few samples for each class
    # below: speed only
    batch_size: int = Field(128, ge=1)  # tiles that pass a rank's network at once
    gather_on_cpu: bool = False  # the query's features lie in the host's memory, and neighbours are sought there

    @field_validator("nb_knn", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("n_per_class_list")
    @classmethod
    def _all_or_some(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if not numbers or any(number < 1 and number != ALL_OF_A_CLASS for number in numbers):
            raise ValueError(f"must hold numbers of samples per class, -1 meaning all of them, not {list(numbers)}")
        return numbers

    def ks(self, num_query: int) -> list[int]:
        """Those of `nb_knn` that there are enough query samples for."""
        return sorted({k for k in self.nb_knn if k <= num_query})

    def suffix(self, n_per_class: int) -> str:
        """Of the names of numbers: acc_20, and acc_20_5_per_class."""
        return "" if n_per_class == ALL_OF_A_CLASS else f"_{n_per_class}_per_class"


class EarlyStoppingConfig(Section):
    """When a run ends before its last step. The best step by `tracking` is kept in any case."""

    enable: bool = False
    tracking: str = "auc_20"  # a number of the teacher's: acc_K, balanced_acc_K, auc_K
    patience: int = Field(20, ge=1)  # tunings in a row without an improvement
    min_pct: Fraction = 0.3  # of all steps, before which no run ends

    @field_validator("tracking")
    @classmethod
    def _a_metric_of_tuning(cls, name: str) -> str:
        if not re.fullmatch(r"(acc|balanced_acc|auc)_[0-9]+(_[0-9]+_per_class)?", name):
            raise ValueError(f"must be acc_K, balanced_acc_K or auc_K with one of tune.knn.nb_knn, not '{name}'")
        return name


class GuardConfig(Section):
    """Against forgetting: what the teacher knew before the first step, by `early_stopping.tracking`."""

    max_drop: float | None = Field(None, ge=0, le=1)  # below the value at step 0; None: no guard, no tuning at step 0
    action: Literal["alarm", "stop"] = "alarm"


class TuneConfig(Section):
    """kNN classification of labelled tiles while a run trains. It changes nothing of what is trained."""

    query_dataset_path: str | None = None  # labelled samples, KNN:root=/data:split=query; without them nothing is tuned
    test_dataset_path: str | None = None  # samples that are classified by them
    tune_every_pct: float | None = Field(1.0, gt=0)  # of an epoch: 0.25 is four times in each; None: no tuning
    tune_every_samples: int | None = Field(None, ge=1)  # seen in training, in place of tune_every_pct
    online: bool = True  # False: another job tunes, 'launchers/evaluate.py --follow RUN'
    tile_size: int | None = Field(None, ge=1)  # px that tiles are scaled and cropped to; None: crops.global_crops_size
    num_workers: int = Field(4, ge=0)  # of each rank, only while it tunes
    bootstrap: int = Field(1000, ge=100)  # resamples of the test samples behind the 95 % intervals
    knn: KnnConfig = KnnConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    guard: GuardConfig = GuardConfig()

    @property
    def is_on(self) -> bool:
        """Whether there is something to tune on, in the run or beside it."""
        return bool(self.query_dataset_path and (self.tune_every_pct or self.tune_every_samples))

    @property
    def has_guard(self) -> bool:
        return self.guard.max_drop is not None

    @property
    def may_end_a_run(self) -> bool:
        """Before its last step."""
        return self.early_stopping.enable or (self.has_guard and self.guard.action == "stop")

    @model_validator(mode="after")
    def _both_or_neither(self) -> "TuneConfig":
        if bool(self.query_dataset_path) != bool(self.test_dataset_path):
            raise ValueError("tuning needs both tune.query_dataset_path and tune.test_dataset_path")
        wants_numbers = {
            "tune.early_stopping.enable": self.early_stopping.enable,
            "tune.guard.max_drop": self.has_guard,
        }
        if (asked := [key for key, wants in wants_numbers.items() if wants]) and not (self.is_on and self.online):
            raise ValueError(
                f"{asked[0]} needs tuning in the run: tune.query_dataset_path, tune.test_dataset_path, "
                "tune.tune_every_pct, and tune.online=true"
            )
        return self


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
    freeze_backbone_pct: Fraction = 0.0  # after a warm start: the heads learn first
    patch_embed_lr_mult: float = Field(0.2, ge=0)
    layerwise_decay: float = Field(0.9, gt=0, le=1)
    adamw_beta1: float = Field(0.9, ge=0, lt=1)
    adamw_beta2: float = Field(0.999, ge=0, lt=1)
    # Steps in a row without a finite loss and gradient before the run goes back to a checkpoint and leaves them out,
    # and how often it goes back to the same one before it ends.
    max_skipped_steps: int = Field(5, ge=1)
    max_roll_backs: int = Field(2, ge=0)
