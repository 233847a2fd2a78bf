"""The page of `lxscale show`: its numbers against the model's own, and in a real browser."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cluster.cli.main import main
from model.errors import ModelError
from model.stored import decoded
from shards.dataset import open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.features import FeatureType
from shards.format.manifest import load_manifest
from shards.format.record import ImageRecord, Labels, Picture, Sentence
from shards.inspect.records import open_set
from tests.browser import Dom, open_browser
from tests.ranks import config_tree
from tests.trainer.checkpoint.test_checkpoint import RUN, START
from trainer.checkpoint.format import KINDS, CheckpointManifest, Span
from trainer.checkpoint.journal import Journal, StepLine
from trainer.checkpoint.owner import Claimant, claim
from trainer.checkpoint.saver import Snapshot, write_object
from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.kinds import answer_type, kind_of
from trainer.model import build_model, load_checkpoint
from trainer.setup import resolve_model
from trainer.show import show as show_module
from trainer.show.look import Heads, Masks, Sight, Viewer, heads_of, layers_of, look
from trainer.show.show import Settings, show
from trainer.tasks import TASKS

EVIL = "</script><img src=x onerror=document.title='owned'>"
WORDS = ["red", "green", "what", "color", "is", "it", "how", "many", "?", "<", ">", "/", "img"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
MAX_TOKENS, CLASSES = 10, 12


def records(labels: bool = True) -> list[ImageRecord]:
    """Images of 1 to 6 objects, with two questions each and a caption."""
    rng = np.random.default_rng(7)
    found = []
    for i in range(8):
        n = 1 + i % 6
        sentences = (
            Sentence(" ".join(rng.choice(WORDS[:8], size=14 if i == 2 else 5)), "coco_cap"),
            Sentence("what color is it?", "vqa", {"red": 1.0, "rare": 0.3}, f"q{i}"),
            Sentence("how many is it?", "vqa", {"2": 1.0} if i % 2 else {"rare": 1.0}, i, "count"),
        )
        zero = np.zeros(n, np.int32)
        found.append(
            ImageRecord(
                image=f"img_{i}",
                width=640,
                height=480,
                boxes=np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32),
                features=rng.normal(size=(n, 6)).astype(np.float32),
                sentences=sentences,
                labels=Labels(
                    zero + i, rng.random(n, np.float32), zero + 1, rng.random(n, np.float32)
                )
                if labels
                else None,
            )
        )
    evil = Sentence(f"is it {EVIL}?", "vqa", {EVIL: 0.5, "red": 0.1}, EVIL)
    found[5] = replace(found[5], image=f"img {EVIL}", sentences=(evil, *found[5].sentences))
    return found


def build_set(folder: Path, made: list[ImageRecord], **settings: Any) -> Path:
    if settings.get("feature_type", "fp16") == "fp16":
        made = [replace(r, features=r.features.astype(np.float16)) for r in made]
    base = BuildSettings(
        "made",
        "random",
        vocab=VOCAB,
        answers=["red", "2", "yes", "no", EVIL.lower(), "blue"],
        images_per_shard=3,
        max_tokens=MAX_TOKENS,
        skip_bad=True,
        num_object_classes=CLASSES,
        num_attribute_classes=CLASSES,
    )
    build(made, folder, replace(base, **settings))
    return folder


def pair_records() -> list[ImageRecord]:
    """Records of two images with 1 and 2, 3 and 4, or 5 and 6 objects, and two statements each, the
    last without a label."""
    single, out = records(), []
    for i, (a, b) in enumerate(zip(single[0:6:2], single[1:6:2], strict=True)):
        assert a.labels and b.labels
        joined = [np.concatenate(x) for x in zip(*(vars(r.labels).values() for r in (a, b)),
                                                 strict=True)]  # fmt: skip
        statements = (
            Sentence("red is green", "nlvr2", {["True", "False"][i % 2]: 1.0}, f"dev-{i}-0-0"),
            Sentence("it is red", "nlvr2", None if i == 2 else {"True": 1.0}, f"dev-{i}-0-1"),
        )
        out.append(
            replace(
                a,
                image=f"dev-{i}-0",
                boxes=np.concatenate([a.boxes, b.boxes]),
                features=np.concatenate([a.features, b.features]),
                labels=Labels(*joined),
                sentences=statements,
                sides=np.repeat(np.arange(2, dtype=np.uint8), [len(a.boxes), len(b.boxes)]),
                pictures=(Picture(f"dev-{i}-0-img0", 640, 480), Picture(f"dev-{i}-0-img1", 64, 48)),
            )
        )
    return out


def write_run(folder: Path, data: Path, task: str = "pretrain", **trained: float) -> Path:
    """A run with one checkpoint of random weights, whose objectives are `trained`."""
    sizes = {
        "language_layers": 2,
        "cross_layers": 2,
        "initializer_range": 0.4,
        "max_positions": 16,
    }
    tree = config_tree(data, folder, "run", model=sizes)
    config = parse_config({"task": task, **tree}, "test")
    opened = open_dataset(str(data), folder / "cache")
    config = config.model_copy(update={"model": resolve_model(config, opened)})
    model = build_model(config.model, 3, TASKS[task].objectives)
    weights = dict(model.named_parameters())
    flat = np.concatenate([w.detach().numpy().reshape(-1) for w in weights.values()])
    spans = tuple(Span(name, 0, w.numel()) for name, w in weights.items())
    manifest = load_manifest(str(data))
    with contextlib.closing(claim(str(folder / "run"), Claimant())) as owner:
        snapshot = Snapshot(spans, dict.fromkeys(KINDS, flat))
        journal = Journal((), {}, (), START)
        journal.add(StepLine(1, 1, 2, 0), START)
        described = replace(
            RUN,
            parameters={name: list(w.shape) for name, w in weights.items()},
            config=config.model_dump(mode="json"),
            objectives=trained,
            vocab_sha256=manifest.vocab.sha256,
            answers_sha256=manifest.answers.sha256,
        )
        owner.commit(
            CheckpointManifest(
                **vars(described),
                sampler=START,
                step=1,
                attempt=owner.attempt,
                objects=(write_object(owner.run_url, 1, owner.attempt, 0, snapshot),),
                journal=journal.write(owner.run_url, owner.attempt, 1),
            ),
            1,
        )
    return folder / "run"


ALL = dict.fromkeys(("masked_lm", "masked_object", "masked_attribute", "matching", "qa"), 1.0)


@dataclass(frozen=True)
class Made:
    root: Path
    data: Path
    run: Path

    def page(self, name: str = "page.html", **settings: Any) -> Path:
        path = self.root / name
        show(str(self.run), str(self.data), Settings(path, **settings), self.root / "cache")
        return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is quickest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("show")
    data = build_set(root / "data", records(), feature_type="fp32")
    return Made(root, data, write_run(root, data, **ALL))


@pytest.fixture(scope="module")
def page(made: Made) -> Path:
    folder = made.root / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 48), (200, 9, 9)).save(folder / "img_1.jpg")
    (folder / "img_2.png").write_bytes(b"no picture")
    names = made.root / "names"
    names.write_text("".join(f"thing{i}\n" for i in range(5)) + f"{EVIL}\n")
    return made.page(images=0, sentences=0, pictures=folder, objects=names)


# --- what is in the file ------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """An image of a page."""

    header: dict[str, Any]
    body: bytes

    def map(self, where: list[int]) -> NDArray[np.float64]:
        """Attention weights (heads, queries, keys)."""
        at, *shape = where
        raw = np.frombuffer(self.body, np.uint8, int(np.prod(shape)), at).reshape(shape)
        found: NDArray[np.float64] = (raw / 255) ** 2
        return found


def contents(path: Path) -> tuple[dict[str, Any], list[Block]]:
    """The index and the images of a page, read by other means than the page's."""
    found = re.findall(
        r'<script type="text/plain" class="(\w+)">([A-Za-z0-9+/=]*)</script>', path.read_text()
    )
    unpacked = [(kind, zlib.decompress(base64.b64decode(data))) for kind, data in found]
    blocks = []
    for kind, data in unpacked:
        if kind == "image":
            size = int.from_bytes(data[:4], "little")
            blocks.append(Block(json.loads(data[4 : 4 + size]), data[4 + size :]))
    (index,) = [json.loads(data) for kind, data in unpacked if kind == "index"]
    return index, blocks


@dataclass(frozen=True)
class Direct:
    """A pair as the model's own forward has it."""

    model: nn.Module
    ids: Tensor
    features: Tensor
    boxes: Tensor

    def forward(self, words: tuple[int, ...] = (), objects: tuple[int, ...] = ()) -> Any:
        """With these masked."""
        ids, features = self.ids.clone(), self.features.clone()
        ids[0, list(words)] = VOCAB.index("[MASK]")
        features[0, list(objects)] = 0
        with torch.no_grad():
            trunk = self.model.get_submodule("lxmert")
            return trunk(ids, None, features, self.boxes, return_attention=True)

    def chances(self, head: str, hidden: Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            out: Tensor = self.model.get_submodule(head)(hidden).softmax(-1)
        return out.numpy()


def direct(made: Made, model: nn.Module, place: str, number: int) -> Direct:
    shard, index = map(int, place.split(":"))
    data = open_dataset(str(made.data), made.root / "cache")
    image = int(data.index.shard_image[shard]) + index
    pair = int(data.index.image_pair[image]) + number
    n, schema = int(data.index.image_objects[image]), data.manifest.schema
    dtype = {"fp16": np.float16, "fp32": np.float32, "uint8": np.uint8}[schema.feature_type]
    stored = np.zeros((1, n, schema.stored_width), dtype)
    data.gather_images(np.asarray([image]), np.asarray([shard]), stored)
    record = open_set(str(made.data), made.root / "cache")
    boxes = record.record(shard, record.table(shard), index).boxes
    words = data.index.tokens[data.index.token_start[pair] : data.index.token_start[pair + 1]]
    ids = [VOCAB.index("[CLS]"), *words.tolist(), VOCAB.index("[SEP]")]
    features = decoded(torch.from_numpy(stored[0]), torch.float32)[None]
    return Direct(model, torch.tensor([ids]), features, torch.from_numpy(boxes.copy())[None])


def is_top(said: list[list[Any]], names: list[str], chances: NDArray[np.float32]) -> None:
    order = np.argsort(-chances)[: len(said)]
    assert [name for name, _ in said] == [names[i] for i in order]
    assert [p for _, p in said] == pytest.approx(chances[order].tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "uint8"])
def test_numbers_are_those_of_the_model(made: Made, page: Path, kind: FeatureType) -> None:
    if kind != "fp32":
        data = build_set(made.root / kind, records(), feature_type=kind)
        made = replace(made, data=data)
        page = made.page(f"{kind}.html", pairs=("img_0#", "img_2#", "img_4#1"))
    index, blocks = contents(page)
    assert index["heads"] == vars(Heads(True, False, True, True, True))
    answers = ["red", "2", "yes", "no", EVIL.lower(), "blue"]
    names = [f"thing{i}" for i in range(5)] + [EVIL] if kind == "fp32" else []
    objects = names + [f"#{i}" for i in range(len(names), CLASSES)]
    model = load_checkpoint(str(made.run))[0].eval()
    seen = 0
    for example in index["examples"]:
        if kind == "fp32" and example["image"] not in (0, 2, 5):
            continue
        block = blocks[example["image"]]
        told = block.header["sentences"][example["sentence"]]
        real = direct(made, model, block.header["place"], example["number"])
        out = real.forward()
        assert told["tokens"] == [VOCAB[i] for i in real.ids[0].tolist()]
        (maps,), (of_image,) = (map(iter, x["maps"]) for x in (told, block.header))
        for layer, weights in zip(index["layers"], out.attentions, strict=True):
            found = block.map(next(of_image if layer["of_image"] else maps))
            np.testing.assert_allclose(found, weights[0].numpy(), atol=0.004)
        assert next(maps, None) is None and next(of_image, None) is None
        is_top(told["answers"], answers, real.chances("answer_head", out.pooled)[0])
        matching = real.chances("cls.seq_relationship", out.pooled)[0, 1]
        assert told["matching"] == example["matching"] == pytest.approx(matching, abs=1e-4)

        masked = told["masked"]
        words, places = tuple(masked["words"]), tuple(masked["objects"])
        assert words and min(words) > 0 and max(words) < len(told["tokens"]) - 1 and places
        out = real.forward(words, places)
        for says, row in zip(
            masked["says"],
            real.chances("cls.predictions", out.language[0, list(words)]),
            strict=True,
        ):
            is_top(says, VOCAB, row)
        hidden = real.model.get_submodule("obj_predict_head.transform")(out.vision[0, list(places)])
        for says, row in zip(
            masked["object"], real.chances("obj_predict_head.decoder_dict.obj", hidden), strict=True
        ):
            is_top(says, objects, row)
        for says, row in zip(
            masked["attribute"],
            real.chances("obj_predict_head.decoder_dict.attr", hidden),
            strict=True,
        ):
            is_top(says, [f"#{i}" for i in range(CLASSES)], row)
        seen += 1
    assert seen == (10 if kind == "fp32" else 7)


def test_a_list_says_what_is_asked_and_right(page: Path) -> None:
    index, blocks = contents(page)
    assert len(index["examples"]) == 25 and len(blocks) == 8
    for e in index["examples"]:
        block = blocks[e["image"]]
        assert e["objects"] == len(block.header["boxes"]) == block.header["parts"][0]["objects"]
        if e["source"] == "coco_cap":
            assert (e["kind"], e["type"], e["answer"], e["score"]) == ("coco_cap", None, None, None)
            continue
        best = block.header["sentences"][e["sentence"]]["answers"][0][0]
        assert e["answer"] == best
        truth = {answer: score for answer, score, known in e["truth"] if known}
        assert e["score"] == (pytest.approx(truth.get(best, 0.0)) if truth else None)
    by_id = {e["id"]: e for e in index["examples"] if e["id"] is not None}
    assert by_id["q1"]["kind"] == "what color" and by_id["q1"]["type"] == "other"
    assert by_id[1]["kind"] == "count" and by_id[1]["type"] == "number"
    assert by_id[0]["truth"] == [["rare", 1.0, None]] and by_id[0]["score"] is None
    cut = [s["cut"] for s in blocks[2].header["sentences"]]
    assert cut == [True, False, False]
    assert len(blocks[2].header["sentences"][0]["tokens"]) == MAX_TOKENS
    pictures = [b.header["parts"][0]["picture"][1] for b in blocks]
    assert [i for i, size in enumerate(pictures) if size] == [1]
    at = blocks[1].header["parts"][0]["picture"][0]
    assert blocks[1].body[at : at + 2] == b"\xff\xd8"


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Is there a dog?", {"no": 0.3, "yes": 0.9}, ("is there", "yes/no")),
        ("How many, then?", {"two": 1.0}, ("how many", "number")),
        ("Where", {"1st base": 1.0}, ("where", "other")),
        ("?!", None, ("(no words)", None)),
    ],
)
def test_kinds(text: str, answers: dict[str, float], expected: tuple[str, str | None]) -> None:
    assert (kind_of(None, text), answer_type(answers)) == expected


# --- two images a record ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("paired")
    answers = ["false", "true"]
    data = build_set(root / "data", pair_records(), answers=answers, feature_type="fp32")
    return Made(root, data, write_run(root, data, "nlvr2", statement=1.0))


@pytest.fixture(scope="module")
def paired_page(paired: Made) -> Path:
    folder = paired.root / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 48), (200, 9, 9)).save(folder / "dev-1-0-img1.jpg")
    return paired.page(images=0, sentences=0, pictures=folder)


def test_statements_are_seen_with_one_picture_and_the_other(
    paired: Made, paired_page: Path
) -> None:
    index, blocks = contents(paired_page)
    assert index["heads"] == vars(Heads(True, False, False, False, False))
    assert len(index["examples"]) == 6 and len(blocks) == 3
    model = load_checkpoint(str(paired.run))[0].eval()
    for example in index["examples"]:
        header, i = blocks[example["image"]].header, example["image"]
        told, parts = header["sentences"][example["sentence"]], header["parts"]
        assert [p["image"] for p in parts] == [f"dev-{i}-0-img0", f"dev-{i}-0-img1"]
        assert [(p["width"], p["height"]) for p in parts] == [(640, 480), (64, 48)]
        assert [(p["first"], p["objects"]) for p in parts] == [
            (0, 2 * i + 1),
            (2 * i + 1, 2 * i + 2),
        ]
        whole, pooled = direct(paired, model, header["place"], example["number"]), []
        assert example["objects"] == whole.boxes.shape[1] == 4 * i + 3
        for n, some in enumerate((slice(0, 2 * i + 1), slice(2 * i + 1, None))):
            part = replace(whole, features=whole.features[:, some], boxes=whole.boxes[:, some])
            out = part.forward()
            pooled.append(out.pooled)
            maps, of_image = (iter(x["maps"][n]) for x in (told, header))
            for layer, weights in zip(index["layers"], out.attentions, strict=True):
                found = blocks[i].map(next(of_image if layer["of_image"] else maps))
                np.testing.assert_allclose(found, weights[0].numpy(), atol=0.004)
        chances = whole.chances("pair_head", torch.cat(pooled, 1))[0]
        is_top(told["answers"], ["false", "true"], chances)
        best = ["false", "true"][int(chances.argmax())]
        assert example["answer"] == best and example["matching"] is None
        truth = pair_records()[i].sentences[example["number"]].answers
        due = None if truth is None else float(truth.get(best.capitalize(), 0.0))
        assert example["score"] == due and told["masked"]["says"] is None
    sizes = [[p["picture"][1] > 0 for p in b.header["parts"]] for b in blocks]
    assert sizes == [[False, False], [False, True], [False, False]]


def test_records_of_as_many_images_as_the_tasks(made: Made, paired: Made) -> None:
    with pytest.raises(ConfigError, match="task nlvr2 is about two images a record, and those"):
        replace(paired, data=made.data).page("never.html")
    with pytest.raises(ConfigError, match="task pretrain is about one image a record, and those"):
        replace(made, data=paired.data).page("never.html")


# --- which pairs --------------------------------------------------------------------------------


def pairs_of(path: Path) -> list[tuple[str, int]]:
    index, blocks = contents(path)
    return [(blocks[e["image"]].header["place"], e["number"]) for e in index["examples"]]


def test_pairs_that_are_drawn(made: Made) -> None:
    few = pairs_of(made.page("few.html", images=4, sentences=2, seed=1))
    assert len(few) == 8 and len({place for place, _ in few}) == 4
    # Questions come before captions, which are number 0, or 1 behind the other question.
    assert all(number != 0 or place == "1:2" for place, number in few)
    assert few == pairs_of(made.page("again.html", images=4, sentences=2, seed=1))
    assert few != pairs_of(made.page("other.html", images=4, sentences=2, seed=2))


def test_pairs_that_are_named(made: Made, page: Path) -> None:
    named = made.page("named.html", pairs=("q4", "2:0#0", "1", "img_1#", "q1"))
    expected = [("2:0", 0), ("0:1", 0), ("0:1", 1), ("0:1", 2), ("1:1", 1)]
    assert pairs_of(named) == expected
    # What is masked depends on the pair alone.
    found, every = contents(named), contents(page)
    one = found[1][1].header["sentences"][1]["masked"]["words"]
    assert one == every[1][1].header["sentences"][1]["masked"]["words"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("q1", "q9", "q77"), "has no question 'q9', 'q77': give ids of questions, or IMAGE#N"),
        (("img_1#3",), r"'img_1#3' is no pair of .*: sentences of 'img_1' are img_1#0 to #2"),
        (("img_1#-1",), "'img_1#-1' is no pair"),
        (("img_99#0",), "has no record 'img_99': the nearest keys are img_"),
        (("7:0#",), "has no shard 7"),
    ],
)
def test_ids_that_there_are_not(made: Made, ids: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made.page("never.html", pairs=ids)
    assert not (made.root / "never.html").exists()


# --- what there need not be, and what may not be ------------------------------------------------


def test_a_run_without_answers_and_labels(tmp_path: Path) -> None:
    made = [
        replace(r, sentences=tuple(s for s in r.sentences if s.source == "coco_cap"))
        for r in records(labels=False)
    ]
    data = build_set(tmp_path / "data", made, answers=[])
    run = write_run(tmp_path, data, masked_lm=1.0)
    index, blocks = contents(Made(tmp_path, data, run).page())
    assert index["heads"] == vars(Heads(False, False, False, True, False))
    (told,) = blocks[0].header["sentences"]
    assert (told["answers"], told["matching"], told["masked"]["object"]) == (None, None, None)
    assert len(told["masked"]["says"][0]) == 3 and index["examples"][0]["answer"] is None


def test_a_model_with_an_answer_head_alone(made: Made) -> None:
    model, config, _ = load_checkpoint(str(made.run))
    del model.cls, model.obj_predict_head
    heads = heads_of(model, {"answers": 1.0}, answers=True, labels=True)
    assert heads == Heads(True, True, False, False, False)
    viewer = Viewer(model.eval(), layers_of(config.model), heads, 4)
    sight = Sight([np.asarray([2, 5, 3])], np.ones((2, 6)), np.zeros((2, 4)), [slice(0, 2)])
    (seen,) = look(viewer, sight, [Masks((1,), (0,))])
    assert (seen.matching, seen.filled.words, seen.filled.objects) == (None, None, None)
    with torch.no_grad():
        ids, features = torch.tensor([[2, 5, 3]]), torch.ones(1, 2, 6)
        pooled = model.lxmert(ids, None, features, torch.zeros(1, 2, 4)).pooled
        chances = model.answer_head(pooled)[0].sigmoid()
    assert seen.answers is not None and len(seen.answers) == 5
    assert dict(seen.answers) == pytest.approx(
        {i: float(chances[i]) for i in chances.topk(5).indices.tolist()}, abs=1e-6
    )


def test_a_model_that_is_broken(made: Made) -> None:
    model, config, _ = load_checkpoint(str(made.run))
    model.lxmert.pooler.dense.bias.data.fill_(torch.nan)
    viewer = Viewer(model.eval(), layers_of(config.model), Heads(*[False] * 5), 4)
    sight = Sight([np.asarray([2, 5, 3])], np.ones((2, 6)), np.zeros((2, 4)), [slice(0, 2)])
    with pytest.raises(ModelError, match="not finite: take an earlier checkpoint"):
        next(look(viewer, sight, [Masks((1,), (0,))]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab": [*VOCAB, "more"]}, "has another vocabulary than the training set"),
        ({"answers": ["red", "no"]}, "has another answer table than the training set"),
        ({"feature_dim": 5}, "has features of 5, the model takes 6: show a data set that is built"),
        ({"max_tokens": 20}, "has sentences of 20, the model takes 16"),
    ],
)
def test_data_that_is_not_the_models(
    made: Made, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    width = settings.pop("feature_dim", 6)
    records_ = [replace(r, features=r.features[:, :width]) for r in records()]
    data = build_set(tmp_path / "data", records_, **settings)
    with pytest.raises(ConfigError, match=message):
        replace(made, data=data, root=tmp_path).page()
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_would_be_too_large(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show_module, "MOST_BYTES", 10_000)
    with pytest.raises(ConfigError, match=r"25 pairs at \d KB .*: show about \d+ of them"):
        made.page("large.html", images=0, sentences=0)
    assert not (made.root / "large.html").exists()


def test_the_command(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    out = made.root / "command.html"
    arguments = ["show", str(made.run), "--data", str(made.data), "--cache", str(made.root / "c")]
    assert main([*arguments, "--out", str(out), "--pairs", "q1", "img_3#0", "--quiet"]) == 0
    said = capsys.readouterr()
    assert f"{out}: 2 pairs of 2 records, 0.0 MB" in said.out
    assert pairs_of(out) == [("1:0", 0), ("0:1", 1)]
    before = out.read_bytes()
    assert main([*arguments, "--out", str(out), "--pairs", "nothing"]) == 2
    assert "error: " in capsys.readouterr().err and out.read_bytes() == before
    assert main([*arguments, "--out", str(made.root)]) == 2
    assert "is a folder: name a file for the page" in capsys.readouterr().err


def test_text_of_the_data_is_no_markup(page: Path) -> None:
    text = page.read_text()
    assert "owned" not in text and text.count("<script>") == 1
    assert not re.search(r"https?:|\bsrc=|href=|@import|url\(", text)


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dom(tmp_path_factory: pytest.TempPathFactory) -> Dom:
    return open_browser(tmp_path_factory.mktemp("profile"))


def weights_in(dom: str, tag: str, part: int = 0) -> list[float]:
    """The attention that words or boxes of a picture are shaded by, in order; nan where there is
    none."""
    kind = "button" if tag == "word" else "div"
    found = {}
    for element in re.findall(rf"<{kind} [^>]*data-{tag}=[^>]*>", dom):
        if f'data-part="{part}"' not in element:
            continue
        (place,) = re.findall(rf'data-{tag}="(\d+)"', element)
        found[int(place)] = float((re.findall(r'data-weight="([\d.]+)"', element) or ["nan"])[0])
    return [found[i] for i in sorted(found)]


def test_a_word_shades_boxes_and_words(page: Path, dom: Dom) -> None:
    index, blocks = contents(page)
    number, example = next((i, e) for i, e in enumerate(index["examples"]) if e["id"] == "q4")
    block = blocks[example["image"]]
    told = block.header["sentences"][example["sentence"]]
    names = [layer["name"] for layer in index["layers"] if not layer["of_image"]]
    maps = {name: block.map(where) for name, where in zip(names, told["maps"][0], strict=True)}
    out = dom(page, f"pair={number}&layer=cross 1: all four&head=2&on=words3")
    boxes, words = weights_in(out, "object"), weights_in(out, "word")
    assert boxes == pytest.approx(maps["cross 1: language → vision"][1, 3], abs=6e-5)
    assert words == pytest.approx(maps["cross 1: language self"][1, 3], abs=6e-5)
    # A box, by the mean of heads, in a layer where words look at boxes alone: who looks at it.
    out = dom(page, f"pair={number}&layer=cross 2: language → vision&on=objects1")
    words = weights_in(out, "word")
    expected = maps["cross 2: language → vision"].mean(0)[:, 1]
    assert words == pytest.approx(expected, abs=6e-5)
    assert all(np.isnan(w) for w in weights_in(out, "object"))
    assert "thing4 is looked at by words" in out


def test_masks_filters_and_text_that_stays_text(page: Path, dom: Dom) -> None:
    index, blocks = contents(page)
    number, example = next((i, e) for i, e in enumerate(index["examples"]) if e["id"] == EVIL)
    out = dom(page, f"pair={number}&masked=1&kind=is it&q=owned")
    assert "1 of 25 pairs" in out and re.findall(r'data-example="(\d+)"', out) == [str(number)]
    assert "<title>run on made</title>" in out and not re.search(r"<img[^>]*onerror", out)
    assert html.escape(EVIL, quote=False) in out
    told = blocks[example["image"]].header["sentences"][example["sentence"]]
    masked = told["masked"]
    assert len(re.findall(r'class="word covered"', out)) == len(masked["words"])
    assert len(re.findall(r'class="box covered', out)) == len(masked["objects"])
    token, chance = masked["says"][0][0]
    assert f"{html.escape(token, quote=False)} {100 * chance:.1f} %" in out
    scored = [e for e in index["examples"] if e["score"] is not None]
    out = dom(page, "result=wrong")
    wrong = [i for i, e in enumerate(index["examples"]) if e in scored and e["score"] == 0]
    assert re.findall(r'data-example="(\d+)"', out) == [str(i) for i in wrong]
    assert f"accuracy 0.0 % of {len(wrong)} questions shown" in out


def test_two_pictures_are_shaded_by_their_own_attention(paired_page: Path, dom: Dom) -> None:
    index, blocks = contents(paired_page)
    block = blocks[1]
    number = next(i for i, e in enumerate(index["examples"]) if e["id"] == "dev-1-0-1")
    told = block.header["sentences"][index["examples"][number]["sentence"]]
    names = [layer["name"] for layer in index["layers"] if not layer["of_image"]]
    maps = [
        {name: block.map(where) for name, where in zip(names, part, strict=True)}
        for part in told["maps"]
    ]
    out = dom(paired_page, f"pair={number}&layer=cross 2: all four&head=2&on=words3")
    for n in (0, 1):
        boxes, words = weights_in(out, "object", n), weights_in(out, "word", n)
        assert len(boxes) == 3 + n and len(words) == 5
        assert boxes == pytest.approx(maps[n]["cross 2: language → vision"][1, 3], abs=6e-5)
        assert words == pytest.approx(maps[n]["cross 2: language self"][1, 3], abs=6e-5)
    assert out.count('<img src="blob:') == 1 and out.count("<canvas") == 2
    answers = out[out.index('id="answers"') :]
    (best, chance), _ = told["answers"]
    assert f">{best}</td>" in answers and f"{100 * chance:.1f} %" in answers
    # An object of the second picture is seen by that picture's words, and by nothing of the first.
    out = dom(paired_page, f"pair={number}&layer=cross 2: all four&head=1&on=objects4")
    due = maps[1]["cross 2: vision → language"][0, 1]
    assert weights_in(out, "word", 1) == pytest.approx(due, abs=6e-5)
    nothing = weights_in(out, "word", 0) + weights_in(out, "object", 0)
    assert len(nothing) == 8 and np.isnan(nothing).all()
