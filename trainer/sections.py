"""The sections of a run's configuration, and what every key means.

trainer/config.py reads them from YAML and the command line.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from model.objectives import OBJECTIVES
from model.objectives.base import FeatureLoss, LabelScope, LossSettings
from shards.dataset import DatasetSpec, Text
from shards.store.objects import local_path
from shards.store.places import bucket_and_key, expanded
from shards.urls import shown

_LONGEST = 255  # bytes of a file's name, on Linux

# No number below can be meant to be more; products of them stay within 64 bits, and times within
# what the system's clocks take.
_MANY = 2**31
_WEIGHT = 10**9
_LONG = 10**7


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _place(text: str) -> str:
    """A folder or URL, checked as far as that goes without asking for it. Configurations are stored
    and shown, so that they have no credentials in them."""
    if not text.strip() or "\0" in text:
        raise ValueError(f"{json.dumps(text)} is no path or URL")
    if (safe := shown(text)) != text:
        raise ValueError(
            f"{json.dumps(safe, ensure_ascii=False)} has a password or a query in it: credentials "
            "come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or the AWS files"
        )
    if text.startswith("s3://"):
        bucket_and_key(text, "list")
    local_path(text)
    return expanded(text)


Place = Annotated[str, AfterValidator(_place)]


class RunSection(Section):
    """Where the run lives. Everything it writes is under storage/name."""

    name: str = "lxmert"
    """The same name resumes the run from its newest whole checkpoint."""
    storage: Place = "runs"
    """A folder or an s3:// URL that every worker can write."""
    tensorboard: Place | None = None
    """Folder for TensorBoard events, written by rank 0; by default storage/name/tensorboard, in
    remote storage, too."""
    seed: int = Field(9595, ge=-(2**63), lt=2**63)
    """Of the initial weights, the order, the masks and dropout."""

    @field_validator("name")
    @classmethod
    def _below_the_storage(cls, name: str) -> str:
        parts = name.split("/")
        odd = any(p.strip() in ("", ".", "..") or len(p.encode()) > _LONGEST for p in parts)
        if odd or not name.isprintable():
            raise ValueError(
                f"{json.dumps(name)} is no folder under run.storage: give a name, or several with "
                f"/ between them, none of them empty, ., .. or of more than {_LONGEST} bytes"
            )
        return name


class DatasetSection(Section):
    """One of several data sets that are mixed."""

    url: Place
    weight: float | None = Field(None, ge=0, le=_WEIGHT)
    """Its share of the pairs, against the others' weights; give all of them one or none. Without,
    the sets come in proportion to their pairs."""


class LoaderSettings(Section):
    """How batches are made ahead of the step; a part of the section `data`."""

    loader_workers: int = Field(0, ge=0, lt=_MANY)
    """Processes that make batches ahead of the step, per training worker; 0 makes them in it."""
    loader_start: Literal["forkserver", "spawn", "fork"] = "forkserver"
    """How they start. forkserver: quick, small, and safe beside threads; spawn: slower, each
    imports all by itself; fork: quickest, but a copy of a process with threads."""
    prefetch: int = Field(2, ge=1, lt=_MANY)
    """Steps that each loader worker keeps ready."""
    fetch_threads: int = Field(8, ge=1, lt=_MANY)
    """Downloads at once, ahead of need, per training worker."""


# Tags of the forms of data.train; what begins so is not shown in the key of an error.
FORM = "form:"


def _form(train: Any) -> str | None:
    """Which form data.train has, so that errors are of that one alone; None: neither."""
    if isinstance(train, str):
        return f"{FORM}one"
    return f"{FORM}list" if isinstance(train, list | tuple) else None


class DataSection(LoaderSettings):
    train: Annotated[
        Annotated[Place, Tag(f"{FORM}one")]
        | Annotated[tuple[DatasetSection, ...], Tag(f"{FORM}list")],
        Discriminator(
            _form,
            custom_error_type="form",
            custom_error_message="a folder or s3:// URL is expected, or a list of {url, weight}",
        ),
    ]
    """Folder or s3:// URL of a data set built by `lxscale shards build`; or a list of {url,
    weight}, to mix several. Each goes through its own epochs."""
    validation: Place | None = None
    cache: Place | None = None
    """Node cache of remote shards and of merged tables; by default LXSCALE_CACHE or
    ~/.cache/lxscale."""
    cache_limit_gb: float | None = Field(None, gt=0, lt=_MANY)
    """GiB of remote shards that a node's cache may hold; by default no limit. It must hold two
    shuffle windows (`lxscale shards plan` says how much that is). Runs that
    share a cache need one limit, which holds what they use together."""
    text: Text = "all"
    """all: the words of all shards are merged into one file on every node, and a mismatched
    sentence is any other of its data set (about 110 bytes a pair of disk). window: words come and
    go with their shards, and it is any other of the shards that are read at the time."""
    on_error: Literal["fail", "skip"] = "fail"
    """A shard that cannot be had ends the run, or all workers pass over its pairs from the same
    step on; what was skipped is reported and kept in the checkpoint."""

    def specs(self) -> tuple[DatasetSpec, ...]:
        if isinstance(self.train, str):
            return (DatasetSpec(self.train),)
        return tuple(DatasetSpec(p.url, p.weight) for p in self.train)

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> DataSection:
        given = [p.weight is not None for p in self.specs()]
        if not given:
            raise ValueError("data.train lists no data set")
        if any(given) != all(given):
            raise ValueError("give every data set of data.train a weight, or none")
        return self


def weights_section() -> type[Section]:
    """A section with a weight for every objective of the table."""
    keys: dict[str, Any] = {name: (float, Field(1.0, ge=0, le=_WEIGHT)) for name in OBJECTIVES}
    return create_model("WeightsSection", __base__=Section, **keys)


if TYPE_CHECKING:
    WeightsSection = Section
else:
    WeightsSection = weights_section()


class ObjectiveSection(WeightsSection):
    """A weight for each objective of model/objectives, 1 by default; 0 leaves one out. Visual
    losses are means over the masked objects here, which equals the released code's mean over all
    objects times 1/0.15."""

    qa_from_epoch: float = Field(0.0, ge=0, lt=_MANY)
    """QA joins after so many epochs; the paper's schedule is 10 of 20."""
    token_mask: float = Field(0.15, ge=0, le=1)
    """Probability that a word is masked."""
    object_mask: float = Field(0.15, ge=0, le=1)
    """Probability that an object is masked."""
    label_scope: LabelScope = "masked"
    """Objects that carry the label losses: the masked ones (paper) or all (released code)."""
    feature_loss: FeatureLoss = "l2"
    """paper: L2; released code: SmoothL1."""

    def weights(self) -> dict[str, float]:
        """Name -> weight of every objective, in the table's order."""
        return {name: getattr(self, name) for name in OBJECTIVES}

    def losses(self) -> LossSettings:
        return LossSettings(self.label_scope, self.feature_loss)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    name: Literal["adamw", "bert_adam"] = "adamw"
    """bert_adam: the original's Adam, without bias correction."""
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    no_decay: tuple[str, ...] = ()
    """Parameters whose name contains one of these have no weight decay ("bias", "LayerNorm");
    the original decays everything."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with linearly rising rate; it then falls linearly to 0."""
    clip_norm: float = Field(1.0, ge=0)
    """Global gradient norm; 0 = no clipping."""


class TrainSection(Section):
    epochs: float | None = Field(None, gt=0, lt=_MANY)
    """Of the training set's pairs; give this or `steps`."""
    steps: int | None = Field(None, ge=0, lt=_MANY)
    global_batch: int = Field(256, ge=1, lt=_MANY)
    """Pairs per optimizer step over all workers, whatever their number."""
    accumulation: int = Field(1, ge=1, lt=_MANY)
    """Micro-batches per step and worker. Where cluster.workers is a range: with the most of them;
    fewer make more, none of them larger."""
    strict: int = Field(0, ge=0, lt=_MANY)
    """V > 0: bitwise the same training at every number of workers that divides V, on machines of
    one kind with the same cluster.cpus_per_worker. A step is V micro-batches, whatever the number
    of workers, and their gradients are summed exactly. In place of `accumulation`; ZeRO 0 to 2."""
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["optimizer", "parameters"] | None = None
    """What workers keep in host memory in place of the GPU's, and ZeRO moves there and back:
    masters and moments, which are then updated on the CPU (ZeRO 1 to 3), or weights, too (ZeRO
    3)."""
    activation_checkpointing: bool = False
    """Layers keep their inputs alone for the backward, which computes the rest again: a third more
    operations, for a fraction of the activations' memory. Results are bitwise the same."""
    compile: bool = False
    """On GPUs torch.compile makes the layers' code at the first step, in a minute. ZeRO 0 to 2."""
    max_skipped_updates: int = Field(5, ge=0, lt=_MANY)
    """A step whose loss or gradients are not finite makes no update. More of these in a row end the
    run, with an error that names their pairs and shards."""
    log_every: int = Field(10, ge=1, lt=_MANY)
    profile: int = Field(0, ge=0, lt=1000)
    """So many steps of each attempt are traced, after its first five: a file each beside the
    curves, for Perfetto or TensorBoard's profiler."""
    validate_every: int = Field(0, ge=0, lt=_MANY)
    """Steps between validations; 0 = only at the end."""
    validation_batch: int = Field(256, ge=1, lt=_MANY)
    init_from: Place | None = None
    """Initial weights; by default from scratch. Another run's folder or URL (or a checkpoint's
    manifest), a Hugging Face folder of an LXMERT, or a .pth (a released one, or any with a
    state_dict in it): every weight; a Hugging Face folder of an LxmertModel: all but the heads; one
    of a BERT: embeddings and language encoder. In fine-tuning heads that the task has not are left
    out, and begin at random where the source has not. Read where the run has no checkpoint yet, not
    needed later."""
    init_fresh: tuple[str, ...] = ()
    """Parts of the model that keep their random weights although `init_from` is given, by the
    beginning of their parameters' names ("answer_head", "lxmert.embeddings.word_embeddings"). The
    file may lack them, or have them in other sizes."""
    init_answers: Place | None = None
    """The answer table of `init_from`, a JSON list or LXMERT's all_ans.json, so that each answer of
    the data set begins with the weights that it has there, and a new one at random. Needed for
    files that do not have one; runs and folders that `checkpoint export` made do."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        return self

    @model_validator(mode="after")
    def _offload_by_stage(self) -> TrainSection:
        least = {None: 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"train.offload={self.offload} needs train.zero_stage {least} or more")
        return self

    @model_validator(mode="after")
    def _compile_by_stage(self) -> TrainSection:
        if self.compile and (self.zero_stage == 3 or self.strict):
            raise ValueError(
                "train.compile goes with train.zero_stage 0 to 2, without train.strict"
            )
        return self

    @model_validator(mode="after")
    def _strict_alone(self) -> TrainSection:
        if self.strict and self.zero_stage == 3:
            raise ValueError("train.strict goes with train.zero_stage 0, 1 and 2")
        if self.strict and self.offload:
            raise ValueError("train.strict goes without train.offload")
        if self.strict and self.accumulation > 1:
            raise ValueError(
                f"train.strict={self.strict} says how many micro-batches a step has: leave "
                "train.accumulation out"
            )
        return self

    @model_validator(mode="after")
    def _fresh_beside_something(self) -> TrainSection:
        if self.init_fresh and self.init_from is None:
            raise ValueError("train.init_fresh goes with train.init_from: without, all is fresh")
        if self.init_answers and self.init_from is None:
            raise ValueError(
                "train.init_answers goes with train.init_from: it is the table of that"
            )
        return self


class CheckpointSection(Section):
    every: int = Field(1000, ge=1, lt=_MANY)
    """Steps between checkpoints; one more is written at the end and on a clean stop."""
    every_minutes: float | None = Field(None, gt=0, le=_LONG)
    """Minutes from one checkpoint's begin to the next, beside `every`: what is due first counts."""
    keep: int = Field(3, ge=1, lt=_MANY)
    """Newest generations that are kept."""
    spool: int = Field(2, ge=1, lt=_MANY)
    """Checkpoints in host memory that wait for the store or are on their way there, at 12 bytes a
    parameter each over all workers. One that is due when there is no room is put off, and training
    goes on."""
    max_unsaved: int | None = Field(None, ge=1, lt=_MANY)
    """Steps that training goes on after a checkpoint that is due and not on the store yet, before
    the run ends; by default any number, within the next."""
    max_unsaved_minutes: float = Field(60, gt=0, le=_LONG)
    """Minutes that it does."""
    fast_every: int = Field(0, ge=0, lt=_MANY)
    """Steps between snapshots in the host memory of nodes, beside the checkpoints on the store: a
    crash costs at most so many steps. 0 makes none."""
    fast_folder: Place = "/dev/shm"
    """Where nodes keep them: a folder in memory (tmpfs) that outlives the workers."""
    resume_from: int | None = Field(None, ge=0, lt=_MANY)
    """Go on from the generation of this step and not from the newest one, once: a run that has gone
    on from it since goes on from its newest."""
    override_data_state: bool = False
    """Resume although the data set or an order-relevant setting differs from the checkpoint's."""
    override_settings: bool = False
    """Resume although the optimizer, the objectives, dropout or the number of heads differ."""


def _workers(given: Any) -> int | str:
    """A number of workers, or a range of them."""
    ends = re.fullmatch(r"(\d{1,10})(?:\.\.(\d{1,10}))?", str(given))
    if ends is None:
        raise ValueError(f"{json.dumps(given):.80} is no number of workers, and no range as 1..4")
    fewest, most = int(ends[1]), int(ends[2] or ends[1])
    if not 1 <= fewest <= most < _MANY:
        raise ValueError(f"{json.dumps(given)}: give at least 1 worker, and the fewest first")
    return str(given) if ends[2] else fewest


Workers = Annotated[int | str, PlainValidator(_workers)]


class ClusterSection(Section):
    workers: Workers = 1
    """Training processes. A number, or a range as 1..4: the run takes what room there is, grows
    with the cluster and shrinks with it. On a Ray of its own a number may be more than there are
    cores, which are shared then; a range takes what the machine has."""
    grow_after_s: float = Field(30, ge=0, le=_LONG)
    """Room for more workers of the range has to last so long, and the last start to be so long
    ago, before the run saves and takes it."""
    cpus_per_worker: float = Field(1, gt=0, lt=_MANY)
    """Cores that Ray reserves for a worker, and its threads."""
    gpus_per_worker: float = Field(0, ge=0, lt=_MANY)
    """0 trains on the CPU."""
    max_failures: int = Field(3, ge=-1, lt=_MANY)
    """Failures without a new generation in between after which the run ends; -1 = any number."""
    start_timeout_s: float = Field(60, gt=0, le=_LONG)
    """How long to wait for room for all workers, and for them to start. A run that finds no room
    ends with status 75."""
    stop_timeout_s: float = Field(60, gt=0, le=_LONG)
    """How long a stop (SIGTERM, SIGUSR1, Ctrl-C) may take, with the checkpoint that it saves."""
    hang_timeout_s: float = Field(15, gt=0, le=_LONG)
    """A step that takes longer than this and than ten median ones is a hang, and so is a worker
    that does not answer for so long: all workers are started again."""
    process_group_timeout_s: float = Field(360, gt=0, le=_LONG)
    """How long a collective may hang in a start, a validation or a save. Above
    LXSCALE_STORE_DEADLINE, as a worker that waits for the store is waited for."""

    @property
    def fewest(self) -> int:
        """Workers without which the run does not train."""
        return int(str(self.workers).partition("..")[0])

    @property
    def most(self) -> int:
        return int(str(self.workers).rpartition("..")[2])
