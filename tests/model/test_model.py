"""Our LXMERT against Hugging Face's, and what training relies on: sums, counts, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from model.batch import Batch
from model.config import ModelConfig
from model.interchange import config_to_huggingface
from model.lxmert import Lxmert, init_weights
from model.objectives import OBJECTIVES, objectives_of, target_counts
from model.objectives.base import Encoded, LossSettings, Objective, Result, classify

ALL = frozenset(OBJECTIVES)
CONFIG = ModelConfig(
    vocab_size=50,
    num_answers=11,
    hidden_size=24,
    num_heads=3,
    intermediate_size=40,
    language_layers=2,
    object_layers=2,
    cross_layers=2,
    max_positions=16,
    feature_dim=10,
    num_object_classes=7,
    num_attribute_classes=5,
)


def make_model(seed: int = 0) -> Lxmert:
    model = Lxmert(CONFIG)
    init_weights(model, seed)
    # Small random weights hide errors: make every part matter.
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def make_batch(pairs: int = 6, seed: int = 0, objects: int = 5, ragged: bool = False) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=g)

    images = max(pairs // 2, 1)
    length = 3 + integers(5, pairs)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    total = int(start[-1])
    count = torch.full((images,), objects)
    if ragged:
        count = 2 + integers(objects - 1, images)
    index = torch.arange(pairs) % images
    slot = torch.arange(objects)
    real = (slot < count[index, None]).flatten()
    position = (real & (torch.rand(pairs * objects, generator=g) < 0.4)).nonzero().squeeze(1)
    third = len(position) // 3
    lm = (torch.rand(total, generator=g) < 0.3).nonzero().squeeze(1)
    answers = (torch.rand(pairs, generator=g) < 0.6).nonzero().squeeze(1)
    features = torch.rand(images, objects, CONFIG.feature_dim, generator=g).half()
    features[slot >= count[:, None]] = 0
    return Batch(
        tokens=integers(CONFIG.vocab_size, total),
        token_start=start,
        features=features,
        boxes=torch.rand(images, objects, 4, generator=g),
        num_objects=count,
        image_index=index,
        lm_position=lm,
        lm_target=integers(CONFIG.vocab_size, len(lm)),
        object_position=position,
        zero_position=position[:third],
        swap_position=position[third : 2 * third],
        swap_features=torch.rand(third, CONFIG.feature_dim, generator=g).half(),
        matched=integers(2, pairs),
        answer_pair=answers,
        answer_target=integers(CONFIG.num_answers, len(answers)),
        pair_id=torch.arange(pairs),
        sentence_id=torch.arange(pairs),
        source=torch.zeros(pairs, dtype=torch.int64),
        offset=torch.arange(pairs),
        dataset=torch.zeros(pairs, dtype=torch.int64),
        object_label=integers(CONFIG.num_object_classes, images, objects),
        object_conf=torch.rand(images, objects, generator=g),
        attribute_label=integers(CONFIG.num_attribute_classes, images, objects),
        attribute_conf=torch.rand(images, objects, generator=g),
    )


def reference(model: Lxmert, **switches: bool) -> transformers.LxmertForPreTraining:
    """Hugging Face's model with our weights."""
    tree = config_to_huggingface(model) | switches
    config = transformers.LxmertConfig(**{k: v for k, v in tree.items() if k != "architectures"})
    theirs = transformers.LxmertForPreTraining(config).eval()
    # A task that is switched off has no head there; whatever it has gets our weights.
    assert not theirs.load_state_dict(model.state_dict(), strict=False).missing_keys
    return theirs


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as Hugging Face's model takes it: padded ids, masked features of every pair."""
    length = batch.token_start.diff()
    pairs, longest = len(length), int(length.max())
    ids = torch.zeros(pairs, longest, dtype=torch.int64)
    mask = torch.zeros(pairs, longest)
    for i in range(pairs):
        ids[i, : length[i]] = batch.tokens[batch.token_start[i] : batch.token_start[i + 1]]
        mask[i, : length[i]] = 1
    features = batch.features.float()[batch.image_index]
    flat = features.flatten(0, 1)
    flat[batch.zero_position] = 0
    flat[batch.swap_position] = batch.swap_features.float()
    objects = features.shape[1]
    real = (torch.arange(objects) < batch.num_objects[batch.image_index, None]).float()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "visual_feats": features,
        "visual_pos": batch.boxes[batch.image_index],
        "visual_attention_mask": real,
    }


def trunk_arguments(batch: Batch) -> tuple[torch.Tensor, ...]:
    """The batch as our trunk takes it from whoever pads."""
    i = padded(batch)
    return (
        i["input_ids"],
        i["attention_mask"].bool(),
        i["visual_feats"],
        i["visual_pos"],
        i["visual_attention_mask"].bool(),
    )


def token_places(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    length = batch.token_start.diff()
    row = torch.repeat_interleave(torch.arange(len(length)), length)
    return row, torch.arange(len(batch.tokens)) - batch.token_start[row]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_base_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = Lxmert(ModelConfig())
        count = {id(p): p.numel() for p in model.parameters()}
        assert sum(count.values()) == 228_051_752
        assert sum(p.numel() for p in model.lxmert.parameters()) == 207_936_768
        encoder = model.lxmert.encoder
        assert sum(p.numel() for p in encoder.layer[0].parameters()) == 7_087_872
        assert sum(p.numel() for p in encoder.x_layers[0].parameters()) == 16_539_648
        assert sum(p.numel() for p in encoder.visn_fc.parameters()) == 1_580_544


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_outputs_agree_with_hugging_face(ragged: bool) -> None:
    model = make_model().eval()
    batch = make_batch(ragged=ragged)
    with torch.no_grad():
        logits = model.decode(model.encode(batch, LossSettings("all")), ALL)
        trunk = model.lxmert(*trunk_arguments(batch))
        theirs = reference(model)(**padded(batch))
        hidden = reference(model).lxmert(**padded(batch))
    real = padded(batch)["visual_attention_mask"].bool()
    r, c = token_places(batch)
    close(trunk.language[r, c], hidden.language_output[r, c])
    close(trunk.vision[real], hidden.vision_output[real])
    close(trunk.pooled, hidden.pooled_output)
    places = batch.lm_position
    close(logits["masked_lm"], theirs.prediction_logits[r[places], c[places]])
    close(logits["matching"], theirs.cross_relationship_score)
    close(logits["qa"], theirs.question_answering_score[batch.answer_pair])
    with torch.no_grad():
        heads = reference(model).obj_predict_head(hidden.vision_output)
    close(logits["masked_object"], heads["obj"][real])
    close(logits["masked_attribute"], heads["attr"][real])
    close(logits["masked_feature"], heads["feat"].flatten(0, 1)[batch.object_position])


def losses(model: Lxmert, batch: Batch, *names: str, **settings: str) -> dict:
    with torch.no_grad():
        out = model(batch, frozenset(names), LossSettings(**settings))
    return {n: float(out.loss_sum[n]) / max(out.count[n], 1) for n in names}


def test_losses_agree_with_hugging_face_where_defined_alike() -> None:
    model = make_model().eval()
    batch = make_batch()
    inputs = padded(batch)
    r, c = token_places(batch)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[r[batch.lm_position], c[batch.lm_position]] = batch.lm_target
    ours = losses(model, batch, "masked_lm", "matching")
    off = {
        "task_matched": False,
        "task_mask_lm": False,
        "task_obj_predict": False,
        "task_qa": False,
    }
    with torch.no_grad():
        lm = reference(model, **off | {"task_mask_lm": True})(**inputs, labels=labels).loss
        matching = reference(model, **off | {"task_matched": True})(
            **inputs, matched_label=batch.matched
        ).loss
    assert ours["masked_lm"] == pytest.approx(float(lm), rel=1e-5)
    assert ours["matching"] == pytest.approx(float(matching), rel=1e-5)
    # QA: theirs is a mean over all pairs (no pair is without an answer there).
    answered = replace(
        batch,
        answer_pair=torch.arange(6),
        answer_target=torch.arange(6),
    )
    with torch.no_grad():
        qa = reference(model, **off | {"task_qa": True})(**inputs, ans=torch.arange(6)).loss
    assert losses(model, answered, "qa")["qa"] == pytest.approx(float(qa), rel=1e-5)


def test_visual_losses_differ_from_hugging_face_as_stated() -> None:
    """Theirs: SmoothL1 or cross-entropy over ALL objects, weighted by one confidence, mean, times
    6.67. Ours: the objects in scope, each label with its own confidence, a mean over the scope."""
    model = make_model().eval()
    batch = make_batch()
    inputs = padded(batch)
    objects = batch.features.shape[1]
    chosen = torch.zeros(6 * objects)
    chosen[batch.object_position] = 1
    shape = (6, objects)
    labels = {
        "feat": (batch.features.float()[batch.image_index], chosen.view(shape)),
        "obj": (batch.object_label[batch.image_index], batch.object_conf[batch.image_index]),
        "attr": (batch.attribute_label[batch.image_index], batch.attribute_conf[batch.image_index]),
    }
    off = {"task_matched": False, "task_mask_lm": False, "task_qa": False}
    only = {f"visual_{k}_loss": False for k in labels}
    for theirs, ours in (
        ("feat", "masked_feature"),
        ("obj", "masked_object"),
        ("attr", "masked_attribute"),
    ):
        hf = reference(model, **off, **only | {f"visual_{theirs}_loss": True})
        with torch.no_grad():
            total = float(hf(**inputs, obj_labels=labels).loss)
        value = losses(model, batch, ours, label_scope="all", feature_loss="smooth_l1")[ours]
        if ours == "masked_feature":
            value *= len(batch.object_position) / (6 * objects)
        assert value * 6.67 == pytest.approx(total, rel=1e-5), ours


def test_only_masked_objects_carry_label_losses_in_the_masked_scope() -> None:
    model = make_model().eval()
    batch = make_batch()
    with torch.no_grad():
        logits = model.decode(model.encode(batch), ALL)
    target = batch.object_label[batch.image_index].flatten()[batch.object_position]
    weight = batch.object_conf[batch.image_index].flatten()[batch.object_position]
    expected = (F.cross_entropy(logits["masked_object"], target, reduction="none") * weight).mean()
    found = losses(model, batch, "masked_object", label_scope="masked")["masked_object"]
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_sums_over_parts_are_the_sum_over_the_whole() -> None:
    """What makes the loss independent of the world size."""
    model = make_model().eval()
    whole, names = make_batch(pairs=2, seed=4), sorted(ALL)
    parts = [cut(whole, i) for i in range(2)]
    with torch.no_grad():
        one = model(whole)
        two = [model(p) for p in parts]
    for n in names:
        known = target_counts(whole, LossSettings())[n]
        assert sum(o.count[n] for o in two) == one.count[n] == known
        close(sum(o.loss_sum[n] for o in two), one.loss_sum[n])


def cut(batch: Batch, i: int) -> Batch:
    """Pair i of a batch of two pairs of one image."""
    objects = batch.features.shape[1]
    begin, end = int(batch.token_start[i]), int(batch.token_start[i + 1])
    lm = (batch.lm_position >= begin) & (batch.lm_position < end)
    answered = batch.answer_pair == i

    def here(position: torch.Tensor) -> torch.Tensor:
        return position // objects == i

    return replace(
        batch,
        tokens=batch.tokens[begin:end],
        token_start=batch.token_start[i : i + 2] - begin,
        image_index=batch.image_index[i : i + 1],
        lm_position=batch.lm_position[lm] - begin,
        lm_target=batch.lm_target[lm],
        object_position=batch.object_position[here(batch.object_position)] - i * objects,
        zero_position=batch.zero_position[here(batch.zero_position)] - i * objects,
        swap_position=batch.swap_position[here(batch.swap_position)] - i * objects,
        swap_features=batch.swap_features[here(batch.swap_position)],
        matched=batch.matched[i : i + 1],
        answer_pair=batch.answer_pair[answered] - i,
        answer_target=batch.answer_target[answered],
    )


def empty_batch() -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    whole = make_batch()
    return replace(
        whole,
        tokens=none,
        token_start=torch.zeros(1, dtype=torch.int64),
        features=whole.features[:0],
        boxes=whole.boxes[:0],
        num_objects=none,
        image_index=none,
        lm_position=none,
        lm_target=none,
        object_position=none,
        zero_position=none,
        swap_position=none,
        swap_features=whole.swap_features[:0],
        matched=none,
        answer_pair=none,
        answer_target=none,
        object_label=whole.object_label[:0],
        object_conf=whole.object_conf[:0],
        attribute_label=whole.attribute_label[:0],
        attribute_conf=whole.attribute_conf[:0],
    )


@pytest.mark.parametrize("objectives", [ALL, {"qa"}, {"matching"}, {"masked_lm"}])
@pytest.mark.parametrize("pairs", [0, 6])
def test_every_parameter_gets_a_gradient(objectives: set[str], pairs: int) -> None:
    """ZeRO and DDP wait for all of them on every rank, also where a slice is empty."""
    model = make_model()
    batch = make_batch() if pairs else empty_batch()
    out = model(batch, frozenset(objectives))
    sum(out.loss_sum.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        if not pairs:
            assert not p.grad.any(), name


def test_padding_of_objects_and_tokens_changes_nothing() -> None:
    model = make_model().eval()
    batch = make_batch(pairs=1, objects=4)
    wide = replace(
        batch,
        features=F.pad(batch.features, (0, 0, 0, 3), value=9.0),
        boxes=F.pad(batch.boxes, (0, 0, 0, 3), value=0.5),
    )
    with torch.no_grad():
        narrow, padded_out = (
            model.encode(
                replace(
                    shown,
                    zero_position=batch.zero_position[:0],
                    swap_position=batch.swap_position[:0],
                    swap_features=batch.swap_features[:0],
                ),
                LossSettings("all"),
            )
            for shown in (batch, wide)
        )
    close(padded_out.pooled, narrow.pooled)
    close(padded_out.objects, narrow.objects)


def test_attention_weights_on_request_do_not_change_the_outputs() -> None:
    model = make_model().eval()
    arguments = trunk_arguments(make_batch(ragged=True))
    with torch.no_grad():
        plain = model.lxmert(*arguments)
        shown = model.lxmert(*arguments, return_attention=True)
    close(plain.pooled, shown.pooled)
    assert plain.attentions is None and shown.attentions is not None
    assert len(shown.attentions) == 2 + 2 + 4 * 2
    for weights in shown.attentions:
        summed = weights.sum(-1)  # 0 where a query is padded
        close(summed, (summed > 0.5).to(summed.dtype))
        assert (summed > 0.5).any(-1).all()


def test_the_batch_is_not_changed_by_the_forward() -> None:
    model, batch = make_model().eval(), make_batch()
    before = batch.features.clone()
    model(batch)
    assert torch.equal(batch.features, before)


def test_initial_weights_depend_on_the_seed_and_the_name_only() -> None:
    a, b = Lxmert(CONFIG), Lxmert(CONFIG)
    init_weights(a, 1)
    torch.manual_seed(99)
    init_weights(b, 1)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name
    init_weights(b, 2)
    assert not torch.equal(a.answer_head.logit_fc[0].weight, b.answer_head.logit_fc[0].weight)
    assert float(a.lxmert.encoder.visn_fc.visn_fc.weight.detach().std()) == pytest.approx(
        0.02, rel=0.3
    )


def test_the_table_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective that is added to it is counted, computed and predicted, with no other change."""

    def loss(logits: torch.Tensor, encoded: Encoded) -> Result:
        return classify(logits, (encoded.batch.token_start.diff() > 5).long())

    long = Objective(
        "long_sentence",
        "matching",
        "cls.seq_relationship",
        rows=lambda encoded: encoded.pooled,
        count=lambda batch, settings: batch.pairs,
        loss=loss,
    )
    model, batch = make_model().eval(), make_batch()
    before = model(batch)
    monkeypatch.setitem(OBJECTIVES, long.name, long)
    assert objectives_of("matching") == ["matching", "long_sentence"]
    assert objectives_of("all") == [*before.loss_sum, "long_sentence"]
    assert target_counts(batch, LossSettings())["long_sentence"] == 6
    out = model(batch)
    assert list(out.loss_sum) == [*before.loss_sum, "long_sentence"]
    assert out.count["long_sentence"] == 6 and torch.isfinite(out.loss_sum["long_sentence"])
    hits = (out.prediction["long_sentence"] == (batch.token_start.diff() > 5)).sum()
    assert out.correct["long_sentence"] == hits
    for name, value in before.loss_sum.items():
        assert torch.equal(out.loss_sum[name], value), name
    assert list(model(batch, frozenset({"long_sentence"})).loss_sum) == ["long_sentence"]


@pytest.mark.parametrize("scope", ["masked", "all"])
def test_counts_are_the_rows_of_the_heads(scope: str) -> None:
    model, batch, settings = make_model(), make_batch(ragged=True), LossSettings(scope)
    assert batch.num_objects.min() < batch.features.shape[1]
    logits = model.decode(model.encode(batch, settings), ALL)
    rows = {name: len(values) for name, values in logits.items()}
    assert rows == target_counts(batch, settings) == model(batch, settings=settings).count
    assert all(
        len(p) == rows[name] for name, p in model(batch, settings=settings).prediction.items()
    )


def test_objectives_are_ordered_and_grouped() -> None:
    masked = ["masked_lm", "masked_feature", "masked_object", "masked_attribute"]
    assert list(OBJECTIVES) == objectives_of("all") == [*masked, "matching", "qa"]
    assert objectives_of("masked") == masked
    assert objectives_of("matching") == ["matching"] and objectives_of("qa") == ["qa"]
    assert all(o.name == name for name, o in OBJECTIVES.items())
    assert set(make_model()(make_batch()).correct) == ALL - {"masked_feature"}
