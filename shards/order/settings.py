"""The settings of a sampler: the section `sampler` of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The sum of many stays a number.
Weight = Annotated[float, Field(ge=0, le=10**9)]


class FamilyWeights(BaseModel):
    """`alternating` only: how many of the steps serve each family of objectives."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    masked: Weight = 1.0
    matching: Weight = 1.0
    qa: Weight = 1.0

    @model_validator(mode="after")
    def _some_step(self) -> FamilyWeights:
        if not self.masked + self.matching + self.qa:
            raise ValueError("no family has a weight: there would be no step")
        return self


class SamplerSettings(BaseModel):
    """Every setting that changes the order, beside the run's seed; all are in the data state."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: Literal["natural", "balanced", "alternating"] = "natural"
    """natural: pairs as they come; balanced: exact shares of questions and of mismatched pairs;
    alternating: a step serves the masked objectives, matching or QA, as in UNITER
    (shards/order/modes)."""
    window: int = Field(0, ge=0, lt=2**31)
    """Shards per shuffle window; 0 = all, the exact global shuffle of the original."""
    mismatch: float = Field(0.5, ge=0, le=1)
    """The paper's probability that a pair gets another image's sentence. An exact share in
    `balanced` and in the matching steps of `alternating`."""
    question_share: float = Field(0.5, ge=0, le=1)
    """`balanced` only: the exact share of question pairs."""
    source_weights: dict[str, Weight] = {}
    """How often pairs of a source set come: {vqa: 2} twice as often as the others."""
    families: FamilyWeights = FamilyWeights()
    sentences_per_visit: int = Field(1, ge=1, lt=2**31)
    """Neighbouring pairs, most of one image, that come together: fewer features to read and send,
    less of a shuffle (`lxscale shards plan` says how much)."""
    share_vision: int = Field(1, ge=1, lt=2**31)
    """So many neighbouring pairs of one image have the same of its objects masked in the same way,
    so that the object-relationship encoder runs once for those of them that a micro-batch has. They
    come together with `sentences_per_visit` of as many, or a multiple."""
    lanes: int = Field(1, ge=1, le=1 << 16)
    """Parts of every window that are shuffled for themselves; a step takes from all in turn. A
    worker takes whole lanes where there are as many as workers, so that a node reads the shards of
    its own lanes only. 1: every node reads all. With 4 for each worker, a worker's slice of a step
    is an even one and a quarter at most, and a visit or two of each stream."""
    last_batch: Literal["wrap", "short"] = "wrap"
    """A batch at the end of an epoch goes on into the next one, or is short."""

    @model_validator(mode="after")
    def _shared_come_together(self) -> SamplerSettings:
        if self.sentences_per_visit % self.share_vision:
            raise ValueError(
                f"sampler.share_vision={self.share_vision} needs sampler.sentences_per_visit="
                f"{self.share_vision}, or a multiple: pairs share what they come with"
            )
        return self
