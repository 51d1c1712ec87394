"""The demo: its data, its labels, its metric, and whole runs with a tiny model."""

import json

import answers
import corpus
import demo
import docstrings
import pytest
import torch
from datasets import Dataset, load_from_disk
from failure import DemoError
from prompts import IGNORED, Prompts, padding_collator
from transformers import AutoModelForCausalLM, AutoTokenizer

SOURCE = '''
def add(left: int, right=2, *rest, flag=False) -> int:
    """Return the sum of both numbers.

    More text.
    """

class Box:
    async def open(self):
        "Open the box and wait for it."
        def inner(x):
            """Do what is inside the box."""

def unfinished():
    """Return a sentence that goes on
    in the next line."""

def short():
    """Too short."""

if True:
    def conditional():
        """Stand inside of a condition."""
'''


@pytest.fixture(scope="module")
def library():
    return docstrings.read_docstrings()


# --- the data -------------------------------------------------------------------------------------


def test_docstrings_of_a_file(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text(SOURCE)
    found = docstrings.read_docstrings(tmp_path)
    assert [(d.module, d.signature, d.summary) for d in found] == [
        (
            "pkg",
            "# pkg\ndef add(left: int, right=2, *rest, flag=False) -> int:",
            "Return the sum of both numbers.",
        ),
        ("pkg", "# pkg, class Box\nasync def open(self):", "Open the box and wait for it."),
        ("pkg", "# pkg\ndef conditional():", "Stand inside of a condition."),
    ]


def test_library_is_split_by_module_without_leakage(library):
    train, held_out = docstrings.split_by_module(library)
    assert len(train) > 1000
    assert len(held_out) > 150
    assert not {d.top_module for d in train} & {d.top_module for d in held_out}
    assert not {d.module for d in train} & {d.module for d in held_out}

    def texts(side):
        return {(d.signature.partition("\n")[2], d.summary) for d in side}

    assert not texts(train) & texts(held_out)


def test_a_modules_side_does_not_depend_on_the_others(library):
    train, held_out = docstrings.split_by_module(library)
    some = [d for d in library if d.top_module in {"asyncio", "json", "logging", "pathlib"}]
    fewer_train, fewer_held_out = docstrings.split_by_module(some)
    assert {d.top_module for d in fewer_train} <= {d.top_module for d in train}
    assert {d.top_module for d in fewer_held_out} <= {d.top_module for d in held_out}


def test_corpus_is_deterministic_and_seeded(tmp_path):
    for number in range(12):
        body = "".join(
            f'def f{number}_{k}(x):\n    """Return the {k}th thing of {number}."""\n' for k in range(6)
        )
        (tmp_path / f"module{number}.py").write_text(body)
    first, again, other = (corpus.docstring_corpus(seed, tmp_path) for seed in (0, 0, 1))
    assert first.train[:] == again.train[:]
    assert first.held_out[:] == again.held_out[:]
    assert first.train[:] != other.train[:]
    assert sorted(first.train["prompt"]) == sorted(other.train["prompt"])


@pytest.mark.parametrize("kind", ["tokenizer", "chat_tokenizer"])
def test_only_the_answer_is_learnt(kind, request):
    tokenizer = request.getfixturevalue(kind)
    row = {"prompt": "def f(x):", "completion": "Return the list."}
    encoded = Prompts(tokenizer, "Document this.", max_length=200).encode(row)
    learnt = [token for token in encoded["labels"] if token != IGNORED]
    assert tokenizer.decode(learnt) == "Return the list.<|end|>"
    prompt = encoded["input_ids"][: -len(learnt)]
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert encoded["input_ids"][len(prompt) :] == learnt
    text = tokenizer.decode(prompt)
    expected = {
        "tokenizer": "<|start|>Document this.\n\ndef f(x):\n",
        "chat_tokenizer": "<|system|>Document this.<|end|><|user|>def f(x):<|end|><|assistant|>",
    }
    assert text == expected[kind]


def test_a_template_without_a_system_role_gets_the_instruction_with_the_prompt(chat_tokenizer):
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chat_tokenizer.chat_template = refuse + chat_tokenizer.chat_template
    prompts = Prompts(chat_tokenizer, "Document this.", max_length=200)
    assert chat_tokenizer.decode(prompts.cue_tokens("def f():")) == (
        "<|user|>Document this.\n\ndef f():<|end|><|assistant|>"
    )


def test_plain_text_is_learnt_whole_and_questioned_by_halves(tokenizer):
    prompts = Prompts(tokenizer, None, max_length=200)
    row = {"prompt": "", "completion": "the sum of the list"}
    encoded = prompts.encode(row)
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]
    assert tokenizer.decode(encoded["input_ids"]) == "<|start|>the sum of the list<|end|>"
    assert prompts.question(row) == ("the sum", "of the list")
    assert tokenizer.decode(prompts.question_tokens(row)) == "<|start|>the sum"


def test_rows_are_cut_and_those_without_an_answer_dropped(tokenizer):
    rows = Dataset.from_dict({"prompt": ["a", "a" * 50], "completion": ["b" * 50, "b"]})
    encoded = Prompts(tokenizer, None, max_length=20).encode_all(rows)
    assert len(encoded) == 1
    assert len(encoded[0]["input_ids"]) == len(encoded[0]["labels"]) == 20


def test_a_batch_is_padded_to_its_longest_row(tokenizer):
    rows = Dataset.from_dict({"prompt": ["a", "ab"], "completion": ["b", "bcdef"]})
    encoded = list(Prompts(tokenizer, None, max_length=99).encode_all(rows))
    tokenizer.pad_token = tokenizer.eos_token
    batch = padding_collator(tokenizer)(encoded)
    longest = max(len(row["input_ids"]) for row in encoded)
    assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(batch, (2, longest))
    padded = batch["attention_mask"] == 0
    assert padded.any()
    assert (batch["labels"][padded] == IGNORED).all()


# --- datasets that the user names -----------------------------------------------------------------


def test_named_dataset_is_split_and_seeded(tiny_dataset):
    first, again, other = (corpus.load_corpus(str(tiny_dataset), seed, 100) for seed in (0, 0, 1))
    assert (len(first.train), len(first.held_out)) == (36, 4)
    assert first.train[:] == again.train[:] != other.train[:]
    assert not set(first.train["prompt"]) & set(first.held_out["prompt"])


def test_named_splits_and_text_columns(tmp_path):
    train = Dataset.from_dict({"text": ["one two", "", None, "three"]})
    held_out = Dataset.from_dict({"text": ["four"]})
    from datasets import DatasetDict

    DatasetDict(train=train, test=held_out).save_to_disk(tmp_path / "saved")
    assert set(load_from_disk(tmp_path / "saved")) == {"train", "test"}
    loaded = corpus.load_corpus(str(tmp_path / "saved"), 0, 100)
    assert sorted(loaded.train["completion"]) == ["one two", "three"]
    assert loaded.held_out[:] == {"prompt": [""], "completion": ["four"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", json.dumps({"text": " "}) + "\n", "usable rows"),
        ("columns.jsonl", json.dumps({"question": "x"}) + "\n", "the columns question"),
        ("numbers.jsonl", json.dumps({"text": 3}) + "\n", "wanted is text"),
        ("broken.jsonl", "{]\n", "cannot load the dataset"),
        ("data.xyz", "x", "the file types are"),
        (None, None, "cannot load the dataset"),
    ],
)
def test_unusable_datasets_are_named(tmp_path, name, content, message):
    path = tmp_path / (name or "missing.jsonl")
    if content is not None:
        path.write_text(content)
    with pytest.raises(DemoError, match=message):
        corpus.load_corpus(str(path), 0, 100)


# --- the metric -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "rouge_l"),
    [
        ("Return the list.", "return THE list", 1.0, 1.0),
        ("list the return", "return the list", 1.0, 1 / 3),
        ("Return a new list", "Return the list", 2 * 2 / 7, 2 * 2 / 7),
        ("the the the", "the", 2 / 4, 2 / 4),
        ("nothing alike", "return the list", 0.0, 0.0),
        ("", "return the list", 0.0, 0.0),
        ("", "...", 1.0, 1.0),
    ],
)
def test_metric_values(prediction, reference, f1, rouge_l):
    assert answers.score([prediction], [reference]) == pytest.approx({"f1": f1, "rouge_l": rouge_l})


def test_metric_is_the_mean_over_answers():
    scores = answers.score(["the list", "x"], ["the list", "y"])
    assert scores == pytest.approx({"f1": 0.5, "rouge_l": 0.5})


# --- the answers ----------------------------------------------------------------------------------


def test_answers_do_not_depend_on_their_batch(tiny_model_dir, tiny_dataset):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_dict({"prompt": ["a", "a longer one", "the list"], "completion": ["", "", ""]})
    prompts = Prompts(tokenizer, None, max_length=50)
    alone, together = (answers.answer(model, prompts, rows, torch.device("cpu"), size) for size in (1, 3))
    assert alone == together
    assert model.training


# --- whole runs -----------------------------------------------------------------------------------


def run_demo(tiny_model_dir, tiny_dataset, output_dir, *more):
    return demo.main(
        ["--model", str(tiny_model_dir), "--dataset", str(tiny_dataset), "--output-dir", str(output_dir)]
        + ["--max-steps", "12", "--batch-size", "4", "--learning-rate", "1e-2", "--max-length", "64", "--cpu"]
        + list(more)
    )


@pytest.mark.parametrize("trainer", ["plain", "slide"])
def test_whole_run(trainer, tiny_model_dir, tiny_dataset, tmp_path, capsys):
    assert run_demo(tiny_model_dir, tiny_dataset, tmp_path / "out", "--trainer", trainer) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for heading in ("Before training", "What lives where", "Training", "After training", "Saved"):
        assert f"\n{heading}\n---" in printed.out
    (line,) = [line for line in printed.out.splitlines() if line.startswith("held-out loss") and "->" in line]
    before, after = (float(word) for word in line.split()[2::2])
    assert after < 0.8 * before
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_both_trainers_learn_the_same(tiny_model_dir, tiny_dataset, tmp_path, capsys, monkeypatch):
    import finetune

    monkeypatch.setattr(finetune, "choose_precision", lambda cpu_only: ("fp32", "the test says so"))
    for trainer in ("plain", "slide"):
        assert run_demo(tiny_model_dir, tiny_dataset, tmp_path / trainer, "--trainer", trainer) == 0
    capsys.readouterr()
    plain, slide = (
        AutoModelForCausalLM.from_pretrained(tmp_path / kind).state_dict() for kind in ("plain", "slide")
    )
    assert plain.keys() == slide.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(slide[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("device", [[], ["--cpu"]])
def test_arguments_suit_the_machine(precision, device, tmp_path):
    import finetune

    arguments = finetune.training_arguments(demo.parse(["--output-dir", str(tmp_path), *device]), precision)
    assert arguments.device.type == ("cuda" if torch.cuda.is_available() and not device else "cpu")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "no/such/directory"], "cannot load the model"),
        (["--max-length", "3"], "leaves room for an answer"),
        (["--output-dir", "/proc/nowhere"], "output directory"),
    ],
)
def test_mistakes_end_with_one_line(more, message, tiny_model_dir, tiny_dataset, tmp_path, capsys):
    assert run_demo(tiny_model_dir, tiny_dataset, tmp_path / "out", "--trainer", "plain", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("demo: ")
    assert error.count("\n") == 1


def test_an_unreadable_model_file_is_named(tiny_dataset, tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    assert run_demo(tmp_path / "broken.gguf", tiny_dataset, tmp_path / "out", "--trainer", "plain") == 2
    assert "cannot load the model" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(demo.PACKAGES, "no_such_package", "no-such-package")
    assert demo.main([]) == 2
    assert "not installed: no-such-package" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--max-steps", "0"], ["--learning-rate", "-1"], ["--batch-size", "x"]])
def test_numbers_are_positive(option, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(option)
    assert ended.value.code == 2
    assert "invalid positive" in capsys.readouterr().err
