"""Sentences in the files of the sets as they are published, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.format.record import Report
from shards.sources.sentences import FORMATS, sentence_format
from shards.sources.texts import ImageText

VQA_Q = {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?",
         "question_id": 458752000},
        {"image_id": 458752, "question": "Is it red?", "question_id": 458752001},
    ],
}  # fmt: skip
VQA_A = {
    "info": {"version": "2.0"},
    "data_subtype": "train2014",
    "annotations": [
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": i + 1}
                for i, a in enumerate(["net"] * 6 + ["netting", "Net.", "the mesh", "mesh"])
            ],
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
        },
        {"question_id": 458752001, "image_id": 458752, "answers": [{"answer": "yes"}] * 10},
    ],
}
COCO = {
    "info": {"year": 2014},
    "images": [{"file_name": "COCO_train2014_000000318556.jpg", "id": 318556}],
    "annotations": [
        {"image_id": 318556, "id": 48, "caption": " A very clean bathroom.\n"},
        {"image_id": 318556, "id": 49, "caption": " "},
    ],
}
REGIONS = [
    {"regions": [{"region_id": 1382, "phrase": "the clock is green", "image_id": 1, "x": 421}],
     "id": 1},
    {"regions": [], "id": 2},
]  # fmt: skip
VG_QA = [
    {"id": 1, "qas": [{"a_objects": [], "question": "What color is the clock?", "image_id": 1,
                       "qa_id": 986768, "answer": "Green."}]},
]  # fmt: skip
GQA = {
    "02930152": {"semantic": [], "question": "Is the sky dark?", "imageId": "2354786",
                 "answer": "yes", "isBalanced": True},
    "07333408": {"question": "What is it?", "imageId": "n161313"},
}  # fmt: skip
NLVR2 = [
    {"sentence": "An image shows one leather pencil case.", "identifier": "train-10171-0-0",
     "label": "True", "left_url": "x", "validation": {}},
    {"sentence": "There is no pencil.", "identifier": "test1-0-1-0"},
]  # fmt: skip


def write(path: Path, document: Any, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, document)) if lines else json.dumps(document)
    path.write_text(text)
    return path


def read(*files: Path, report: Report | None = None) -> list[ImageText]:
    """By the detected format, which is that of all."""
    (form,) = {sentence_format(f, None).name for f in files}
    found = FORMATS[form]
    return list(found.read(files, found.source, report or Report()))


def told(texts: list[ImageText]) -> list[tuple]:
    return [(t.image, *((s.text, s.source, s.answers, s.id) for s in t.sentences)) for t in texts]


def test_vqa(tmp_path: Path) -> None:
    questions, annotations = write(tmp_path / "q", VQA_Q), write(tmp_path / "a", VQA_A)
    for files in ((questions, annotations), (annotations, questions)):
        first, second = read(*files)
        assert told([first, second]) == [
            (
                "coco/458752",
                (
                    "What is this photo taken looking through?",
                    "vqa",
                    {"net": 1.0, "netting": 0.3, "mesh": 0.6},
                    458752000,
                ),
            ),
            ("coco/458752", ("Is it red?", "vqa", {"yes": 1.0}, 458752001)),
        ]
    assert [t.sentences[0].answers for t in read(questions)] == [None, None], "as of a test set"
    with pytest.raises(DataError, match="annotations without their questions"):
        read(annotations)
    few = write(tmp_path / "few", VQA_Q | {"questions": VQA_Q["questions"][:1]})
    with pytest.raises(DataError, match=r"1 annotations are of questions .*first: .* 458752001"):
        read(few, annotations)
    report = Report()
    half = write(tmp_path / "half", VQA_A | {"annotations": VQA_A["annotations"][:1]})
    assert len(read(questions, half, report=report)) == 2
    assert report.counts == {"questions without annotations": 1}
    with pytest.raises(DataError, match="question_id 458752000 comes twice"):
        read(questions, few)
    with pytest.raises(DataError, match="question_id 458752000 has annotations already"):
        read(questions, annotations, half)
    lone = {"question_id": 458752000, "answers": [{"answer": "net"}]}
    single = write(tmp_path / "single", {"annotations": [lone]})
    assert read(few, single)[0].sentences[0].answers == {}, "no score is 0"


def test_captions_regions_and_questions(tmp_path: Path) -> None:
    report = Report()
    assert told(read(write(tmp_path / "coco", COCO), report=report)) == [
        ("coco/318556", ("A very clean bathroom.", "coco_cap", None, None))
    ]
    assert report.counts == {"empty sentences": 1}
    assert told(read(write(tmp_path / "regions", REGIONS))) == [
        ("vg/1", ("the clock is green", "vg_cap", None, None))
    ]
    assert told(read(write(tmp_path / "qa", VG_QA))) == [
        ("vg/1", ("What color is the clock?", "vgqa", {"Green.": 1.0}, 986768))
    ]
    assert told(read(write(tmp_path / "gqa", GQA))) == [
        ("vg/2354786", ("Is the sky dark?", "gqa", {"yes": 1.0}, "02930152")),
        ("n161313", ("What is it?", "gqa", None, "07333408")),
    ]


def test_statements_about_two_images(tmp_path: Path) -> None:
    sentence = ("An image shows one leather pencil case.", "nlvr2", {"True": 1.0})
    other = ("There is no pencil.", "nlvr2", None, "test1-0-1-0")
    found = read(write(tmp_path / "n", NLVR2, lines=True))
    assert told(found) == [("train-10171-0", (*sentence, "train-10171-0-0")), ("test1-0-1", other)]
    assert [t.split for t in found] == ["train", "test1"]
    assert [t.pictures for t in found] == [
        ("train-10171-0-img0", "train-10171-0-img1"),
        ("test1-0-1-img0", "test1-0-1-img1"),
    ]


ROWS = [
    {"image": "a/1.png", "sentence": "what, and \"why\"?", "answers": {"red": 1, "blue": 0.3},
     "source": "mine", "id": "007", "split": "val"},
    {"image": "2", "sentence": "x", "answers": ["b"]},
    {"image": "3", "sentence": "no answers"},
]  # fmt: skip
CSV = (
    "image,sentence,answers,source,id,split\r\n"
    'a/1.png,"what, and ""why""?","{""red"": 1, ""blue"": 0.3}",mine,007,val\r\n'
    "2,x,b,,,\r\n"
    "3,no answers,,,,\r\n"
)
TABS = "sentence\timage\nx\t2\n"


def test_rows(tmp_path: Path) -> None:
    due = [
        ("a/1", ('what, and "why"?', "mine", {"red": 1, "blue": 0.3}, "007")),
        ("2", ("x", "sentences", {"b": 1.0}, None)),
        ("3", ("no answers", "sentences", None, None)),
    ]
    assert told(read(write(tmp_path / "a", ROWS, lines=True))) == due
    (tmp_path / "b").write_text("\ufeff" + CSV, newline="")
    found = read(tmp_path / "b")
    assert told(found) == due and found[0].split == "val"
    (tmp_path / "c").write_text(TABS)
    assert told(read(tmp_path / "c")) == [("2", ("x", "sentences", None, None))]
    (tmp_path / "d").write_text('image,sentence,answers\n1,x,"yes; no"\n')
    assert read(tmp_path / "d")[0].sentences[0].answers == {"yes": 1.0, "no": 1.0}
    for odd in (
        "\n\nimage,sentence\n\n2,x\n",
        "image,sentence\r2,x\r",
        '\ufeff{"image": "2", "sentence": "x"}',
        '\n{"image": "2", "sentence": "x"}',
    ):
        (tmp_path / "e").write_text(odd, newline="")
        assert told(read(tmp_path / "e")) == [("2", ("x", "sentences", None, None))]


BAD: list[tuple[str, str, str]] = [
    ("coco", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "annotation 0 has no"),
    ("coco", '{"images": [{"file_name": "x"}]}', "has no list 'annotations'"),
    ("coco", '{"images": [], "annotations": [{"image_id": 1, "cap', "not JSON.*character"),
    ("vg-regions", '[{"id": 1, "regions": [{"phrase": 3}]}]', "image 1: a region has no phrase"),
    ("vg-regions", '[{"id": "x", "regions": [{"phrase": "a"}]}]', "entry 0 is not an object"),
    ("vg-qa", '[{"id": 1, "qas": [{"question": "x"}]}]', "a question or answer is missing"),
    ("gqa", '{"01": {"question": "x"}}', "question 01 has no question and imageId"),
    ("gqa", "[]", "is not an object"),
    ("vqa", '{"questions": [{"question_id": true}]}', "question 0 has no question_id"),
    ("nlvr2", '{"identifier": "a-b", "sentence": "x"}', "line 1: it has no identifier"),
    ("nlvr2", '{"identifier": "a-b-c-d", "sentence": "x", "label": 3}', "the label is 3"),
    ("nlvr2", '{"identifier": "a-b-c-d", "sentence": "x"}\n{', "line 2 is not JSON"),
    ("rows", "image,sentence\n1\n", "line 2: not as many cells"),
    ("rows", "image,sentence\n1,2,3\n", "line 2: not as many cells"),
    ("rows", "image,sentence,colour\n1,2,3\n", "unknown column 'colour'"),
    ("rows", 'image,sentence\n1,"x\n', "is no CSV"),
    ("rows", '{"image": 1, "sentence": "x"}', "it has no image and sentence"),
    ("rows", '{"image": "1", "sentence": "x", "answers": {"a": 3}}', "score of answer 'a' is 3"),
    ("rows", '{"image": "1", "sentence": "x", "id": true}', "the id True is no"),
    ("rows", 'image,sentence,answers\n1,x,"{"\n', "the answers are no JSON"),
    ("rows", "", "the header has no column 'image'"),
    ("rows", "image,text\n", "the header has no column 'sentence'"),
    ("rows", "image,sentence,sentence\n1,x,y\n", "the header has a column twice"),
    ("rows", '{"image": " ", "sentence": "x"}', "it has no image and sentence"),
    ("coco", '{"annotations": [{"image_id": true, "caption": "x"}]}', "annotation 0 has no"),
    ("vg-regions", '[{"id": true, "regions": []}]', "entry 0 is not an object"),
    ("vg-qa", '[{"id": true, "qas": []}]', "entry 0 is not an object"),
    ("vg-qa", '[{"id": 1, "qas": [{"question": "x", "answer": "y", "qa_id": "z"}]}]', "qa_id 'z'"),
    ("gqa", '{"01": {"question": "x", "imageId": "1", "answer": 3}}', "question 01 is 3, no text"),
    ("nlvr2", '{"identifier": "---", "sentence": "x"}', "line 1: it has no identifier"),
    ("nlvr2", '{"identifier": "a-b-c-d", "sentence": "x"}\n' * 2, "line 2: 'a-b-c-d' comes twice"),
]


@pytest.mark.parametrize(("form", "text", "message"), BAD)
def test_bad_files(tmp_path: Path, form: str, text: str, message: str) -> None:
    path = tmp_path / "given"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(FORMATS[form].read([path], "x", Report()))
    assert str(path) in str(caught.value)


def test_rows_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(b"image,sentence\n1,\xe9t\xe9\n")
    with pytest.raises(DataError, match=r"given is not UTF-8 text: .*; convert it"):
        read(tmp_path / "given")


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_absent_files(tmp_path: Path, form: str) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none: No such file"):
        list(FORMATS[form].read([tmp_path / "none"], "x", Report()))


def test_every_file_is_of_one_format(tmp_path: Path) -> None:
    """Detection tells each from all others, spaces before it or not."""
    files = {
        "vqa": json.dumps(VQA_Q), "coco": json.dumps(COCO), "vg-regions": json.dumps(REGIONS),
        "vg-qa": json.dumps(VG_QA), "gqa": json.dumps(GQA), "nlvr2": json.dumps(NLVR2[0]),
        "rows": CSV, "lxmert": '[{"img_id": "a", "sentf": {"mscoco": ["x"]}}]',
        "pictures": '[{"image": "a.png", "sentences": [{"text": "x"}]}]',
    }  # fmt: skip
    assert set(files) == set(FORMATS)
    for name, text in files.items():
        (tmp_path / name).write_text(text if name == "rows" else f" {text}")
        found = [f.name for f in FORMATS.values() if f.detect(tmp_path / name)]
        assert found == [name]
    (tmp_path / "a").write_text(json.dumps(VQA_A))
    assert [f.name for f in FORMATS.values() if f.detect(tmp_path / "a")] == ["vqa"]
    quoting = {"annotations": [{"image_id": 1, "caption": 'a "question" mark'}]}
    (tmp_path / "b").write_text(json.dumps(quoting))
    assert [f.name for f in FORMATS.values() if f.detect(tmp_path / "b")] == ["coco"]
    for other in ("", "text", "[]", "{}", "\0\1", 'a\rb,"x\rc', "\ufeff" + json.dumps(COCO)):
        (tmp_path / "other").write_text(other)
        with pytest.raises(DataError, match="is of no format of sentences that is known"):
            sentence_format(tmp_path / "other", None)


def test_real_captions(shared_data: Path) -> None:
    files = sorted((shared_data / "tiny_coco/annotations").glob("captions_*.json"))
    documents = [json.loads(path.read_text()) for path in files]
    found = read(*files)
    assert len(found) == sum(len(d["annotations"]) for d in documents) == 500
    assert {t.image for t in found} == {f"coco/{i['id']}" for d in documents for i in d["images"]}
