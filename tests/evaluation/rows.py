"""A few rows of each task's columns, made up here, in the layout of --data_dir."""

import json
import pathlib

_QUESTIONS = [
    ("What is layer two?", "wide"),
    ("Where is the model?", "early"),
    ("Is it late?", "no"),
]


def _rows() -> dict[str, tuple[str, list[dict]]]:
    words = ["early", "late", "layer", "width"]
    arc = [
        {
            "question": q,
            "choices": {"text": [a, *words[:3]], "label": list("ABCD")},
            "answerKey": "A",
        }
        for q, a in _QUESTIONS
    ]
    return {
        "lambada_openai": ("test", [{"text": f"the taper of layer {w} is {w}"} for w in words]),
        "piqa": (
            "validation",
            [{"goal": q, "sol1": a, "sol2": "width", "label": 0} for q, a in _QUESTIONS],
        ),
        "hellaswag": (
            "validation",
            [
                {
                    "activity_label": "Tapering",
                    "ctx_a": q,
                    "ctx_b": "it",
                    "ctx": f"{q} it",
                    "endings": [a, *words[:3]],
                    "label": "0",
                }
                for q, a in _QUESTIONS
            ],
        ),
        "winogrande": (
            "validation",
            [
                {
                    "sentence": f"The {w} came before the end because _ was first.",
                    "option1": w,
                    "option2": "end",
                    "answer": "1",
                }
                for w in words
            ],
        ),
        "arc_easy": ("test", arc),
        "arc_challenge": ("test", arc[:2]),
        "social_iqa": (
            "validation",
            [
                {
                    "context": q,
                    "question": "Why?",
                    "answerA": a,
                    "answerB": "late",
                    "answerC": "x1",
                    "label": "1",
                }
                for q, a in _QUESTIONS
            ],
        ),
        "boolq": (
            "validation",
            [
                {"question": "is it early", "passage": f"{q} {a}", "label": i % 2}
                for i, (q, a) in enumerate(_QUESTIONS)
            ],
        ),
        "wikitext": ("test", [{"page": " = Layers = \n \n The first layer is wide . \n"}] * 2),
    }


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes TASK/SPLIT.jsonl for all tasks of the suite `paper`; returns the folder."""
    for task, (split, rows) in _rows().items():
        file = folder / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
